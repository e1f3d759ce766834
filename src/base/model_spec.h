// What a Llama-style model is made of: its hyper-parameters, and the one table of tensor names and
// shapes that loaders check and the model reads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/tensor_view.h"

namespace sagelm {

// Rotary embedding scaling as HF configs spell it. kLlama3 is the piecewise frequency scaling of
// Llama 3.1 (transformers modeling_rope_utils, "llama3").
struct RopeScaling {
  enum class Type : uint8_t { kNone, kLinear, kLlama3 };
  Type type = Type::kNone;
  double factor = 1.0;
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;
  int64_t original_max_position_embeddings = 0;
};

struct ModelConfig {
  std::string name;  // the directory's or file's name, for reports
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t max_position_embeddings = 0;
  double rms_norm_eps = 1e-5;
  double rope_theta = 10000.0;
  RopeScaling rope_scaling;
  bool tie_word_embeddings = false;
  DType dtype = DType::kF32;  // of the stored weights, as the tensors themselves say
  int32_t bos_token_id = 1;
  std::vector<int32_t> eos_token_ids = {2};

  int64_t q_size() const { return num_heads * head_dim; }
  int64_t kv_size() const { return num_kv_heads * head_dim; }
};

struct LayerWeights {
  TensorView input_norm;  // [hidden_size]
  TensorView q_proj;      // [q_size, hidden_size]
  TensorView k_proj;      // [kv_size, hidden_size]
  TensorView v_proj;      // [kv_size, hidden_size]
  TensorView o_proj;      // [hidden_size, q_size]
  TensorView post_norm;   // [hidden_size]
  TensorView gate_proj;   // [intermediate_size, hidden_size]
  TensorView up_proj;     // [intermediate_size, hidden_size]
  TensorView down_proj;   // [hidden_size, intermediate_size]
};

// Q and K rows are in the half-split (HF "rotate_half") RoPE order; loaders of interleaved formats
// permute.
struct ModelWeights {
  TensorView embedding;  // [vocab_size, hidden_size]
  std::vector<LayerWeights> layers;
  TensorView final_norm;  // [hidden_size]
  TensorView lm_head;     // [vocab_size, hidden_size]; the embedding again when tied
};

}  // namespace sagelm
