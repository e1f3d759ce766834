// Charts as SVG elements for a page that report.h makes. They carry no colours and no fonts: the
// page's style sheet does, so that they follow light, dark and print.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace sagelm {

// How many series the style sheet can tell apart; the next one looks like the first again.
inline constexpr size_t kSeriesStyles = 8;

struct Series {
  enum class Mark : uint8_t { kDots, kLine, kSteps };  // kSteps: the outline of a histogram

  std::string name = {};
  Mark mark = Mark::kDots;
  size_t style = 0;  // its colour, e.g. the setting's index
  // kSteps: (left edge of a bin, height), the last one giving the right edge of all.
  std::vector<std::pair<double, double>> points = {};
};

struct XyChart {
  std::string title = {};  // read aloud, not drawn
  std::string x_label = {};
  std::string y_label = {};
  bool x_whole = false;  // only whole numbers are marked
  bool x_log = false;    // decades; values that are not above 0 are left out
  bool y_log = false;
  bool y_from_zero = false;
  bool diagonal = false;  // both axes have one range, and the line y = x
  std::vector<Series> series = {};
};

struct Bar {
  std::string name = {};
  double value = 0;        // 0 or more
  std::string shown = {};  // the value as text
  size_t style = 0;
};

// Values that are not finite are left out.
std::string svg_chart(const XyChart& chart);
std::string svg_bars(std::string_view title, const std::vector<Bar>& bars);

// Printable text (utf8.h) with &, <, >, " and ' as entities.
std::string escape_html(std::string_view text);

}  // namespace sagelm
