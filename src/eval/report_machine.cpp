#include "eval/report_machine.h"

#include <spdlog/fmt/fmt.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <fstream>
#include <iterator>
#include <thread>

#include "base/utf8.h"

namespace sagelm {
namespace {

std::string file_text(const char* path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string_view trimmed(std::string_view text, std::string_view marks) {
  const size_t begin = text.find_first_not_of(marks);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(marks) - begin + 1);
}

// The value of the first line "key <separator> value".
std::string_view value_of(std::string_view text, std::string_view key, char separator) {
  while (!text.empty()) {
    const size_t end = text.find('\n');
    const std::string_view line = text.substr(0, end);
    const size_t split = line.find(separator);
    if (split != std::string_view::npos && trimmed(line.substr(0, split), " \t") == key) {
      return trimmed(line.substr(split + 1), " \t\r");
    }
    text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
  }
  return {};
}

}  // namespace

std::string processor_name(std::string_view cpuinfo) {
  return printable(value_of(cpuinfo, "model name", ':'));
}

std::string system_name(std::string_view os_release) {
  return printable(trimmed(value_of(os_release, "PRETTY_NAME", '='), "\"'"));
}

std::string describe_machine() {
  std::string text;
  const auto add = [&text](const std::string& part) {
    if (part.empty()) return;
    if (!text.empty()) text += ", ";
    text += part;
  };
  add(processor_name(file_text("/proc/cpuinfo")));
  const unsigned cpus = std::thread::hardware_concurrency();
  if (cpus > 0) add(fmt::format("{} CPU{}", cpus, cpus == 1 ? "" : "s"));
  const long pages = sysconf(_SC_PHYS_PAGES);
  const long page_bytes = sysconf(_SC_PAGESIZE);
  if (pages > 0 && page_bytes > 0) {
    constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;
    add(fmt::format("{:.1f} GiB",
                    static_cast<double>(pages) * static_cast<double>(page_bytes) / kGiB));
  }
  add(system_name(file_text("/etc/os-release")));
  utsname names{};
  if (uname(&names) == 0) add(printable(names.machine));
  return text;
}

}  // namespace sagelm
