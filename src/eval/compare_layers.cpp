#include "eval/compare_layers.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "base/dtype.h"
#include "base/error.h"

namespace sagelm {
namespace {

double as_read(float value) { return half_to_float(float_to_half(value)); }

// One query row of one head over the first `visible` keys. keys [head_dim][tokens], values
// [tokens][head_dim]; weights is scratch for `visible` numbers.
void attend(std::span<const double> query, std::span<const double> keys,
            std::span<const double> values, size_t tokens, size_t visible,
            std::span<double> weights, std::span<double> out) {
  const size_t head_dim = query.size();
  std::fill(weights.begin(), weights.end(), 0.0);
  for (size_t d = 0; d < head_dim; ++d) {
    const double* column = keys.data() + d * tokens;
    for (size_t j = 0; j < visible; ++j) weights[j] += query[d] * column[j];
  }
  const double scale = 1 / std::sqrt(static_cast<double>(head_dim));
  const double largest = *std::max_element(weights.begin(), weights.end());
  double sum = 0;
  for (double& weight : weights) {
    weight = std::exp((weight - largest) * scale);
    sum += weight;
  }
  std::fill(out.begin(), out.end(), 0.0);
  for (size_t j = 0; j < visible; ++j) {
    const double* row = values.data() + j * head_dim;
    for (size_t d = 0; d < head_dim; ++d) out[d] += weights[j] / sum * row[d];
  }
}

}  // namespace

std::vector<double> exact_attention(const Model::AttentionRecord& record,
                                    const AttentionDims& dims) {
  const auto tokens = static_cast<size_t>(record.tokens);
  const auto heads = static_cast<size_t>(dims.num_heads);
  const auto kv_heads = static_cast<size_t>(dims.num_kv_heads);
  const auto head_dim = static_cast<size_t>(dims.head_dim);
  const size_t stride = (heads + 2 * kv_heads) * head_dim;
  if (kv_heads == 0 || heads % kv_heads != 0 || record.qkv.size() != tokens * stride ||
      record.out.size() != tokens * heads * head_dim) {
    fail("the attention of layer {} has not the model's sizes", record.layer);
  }
  std::vector<double> out(tokens * heads * head_dim);
  std::vector<double> keys(head_dim * tokens);
  std::vector<double> values(tokens * head_dim);
  for (size_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
    for (size_t t = 0; t < tokens; ++t) {
      const float* key = record.qkv.data() + t * stride + (heads + kv_head) * head_dim;
      const float* value = key + kv_heads * head_dim;
      for (size_t d = 0; d < head_dim; ++d) {
        keys[d * tokens + t] = as_read(key[d]);
        values[t * head_dim + d] = as_read(value[d]);
      }
    }
    const size_t group = heads / kv_heads;
#pragma omp parallel
    {
      std::vector<double> weights(tokens);
      std::vector<double> query(head_dim);
#pragma omp for schedule(dynamic, 16)
      for (size_t row = 0; row < group * tokens; ++row) {
        const size_t head = kv_head * group + row / tokens;
        const size_t t = row % tokens;
        const float* from = record.qkv.data() + t * stride + head * head_dim;
        for (size_t d = 0; d < head_dim; ++d) query[d] = as_read(from[d]);
        attend(query, keys, values, tokens, t + 1, std::span(weights).first(t + 1),
               std::span(out).subspan((t * heads + head) * head_dim, head_dim));
      }
    }
  }
  return out;
}

void LayerErrors::add(const Model::AttentionRecord& record, std::span<const double> exact) {
  const auto layer = static_cast<size_t>(record.layer);
  if (sums_.size() <= layer) sums_.resize(layer + 1);
  Sums& sums = sums_[layer];
  for (size_t i = 0; i < exact.size(); ++i) {
    const double out = record.out[i];
    const double difference = out - exact[i];
    sums.dot += out * exact[i];
    sums.out_squares += out * out;
    sums.exact_squares += exact[i] * exact[i];
    sums.difference += std::abs(difference);
    sums.exact += std::abs(exact[i]);
    sums.difference_squares += difference * difference;
  }
  sums.count += static_cast<int64_t>(exact.size());
}

std::vector<AttentionError> LayerErrors::layers() const {
  std::vector<AttentionError> result;
  for (const Sums& sums : sums_) {
    result.push_back(
        {.cosine = sums.dot / std::sqrt(sums.out_squares * sums.exact_squares),
         .relative_l1 = sums.difference / sums.exact,
         .rmse = std::sqrt(sums.difference_squares / static_cast<double>(sums.count))});
  }
  return result;
}

std::vector<AttentionError> measure_layers(std::span<const std::span<const int32_t>> texts,
                                           const AttentionDims& dims, const AttentionProber& prober,
                                           const std::function<bool()>& after_text) {
  LayerErrors errors;
  for (const std::span<const int32_t> ids : texts) {
    prober(ids, [&](const Model::AttentionRecord& record) {
      errors.add(record, exact_attention(record, dims));
    });
    if (!after_text()) break;
  }
  return errors.layers();
}

std::vector<AttentionError> measure_layers(std::span<const std::span<const int32_t>> texts,
                                           Model& model, const std::function<bool()>& after_text) {
  const ModelInfo info = model.info();
  return measure_layers(
      texts,
      {.num_heads = info.num_heads, .num_kv_heads = info.num_kv_heads, .head_dim = info.head_dim},
      [&model](std::span<const int32_t> ids,
               const std::function<void(const Model::AttentionRecord&)>& on_layer) {
        model.probe_attention(ids, on_layer);
      },
      after_text);
}

}  // namespace sagelm
