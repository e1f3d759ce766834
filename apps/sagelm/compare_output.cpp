#include "compare_output.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "eval/compare_charts.h"
#include "eval_options.h"

namespace sagelm::cli {
namespace {

using Table = std::vector<std::vector<std::string>>;  // rows; the first cell names the row

constexpr size_t kMinColumn = 10;
constexpr double kMiB = 1024.0 * 1024.0;

// Digits after the point that show two significant ones of the error.
int digits_for(double error) {
  constexpr int kMost = 9;
  if (!std::isfinite(error) || error <= 0) return 4;
  return std::clamp(1 - static_cast<int>(std::floor(std::log10(error))), 0, kMost);
}

std::string with_error(double value, double error) {
  return fmt::format("{} ± {}", format_figure(value, 4), format_figure(error, 4));
}

std::string signed_figure(double value, int digits) {
  return std::isfinite(value) ? fmt::format("{:+.{}f}", value, digits) : "undefined";
}

std::string percent(double share, int digits) {
  return std::isfinite(share) ? fmt::format("{:.{}f} %", 100 * share, digits) : "undefined";
}

std::string short_figure(double value) {
  return std::isfinite(value) ? fmt::format("{:.3g}", value) : "undefined";
}

// A row of cell(setting) for every setting; the baseline's is `baseline` if that is not empty.
template <typename Cell>
std::vector<std::string> make_row(std::string name, size_t settings, const char* baseline,
                                  const Cell& cell) {
  std::vector<std::string> row = {std::move(name)};
  for (size_t s = 0; s < settings; ++s) {
    row.push_back(s == 0 && *baseline != '\0' ? std::string(baseline) : cell(s));
  }
  return row;
}

std::string metric_label(const std::string& name) {
  std::string label = name;
  std::replace(label.begin(), label.end(), '_', ' ');
  return label;
}

Table metric_rows(const CompareResult& result) {
  const size_t count = result.settings.size();
  Table table;
  for (const ComparedMetric& metric : result.metrics) {
    const auto& figures = metric.figures;
    table.push_back(make_row(metric_label(metric.name), count, "", [&](size_t s) {
      return with_error(figures[s].value, figures[s].standard_error);
    }));
    table.push_back(make_row("  difference", count, "baseline", [&](size_t s) {
      const int digits = digits_for(figures[s].difference_error);
      return signed_figure(figures[s].difference, digits) + " ± " +
             format_figure(figures[s].difference_error, digits);
    }));
    table.push_back(make_row("  relative", count, "-", [&](size_t s) {
      const double error = std::abs(figures[s].difference_error / figures[0].value);
      const int digits = digits_for(100 * error);
      return signed_figure(100 * figures[s].relative_difference(figures[0]), digits) + " ± " +
             percent(error, digits);
    }));
    table.push_back(make_row("  95 % interval", count, "-", [&](size_t s) {
      const int digits = digits_for(figures[s].difference_error);
      return signed_figure(figures[s].difference - figures[s].margin(), digits) + " to " +
             signed_figure(figures[s].difference + figures[s].margin(), digits);
    }));
    table.push_back(make_row("  excludes zero", count, "-", [&](size_t s) {
      if (!std::isfinite(figures[s].difference_error)) return "undefined";
      return figures[s].excludes_zero() ? "yes" : "no";
    }));
  }
  return table;
}

Table distance_rows(const CompareResult& result) {
  const size_t count = result.settings.size();
  const auto& distances = result.distances;
  return {
      make_row("KL mean", count, "-",
               [&](size_t s) {
                 return short_figure(distances[s].kl_mean) + " ± " +
                        short_figure(distances[s].kl_error);
               }),
      make_row("KL 99 %", count, "-", [&](size_t s) { return short_figure(distances[s].kl_p99); }),
      make_row("KL max", count, "-", [&](size_t s) { return short_figure(distances[s].kl_max); }),
      make_row("same top-1", count, "-",
               [&](size_t s) {
                 return percent(distances[s].same_top, 3) + " ± " +
                        percent(distances[s].same_top_error, 3);
               }),
      make_row("RMS Δp", count, "-",
               [&](size_t s) {
                 return percent(distances[s].rms_change, 3) + " ± " +
                        percent(distances[s].rms_change_error, 3);
               }),
  };
}

Table cost_rows(const CompareResult& result) {
  const size_t count = result.settings.size();
  const auto& settings = result.comparison.settings;
  const double first = settings[0].tokens_per_second();
  return {make_row("tokens/s", count, "",
                   [&](size_t s) {
                     const double speed = settings[s].tokens_per_second();
                     std::string text = fmt::format("{:.0f}", speed);
                     if (s > 0 && first > 0) text += fmt::format(" ({:.2f}×)", speed / first);
                     return text;
                   }),
          make_row("memory, about", count, "", [&](size_t s) {
            return fmt::format("{:.1f} MiB",
                               static_cast<double>(result.settings[s].memory_bytes) / kMiB);
          })};
}

// Cosine similarities near 1 would all look alike with few digits.
std::string cosine_figure(double value) { return format_figure(value, 7); }

// A figure of AttentionError as it is shown.
struct LayerMeasure {
  const char* name;
  double AttentionError::*value;
  std::string (*shown)(double);
  bool higher_is_better;
};

constexpr LayerMeasure kLayerMeasures[] = {
    {"cosine similarity", &AttentionError::cosine, cosine_figure, true},
    {"relative L1", &AttentionError::relative_l1, short_figure, false},
    {"RMSE", &AttentionError::rmse, short_figure, false},
};

// One row per layer, then their mean and the worst.
Table layer_rows(const CompareResult& result, const LayerMeasure& measure) {
  Table table;
  std::vector<std::string> mean = {"mean"};
  std::vector<std::string> worst = {"worst"};
  for (size_t layer = 0; layer < result.layers[0].size(); ++layer) {
    table.push_back({fmt::format("layer {}", layer)});
  }
  for (const std::vector<AttentionError>& layers : result.layers) {
    double sum = 0;
    double extreme = layers.empty() ? 0 : layers[0].*measure.value;
    for (size_t layer = 0; layer < layers.size(); ++layer) {
      const double value = layers[layer].*measure.value;
      sum += value;
      extreme = measure.higher_is_better ? std::min(extreme, value) : std::max(extreme, value);
      table[layer].push_back(measure.shown(value));
    }
    mean.push_back(measure.shown(sum / static_cast<double>(layers.size())));
    worst.push_back(measure.shown(extreme));
  }
  table.push_back(std::move(mean));
  table.push_back(std::move(worst));
  return table;
}

std::vector<std::string> setting_names(const CompareResult& result) {
  std::vector<std::string> names;
  for (const SettingInfo& setting : result.settings) names.push_back(setting.name);
  return names;
}

std::vector<std::string> header_of(const CompareResult& result) {
  std::vector<std::string> header = setting_names(result);
  header.insert(header.begin(), "");
  return header;
}

// Columns on the screen: bytes that do not continue a character.
size_t width_of(const std::string& text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xC0U) != 0x80U;
  }));
}

