#include "progress.h"

#include <spdlog/fmt/fmt.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

namespace sagelm::cli {
namespace {

constexpr int kBarWidth = 24;
constexpr auto kRedrawEvery = std::chrono::milliseconds(100);
// A rate from less than this says nothing.
constexpr double kFirstEstimateSeconds = 0.5;

size_t terminal_columns() {
  winsize size{};
  if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col == 0) return 80;
  return size.ws_col;
}

}  // namespace

std::string format_duration(double seconds) {
  const auto whole = static_cast<int64_t>(std::clamp(seconds, 0.0, 3.6e8));
  const int64_t hours = whole / 3600;
  const int64_t minutes = whole / 60 % 60;
  if (hours > 0) return fmt::format("{}:{:02}:{:02}", hours, minutes, whole % 60);
  return fmt::format("{}:{:02}", minutes, whole % 60);
}

Progress::Progress(std::string label, std::string unit, int64_t total)
    : label_(std::move(label)),
      unit_(std::move(unit)),
      total_(std::max<int64_t>(total, 1)),
      enabled_(isatty(STDERR_FILENO) == 1),
      start_(Clock::now()),
      last_draw_(start_) {}

Progress::~Progress() {
  if (!drawn_) return;
  std::fputs("\r\x1b[K", stderr);
  std::fflush(stderr);
}

void Progress::update(int64_t done, const std::string& note) {
  if (!enabled_) return;
  const Clock::time_point now = Clock::now();
  if (now - last_draw_ < kRedrawEvery) return;
  last_draw_ = now;
  drawn_ = true;

  const double seconds = std::chrono::duration<double>(now - start_).count();
  const double fraction =
      std::clamp(static_cast<double>(done) / static_cast<double>(total_), 0.0, 1.0);
  const auto filled = static_cast<size_t>(fraction * kBarWidth);
  std::string line = fmt::format("{} [{}{}] {:3.0f} %", label_, std::string(filled, '#'),
                                 std::string(kBarWidth - filled, '.'), 100 * fraction);
  if (!unit_.empty()) {
    line += fmt::format("  {}/{} {}", done, total_, unit_);
    if (seconds >= kFirstEstimateSeconds && done > skipped_) {
      line += fmt::format("  {:.0f} {}/s", static_cast<double>(done - skipped_) / seconds, unit_);
    }
  }
  if (seconds >= kFirstEstimateSeconds && done > skipped_) {
    const double per_unit = seconds / static_cast<double>(done - skipped_);
    line +=
        fmt::format("  {} left", format_duration(per_unit * static_cast<double>(total_ - done)));
  }
  if (!note.empty()) line += "  " + note;
  // A line that wraps could not be wiped.
  if (const size_t columns = terminal_columns(); line.size() >= columns) line.resize(columns - 1);
  std::fputs(("\r" + line + "\x1b[K").c_str(), stderr);
  std::fflush(stderr);
}

}  // namespace sagelm::cli
