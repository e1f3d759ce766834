#include "eval/report.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "eval/chart.h"
#include "eval/report_machine.h"

namespace sagelm {
namespace {

namespace fs = std::filesystem;

// What is wrong with the page as XML, or nothing: every element is closed in order, attributes are
// quoted, no stray markup or entity.
std::string malformed(std::string_view html) {
  std::vector<std::string> open;
  size_t at = 0;
  if (html.starts_with("<!DOCTYPE html>")) at = html.find('>') + 1;
  while (at < html.size()) {
    if (html[at] == '&') {
      const size_t end = html.find(';', at);
      const std::string name(html.substr(at + 1, end == html.npos ? 1 : end - at - 1));
      if (name != "amp" && name != "lt" && name != "gt" && name != "quot" && name != "#39") {
        return "entity " + name;
      }
    }
    if (html[at] == '>') return "stray >";
    if (html[at] != '<') {
      ++at;
      continue;
    }
    const size_t end = html.find('>', at);
    if (end == html.npos) return "an element that does not end";
    std::string_view tag = html.substr(at + 1, end - at - 1);
    at = end + 1;
    if (tag.find('<') != tag.npos) return "a < inside " + std::string(tag);
    if (tag.starts_with('/')) {
      if (open.empty() || open.back() != tag.substr(1)) return "unexpected " + std::string(tag);
      open.pop_back();
      continue;
    }
    const std::string name(tag.substr(0, tag.find_first_of(" /")));
    size_t quotes = 0;
    for (const char c : tag) quotes += c == '"' ? 1 : 0;
    size_t equals = 0;
    for (size_t i = 1; i < tag.size(); ++i) equals += tag[i - 1] == '=' && tag[i] == '"' ? 1 : 0;
    if (quotes != 2 * equals) return "attributes of " + std::string(tag);
    if (tag.ends_with('/')) continue;
    if (name == "style") {  // plain text to its end
      at = html.find("</style>", at);
      if (at == html.npos) return "style does not end";
    }
    open.push_back(name);
  }
  return open.empty() ? "" : "open " + open.back();
}

TEST(Report, TheCheckerOfTheseTestsFindsFaults) {
  EXPECT_EQ(malformed("<!DOCTYPE html><p class=\"a\">x &amp; y<br/></p>"), "");
  for (const char* bad : {"<p>", "<p></b>", "a > b", "&x;", "<p a=b c=\"d></p>", "</p>", "<p"}) {
    EXPECT_NE(malformed(bad), "") << bad;
  }
}

const std::string kNasty = "<script src=\"x\">alert('&')</script>\x01\xFF";

Report nasty_report() {
  XyChart chart{.title = kNasty, .x_label = kNasty, .y_label = kNasty, .diagonal = true};
  const double inf = std::numeric_limits<double>::infinity();
  chart.series.push_back({.name = kNasty, .points = {{-1, -2}, {NAN, 1}, {inf, 1}, {-3, -3}}});
  XyChart log_chart{.title = "log", .x_label = "x", .y_label = "y", .x_log = true, .y_log = true};
  log_chart.series.push_back(
      {.name = "a", .mark = Series::Mark::kLine, .points = {{1e-9, 1}, {0, 1}, {1e-3, 0.01}}});
  log_chart.series.push_back(
      {.name = "b", .mark = Series::Mark::kSteps, .style = 1, .points = {{1e-9, 1}, {1, 0.5}}});
  const XyChart empty{.title = "nothing", .x_label = "x", .y_label = "y", .series = {{}}};
  return {
      .title = kNasty,
      .summary = {kNasty, kNasty},
      .tables = {{.title = kNasty,
                  .note = kNasty,
                  .header = {"", kNasty},
                  .rows = {{kNasty, kNasty}, {"b", "± 1"}}}},
      .figures = {{.title = kNasty, .caption = kNasty, .svg = svg_chart(chart), .legend = {kNasty}},
                  {.title = "log", .caption = "", .svg = svg_chart(log_chart), .legend = {}},
                  {.title = "empty", .caption = "", .svg = svg_chart(empty), .legend = {}},
                  {.title = "bars",
                   .caption = "",
                   .svg = svg_bars(kNasty, {{.name = kNasty, .value = 2, .shown = kNasty},
                                            {.name = "b", .value = 0, .shown = "0"},
                                            {.name = "c", .value = NAN, .shown = ""}}),
                   .legend = {}}},
      .facts = {{kNasty, kNasty}},
      .command = "sagelm compare --file '" + kNasty + "'"};
}

TEST(Report, ForeignTextCannotBreakThePage) {
  const std::string html = render_report(nasty_report());
  EXPECT_EQ(malformed(html), "");
  EXPECT_EQ(html.find("<script"), std::string::npos);
  EXPECT_EQ(html.find('\x01'), std::string::npos);
  EXPECT_EQ(html.find("nan"), std::string::npos);
  EXPECT_EQ(html.find("inf"), std::string::npos);
  EXPECT_NE(html.find("&lt;script src=&quot;x&quot;&gt;alert(&#39;&amp;&#39;)"), std::string::npos);
}

TEST(Report, ThePageNeedsNothingElse) {
  const std::string html = render_report(nasty_report());
  for (const char* outside : {"http", "url(", "@import", "<link", "<img", "href", "<iframe"}) {
    EXPECT_EQ(html.find(outside), std::string::npos) << outside;
  }
  for (const char* needed : {"<meta charset=\"utf-8\"/>", "name=\"viewport\"", "@media print",
                             "prefers-color-scheme: dark", "lang=\"en\""}) {
    EXPECT_NE(html.find(needed), std::string::npos) << needed;
  }
  EXPECT_LT(html.find("charset"), 1024u);  // where a browser looks for it
}

// x from 0 to 10 spans 56 to 388 in the view box, y from 0 to 10 spans 258 to 10.
TEST(Chart, PointsAreWhereTheyBelong) {
  XyChart chart{.title = "t", .x_label = "x", .y_label = "y"};
  chart.series.push_back({.name = "a", .style = 3, .points = {{0, 0}, {5, 5}, {10, 10}}});
  const std::string svg = svg_chart(chart);
  EXPECT_NE(svg.find("<path class=\"dots s3\" d=\"M56.0 258.0h0M222.0 134.0h0M388.0 10.0h0\"/>"),
            std::string::npos)
      << svg;
  EXPECT_NE(svg.find(">10</text>"), std::string::npos);
  chart.series[0] = {
      .name = "a", .mark = Series::Mark::kSteps, .points = {{0, 10}, {5, 5}, {10, 0}}};
  EXPECT_NE(svg_chart(chart).find("d=\"M56.0 258.0L56.0 258.0L56.0 10.0L222.0 10.0L222.0 134.0"
                                  "L388.0 134.0L388.0 258.0\""),
            std::string::npos)
      << svg_chart(chart);
}

TEST(Chart, LogarithmicAxesHaveWholeDecades) {
  XyChart chart{.title = "t", .x_label = "x", .y_label = "y", .x_log = true};
  chart.series.push_back({.name = "a", .points = {{2e-3, 0}, {0.01, 1}, {0, 1}, {-1, 1}}});
  const std::string svg = svg_chart(chart);
  EXPECT_NE(svg.find(">1e-3</text>"), std::string::npos);
  EXPECT_NE(svg.find(">1e-2</text>"), std::string::npos);
  EXPECT_EQ(svg.find(">1e-1</text>"), std::string::npos);
  EXPECT_NE(svg.find("M388.0 10.0h0\"/>"), std::string::npos);
}

TEST(Chart, BarsAreProportional) {
  const std::string svg = svg_bars("speed", {{.name = "a", .value = 4, .shown = "4/s"},
                                             {.name = "b", .value = 1, .shown = "1/s"}});
  EXPECT_NE(svg.find("width=\"376.0\""), std::string::npos) << svg;
  EXPECT_NE(svg.find("width=\"94.0\""), std::string::npos) << svg;
}

TEST(Chart, WholeNumbersAreNotDivided) {
  XyChart chart{.title = "t", .x_label = "x", .y_label = "y", .x_whole = true};
  chart.series.push_back({.name = "a", .points = {{0, 10}, {3, 20}}});
  const std::string svg = svg_chart(chart);
  for (const char* tick : {">0</text>", ">1</text>", ">2</text>", ">3</text>"}) {
    EXPECT_NE(svg.find(tick), std::string::npos) << tick;
  }
  EXPECT_EQ(svg.find(">0.5</text>"), std::string::npos);
}

TEST(Report, LegendsHaveTheStylesOfTheirSeries) {
  const std::string html = render_report(
      {.figures = {{.title = "f", .legend = {"second", "third"}, .legend_style = 1}}});
  EXPECT_NE(html.find("class=\"s1\"></span>second"), std::string::npos);
  EXPECT_NE(html.find("class=\"s2\"></span>third"), std::string::npos);
}

TEST(ReportMachine, NamesAreReadFromTheSystemsFiles) {
  EXPECT_EQ(processor_name("processor\t: 0\nmodel\t\t: 143\nmodel name\t: Some: CPU @ 2 GHz\r\n"
                           "model name\t: Other\n"),
            "Some: CPU @ 2 GHz");
  EXPECT_EQ(processor_name("model name\t:"), "");
  EXPECT_EQ(processor_name("CPU part\t: 0xd40\n"), "");
  EXPECT_EQ(processor_name(""), "");
  EXPECT_EQ(system_name("NAME=\"A\"\nPRETTY_NAME=\"A system 1 (x)\"\n"), "A system 1 (x)");
  EXPECT_EQ(system_name("PRETTY_NAME=plain"), "plain");
  EXPECT_EQ(system_name("PRETTY_NAME=\"\x1b[1m\""), "\\x1b[1m");
  EXPECT_FALSE(describe_machine().empty());
}

class ReportFile : public testing::Test {
 protected:
  void SetUp() override {
    root_ = fs::temp_directory_path() / fmt::format("sagelm-report-{}", getpid());
    fs::create_directories(root_);
  }
  void TearDown() override { fs::remove_all(root_); }

  static std::string read(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }

  fs::path root_;
};

TEST_F(ReportFile, IsReplacedWhole) {
  const fs::path directory = root_ / "a/b";
  prepare_report_directory(directory);
  EXPECT_TRUE(fs::is_empty(directory));
  EXPECT_EQ(write_report(directory, "first"), directory / "index.html");
  prepare_report_directory(directory);
  write_report(directory, "second");
  EXPECT_EQ(read(directory / "index.html"), "second");
  EXPECT_EQ(std::distance(fs::directory_iterator(directory), {}), 1);
}

TEST_F(ReportFile, WhatIsNoDirectoryIsRefused) {
  std::ofstream(root_ / "file") << "x";
  EXPECT_THROW(prepare_report_directory(root_ / "file"), Error);
  EXPECT_THROW(prepare_report_directory(root_ / "file/below"), Error);
  EXPECT_THROW(write_report(root_ / "none", "x"), Error);
  EXPECT_EQ(read(root_ / "file"), "x");
}

}  // namespace
}  // namespace sagelm
