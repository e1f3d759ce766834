// A model on disk: configuration and checked weights.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/mmap.h"
#include "base/model_spec.h"
#include "checkpoint/random_weights.h"

namespace sagelm {

// The directory that model is, or that the .safetensors file model lies in. Throws Error if model
// is neither, or cannot be opened.
std::filesystem::path checkpoint_directory(const std::filesystem::path& model);

class Checkpoint {
 public:
  // model: an HF directory (config.json with model.safetensors, or with
  // model.safetensors.index.json and its shards), or a .safetensors file with config.json beside
  // it; generation_config.json may be there too. Throws Error naming file and tensor for anything
  // that is missing or does not fit.
  static Checkpoint open(const std::filesystem::path& model);
  // An architecture that architecture_config knows, with made-up weights: has no directory.
  static Checkpoint random(std::string_view architecture);

  const ModelConfig& config() const { return config_; }
  // Views into the mapped files (or random tensors), valid as long as the checkpoint; every name,
  // shape and dtype agrees with the configuration.
  const ModelWeights& weights() const { return weights_; }
  // Where config.json lies, and with it the tokenizer; empty if there is none.
  const std::filesystem::path& directory() const { return directory_; }
  int64_t num_parameters() const { return num_parameters_; }
  int64_t bytes() const { return bytes_; }

 private:
  Checkpoint() = default;
  void count_tensors();

  std::filesystem::path directory_;
  std::vector<MappedFile> files_;
  std::optional<RandomTensors> made_up_;
  ModelConfig config_;
  ModelWeights weights_;
  int64_t num_parameters_ = 0;
  int64_t bytes_ = 0;
};

// Throws Error naming the first tensor and element that is NaN or infinite.
void check_weights_finite(const ModelWeights& weights);

}  // namespace sagelm
