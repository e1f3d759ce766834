// The forward pass against a float64 implementation written from the definition, on small random
// models of every shape the loader accepts.
#include "model/llama.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <utility>

#include "backend/cpu/cpu_backend.h"
#include "base/dtype.h"
#include "base/error.h"

namespace sagelm {
namespace {

// A model with random weights that owns its bytes.
class RandomModel {
 public:
  RandomModel(int64_t heads, int64_t kv_heads, int64_t head_dim, bool tied, DType dtype,
              unsigned seed = 1)
      : random_(seed) {
    config.vocab_size = 97;
    config.hidden_size = 48;
    config.intermediate_size = 80;
    config.num_layers = 2;
    config.num_heads = heads;
    config.num_kv_heads = kv_heads;
    config.head_dim = head_dim;
    config.max_position_embeddings = 512;
    config.tie_word_embeddings = tied;
    config.dtype = dtype;
    const int64_t hidden = config.hidden_size;
    weights.embedding = tensor({config.vocab_size, hidden}, 0.4, 0.0);
    for (int64_t i = 0; i < config.num_layers; ++i) {
      LayerWeights layer;
      layer.input_norm = tensor({hidden}, 0.2, 1.0);
      layer.q_proj = tensor({config.q_size(), hidden}, 0.18, 0.0);
      layer.k_proj = tensor({config.kv_size(), hidden}, 0.18, 0.0);
      layer.v_proj = tensor({config.kv_size(), hidden}, 0.25, 0.0);
      layer.o_proj = tensor({hidden, config.q_size()}, 0.2, 0.0);
      layer.post_norm = tensor({hidden}, 0.2, 1.0);
      layer.gate_proj = tensor({config.intermediate_size, hidden}, 0.2, 0.0);
      layer.up_proj = tensor({config.intermediate_size, hidden}, 0.2, 0.0);
      layer.down_proj = tensor({hidden, config.intermediate_size}, 0.15, 0.0);
      weights.layers.push_back(layer);
    }
    weights.final_norm = tensor({hidden}, 0.2, 1.0);
    weights.lm_head = tied ? weights.embedding : tensor({config.vocab_size, hidden}, 0.3, 0.0);
  }

  static std::vector<double> values(const TensorView& view) {
    std::vector<double> out(static_cast<size_t>(view.num_elements()));
    for (size_t i = 0; i < out.size(); ++i) {
      if (view.dtype == DType::kF32) {
        float value;
        std::memcpy(&value, view.data + 4 * i, 4);
        out[i] = value;
      } else {
        uint16_t raw;
        std::memcpy(&raw, view.data + 2 * i, 2);
        out[i] = view.dtype == DType::kF16 ? half_to_float(raw) : bfloat16_to_float(raw);
      }
    }
    return out;
  }

  void poison(const TensorView& view) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    std::memcpy(const_cast<std::byte*>(view.data), &nan, sizeof nan);
  }

  ModelConfig config;
  ModelWeights weights;

 private:
  TensorView tensor(std::vector<int64_t> shape, double scale, double mean) {
    TensorView view;
    view.dtype = config.dtype;
    view.shape = std::move(shape);
    const auto count = static_cast<size_t>(view.num_elements());
    view.bytes = count * dtype_size(view.dtype);
    auto& bytes = storage_.emplace_back(view.bytes);
    std::normal_distribution<float> normal(static_cast<float>(mean), static_cast<float>(scale));
    for (size_t i = 0; i < count; ++i) {
      const float value = normal(random_);
      if (view.dtype == DType::kF32) {
        std::memcpy(bytes.data() + 4 * i, &value, 4);
      } else {
        const uint16_t raw =
            view.dtype == DType::kF16 ? float_to_half(value) : float_to_bfloat16(value);
        std::memcpy(bytes.data() + 2 * i, &raw, 2);
      }
    }
    view.data = bytes.data();
    return view;
  }

