#include "eval/compare_charts.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "base/error.h"
#include "eval/chart.h"

namespace sagelm {
namespace {

constexpr size_t kMostDots = 4000;
// Of the histogram: divergences below it are counted in its first bin.
constexpr double kLeastKl = 1e-12;
constexpr int kBinsPerDecade = 4;

ReportFigure scatter(const Comparison& comparison, const std::vector<std::string>& names,
                     size_t setting) {
  const auto& first = comparison.settings[0].tokens;
  const auto& own = comparison.settings[setting].tokens;
  const size_t dots = std::min(kMostDots, own.size());
  Series series{.name = names[setting], .mark = Series::Mark::kDots, .style = setting};
  for (size_t i = 0; i < dots; ++i) {
    const size_t token = i * own.size() / dots;  // spread over the whole text
    series.points.emplace_back(first[token].logprob, own[token].logprob);
  }
  const std::string title = names[setting] + " against " + names[0];
  return {.title = title,
          .caption = fmt::format("Log-probability of each correct token; {} of {} tokens, spread "
                                 "evenly. On the line both settings agree.",
                                 dots, own.size()),
          .svg = svg_chart({.title = "Log-probabilities, " + title,
                            .x_label = names[0],
                            .y_label = names[setting],
                            .diagonal = true,
                            .series = {series}})};
}

size_t bin_of(double kl) {
  const double bin = (std::log10(std::max(kl, kLeastKl)) - std::log10(kLeastKl)) * kBinsPerDecade;
  return static_cast<size_t>(std::max(0.0, std::floor(bin)));
}

double left_edge(size_t bin) {
  return kLeastKl * std::pow(10.0, static_cast<double>(bin) / kBinsPerDecade);
}

ReportFigure kl_histogram(const Comparison& comparison, const std::vector<std::string>& names) {
  size_t low = SIZE_MAX;
  size_t high = 0;
  std::vector<std::vector<size_t>> counts(names.size());
  for (size_t s = 1; s < names.size(); ++s) {
    for (const ComparedToken& token : comparison.settings[s].tokens) {
      const size_t bin = bin_of(token.kl);
      if (counts[s].size() <= bin) counts[s].resize(bin + 1);
      ++counts[s][bin];
      low = std::min(low, bin);
      high = std::max(high, bin);
    }
  }
  XyChart chart{.title = "Histogram of KL divergences",
                .x_label = "KL divergence, nats",
                .y_label = "% of tokens",
                .x_log = true,
                .y_from_zero = true};
  for (size_t s = 1; s < names.size(); ++s) {
    Series series{.name = names[s], .mark = Series::Mark::kSteps, .style = s};
    counts[s].resize(high + 1);
    const auto total = static_cast<double>(comparison.settings[s].tokens.size());
    for (size_t bin = low; bin <= high; ++bin) {
      series.points.emplace_back(left_edge(bin), 100 * static_cast<double>(counts[s][bin]) / total);
    }
    series.points.emplace_back(left_edge(high + 1), 0);
    chart.series.push_back(std::move(series));
  }
  return {.title = "How far the distributions are from " + names[0],
          .caption = fmt::format("KL({} || setting) per scored token, {} bins per decade; what is "
                                 "below {:.0e} is in the first one.",
                                 names[0], kBinsPerDecade, kLeastKl),
          .svg = svg_chart(chart),
          .legend = {names.begin() + 1, names.end()},
          .legend_style = 1};
}

ReportFigure speed_bars(const Comparison& comparison, const std::vector<std::string>& names) {
  std::vector<Bar> bars;
  for (size_t s = 0; s < names.size(); ++s) {
    const double speed = comparison.settings[s].tokens_per_second();
    bars.push_back({.name = names[s],
                    .value = speed,
                    .shown = fmt::format("{:.0f} tokens/s", speed),
                    .style = s});
  }
  return {.title = "Speed",
          .caption = "Tokens run through the model per second, whole distributions read back.",
          .svg = svg_bars("Speed", bars)};
}

template <typename Figure>
ReportFigure layer_chart(const std::string& title, const std::string& y_label,
                         const std::vector<std::string>& names,
                         std::span<const std::vector<AttentionError>> layers,
                         const Figure& figure) {
  XyChart chart{
      .title = title, .x_label = "layer", .y_label = y_label, .x_whole = true, .y_log = true};
  for (size_t s = 0; s < layers.size(); ++s) {
    Series series{.name = names[s], .mark = Series::Mark::kLine, .style = s};
    for (size_t layer = 0; layer < layers[s].size(); ++layer) {
      series.points.emplace_back(static_cast<double>(layer), figure(layers[s][layer]));
    }
    chart.series.push_back(std::move(series));
  }
  return {.title = title, .caption = "", .svg = svg_chart(chart), .legend = names};
}

}  // namespace

std::vector<ReportFigure> compare_figures(const Comparison& comparison,
                                          const std::vector<std::string>& names,
                                          std::span<const std::vector<AttentionError>> layers) {
  std::vector<ReportFigure> figures;
  if (!comparison.settings[0].tokens.empty()) {
    for (size_t s = 1; s < names.size(); ++s) figures.push_back(scatter(comparison, names, s));
    if (names.size() > 1) figures.push_back(kl_histogram(comparison, names));
    figures.push_back(speed_bars(comparison, names));
  }
  if (!layers.empty()) {
    figures.push_back(layer_chart("Error of attention by layer", "relative L1", names, layers,
                                  [](const AttentionError& error) { return error.relative_l1; }));
    figures.push_back(layer_chart("1 − cosine similarity by layer", "1 − cosine", names, layers,
                                  [](const AttentionError& error) { return 1 - error.cosine; }));
  }
  return figures;
}

}  // namespace sagelm
