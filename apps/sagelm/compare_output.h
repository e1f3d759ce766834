// The result of `sagelm compare` as text, as JSON and as a page.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "eval/compare.h"
#include "eval/compare_layers.h"
#include "eval/report.h"
#include "json_output.h"

namespace sagelm::cli {

// A setting as it was loaded.
struct SettingInfo {
  std::string name;       // as on the command line
  std::string attention;  // the kernel that ran
  std::string device;
  std::string kv_cache;
  bool smooth_k = true;
  int64_t memory_bytes = 0;  // weights, cache of the context and activations, about
};

struct CompareResult {
  std::string title;
  std::vector<std::pair<std::string, std::string>> facts;  // of data, model and run
  Json json = Json::object();                              // likewise
  std::string units;                                       // "windows" or "passages"
  std::vector<SettingInfo> settings;                       // the first is the baseline
  Comparison comparison;
  std::vector<ComparedMetric> metrics;
  std::vector<DistributionDistance> distances;      // to the baseline
  std::vector<std::vector<AttentionError>> layers;  // [setting][layer]; empty if not asked for
  std::string layers_note;                          // what they were measured on
};

std::string compare_text(const CompareResult& result);
Json compare_json(const CompareResult& result);
// facts are added to those of the result.
Report compare_report(const CompareResult& result,
                      const std::vector<std::pair<std::string, std::string>>& facts,
                      const std::string& command);

}  // namespace sagelm::cli