  std::mt19937 random_;
  std::vector<std::vector<std::byte>> storage_;
};

using Row = std::vector<double>;

Row product(const TensorView& weight, const Row& x) {
  const std::vector<double> w = RandomModel::values(weight);
  Row out(static_cast<size_t>(weight.shape[0]), 0.0);
  for (size_t n = 0; n < out.size(); ++n) {
    for (size_t k = 0; k < x.size(); ++k) out[n] += w[n * x.size() + k] * x[k];
  }
  return out;
}

Row norm(const TensorView& weight, const Row& x, double eps) {
  const std::vector<double> w = RandomModel::values(weight);
  double sum = 0;
  for (double value : x) sum += value * value;
  const double scale = 1.0 / std::sqrt(sum / static_cast<double>(x.size()) + eps);
  Row out(x.size());
  for (size_t i = 0; i < x.size(); ++i) out[i] = x[i] * scale * w[i];
  return out;
}

void rotate(Row& x, int64_t dim, size_t position, const ModelConfig& config) {
  const auto half = static_cast<size_t>(dim / 2);
  for (size_t head = 0; head < x.size() / static_cast<size_t>(dim); ++head) {
    double* h = x.data() + head * static_cast<size_t>(dim);
    for (size_t i = 0; i < half; ++i) {
      const double angle =
          static_cast<double>(position) *
          std::pow(config.rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(dim));
      const double a = h[i], b = h[i + half];
      h[i] = a * std::cos(angle) - b * std::sin(angle);
      h[i + half] = b * std::cos(angle) + a * std::sin(angle);
    }
  }
}

// Logits after every token, [tokens][vocab].
std::vector<Row> reference_logits(const RandomModel& model, std::span<const int32_t> tokens) {
  const ModelConfig& c = model.config;
  const std::vector<double> table = RandomModel::values(model.weights.embedding);
  std::vector<Row> hidden;
  for (int32_t token : tokens) {
    const auto begin = table.begin() + token * c.hidden_size;
    hidden.emplace_back(begin, begin + c.hidden_size);
  }
  const auto dim = static_cast<size_t>(c.head_dim);
  for (const LayerWeights& layer : model.weights.layers) {
    std::vector<Row> q, k, v;
    for (size_t t = 0; t < hidden.size(); ++t) {
      const Row x = norm(layer.input_norm, hidden[t], c.rms_norm_eps);
      q.push_back(product(layer.q_proj, x));
      k.push_back(product(layer.k_proj, x));
      v.push_back(product(layer.v_proj, x));
      rotate(q.back(), c.head_dim, t, c);
      rotate(k.back(), c.head_dim, t, c);
    }
    for (size_t t = 0; t < hidden.size(); ++t) {
      Row attended(static_cast<size_t>(c.q_size()), 0.0);
      for (int64_t head = 0; head < c.num_heads; ++head) {
        const size_t at = static_cast<size_t>(head) * dim;
        const size_t kv_at = static_cast<size_t>(head / (c.num_heads / c.num_kv_heads)) * dim;
        Row weights(t + 1);
        double total = 0;
        for (size_t s = 0; s <= t; ++s) {
          double dot = 0;
          for (size_t i = 0; i < dim; ++i) dot += q[t][at + i] * k[s][kv_at + i];
          weights[s] = std::exp(dot / std::sqrt(static_cast<double>(dim)));
          total += weights[s];
        }
        for (size_t s = 0; s <= t; ++s) {
          for (size_t i = 0; i < dim; ++i) attended[at + i] += weights[s] / total * v[s][kv_at + i];
        }
      }
      const Row o = product(layer.o_proj, attended);
      for (size_t i = 0; i < o.size(); ++i) hidden[t][i] += o[i];
    }
    for (Row& h : hidden) {
      const Row x = norm(layer.post_norm, h, c.rms_norm_eps);
      Row gate = product(layer.gate_proj, x);
      const Row up = product(layer.up_proj, x);
      for (size_t i = 0; i < gate.size(); ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
      const Row down = product(layer.down_proj, gate);
      for (size_t i = 0; i < down.size(); ++i) h[i] += down[i];
    }
  }
  std::vector<Row> logits;
  for (const Row& h : hidden) {
    logits.push_back(
        product(model.weights.lm_head, norm(model.weights.final_norm, h, c.rms_norm_eps)));
  }
  return logits;
}

double reference_logprob(const Row& logits, int32_t target) {
  double total = 0;
  for (double x : logits) total += std::exp(x);
  return logits[static_cast<size_t>(target)] - std::log(total);
}

std::vector<int32_t> random_tokens(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % 97);
  return tokens;
}

struct Case {
  int64_t heads, kv_heads, head_dim;
  bool tied;
  DType dtype;
};

class LlamaShapes : public testing::TestWithParam<Case> {};

TEST_P(LlamaShapes, LogitsAndScoresAgreeWithFloat64) {
  const Case& shape = GetParam();
  const RandomModel model(shape.heads, shape.kv_heads, shape.head_dim, shape.tied, shape.dtype);
  const auto backend = make_cpu_backend(2);
  Llama llama(model.config, model.weights, *backend, {AttentionVariant::kFp16, true});
  KvCache cache = llama.make_cache(KvType::kFp16, {.pages = 8});
  const std::vector<int32_t> tokens = random_tokens(70, 3);
  const std::vector<Row> expected = reference_logits(model, tokens);

  Sequence sequence(cache);
  const StepInput input{&sequence, tokens};
  const auto scores = llama.score(std::span(&input, 1));
  for (size_t t = 1; t < tokens.size(); ++t) {
    EXPECT_NEAR(scores[0][t].logprob, reference_logprob(expected[t - 1], tokens[t]), 0.02) << t;
  }
  Sequence again(cache);
  const StepInput same{&again, tokens};
  const std::vector<float> logits = llama.step(std::span(&same, 1));
  for (size_t i = 0; i < logits.size(); ++i) {
    EXPECT_NEAR(logits[i], expected.back()[i], 0.02) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(All, LlamaShapes,
                         testing::Values(Case{4, 4, 12, false, DType::kBF16},
                                         Case{4, 2, 12, true, DType::kBF16},
                                         Case{6, 1, 16, false, DType::kF16},
                                         Case{2, 2, 40, true, DType::kF32},
                                         Case{3, 3, 64, false, DType::kBF16}));

TEST(Llama, ChunksBatchesAndSingleTokensGiveTheSameScores) {
  const RandomModel model(4, 2, 16, false, DType::kBF16);
  const auto backend = make_cpu_backend(2);
  Llama llama(model.config, model.weights, *backend, {AttentionVariant::kFp16, true});
  KvCache cache = llama.make_cache(KvType::kFp16, {.pages = 12});
  const std::vector<int32_t> tokens = random_tokens(150, 5);
  const std::span<const int32_t> all(tokens);
  Sequence whole(cache);
  const StepInput input{&whole, all};
  const auto expected = llama.score(std::span(&input, 1)).front();

  for (const size_t chunk : {1, 7, 64, 149}) {
    Sequence sequence(cache);
    for (size_t begin = 0; begin < all.size(); begin += chunk) {
      const size_t count = std::min(chunk, all.size() - begin);
      const bool last = begin + count == all.size();
      const StepInput part{&sequence, all.subspan(begin, count), last ? -1 : all[begin + count]};
      const auto scores = llama.score(std::span(&part, 1)).front();
      ASSERT_EQ(scores.size(), count + (last ? 0 : 1));
      for (size_t j = 1; j < scores.size(); ++j) {
        EXPECT_NEAR(scores[j].logprob, expected[begin + j].logprob, 2e-3) << chunk << " " << begin;
      }
    }
  }

  // Prefixes of different lengths side by side.
  std::vector<Sequence> sequences;
  std::vector<StepInput> inputs;
  for (int i = 0; i < 5; ++i) sequences.emplace_back(cache);
  for (size_t i = 0; i < 5; ++i) inputs.push_back({&sequences[i], all.first(1 + 31 * i)});
  const auto batched = llama.score(inputs);
  for (size_t i = 0; i < inputs.size(); ++i) {
    for (size_t j = 1; j < batched[i].size(); ++j) {
      EXPECT_NEAR(batched[i][j].logprob, expected[j].logprob, 2e-3) << i << " " << j;
    }
  }
}

TEST(Llama, NanInAWeightNamesTheLayerAndLeavesTheSequenceAlone) {
  RandomModel model(4, 4, 12, false, DType::kF32);
  model.poison(model.weights.layers[1].o_proj);
  const auto backend = make_cpu_backend(1);
  Llama llama(model.config, model.weights, *backend, {AttentionVariant::kFp16, true});
  KvCache cache = llama.make_cache(KvType::kFp16, {.pages = 2});
  Sequence sequence(cache);
  const std::vector<int32_t> tokens = {1, 2, 3};
  const StepInput input{&sequence, tokens};
  try {
    llama.step(std::span(&input, 1));
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("layer 1"), std::string::npos) << error.what();
  }
  EXPECT_EQ(sequence.length(), 0);
}

TEST(Llama, RefusesWhatDoesNotFit) {
  const RandomModel model(4, 4, 12, false, DType::kF32);
  const auto backend = make_cpu_backend(1);
  Llama llama(model.config, model.weights, *backend, {AttentionVariant::kFp16, true});
  KvCache cache = llama.make_cache(KvType::kFp16, {.pages = 6});
  Sequence sequence(cache);
  const std::vector<int32_t> too_long(513, 1);
  const StepInput input{&sequence, too_long};
  EXPECT_THROW(llama.step(std::span(&input, 1)), Error);
  const std::vector<int32_t> outside = {1, 97};
  const StepInput bad{&sequence, outside};
  EXPECT_THROW(llama.step(std::span(&bad, 1)), Error);
  EXPECT_EQ(sequence.length(), 0);
  EXPECT_EQ(cache.free_room().pages, 6);
}

// ---- The quantized cache ---------------------------------------------------------------------

// A model with a cache of the given type, which has room for a few sequences of one text.
struct Cached {
  Cached(const RandomModel& model, AttentionVariant variant, KvType type)
      : backend(make_cpu_backend(2)),
        llama(model.config, model.weights, *backend, {variant, true}),
        cache(llama.make_cache(type, {.pages = 16, .tails = 4})) {}

  // Log-probabilities of tokens[from ...], appended to sequence in chunks.
  std::vector<double> score(Sequence& sequence, std::span<const int32_t> tokens, size_t chunk) {
    std::vector<double> result;
    for (auto begin = static_cast<size_t>(sequence.length()); begin < tokens.size();) {
      const size_t end = std::min(begin + chunk, tokens.size());
      const StepInput part{&sequence, tokens.subspan(begin, end - begin),
                           end < tokens.size() ? tokens[end] : -1};
      const auto scores = llama.score(std::span(&part, 1)).front();
      for (size_t j = 1; j < scores.size(); ++j) {
        result.push_back(static_cast<double>(scores[j].logprob));
      }
      begin = end;
    }
    return result;
  }

  std::unique_ptr<Backend> backend;
  Llama llama;
  KvCache cache;
};

// Mean difference of the last entries of two lists of log-probabilities.
double mean_difference(const std::vector<double>& a, const std::vector<double>& b) {
  const size_t count = std::min(a.size(), b.size());
  double sum = 0;
  for (size_t i = 1; i <= count; ++i) sum += std::abs(a[a.size() - i] - b[b.size() - i]);
  return sum / static_cast<double>(count);
}

// The bound of docs/kv-cache.md, in units of what sage2 and exact attention differ by.
constexpr double kSplitBound = 1.25;

TEST(LlamaQuantizedCache, ChunksRollbackAndForksStayWithinTheStatedBound) {
  const RandomModel model(4, 2, 32, false, DType::kF32);
  const std::vector<int32_t> tokens = random_tokens(400, 5);
  const std::span<const int32_t> all(tokens);
  Cached exact(model, AttentionVariant::kFp16, KvType::kFp16);
  Cached quantized(model, AttentionVariant::kSage2_8b, KvType::kInt8);
  Sequence reference(exact.cache), whole(quantized.cache);
  const std::vector<double> expected = quantized.score(whole, all, 400);
  const double noise = mean_difference(expected, exact.score(reference, all, 400));
  EXPECT_GT(noise, 0);
  for (const size_t chunk : {1, 7, 127, 128, 129, 300}) {
    Sequence sequence(quantized.cache);
    const double difference = mean_difference(quantized.score(sequence, all, chunk), expected);
    EXPECT_LE(difference, kSplitBound * noise) << "chunks of " << chunk;
  }
  // Back to any length, forked or not, and on again.
  for (const int64_t length : {398, 390, 384, 383, 256, 130, 128, 127, 1, 0}) {
    Sequence fork = whole.fork(length);
    EXPECT_EQ(fork.length(), length >= 384 ? length : length / kPageTokens * kPageTokens);
    EXPECT_LE(mean_difference(quantized.score(fork, all, 400), expected), kSplitBound * noise);
    fork.truncate(length);
    EXPECT_LE(mean_difference(quantized.score(fork, all, 50), expected), kSplitBound * noise);
  }
  EXPECT_EQ(whole.length(), 400);
}

TEST(Llama, ExtendAppendsWhatAStepAppends) {
  const RandomModel model(4, 2, 16, false, DType::kF32);
  const std::vector<int32_t> tokens = random_tokens(300, 5);
  const std::span<const int32_t> all(tokens);
  const std::pair<AttentionVariant, KvType> kinds[] = {
      {AttentionVariant::kFp16, KvType::kFp16}, {AttentionVariant::kSage2_8b, KvType::kInt8}};
  for (const auto& [variant, type] : kinds) {
    Cached cached(model, variant, type);
    const auto logits_after = [&](bool extends) {
      Sequence sequence(cached.cache);
      for (const auto& part : {all.first(140), all.subspan(140, 120)}) {
        const StepInput input{&sequence, part};
        if (extends) {
          cached.llama.extend(std::span(&input, 1));
        } else {
          cached.llama.step(std::span(&input, 1));
        }
      }
      const StepInput last{&sequence, all.subspan(260)};
      return cached.llama.step(std::span(&last, 1));
    };
    EXPECT_EQ(logits_after(true), logits_after(false)) << attention_variant_name(variant);
  }
}

TEST(LlamaQuantizedCache, AStepThatFailsGoesBackToAWholePage) {
  const RandomModel model(4, 2, 16, false, DType::kF32);
  Cached cached(model, AttentionVariant::kSage2_8b, KvType::kInt8);
  const std::vector<int32_t> tokens = random_tokens(300, 5);
  Sequence sequence(cached.cache);
  cached.score(sequence, std::span(tokens).first(200), 200);
  std::vector<int32_t> bad(100, 1);
  bad.back() = 97;  // not in the vocabulary
  const StepInput input{&sequence, std::span(bad).first(20)};
  cached.llama.step(std::span(&input, 1));
  EXPECT_EQ(sequence.length(), 220);
  const StepInput few{&sequence, std::span(bad).last(5)};
  EXPECT_THROW(cached.llama.step(std::span(&few, 1)), Error);
  EXPECT_EQ(sequence.length(), 220);
  const StepInput many{&sequence, bad};
  EXPECT_THROW(cached.llama.step(std::span(&many, 1)), Error);
  EXPECT_EQ(sequence.length(), 128);
}

TEST(Rope, Llama3ScalingKeepsHighAndStretchesLowFrequencies) {
  ModelConfig config;
  config.head_dim = 128;
  config.rope_theta = 500000.0;
  const std::vector<float> plain = rope_inverse_frequencies(config);
  config.rope_scaling = {RopeScaling::Type::kLlama3, 8.0, 1.0, 4.0, 8192};
  const std::vector<float> scaled = rope_inverse_frequencies(config);
  EXPECT_EQ(scaled.front(), plain.front());
  EXPECT_FLOAT_EQ(scaled.back(), plain.back() / 8.0F);
}

}  // namespace
}  // namespace sagelm
