#include "eval/compare_journal.h"

#include <cmath>
#include <nlohmann/json.hpp>

namespace sagelm {

std::string batch_record(size_t first, std::span<const BatchScores> settings) {
  nlohmann::ordered_json record = {{"first", first}};
  auto& parts = record["settings"] = nlohmann::ordered_json::array();
  for (const BatchScores& setting : settings) {
    auto logprobs = nlohmann::ordered_json::array();
    auto divergences = nlohmann::ordered_json::array();
    std::string flags;
    for (const ComparedToken& token : setting.tokens) {
      logprobs.push_back(token.logprob);
      divergences.push_back(token.kl);
      flags += static_cast<char>('0' + (token.is_top ? 1 : 0) + (token.same_top ? 2 : 0));
    }
    parts.push_back({{"seconds", setting.seconds},
                     {"logprob", std::move(logprobs)},
                     {"kl", std::move(divergences)},
                     {"flags", std::move(flags)}});
  }
  return record.dump();
}

std::optional<std::vector<BatchScores>> read_batch_record(const std::string& record, size_t first,
                                                          size_t settings, size_t tokens) {
  const auto json = nlohmann::json::parse(record, nullptr, /*allow_exceptions=*/false);
  std::vector<BatchScores> result;
  try {
    if (json.at("first") != first || json.at("settings").size() != settings) return {};
    for (const auto& part : json.at("settings")) {
      const auto& logprobs = part.at("logprob");
      const auto& divergences = part.at("kl");
      const auto flags = part.at("flags").get<std::string>();
      if (logprobs.size() != tokens || divergences.size() != tokens || flags.size() != tokens) {
        return {};
      }
      BatchScores& setting = result.emplace_back();
      setting.seconds = part.at("seconds").get<double>();
      setting.tokens.reserve(tokens);
      for (size_t i = 0; i < tokens; ++i) {
        const ComparedToken token{.logprob = logprobs.at(i).get<double>(),
                                  .kl = divergences.at(i).get<double>(),
                                  .is_top = flags[i] == '1' || flags[i] == '3',
                                  .same_top = flags[i] == '2' || flags[i] == '3'};
        if (!std::isfinite(token.logprob) || !std::isfinite(token.kl)) return {};
        setting.tokens.push_back(token);
      }
    }
  } catch (const nlohmann::json::exception&) {
    return {};
  }
  return result;
}

}  // namespace sagelm
