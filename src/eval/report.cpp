#include "eval/report.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <system_error>

#include "base/error.h"
#include "eval/chart.h"

namespace sagelm {
namespace {

namespace fs = std::filesystem;

// Series colours: told apart in light and dark and by most who see few colours; on paper the dark
// ink of the light scheme. Nothing is loaded: the fonts are the reader's own.
constexpr std::string_view kStyle = R"css(
:root { color-scheme: light dark; --ink: #1a1c1f; --soft: #5b6068; --line: #d5d8dd; --page: #fff;
  --panel: #f5f6f8; --s0: #5b6068; --s1: #0b62a8; --s2: #c2410c; --s3: #0f7b4f; --s4: #8a3ab0;
  --s5: #a16207; --s6: #be185d; --s7: #0e7490; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a2a8b1; --line: #3a3f47;
  --page: #16181c; --panel: #1f2227; --s0: #a2a8b1; --s1: #6cb4f5; --s2: #fb8c5a; --s3: #4cc38a;
  --s4: #c792ea; --s5: #e5b94b; --s6: #f472b6; --s7: #5ccfe6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.25rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
.note, figcaption { color: var(--soft); font-size: .875rem; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .75rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
thead th { border-bottom: 2px solid var(--soft); }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
tbody th { font-weight: 500; white-space: pre; }
.figures { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; padding: .75rem; background: var(--panel); border: 1px solid var(--line);
  border-radius: .5rem; max-width: 36rem; }
figure h3 { font-size: 1rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; font-size: 12px; fill: var(--ink); }
.grid { stroke: var(--line); stroke-width: 1; fill: none; }
.diagonal { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 3; fill: none; }
.line { fill: none; stroke-width: 1.8; stroke: var(--c); }
.dots { fill: none; stroke: var(--c); stroke-width: 2.6; stroke-linecap: round; stroke-opacity: .45; }
rect { fill: var(--c); }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); } .s3 { --c: var(--s3); }
.s4 { --c: var(--s4); } .s5 { --c: var(--s5); } .s6 { --c: var(--s6); } .s7 { --c: var(--s7); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .4rem 0 0;
  padding: 0; font-size: .875rem; }
.legend span { display: inline-block; width: .8em; height: .8em; margin-right: .4em;
  background: var(--c); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.25rem; margin: 0;
  font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dt { margin-top: .4rem; } }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --page: #fff;
  --panel: #fff; --s0: #5b6068; --s1: #0b62a8; --s2: #c2410c; --s3: #0f7b4f; --s4: #8a3ab0;
  --s5: #a16207; --s6: #be185d; --s7: #0e7490; }
  body { font-size: 10pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; } .scroll { overflow: visible; }
  table { font-size: 8pt; } th, td { padding: .15rem .4rem; white-space: normal; }
  tbody th { white-space: pre-wrap; } thead { display: table-header-group; }
  .figures { grid-template-columns: 1fr 1fr; } figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; } @page { margin: 15mm; } }
)css";

using Output = std::back_insert_iterator<std::string>;

void add_table(Output out, const ReportTable& table) {
  fmt::format_to(out, "<section><h2>{}</h2>\n<div class=\"scroll\"><table><thead><tr>",
                 escape_html(table.title));
  for (const std::string& cell : table.header) {
    fmt::format_to(out, "<th scope=\"col\">{}</th>", escape_html(cell));
  }
  fmt::format_to(out, "</tr></thead>\n<tbody>");
  for (const std::vector<std::string>& row : table.rows) {
    fmt::format_to(out, "<tr>");
    for (size_t i = 0; i < row.size(); ++i) {
      const std::string cell = escape_html(row[i]);
      if (i == 0) {
        fmt::format_to(out, "<th scope=\"row\">{}</th>", cell);
      } else {
        fmt::format_to(out, "<td>{}</td>", cell);
      }
    }
    fmt::format_to(out, "</tr>\n");
  }
  fmt::format_to(out, "</tbody></table></div>\n");
  if (!table.note.empty()) {
    fmt::format_to(out, "<p class=\"note\">{}</p>", escape_html(table.note));
  }
  fmt::format_to(out, "</section>\n");
}

