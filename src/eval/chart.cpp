#include "eval/chart.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>

#include "base/utf8.h"

namespace sagelm {
namespace {

// In the units of the view box; a page 400 pixels wide shows them one to one.
constexpr double kWidth = 400;
constexpr double kHeight = 300;
constexpr double kLeft = 56;
constexpr double kRight = 12;
constexpr double kTop = 10;
constexpr double kBottom = 42;
constexpr double kTickTextDrop = 15;
constexpr double kBarHeight = 18;
constexpr double kBarStep = 44;
constexpr int kMostTicks = 6;

// One axis: from values to places on the page.
class Scale {
 public:
  // log: low and high are powers of ten.
  Scale(double low, double high, bool log, double start, double end)
      : log_(log), low_(forward(low)), high_(forward(high)), start_(start), end_(end) {}

  bool shows(double value) const { return std::isfinite(value) && (!log_ || value > 0); }
  double place(double value) const {
    return start_ + (forward(value) - low_) / (high_ - low_) * (end_ - start_);
  }

  // At least least_step apart, if the axis is not logarithmic.
  std::vector<double> ticks(double least_step = 0) const {
    std::vector<double> values;
    if (log_) {
      const double step = std::max(1.0, std::ceil((high_ - low_) / kMostTicks));
      for (double power = low_; power <= high_ + 0.5; power += step) {
        values.push_back(std::pow(10.0, power));
      }
      return values;
    }
    const double step = std::max(least_step, round_step((high_ - low_) / kMostTicks));
    for (double i = std::ceil(low_ / step - 1e-9); i * step <= high_ + step * 1e-9; ++i) {
      values.push_back(i * step);
    }
    return values;
  }

  std::string label(double value) const {
    if (log_) return fmt::format("1e{:.0f}", std::log10(value));
    return fmt::format("{:.6g}", value == 0 ? 0.0 : value);
  }

 private:
  double forward(double value) const { return log_ ? std::log10(value) : value; }

  // 1, 2 or 5 times a power of ten, at least rough.
  static double round_step(double rough) {
    const double power = std::pow(10.0, std::floor(std::log10(rough)));
    for (const double factor : {1.0, 2.0, 5.0}) {
      if (factor * power >= rough) return factor * power;
    }
    return 10 * power;
  }

  bool log_;
  double low_;
  double high_;
  double start_;
  double end_;
};

struct Range {
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();

  void add(double value, bool log) {
    if (!std::isfinite(value) || (log && value <= 0)) return;
    low = std::min(low, value);
    high = std::max(high, value);
  }

