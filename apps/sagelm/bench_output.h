// What the bench subcommands print alike, and the options that they share.
#pragma once

#include <CLI/App.hpp>
#include <optional>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "base/measure.h"
#include "json_output.h"

namespace sagelm::cli {

// 0 if `of` was not measured.
double percent(double value, double of);

Json spread_json(const Spread& spread);
// Rates that were not measured are null.
Json ceilings_json(const Ceilings& ceilings);
// One line.
std::string describe_ceilings(const Ceilings& ceilings);

// A comma-separated list of positive numbers.
void add_number_list(CLI::App& command, const std::string& name, std::vector<int64_t>& values,
                     const std::string& help, const std::string& default_text);
// --attention, a comma-separated list.
void add_attention_list(CLI::App& command, std::vector<std::string>& names);
// --rest, seconds from 0 to a minute.
void add_rest(CLI::App& command, std::optional<double>& seconds, const std::string& help,
              const std::string& default_text);

}  // namespace sagelm::cli