std::string format_table(const std::vector<std::string>& header, const Table& rows) {
  std::vector<size_t> widths(header.size(), kMinColumn);
  const auto widen = [&widths](const std::vector<std::string>& row) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], width_of(row[i]));
  };
  widen(header);
  for (const auto& row : rows) widen(row);
  std::string text;
  const auto add = [&](const std::vector<std::string>& row) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      const std::string padding(widths[i] - width_of(row[i]), ' ');
      line += i == 0 ? row[i] + padding : "  " + padding + row[i];
    }
    line.resize(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  };
  add(header);
  for (const auto& row : rows) add(row);
  return text;
}

Table result_rows(const CompareResult& result) {
  Table rows;
  for (Table part : {metric_rows(result), distance_rows(result), cost_rows(result)}) {
    rows.insert(rows.end(), part.begin(), part.end());
  }
  return rows;
}

std::string samples_note(const CompareResult& result) {
  const Comparison& comparison = result.comparison;
  return fmt::format(
      "{} of {} {}, {} tokens scored{}. ±: standard error, samples taken as independent. "
      "Differences are paired: to {} on the "
      "same tokens. KL: KL({} || this), in nats, of the next-token distribution. Δp: change of the "
      "correct token's probability.",
      comparison.inputs(), comparison.inputs_planned, result.units,
      comparison.settings[0].tokens.size(), comparison.partial() ? " (partial: interrupted)" : "",
      result.settings[0].name, result.settings[0].name);
}

Json layer_json(const std::vector<AttentionError>& layers) {
  Json json = Json::array();
  for (const AttentionError& layer : layers) {
    json.push_back(
        {{"cosine", layer.cosine}, {"relative_l1", layer.relative_l1}, {"rmse", layer.rmse}});
  }
  return json;
}

// Of each setting after the first: "sage2 against fp16: perplexity +0.46 ± 0.05, …".
std::vector<std::string> summary_of(const CompareResult& result) {
  std::vector<std::string> sentences;
  for (size_t s = 1; s < result.settings.size(); ++s) {
    const PairedFigure& figure = result.metrics[0].figures[s];
    const int digits = digits_for(figure.difference_error);
    sentences.push_back(fmt::format(
        "{} against {}: {} {} ± {}, {}; top-1 agreement {}.", result.settings[s].name,
        result.settings[0].name, metric_label(result.metrics[0].name),
        signed_figure(figure.difference, digits), format_figure(figure.difference_error, digits),
        figure.excludes_zero() ? "a difference that its error does not explain"
                               : "not distinguishable from zero",
        percent(result.distances[s].same_top, 2)));
  }
  return sentences;
}

}  // namespace

