#include "eval/csv.h"

#include <cstddef>
#include <utility>

#include "base/error.h"

namespace sagelm {
namespace {

class CsvReader {
 public:
  CsvReader(std::string_view name, std::string_view bytes) : name_(name), bytes_(bytes) {}

  std::vector<CsvRow> read() {
    std::vector<CsvRow> rows;
    while (at_ < bytes_.size()) {
      if (take_row_end()) continue;  // an empty line
      CsvRow row{.line = line_};
      do {
        row.fields.push_back(at('"') ? quoted() : plain());
      } while (take(','));
      if (at_ < bytes_.size() && !take_row_end()) {
        fail("{}:{}: behind the quote that closes field {} there is more text", name_, line_,
             row.fields.size());
      }
      rows.push_back(std::move(row));
    }
    return rows;
  }

 private:
  bool at(char c) const { return at_ < bytes_.size() && bytes_[at_] == c; }

  bool take(char c) {
    if (!at(c)) return false;
    ++at_;
    if (c == '\n') ++line_;
    return true;
  }

  bool take_row_end() {
    if (!at('\r')) return take('\n');
    ++at_;
    if (take('\n')) return true;
    fail("{}:{}: there is a carriage return that no line feed follows", name_, line_);
  }

  std::string plain() {
    const size_t end = bytes_.find_first_of("\",\r\n", at_);
    std::string field(bytes_.substr(at_, end - at_));
    at_ = end == std::string_view::npos ? bytes_.size() : end;
    if (at('"'))
      fail("{}:{}: there is a quote inside a field that has none at its start", name_, line_);
    return field;
  }

  std::string quoted() {
    const int64_t first_line = line_;
    std::string field;
    ++at_;
    while (at_ < bytes_.size()) {
      if (take('"') && !at('"')) return field;
      field += bytes_[at_];
      take(bytes_[at_]);
    }
    fail("{}:{}: the file ends inside the quoted field that begins here", name_, first_line);
  }

  std::string_view name_, bytes_;
  size_t at_ = 0;
  int64_t line_ = 1;
};

}  // namespace

std::vector<CsvRow> parse_csv(std::string_view name, std::string_view bytes) {
  return CsvReader(name, bytes).read();
}

}  // namespace sagelm
