// Reads what the user of a chat enters: with line editing and history (libedit) when standard input
// is a terminal, plain lines otherwise.
#pragma once

#include <memory>
#include <string>

namespace sagelm::cli {

class LineReader {
 public:
  enum class Status {
    kText,
    kInterrupted,  // Ctrl-C; what was typed is dropped
    kEnd,          // Ctrl-D or the end of the input
  };

  LineReader();
  ~LineReader();
  LineReader(const LineReader&) = delete;
  LineReader& operator=(const LineReader&) = delete;

  bool is_terminal() const { return editor_ != nullptr; }

  // Reads one entry: a line, lines each but the last of which ends in a backslash, or a block
  // between lines that start and end with """. text is without the marks.
  Status read(std::string& text);

 private:
  struct Editor;

  Status read_line(bool continued, std::string& line);

  std::unique_ptr<Editor> editor_;  // null: plain lines
};

}  // namespace sagelm::cli
