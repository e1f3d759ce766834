#include "adaptive.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <system_error>

#include "base/error.h"
#include "base/utf8.h"
#include "eval/calibration_text.h"
#include "eval/model_hash.h"
#include "eval/sha256.h"
#include "eval_options.h"
#include "progress.h"

namespace sagelm::cli {
namespace {

namespace fs = std::filesystem;

constexpr size_t kHashDigits = 16;

fs::path cache_directory() {
  if (const char* cache = std::getenv("XDG_CACHE_HOME"); cache != nullptr && *cache == '/') {
    return fs::path(cache) / "sagelm";
  }
  if (const char* home = std::getenv("HOME"); home != nullptr && *home == '/') {
    return fs::path(home) / ".cache" / "sagelm";
  }
  return {};
}

void say(const std::string& text) { std::cerr << "sagelm: " << text << '\n'; }

// The calibration in the file, which is there. Throws Error if it does not hold.
Calibration read_calibration(const fs::path& file, const CalibrationKey& key, int64_t num_layers) {
  Calibration calibration = parse_calibration(read_text_file(file.string()), file.string());
  const std::string why = calibration_mismatch(calibration, key, num_layers);
  if (!why.empty()) fail("{}: the calibration does not fit: {}", file.string(), why);
  return calibration;
}

// Switches the model to a candidate with the cache of the key, or FP16 if it cannot read that.
void use_candidate(Model& model, const std::string& candidate, const CalibrationKey& key) {
  try {
    model.set_attention(candidate, key.smooth_k, key.kv_cache);
  } catch (const UsageError&) {
    model.set_attention(candidate, key.smooth_k, "fp16");
  }
}

CalibrationText make_text(const Model& model, std::string name, std::string_view bytes,
                          std::span<const std::string_view> texts, int64_t limit) {
  CalibrationText result{.name = std::move(name), .sha256 = sha256_hex(bytes), .windows = {}};
  const Tokenizer& tokenizer = model.tokenizer();
  const int32_t bos = adds_bos(tokenizer) ? tokenizer.bos_id() : -1;
  const int64_t most = std::min(kProbedTokens, model.info().context);
  for (const std::string_view text : texts) {
    for (auto& window : calibration_windows(tokenizer.encode(text, false), bos, most, limit)) {
      result.windows.push_back(std::move(window));
    }
  }
  return result;
}

}  // namespace

CommonOptions before_choice(const CommonOptions& options) {
  CommonOptions plain = options;
  plain.attention = "fp16";
  plain.kv_cache = "auto";
  plain.calibration.clear();
  return plain;
}

void check_calibration_option(const CommonOptions& options,
                              std::span<const std::string> attentions) {
  if (options.calibration.empty() || std::ranges::find(attentions, kAdaptive) != attentions.end()) {
    return;
  }
  fail_usage("--calibration goes with --attention {}", kAdaptive);
}

CalibrationKey calibration_key(const CommonOptions& options, const ModelInfo& info) {
  return {.model_hash = model_hash(model_path(options)),
          .candidates = info.adaptive_attention,
          .smooth_k = !options.no_smooth_k,
          .kv_cache = options.kv_cache == "int8" ? "auto" : options.kv_cache};
}

fs::path calibration_file(const CommonOptions& options, const CalibrationKey& key) {
  if (!options.calibration.empty()) return options.calibration;
  const fs::path cache = cache_directory();
  if (cache.empty()) return {};
  return cache / "calibration" /
         fmt::format("{}-{}{}{}.json", key.model_hash.substr(0, kHashDigits),
                     fmt::join(key.candidates, "+"), key.smooth_k ? "" : "-no-smooth-k",
                     key.kv_cache == "auto" ? "" : "-" + key.kv_cache + "-cache");
}

std::optional<Calibration> stored_calibration(const CommonOptions& options) {
  const ModelInfo info = Model::inspect(load_options(before_choice(options)));
  const CalibrationKey key = calibration_key(options, info);
  const fs::path file = calibration_file(options, key);
  std::error_code error;
  if (file.empty() || !fs::exists(file, error)) return {};
  if (!options.calibration.empty()) {
    try {
      return read_calibration(file, key, info.num_layers);
    } catch (const Error& why) {
      fail("{} (sagelm calibrate makes it anew)", why.what());
    }
  }
  try {
    return read_calibration(file, key, info.num_layers);
  } catch (const Error& why) {
    say(fmt::format("{}; it is not used", why.what()));
    return {};
  }
}

CalibrationText built_in_text(const Model& model) {
  std::string bytes;
  for (const std::string_view text : calibration_texts()) bytes += text;
  return make_text(model, "built-in", bytes, calibration_texts(), 1);
}

CalibrationText text_of_file(const Model& model, const std::string& file, int64_t limit) {
  const std::string bytes = read_text_file(file);
  check_text(file, bytes);
  const std::string_view text = bytes;
  return make_text(model, file, bytes, {&text, 1}, limit);
}

Calibration calibrate(Model& model, const CommonOptions& options, const CalibrationText& text,
                      double threshold) {
  const ModelInfo info = model.info();
  Calibration calibration{.key = calibration_key(options, info),
                          .model = info.name,
                          .threshold = threshold,
                          .text = text.name,
                          .text_sha256 = text.sha256,
                          .layers = {}};
  std::vector<std::span<const int32_t>> windows;
  for (const std::vector<int32_t>& window : text.windows) {
    windows.emplace_back(window);
    calibration.tokens += static_cast<int64_t>(window.size());
  }
  const std::vector<std::string>& candidates = calibration.key.candidates;
  const auto most = static_cast<int64_t>(windows.size() * (candidates.size() - 1));
  Progress progress("calibrating", "windows", most);
  int64_t done = 0;
  calibration.layers =
      choose_attention(candidates, info.num_layers, threshold, [&](const std::string& candidate) {
        use_candidate(model, candidate, calibration.key);
        return measure_layers(windows, model, [&] {
          progress.update(++done, candidate);
          return true;
        });
      });
  return calibration;
}

std::string describe_calibration(const Calibration& calibration, const fs::path& file) {
  const CalibrationKey& key = calibration.key;
  std::string text =
      fmt::format("{:<28}{}\n{:<28}{}, {} tokens\n{:<28}{}\n", "calibration", file.string(),
                  "calibration text", printable(calibration.text), calibration.tokens,
                  "threshold of the cosine", calibration.threshold);
  for (size_t i = 0; i < calibration.layers.size(); ++i) {
    const LayerChoice& layer = calibration.layers[i];
    text += fmt::format("  layer {:<20}{:<10}", i, layer.attention);
    for (size_t c = 0; c < layer.cosines.size() && c < key.candidates.size(); ++c) {
      text += fmt::format("  {} {:.6f}", key.candidates[c], layer.cosines[c]);
    }
    text += '\n';
  }
  return text;
}

std::string resolve_attention(Model& model, const CommonOptions& options) {
  if (!is_adaptive(options)) return options.attention;
  if (const auto stored = stored_calibration(options)) return stored->attention();
  const Calibration made = calibrate(model, options, built_in_text(model), kAdaptiveThreshold);
  const fs::path file = calibration_file(options, made.key);
  if (!options.calibration.empty()) {
    save_calibration(made, file);
  } else if (file.empty()) {
    say("the calibration is not kept: neither XDG_CACHE_HOME nor HOME names a directory");
  } else {
    try {
      save_calibration(made, file);
    } catch (const Error& error) {
      say(fmt::format("the calibration is not kept: {}", error.what()));
    }
  }
  return made.attention();
}

}  // namespace sagelm::cli
