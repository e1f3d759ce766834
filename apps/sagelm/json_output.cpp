#include "json_output.h"

#include <cerrno>
#include <cstdio>
#include <cstring>

namespace sagelm::cli {
namespace {

void write_to_stdout(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    throw WriteError(fmt::format("cannot write to standard output: {}", std::strerror(errno)));
  }
}

}  // namespace

ResultOutput::ResultOutput(const std::optional<std::string>& json) {
  if (!json) return;
  if (*json == "-") {
    json_to_stdout_ = true;
    return;
  }
  path_ = *json;
  errno = 0;
  file_.open(path_, std::ios::binary | std::ios::trunc);
  if (!file_.is_open()) fail("cannot write the JSON file {}: {}", path_, std::strerror(errno));
}

void ResultOutput::text(std::string_view text) {
  if (wants_text()) write_to_stdout(text);
}

void ResultOutput::json(const Json& object) {
  if (!wants_json()) return;
  const std::string bytes = object.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
  if (json_to_stdout_) {
    write_to_stdout(bytes);
    return;
  }
  file_ << bytes;
  file_.close();
  if (!file_) fail("cannot write the JSON file {}", path_);
}

}  // namespace sagelm::cli
