// Known architectures with made-up weights: speed does not depend on what a model has learnt.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/model_spec.h"

namespace sagelm {

// name: one of known_architectures(), with ":f16" (the default) or ":bf16" behind it for the type
// of the weights. Positions go far beyond those of the trained models, since nothing was trained.
// Throws UsageError listing the names.
ModelConfig architecture_config(std::string_view name);
std::string known_architectures();

// Tensors that a few hundred megabytes hold, however large the model: all are windows, begun at
// different places, of one block of normal values with the standard deviation that Llama is
// initialised with (0.02). The weights of norms are ones.
class RandomTensors {
 public:
  // config.dtype is F16 or BF16.
  RandomTensors(const ModelConfig& config, uint64_t seed);

  // Valid as long as this lives, moves included. No larger than the largest of config's tensors.
  TensorView take(const std::string& name, const std::vector<int64_t>& shape);

 private:
  DType dtype_;
  std::vector<uint16_t> values_;
  std::vector<uint16_t> ones_;
  int64_t windows_ = 0;
};

}  // namespace sagelm
