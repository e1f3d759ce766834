#include "line_reader.h"

#include <histedit.h>
#include <unistd.h>

#include <cerrno>
#include <clocale>
#include <cstdio>
#include <cwchar>
#include <iostream>
#include <string_view>

#include "base/error.h"
#include "interrupt.h"

namespace sagelm::cli {
namespace {

constexpr int kHistorySize = 500;
constexpr std::string_view kBlockMark = "\"\"\"";

// Reads one character for libedit. Its own function restarts a read that Ctrl-C broke off; here
// that ends the line.
int read_character(EditLine* /*editor*/, wchar_t* character) {
  std::mbstate_t state{};
  while (true) {
    char byte = 0;
    const ssize_t count = ::read(STDIN_FILENO, &byte, 1);
    if (count == 0) return 0;
    if (count < 0) {
      if (errno == EINTR && !interrupted()) continue;  // e.g. the window was resized
      return -1;
    }
    const size_t length = std::mbrtowc(character, &byte, 1, &state);
    if (length == static_cast<size_t>(-1)) {
      state = {};  // a byte that is no text: wait for one that is
      continue;
    }
    if (length != static_cast<size_t>(-2)) return 1;
  }
}

char* first_prompt(EditLine* /*editor*/) {
  static char prompt[] = "> ";
  return prompt;
}

char* continued_prompt(EditLine* /*editor*/) {
  static char prompt[] = ". ";
  return prompt;
}

}  // namespace

struct LineReader::Editor {
  Editor() {
    // libedit decodes what is typed by the locale; the text is UTF-8 in any case.
    if (std::setlocale(LC_CTYPE, "") == nullptr || MB_CUR_MAX == 1) {
      std::setlocale(LC_CTYPE, "C.UTF-8");
    }
    // Prompts go to stderr: stdout holds the answers.
    edit = el_init("sagelm", stdin, stderr, stderr);
    history = history_init();
    if (edit == nullptr || history == nullptr)
      fail("line editing cannot be set up on this terminal");
    HistEvent event;
    ::history(history, &event, H_SETSIZE, kHistorySize);
    ::history(history, &event, H_SETUNIQUE, 1);
    el_set(edit, EL_EDITOR, "emacs");
    el_set(edit, EL_HIST, ::history, history);
    el_set(edit, EL_GETCFN, read_character);
    el_set(edit, EL_BIND, "^[[3~", "ed-delete-next-char", nullptr);
    el_set(edit, EL_BIND, "^[[1;5D", "ed-prev-word", nullptr);
    el_set(edit, EL_BIND, "^[[1;5C", "em-next-word", nullptr);
    el_set(edit, EL_BIND, "^R", "em-inc-search-prev", nullptr);
  }
  ~Editor() {
    if (edit != nullptr) el_end(edit);
    if (history != nullptr) history_end(history);
  }
  Editor(const Editor&) = delete;
  Editor& operator=(const Editor&) = delete;

  EditLine* edit = nullptr;
  History* history = nullptr;
};

LineReader::LineReader() {
  if (isatty(STDIN_FILENO) == 1) editor_ = std::make_unique<Editor>();
}

LineReader::~LineReader() = default;

LineReader::Status LineReader::read_line(bool continued, std::string& line) {
  line.clear();
  clear_interrupt();
  if (editor_ == nullptr) {
    if (!std::getline(std::cin, line)) return interrupted() ? Status::kInterrupted : Status::kEnd;
    if (line.ends_with('\r')) line.pop_back();
    return Status::kText;
  }
  el_set(editor_->edit, EL_PROMPT, continued ? continued_prompt : first_prompt);
  int count = 0;
  const char* typed = el_gets(editor_->edit, &count);
  if (interrupted()) {
    el_reset(editor_->edit);
    std::fputs("^C\n", stderr);
    return Status::kInterrupted;
  }
  if (typed == nullptr || count <= 0) {
    std::fputc('\n', stderr);
    return Status::kEnd;
  }
  line.assign(typed, static_cast<size_t>(count));
  if (line.ends_with('\n')) line.pop_back();
  if (line.find_first_not_of(" \t") != std::string::npos) {
    HistEvent event;
    ::history(editor_->history, &event, H_ENTER, line.c_str());
  }
  return Status::kText;
}

LineReader::Status LineReader::read(std::string& text) {
  Status status = read_line(false, text);
  if (status != Status::kText) return status;
  std::string line;
  if (text.starts_with(kBlockMark)) {
    text.erase(0, kBlockMark.size());
    while (!text.ends_with(kBlockMark)) {
      status = read_line(true, line);
      if (status == Status::kInterrupted) return status;
      if (status == Status::kEnd) return Status::kText;  // the next read says so again
      text += (text.empty() ? "" : "\n") + line;
    }
    text.resize(text.size() - kBlockMark.size());
    if (text.ends_with('\n')) text.pop_back();
    return Status::kText;
  }
  while (text.ends_with('\\')) {
    text.back() = '\n';
    status = read_line(true, line);
    if (status == Status::kInterrupted) return status;
    if (status == Status::kEnd) break;
    text += line;
  }
  return Status::kText;
}

}  // namespace sagelm::cli
