// A progress bar with rate and remaining time, on stderr and only if that is a terminal.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace sagelm::cli {

class Progress {
 public:
  // E.g. Progress("perplexity", "tokens", 402529). An empty unit shows percent and time only.
  Progress(std::string label, std::string unit, int64_t total);
  ~Progress();  // wipes the bar
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // done units of the total are done. Cheap: redraws at most ten times a second. note, if not
  // empty, follows the bar (e.g. the running result).
  void update(int64_t done, const std::string& note = {});
  // done units were there before the start: they count for the bar, not for the rate.
  void skip(int64_t done) { skipped_ = done; }

 private:
  using Clock = std::chrono::steady_clock;

  std::string label_;
  std::string unit_;
  int64_t total_;
  int64_t skipped_ = 0;
  bool enabled_;
  bool drawn_ = false;
  Clock::time_point start_;
  Clock::time_point last_draw_;
};

// "1:05" or "2:03:04".
std::string format_duration(double seconds);

}  // namespace sagelm::cli
