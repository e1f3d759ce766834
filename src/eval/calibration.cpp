#include "eval/calibration.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <system_error>

#include "base/error.h"
#include "base/json_bytes.h"
#include "base/utf8.h"

namespace sagelm {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr const char* kFormat = "sagelm-calibration";
constexpr int kVersion = 1;

std::string short_hash(const std::string& hash) { return hash.substr(0, 12); }

std::string joined(const std::vector<std::string>& names) {
  return fmt::format("{}", fmt::join(names, ", "));
}

}  // namespace

std::string Calibration::attention() const {
  std::string names;
  for (const LayerChoice& layer : layers) {
    if (!names.empty()) names += '/';
    names += layer.attention;
  }
  return names;
}

std::vector<LayerChoice> choose_attention(std::span<const std::string> candidates,
                                          int64_t num_layers, double threshold,
                                          const CandidateMeasurement& measure) {
  std::vector<LayerChoice> layers(static_cast<size_t>(num_layers));
  const auto undecided = [](const LayerChoice& layer) { return layer.attention.empty(); };
  for (const std::string& candidate : candidates.first(candidates.size() - 1)) {
    if (std::ranges::none_of(layers, undecided)) break;
    const std::vector<AttentionError> errors = measure(candidate);
    if (errors.size() != layers.size()) {
      fail("{} layers of {} were measured", errors.size(), layers.size());
    }
    for (size_t i = 0; i < layers.size(); ++i) {
      layers[i].cosines.push_back(errors[i].cosine);
      // A cosine that is not a number (an output of zeros) chooses nothing.
      if (undecided(layers[i]) && errors[i].cosine >= threshold) layers[i].attention = candidate;
    }
  }
  for (LayerChoice& layer : layers) {
    if (undecided(layer)) layer.attention = candidates.back();
  }
  return layers;
}

std::string calibration_json(const Calibration& calibration) {
  const CalibrationKey& key = calibration.key;
  Json layers = Json::array();
  for (const LayerChoice& layer : calibration.layers) {
    layers.push_back({{"attention", layer.attention}, {"cosines", layer.cosines}});
  }
  const Json object = {{"format", kFormat},
                       {"version", kVersion},
                       {"model", calibration.model},
                       {"model_hash", key.model_hash},
                       {"candidates", key.candidates},
                       {"smooth_k", key.smooth_k},
                       {"kv_cache", key.kv_cache},
                       {"threshold", calibration.threshold},
                       {"text", calibration.text},
                       {"text_sha256", calibration.text_sha256},
                       {"tokens", calibration.tokens},
                       {"layers", layers}};
  return object.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

Calibration parse_calibration(std::string_view bytes, const std::string& file) {
  const nlohmann::json object = parse_json_object(bytes, file);
  if (object.value("format", nlohmann::json()) != kFormat ||
      object.value("version", nlohmann::json()) != kVersion) {
    fail("{}: not a calibration that this version of sagelm wrote", file);
  }
  try {
    Calibration calibration;
    CalibrationKey& key = calibration.key;
    object.at("model").get_to(calibration.model);
    object.at("model_hash").get_to(key.model_hash);
    object.at("candidates").get_to(key.candidates);
    object.at("smooth_k").get_to(key.smooth_k);
    object.at("kv_cache").get_to(key.kv_cache);
    object.at("threshold").get_to(calibration.threshold);
    object.at("text").get_to(calibration.text);
    object.at("text_sha256").get_to(calibration.text_sha256);
    object.at("tokens").get_to(calibration.tokens);
    for (const nlohmann::json& layer : object.at("layers")) {
      LayerChoice& choice = calibration.layers.emplace_back();
      layer.at("attention").get_to(choice.attention);
      for (const nlohmann::json& cosine : layer.at("cosines")) {
        choice.cosines.push_back(cosine.is_null() ? std::nan("") : cosine.get<double>());
      }
    }
    return calibration;
  } catch (const nlohmann::json::exception&) {
    fail("{}: the calibration lacks a field, or one is of another kind", file);
  }
}

std::string calibration_mismatch(const Calibration& calibration, const CalibrationKey& key,
                                 int64_t num_layers) {
  const CalibrationKey& made = calibration.key;
  if (made.model_hash != key.model_hash) {
    return fmt::format("it is of another model, {} (hash {}, and this one has {})",
                       calibration.model, short_hash(made.model_hash), short_hash(key.model_hash));
  }
  if (made.candidates != key.candidates) {
    return fmt::format("it chose from {}, and this device has {}", joined(made.candidates),
                       joined(key.candidates));
  }
  if (made.smooth_k != key.smooth_k) {
    return fmt::format("it was made {} --no-smooth-k", made.smooth_k ? "without" : "with");
  }
  if (made.kv_cache != key.kv_cache) {
    return fmt::format("it was made for --kv-cache {}, not {}", made.kv_cache, key.kv_cache);
  }
  if (static_cast<int64_t>(calibration.layers.size()) != num_layers) {
    return fmt::format("it has {} layers, and the model {}", calibration.layers.size(), num_layers);
  }
  for (const LayerChoice& layer : calibration.layers) {
    if (std::ranges::find(key.candidates, layer.attention) == key.candidates.end()) {
      return fmt::format("it chose {}, which was no candidate", excerpt(layer.attention));
    }
  }
  return {};
}

void save_calibration(const Calibration& calibration, const fs::path& file) {
  std::error_code error;
  if (file.has_parent_path()) fs::create_directories(file.parent_path(), error);
  // A name of its own: two programs may write at once.
  const fs::path part = file.string() + fmt::format(".{}.part", ::getpid());
  errno = 0;
  std::ofstream out(part, std::ios::binary | std::ios::trunc);
  out << calibration_json(calibration);
  out.close();
  if (!out) {
    const int reason = errno;
    fs::remove(part, error);
    fail("cannot write the calibration {}: {}", file.string(), std::strerror(reason));
  }
  fs::rename(part, file, error);
  if (error) {
    const std::string reason = error.message();
    fs::remove(part, error);
    fail("cannot write the calibration {}: {}", file.string(), reason);
  }
}

std::vector<std::vector<int32_t>> calibration_windows(std::span<const int32_t> ids, int32_t bos_id,
                                                      int64_t most, int64_t limit) {
  std::vector<std::vector<int32_t>> windows;
  const size_t front = bos_id >= 0 ? 1 : 0;
  const size_t step = std::max(static_cast<size_t>(most), front + 1) - front;
  while (!ids.empty() && static_cast<int64_t>(windows.size()) < limit) {
    if (ids.size() < step && !windows.empty()) break;
    const std::span<const int32_t> part = ids.first(std::min(step, ids.size()));
    std::vector<int32_t>& window = windows.emplace_back();
    if (front > 0) window.push_back(bos_id);
    window.insert(window.end(), part.begin(), part.end());
    ids = ids.subspan(part.size());
  }
  return windows;
}

}  // namespace sagelm
