// Comma-separated values as RFC 4180 has them, and nothing looser: a file that other readers would
// take apart in different ways is refused.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace sagelm {

struct CsvRow {
  int64_t line = 0;  // where it begins in the file, from 1
  std::vector<std::string> fields = {};
};

// Rows end with LF or CRLF (the last one may lack it); a field in double quotes may hold commas,
// line ends and doubled quotes, and is kept as it is. Empty lines are skipped. name is the file's.
// Throws Error with file and line for a quote in an unquoted field, anything but a comma or the
// row's end behind a closing quote, a quoted field without end, and a carriage return alone.
std::vector<CsvRow> parse_csv(std::string_view name, std::string_view bytes);

}  // namespace sagelm
