// What the tasks of `sagelm compare` share: the settings, their models, the run over them, its
// output and its report.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "eval/compare.h"
#include "eval/journal.h"
#include "eval_options.h"
#include "json_output.h"
#include "options.h"
#include "sagelm/sagelm.hpp"

namespace sagelm::cli {

struct CompareFlags {
  EvalFlags eval;  // its --attention is a list of settings
  std::optional<std::string> report;
  bool layers = false;
  int64_t layer_windows = 1;
};

// What is scored, and what figures come of it.
struct CompareTask {
  std::string name;
  std::string title;  // the same as a heading has it
  std::string units;
  std::string unit;  // one of them, as in "window 3 of the text"
  std::span<const Model::ScoreInput> inputs;
  int64_t context = 0;  // tokens that the model must hold; 0: its own
  std::function<std::vector<ComparedMetric>(const Comparison& comparison)> metrics;
  std::string_view data;                           // the file's bytes
  JournalHeader journal_header;                    // what the inputs depend on beside the data
  std::vector<CompareGroup> groups = {};           // as CompareOptions has them
  std::vector<std::vector<int32_t>> choices = {};  // likewise
  std::vector<std::pair<std::string, std::string>> facts;
  Json json;
};

struct CompareSettingFlags {
  std::string name;
  CommonOptions common;  // with the setting's own values
};

// The settings of --attention, checked as far as that goes without reading weights.
std::vector<CompareSettingFlags> parse_settings(const CommonOptions& common);

// Loads the model, runs the task under all settings and prints and writes what comes of it. Throws
// Error (exit status 1) when the result is out and is partial.
void run_task(const CompareFlags& flags, const CompareTask& task,
              const std::vector<CompareSettingFlags>& settings, ResultOutput& output);

}  // namespace sagelm::cli