  // Something to draw even for one value or none.
  Range rounded(bool log, bool from_zero) const {
    Range result = *this;
    if (low > high) return {.low = log ? 0.1 : 0, .high = 1};
    if (log) {
      // A hair off, so that a power of ten stays itself.
      result.low = std::pow(10.0, std::floor(std::log10(low) + 1e-9));
      result.high = std::pow(10.0, std::ceil(std::log10(high) - 1e-9));
      if (result.low >= result.high) result.high = result.low * 10;
      return result;
    }
    if (from_zero) result.low = std::min(0.0, low);
    if (result.low == result.high) {
      const double half = std::max(std::abs(result.low) / 2, 0.5);
      result.low -= from_zero && result.low == 0 ? 0 : half;
      result.high += half;
    }
    return result;
  }
};

using Output = std::back_insert_iterator<std::string>;

void draw_axes(Output out, const XyChart& chart, const Scale& x, const Scale& y) {
  const double bottom = kHeight - kBottom;
  for (const double tick : x.ticks(chart.x_whole ? 1 : 0)) {
    const double at = x.place(tick);
    fmt::format_to(out, "<path class=\"grid\" d=\"M{:.1f} {:.1f}V{:.1f}\"/>", at, kTop, bottom);
    fmt::format_to(out, "<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\">{}</text>", at,
                   bottom + kTickTextDrop, x.label(tick));
  }
  for (const double tick : y.ticks()) {
    const double at = y.place(tick);
    fmt::format_to(out, "<path class=\"grid\" d=\"M{:.1f} {:.1f}H{:.1f}\"/>", kLeft, at,
                   kWidth - kRight);
    fmt::format_to(out, "<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"end\">{}</text>", kLeft - 5,
                   at + 4, y.label(tick));
  }
  const double middle_x = (kLeft + kWidth - kRight) / 2;
  const double middle_y = (kTop + bottom) / 2;
  fmt::format_to(out, "<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\">{}</text>", middle_x,
                 kHeight - 7, escape_html(chart.x_label));
  fmt::format_to(out,
                 "<text x=\"12\" y=\"{0:.1f}\" text-anchor=\"middle\" "
                 "transform=\"rotate(-90 12 {0:.1f})\">{1}</text>",
                 middle_y, escape_html(chart.y_label));
}

void draw_series(Output out, const Series& series, const Scale& x, const Scale& y) {
  const char* mark = series.mark == Series::Mark::kDots ? "dots" : "line";
  fmt::format_to(out, "<path class=\"{} s{}\" d=\"", mark, series.style % kSeriesStyles);
  const double bottom = kHeight - kBottom;
  bool first = true;
  double last_y = bottom;
  for (const auto& [px, py] : series.points) {
    if (!x.shows(px) || !y.shows(py)) continue;
    const double at_x = x.place(px);
    const double at_y = y.place(py);
    if (series.mark == Series::Mark::kDots) {
      fmt::format_to(out, "M{:.1f} {:.1f}h0", at_x, at_y);
    } else if (series.mark == Series::Mark::kLine) {
      fmt::format_to(out, "{}{:.1f} {:.1f}", first ? "M" : "L", at_x, at_y);
    } else {
      if (first) fmt::format_to(out, "M{:.1f} {:.1f}", at_x, bottom);
      fmt::format_to(out, "L{0:.1f} {1:.1f}L{0:.1f} {2:.1f}", at_x, last_y, at_y);
      last_y = at_y;
    }
    first = false;
  }
  fmt::format_to(out, "\"/>");
}

void open_svg(Output out, std::string_view title, double height) {
  fmt::format_to(out, "<svg viewBox=\"0 0 {:.0f} {:.0f}\" role=\"img\"><title>{}</title>", kWidth,
                 height, escape_html(title));
}

}  // namespace

std::string svg_chart(const XyChart& chart) {
  Range x_range;
  Range y_range;
  for (const Series& series : chart.series) {
    for (const auto& [px, py] : series.points) {
      x_range.add(px, chart.x_log);
      y_range.add(py, chart.y_log);
    }
  }
  if (chart.diagonal) {
    x_range.low = y_range.low = std::min(x_range.low, y_range.low);
    x_range.high = y_range.high = std::max(x_range.high, y_range.high);
  }
  x_range = x_range.rounded(chart.x_log, false);
  y_range = y_range.rounded(chart.y_log, chart.y_from_zero);
  const Scale x(x_range.low, x_range.high, chart.x_log, kLeft, kWidth - kRight);
  const Scale y(y_range.low, y_range.high, chart.y_log, kHeight - kBottom, kTop);

  std::string svg;
  const auto out = std::back_inserter(svg);
  open_svg(out, chart.title, kHeight);
  draw_axes(out, chart, x, y);
  if (chart.diagonal) {
    fmt::format_to(out, "<path class=\"diagonal\" d=\"M{:.1f} {:.1f}L{:.1f} {:.1f}\"/>",
                   x.place(x_range.low), y.place(x_range.low), x.place(x_range.high),
                   y.place(x_range.high));
  }
  for (const Series& series : chart.series) draw_series(out, series, x, y);
  svg += "</svg>";
  return svg;
}

std::string svg_bars(std::string_view title, const std::vector<Bar>& bars) {
  double most = 0;
  for (const Bar& bar : bars) {
    if (std::isfinite(bar.value)) most = std::max(most, bar.value);
  }
  std::string svg;
  const auto out = std::back_inserter(svg);
  open_svg(out, title, kBarStep * static_cast<double>(bars.size()) + kTop);
  double top = kTop;
  for (const Bar& bar : bars) {
    const bool drawn = most > 0 && std::isfinite(bar.value);
    const double width = drawn ? bar.value / most * (kWidth - 2 * kRight) : 0;
    fmt::format_to(out, "<text x=\"{:.1f}\" y=\"{:.1f}\">{}</text>", kRight, top + 10,
                   escape_html(bar.name));
    fmt::format_to(out, "<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"end\">{}</text>",
                   kWidth - kRight, top + 10, escape_html(bar.shown));
    fmt::format_to(
        out, "<rect class=\"s{}\" x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.0f}\"/>",
        bar.style % kSeriesStyles, kRight, top + 15, width, kBarHeight);
    top += kBarStep;
  }
  svg += "</svg>";
  return svg;
}

std::string escape_html(std::string_view text) {
  std::string result;
  result.reserve(text.size());
  for (const char c : printable(text)) {
    switch (c) {
      case '&':
        result += "&amp;";
        break;
      case '<':
        result += "&lt;";
        break;
      case '>':
        result += "&gt;";
        break;
      case '"':
        result += "&quot;";
        break;
      case '\'':
        result += "&#39;";
        break;
      default:
        result += c;
    }
  }
  return result;
}

}  // namespace sagelm
