// A result as one HTML page that needs nothing else: no network, no scripts, charts inline.
// Readable on a phone, on a desk and on paper, in light and dark.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace sagelm {

struct ReportTable {
  std::string title = {};
  std::string note = {};                 // a paragraph below; may be empty
  std::vector<std::string> header = {};  // the first cell heads the rows' names
  std::vector<std::vector<std::string>> rows = {};
};

struct ReportFigure {
  std::string title = {};
  std::string caption = {};              // may be empty
  std::string svg = {};                  // of chart.h
  std::vector<std::string> legend = {};  // names of series; may be empty
  size_t legend_style = 0;               // of the first of them; the next have the next styles
};

// Plain text everywhere but in svg: it is escaped here.
struct Report {
  std::string title = {};
  std::vector<std::string> summary = {};  // paragraphs below the title
  std::vector<ReportTable> tables = {};
  std::vector<ReportFigure> figures = {};
  std::vector<std::pair<std::string, std::string>> facts = {};  // name, value
  std::string command = {};
};

std::string render_report(const Report& report);

// Makes sure that write_report can write there, creating the directory. Throws Error for what is
// there and is no directory, or cannot be written to.
void prepare_report_directory(const std::filesystem::path& directory);
// Writes directory/index.html, whole or not at all, and returns its path. Throws Error.
std::filesystem::path write_report(const std::filesystem::path& directory, std::string_view html);

}  // namespace sagelm