void add_figure(Output out, const ReportFigure& figure) {
  fmt::format_to(out, "<figure><h3>{}</h3>\n{}\n", escape_html(figure.title), figure.svg);
  if (!figure.legend.empty()) {
    fmt::format_to(out, "<ul class=\"legend\">");
    for (size_t i = 0; i < figure.legend.size(); ++i) {
      fmt::format_to(out, "<li><span class=\"s{}\"></span>{}</li>",
                     (figure.legend_style + i) % kSeriesStyles, escape_html(figure.legend[i]));
    }
    fmt::format_to(out, "</ul>\n");
  }
  if (!figure.caption.empty()) {
    fmt::format_to(out, "<figcaption>{}</figcaption>", escape_html(figure.caption));
  }
  fmt::format_to(out, "</figure>\n");
}

[[noreturn]] void fail_to_write(const fs::path& path, const std::string& reason) {
  fail("cannot write the report {}: {}", path.string(), reason);
}

// Removes the file unless it was kept.
class TemporaryFile {
 public:
  explicit TemporaryFile(fs::path path) : path_(std::move(path)) {}
  ~TemporaryFile() {
    std::error_code error;
    if (!path_.empty()) fs::remove(path_, error);
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  const fs::path& path() const { return path_; }
  void keep() { path_.clear(); }

 private:
  fs::path path_;
};

// Of this process alone, so that two runs do not write into one file.
fs::path temporary_path(const fs::path& directory) {
  return directory / fmt::format(".index.html.{}", getpid());
}

void write_bytes(const fs::path& path, std::string_view bytes) {
  errno = 0;
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  if (!file) fail_to_write(path, std::strerror(errno));
}

}  // namespace

std::string render_report(const Report& report) {
  std::string html;
  const auto out = std::back_inserter(html);
  fmt::format_to(out,
                 "<!DOCTYPE html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\"/>"
                 "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n"
                 "<title>{0}</title>\n<style>{1}</style></head>\n<body><main>\n<h1>{0}</h1>\n",
                 escape_html(report.title), kStyle);
  for (const std::string& paragraph : report.summary) {
    fmt::format_to(out, "<p>{}</p>\n", escape_html(paragraph));
  }
  for (const ReportTable& table : report.tables) add_table(out, table);
  if (!report.figures.empty()) {
    fmt::format_to(out, "<section><h2>Figures</h2>\n<div class=\"figures\">\n");
    for (const ReportFigure& figure : report.figures) add_figure(out, figure);
    fmt::format_to(out, "</div></section>\n");
  }
  fmt::format_to(out, "<section><h2>How this was measured</h2>\n<dl>\n");
  for (const auto& [name, value] : report.facts) {
    fmt::format_to(out, "<dt>{}</dt><dd>{}</dd>\n", escape_html(name), escape_html(value));
  }
  fmt::format_to(out, "</dl>\n<pre>{}</pre></section>\n</main></body>\n</html>\n",
                 escape_html(report.command));
  return html;
}

void prepare_report_directory(const fs::path& directory) {
  std::error_code error;
  const fs::file_status status = fs::status(directory, error);
  if (fs::exists(status) && !fs::is_directory(status)) {
    fail("the report needs a directory, and {} is none", directory.string());
  }
  fs::create_directories(directory, error);
  if (error) fail_to_write(directory, error.message());
  const TemporaryFile probe(temporary_path(directory));
  write_bytes(probe.path(), "");
}

fs::path write_report(const fs::path& directory, std::string_view html) {
  fs::path path = directory / "index.html";
  TemporaryFile temporary(temporary_path(directory));
  write_bytes(temporary.path(), html);
  std::error_code error;
  fs::rename(temporary.path(), path, error);
  if (error) fail_to_write(path, error.message());
  temporary.keep();
  return path;
}

}  // namespace sagelm
