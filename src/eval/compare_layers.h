// How far a kernel's attention is from exact attention, layer by layer, on the queries, keys and
// values of a real text: SageAttention's accuracy table (arXiv:2410.02367, section 5) on the user's
// own model.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "sagelm/sagelm.hpp"

namespace sagelm {

// Tokens of a text that are probed, at most: exact attention takes long.
inline constexpr int64_t kProbedTokens = 512;

struct AttentionDims {
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;  // divides num_heads
  int64_t head_dim = 0;
};

// Causal attention in float64 of the record's queries, keys and values, rounded to FP16 first as
// all kernels read them; [tokens, num_heads * head_dim]. Throws Error if the record's sizes are not
// those of dims.
std::vector<double> exact_attention(const Model::AttentionRecord& record,
                                    const AttentionDims& dims);

struct AttentionError {
  double cosine = 0;       // of all outputs as one vector
  double relative_l1 = 0;  // sum |out - exact| / sum |exact|
  double rmse = 0;
};

// Sums over the texts that one setting was probed with.
class LayerErrors {
 public:
  void add(const Model::AttentionRecord& record, std::span<const double> exact);
  std::vector<AttentionError> layers() const;

 private:
  struct Sums {
    double dot = 0;
    double out_squares = 0;
    double exact_squares = 0;
    double difference = 0;  // of absolute values
    double exact = 0;       // likewise
    double difference_squares = 0;
    int64_t count = 0;
  };
  std::vector<Sums> sums_;
};

// As Model::probe_attention.
using AttentionProber =
    std::function<void(std::span<const int32_t> ids,
                       const std::function<void(const Model::AttentionRecord& record)>& on_layer)>;

// The errors of every layer over all texts; after_text returns false to stop.
std::vector<AttentionError> measure_layers(std::span<const std::span<const int32_t>> texts,
                                           const AttentionDims& dims, const AttentionProber& prober,
                                           const std::function<bool()>& after_text);
// The same of a model with the attention that it has now.
std::vector<AttentionError> measure_layers(std::span<const std::span<const int32_t>> texts,
                                           Model& model, const std::function<bool()>& after_text);

}  // namespace sagelm