std::string compare_text(const CompareResult& result) {
  std::string text;
  for (const auto& [name, value] : result.facts) text += fmt::format("{:<15}{}\n", name, value);
  for (const SettingInfo& setting : result.settings) {
    text += fmt::format("{:<15}{}: {}; {}, {} cache\n", "setting", setting.name, setting.attention,
                        setting.device, setting.kv_cache);
  }
  text += "\n" + format_table(header_of(result), result_rows(result)) + "\n" +
          samples_note(result) + "\n";
  if (!result.layers.empty()) {
    std::vector<std::string> header = header_of(result);
    for (const LayerMeasure& measure : kLayerMeasures) {
      header[0] = measure.name;
      text += "\n" + format_table(header, layer_rows(result, measure));
    }
    text += "\n" + result.layers_note + "\n";
  }
  return text;
}

Json compare_json(const CompareResult& result) {
  Json json = result.json;
  const Comparison& comparison = result.comparison;
  json.update({{result.units, comparison.inputs()},
               {"tokens_scored", comparison.settings[0].tokens.size()},
               {"tokens_run", comparison.tokens_run},
               {"held_bytes", comparison.held_bytes},
               {"partial", comparison.partial()}});
  Json settings = Json::array();
  for (size_t s = 0; s < result.settings.size(); ++s) {
    const SettingInfo& info = result.settings[s];
    const SettingScores& scores = comparison.settings[s];
    const bool baseline = s == 0;
    Json metrics = Json::object();
    for (const ComparedMetric& metric : result.metrics) {
      const PairedFigure& figure = metric.figures[s];
      Json entry = {{"value", figure.value}, {"stderr", figure.standard_error}};
      if (!baseline) {
        entry.update({{"difference", figure.difference},
                      {"difference_stderr", figure.difference_error},
                      {"relative_difference", figure.relative_difference(metric.figures[0])},
                      {"interval95",
                       {figure.difference - figure.margin(), figure.difference + figure.margin()}},
                      {"excludes_zero", figure.excludes_zero()}});
      }
      metrics[metric.name] = std::move(entry);
    }
    Json setting = {{"name", info.name},
                    {"baseline", baseline},
                    {"attention", info.attention},
                    {"smooth_k", info.smooth_k},
                    {"kv_cache", info.kv_cache},
                    {"device", info.device},
                    {"metrics", std::move(metrics)}};
    if (!baseline) {
      const DistributionDistance& far = result.distances[s];
      setting.update({{"kl_mean", far.kl_mean},
                      {"kl_mean_stderr", far.kl_error},
                      {"kl_p99", far.kl_p99},
                      {"kl_max", far.kl_max},
                      {"same_top", far.same_top},
                      {"same_top_stderr", far.same_top_error},
                      {"rms_probability_change", far.rms_change},
                      {"rms_probability_change_stderr", far.rms_change_error}});
    }
    setting.update({{"tokens_per_second", scores.tokens_per_second()},
                    {"timed_tokens", scores.timed_tokens},
                    {"seconds", scores.seconds},
                    {"memory_bytes", info.memory_bytes}});
    if (!result.layers.empty()) setting["layers"] = layer_json(result.layers[s]);
    settings.push_back(std::move(setting));
  }
  if (!result.layers.empty()) json["layers_note"] = result.layers_note;
  json["settings"] = std::move(settings);
  return json;
}

Report compare_report(const CompareResult& result,
                      const std::vector<std::pair<std::string, std::string>>& facts,
                      const std::string& command) {
  Report report{.title = result.title, .summary = summary_of(result), .command = command};
  report.tables.push_back({.title = "Result",
                           .note = samples_note(result),
                           .header = header_of(result),
                           .rows = result_rows(result)});
  const std::vector<std::string> names = setting_names(result);
  report.figures = compare_figures(result.comparison, names, result.layers);
  if (!result.layers.empty()) {
    for (const LayerMeasure& measure : kLayerMeasures) {
      report.tables.push_back(
          {.title = fmt::format("Attention's output against float64: {}", measure.name),
           .header = header_of(result),
           .rows = layer_rows(result, measure)});
    }
    report.tables.back().note = result.layers_note;
  }
  report.facts = result.facts;
  for (const SettingInfo& setting : result.settings) {
    report.facts.emplace_back(
        "setting " + setting.name,
        fmt::format("{}; {}, {} cache", setting.attention, setting.device, setting.kv_cache));
  }
  report.facts.insert(report.facts.end(), facts.begin(), facts.end());
  return report;
}

}  // namespace sagelm::cli
