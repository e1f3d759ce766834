// An append-only journal of a long run, from which a run that died goes on. One line each: a header
// that names what the run depends on, then the records, in the order they were made. Every line
// starts with the SHA-256 of the line before's digest and its own text (16 hexadecimal digits of
// it), so that a torn, changed, missing or reordered line is noticed.
//
// A run that was interrupted and runs again asks for the records with next() until there are no
// more, does the same as it did when it made them, and appends from there on.
#pragma once

#include <chrono>
#include <cstddef>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace sagelm {

// Names and values of what a run's records depend on: the model, the data, the options.
using JournalHeader = std::vector<std::pair<std::string, std::string>>;

// Move-only. The file is locked against other processes while it is open.
class Journal {
 public:
  // Opens the journal of the run that header describes, or starts it where the file is missing or
  // empty. What a killed run left of a last line is cut off. Throws Error naming the file if it is
  // no journal, is another run's (says in what), is damaged before its end, is in use, or cannot be
  // read or written.
  static Journal open(const std::filesystem::path& path, const JournalHeader& header);
  Journal(Journal&& other) noexcept;
  Journal& operator=(Journal&& other) noexcept;
  Journal(const Journal&) = delete;
  Journal& operator=(const Journal&) = delete;
  ~Journal();

  const std::filesystem::path& path() const { return path_; }
  // The next record that was there when the journal was opened; nothing behind the last.
  std::optional<std::string> next();
  // Writes a record, one line of text, to be found whatever happens to this process from here on;
  // and, after at most a second of further calls, to the machine. Throws Error if it cannot be
  // written, or if recorded ones are left: then the run is not the one that made them.
  void append(std::string_view record);

 private:
  Journal() = default;
  void write_line(std::string_view text);

  std::filesystem::path path_;
  int file_ = -1;
  std::string digest_;                // of the last line
  std::vector<std::string> records_;  // found on opening
  size_t next_ = 0;
  std::chrono::steady_clock::time_point synced_;
};

}  // namespace sagelm
