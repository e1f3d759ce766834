// The adaptive choice of SageAttention (arXiv:2410.02367, section 4.5): for every layer the fastest
// kernel whose output, on a text, is close enough to exact attention's; and the file that keeps it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "eval/compare_layers.h"

namespace sagelm {

// The paper's: a layer takes a kernel whose cosine similarity is not below it.
inline constexpr double kAdaptiveThreshold = 0.998;

struct LayerChoice {
  std::string attention;
  std::vector<double> cosines;  // of the candidates that were measured, in their order
};

// What a choice holds for: another model, device or setting has another.
struct CalibrationKey {
  std::string model_hash;               // as model_hash() gives it
  std::vector<std::string> candidates;  // as ModelInfo::adaptive_attention has them
  bool smooth_k = true;
  // The KV cache that candidates were measured with, those that can read it: 8-bit ("auto"), int4
  // or fp16.
  std::string kv_cache = "auto";
};

struct Calibration {
  CalibrationKey key;
  std::string model;  // its name
  double threshold = kAdaptiveThreshold;
  std::string text;  // "built-in" or the file's name
  std::string text_sha256;
  int64_t tokens = 0;
  std::vector<LayerChoice> layers;

  std::string attention() const;  // as LoadOptions has it, one name per layer
};

// The errors of all layers' attention with that candidate.
using CandidateMeasurement =
    std::function<std::vector<AttentionError>(const std::string& candidate)>;

// The first candidate of each layer whose cosine is not below the threshold, else the last, which
// is not measured. No more candidates are measured than are needed until all layers have one.
// Throws Error if a measurement is not of num_layers layers.
std::vector<LayerChoice> choose_attention(std::span<const std::string> candidates,
                                          int64_t num_layers, double threshold,
                                          const CandidateMeasurement& measure);

// One JSON object, and back. Throws Error naming the file if the bytes are no such object.
std::string calibration_json(const Calibration& calibration);
Calibration parse_calibration(std::string_view bytes, const std::string& file);

// Why a calibration does not hold for that key and number of layers: one sentence without its full
// stop; empty if it does.
std::string calibration_mismatch(const Calibration& calibration, const CalibrationKey& key,
                                 int64_t num_layers);

// Writes the file at once or not at all, with the directories that it needs. Throws Error.
void save_calibration(const Calibration& calibration, const std::filesystem::path& file);

// A text's windows of at most `most` tokens, bos_id (if it is not negative) in front of each; the
// first `limit` of them. A last one that is shorter counts only if it is the first.
std::vector<std::vector<int32_t>> calibration_windows(std::span<const int32_t> ids, int32_t bos_id,
                                                      int64_t most, int64_t limit);

}  // namespace sagelm
