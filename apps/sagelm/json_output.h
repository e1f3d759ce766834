// Where a command's result goes: plain text to standard output, one JSON object to standard output
// (--json) or to a file beside the text (--json FILE).
#pragma once

#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "base/error.h"

namespace sagelm::cli {

using Json = nlohmann::ordered_json;

// Standard output cannot be written: nobody is listening.
class WriteError : public Error {
 public:
  using Error::Error;
};

class ResultOutput {
 public:
  // json as in CommonOptions. Opens the file, so that a bad path fails before the work: Error.
  explicit ResultOutput(const std::optional<std::string>& json);

  bool wants_text() const { return !json_to_stdout_; }
  bool wants_json() const { return json_to_stdout_ || file_.is_open(); }

  // Writes to standard output at once, unless that is kept for the JSON object. Throws WriteError
  // when it cannot be written (closed pipe, full disk).
  void text(std::string_view text);
  // Writes the object, if it is wanted; once, at the end. Numbers that are NaN or infinite become
  // null, bytes that are not UTF-8 become U+FFFD.
  void json(const Json& object);

 private:
  bool json_to_stdout_ = false;
  std::string path_;
  std::ofstream file_;
};

}  // namespace sagelm::cli
