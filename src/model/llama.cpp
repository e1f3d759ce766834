#include "model/llama.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numbers>
#include <utility>

#include "base/dtype.h"
#include "base/error.h"

namespace sagelm {
namespace {

// Which scratch buffer holds what.
enum Slot : int {
  kHidden,
  kNormed,
  kQkv,
  kAttended,
  kGateUp,
  kActivated,
  kGathered,
  kLogits,
  kNumSlots
};

class NotFinite : public Error {
  using Error::Error;
};

void advance(std::span<const StepInput> inputs, const ModelConfig& config) {
  std::vector<Sequence*> sequences;
  std::vector<int64_t> counts;
  for (const StepInput& input : inputs) {
    const auto count = static_cast<int64_t>(input.tokens.size());
    if (input.sequence->length() + count > config.max_position_embeddings) {
      fail("{} tokens do not fit: the sequence holds {} and the model's context is {}", count,
           input.sequence->length(), config.max_position_embeddings);
    }
    sequences.push_back(input.sequence);
    counts.push_back(count);
  }
  Sequence::extend_all(sequences, counts);
}

// Tokens that score knows of: those of the input and the one after them, if it is given.
int64_t num_scored(const StepInput& input) {
  return static_cast<int64_t>(input.tokens.size()) + (input.next_token >= 0 ? 1 : 0);
}

Matrix rows_of(const Matrix& matrix, int64_t begin, int64_t count) {
  const auto offset = static_cast<size_t>(begin * matrix.cols) * dtype_size(matrix.type);
  return {static_cast<std::byte*>(matrix.data) + offset, matrix.type, count, matrix.cols};
}

std::vector<float> copy_to_host(Backend& backend, Matrix matrix) {
  std::vector<float> values(static_cast<size_t>(matrix.rows * matrix.cols));
  backend.read_logits(matrix, values);
  return values;
}

bool is_decoding(std::span<const StepInput> inputs) {
  return std::ranges::all_of(inputs,
                             [](const StepInput& input) { return input.tokens.size() == 1; });
}

// The last row of each sequence.
std::vector<int32_t> last_rows(const Batch& batch) {
  std::vector<int32_t> rows;
  for (const SequenceChunk& sequence : batch.sequences) {
    rows.push_back(static_cast<int32_t>(sequence.first_row + sequence.q_len - 1));
  }
  return rows;
}

bool is_identity(std::span<const int32_t> rows, int64_t count) {
  if (static_cast<int64_t>(rows.size()) != count) return false;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i] != static_cast<int32_t>(i)) return false;
  }
  return true;
}

void roll_back(std::span<const StepInput> inputs) {
  for (const StepInput& input : inputs) {
    input.sequence->truncate(input.sequence->length() - static_cast<int64_t>(input.tokens.size()));
  }
}

}  // namespace

std::vector<float> rope_inverse_frequencies(const ModelConfig& config) {
  std::vector<float> result(static_cast<size_t>(config.head_dim / 2));
  const RopeScaling& scaling = config.rope_scaling;
  for (size_t i = 0; i < result.size(); ++i) {
    const double exponent = 2.0 * static_cast<double>(i) / static_cast<double>(config.head_dim);
    double frequency = 1.0 / std::pow(config.rope_theta, exponent);
    if (scaling.type == RopeScaling::Type::kLinear) {
      frequency /= scaling.factor;
    } else if (scaling.type == RopeScaling::Type::kLlama3) {
      // Long wavelengths are stretched by the factor, short ones kept, those between blended.
      const double wavelength = 2.0 * std::numbers::pi / frequency;
      const auto original = static_cast<double>(scaling.original_max_position_embeddings);
      const double ratio = original / wavelength;
      if (ratio < scaling.low_freq_factor) {
        frequency /= scaling.factor;
      } else if (ratio <= scaling.high_freq_factor) {
        const double blend = (ratio - scaling.low_freq_factor) /
                             (scaling.high_freq_factor - scaling.low_freq_factor);
        frequency = (1.0 - blend) * frequency / scaling.factor + blend * frequency;
      }
    }
    result[i] = static_cast<float>(frequency);
  }
  return result;
}

Llama::Llama(const ModelConfig& config, const ModelWeights& weights, Backend& backend,
             const AttentionSpec& attention, const std::function<void(double)>& progress)
    : config_(config),
      attention_(static_cast<size_t>(config.num_layers), attention),
      backend_(&backend),
      inverse_frequencies_(rope_inverse_frequencies(config)) {
  embedding_ = backend.add_embedding(weights.embedding);
  layers_.reserve(weights.layers.size());
  for (const LayerWeights& from : weights.layers) {
    Layer layer;
    layer.input_norm = backend.add_vector(from.input_norm);
    layer.qkv = backend.add_linear(std::vector{from.q_proj, from.k_proj, from.v_proj});
    layer.o = backend.add_linear(std::span(&from.o_proj, 1));
    layer.post_norm = backend.add_vector(from.post_norm);
    layer.gate_up = backend.add_gate_up(from.gate_proj, from.up_proj);
    layer.down = backend.add_linear(std::span(&from.down_proj, 1));
    layers_.push_back(layer);
    if (progress) {
      progress(static_cast<double>(layers_.size()) /
               static_cast<double>(weights.layers.size() + 1));
    }
  }
  final_norm_ = backend.add_vector(weights.final_norm);
  lm_head_ = backend.add_linear(std::span(&weights.lm_head, 1));
  if (progress) progress(1.0);
}

void Llama::set_attention(std::vector<AttentionSpec> layers) {
  if (layers.size() != layers_.size()) {
    fail("attention is set for {} layers, and the model has {}", layers.size(), layers_.size());
  }
  attention_ = std::move(layers);
}

std::vector<ScratchSize> Llama::scratch_sizes(const ModelConfig& config, int64_t tokens) {
  std::vector<ScratchSize> sizes(kNumSlots);
  const int64_t hidden = config.hidden_size;
  sizes[kHidden] = sizes[kGathered] = {tokens, hidden, Holds::kResidual};
  sizes[kNormed] = {tokens, hidden, Holds::kActivations};
  sizes[kQkv] = {tokens, config.q_size() + 2 * config.kv_size(), Holds::kActivations};
  sizes[kAttended] = {tokens, config.q_size(), Holds::kActivations};
  sizes[kGateUp] = {tokens, 2 * config.intermediate_size, Holds::kActivations};
  sizes[kActivated] = {tokens, config.intermediate_size, Holds::kActivations};
  sizes[kLogits] = {std::min(tokens, kLogitsRows), config.vocab_size, Holds::kLogits};
  return sizes;
}

KvCache Llama::make_cache(KvType type, const KvRoom& room) {
  return KvCache(*backend_, type, config_.num_layers, config_.num_kv_heads, config_.head_dim, room);
}

Batch Llama::batch_of(std::span<const StepInput> inputs) {
  Batch batch;
  for (const StepInput& input : inputs) {
    SequenceChunk chunk;
    chunk.first_row = batch.rows();
    chunk.q_len = static_cast<int64_t>(input.tokens.size());
    chunk.kv_len = input.sequence->length();
    chunk.pages = input.sequence->pages();
    chunk.tail = input.sequence->tail();
    batch.tokens.insert(batch.tokens.end(), input.tokens.begin(), input.tokens.end());
    batch.sequences.push_back(chunk);
  }
  return batch;
}

void Llama::check_tokens(const Batch& batch) const {
  for (const int32_t token : batch.tokens) {
    if (!is_token_name(token) && (token < 0 || token >= config_.vocab_size)) {
      fail("token id {} is outside the model's vocabulary of {}", token, config_.vocab_size);
    }
  }
}

Matrix Llama::run_layers(const Batch& batch, KvStorage& kv, std::span<const int32_t> wanted,
                         bool check, const AttentionProbe& probe) {
  Backend& b = *backend_;
  const int64_t rows = batch.rows();
  const auto num_wanted = static_cast<int64_t>(wanted.size());
  const Matrix hidden = b.scratch(kHidden, rows, config_.hidden_size, Holds::kResidual);
  // All rows in their order need no gathering.
  const bool wants_all = is_identity(wanted, rows);
  const Matrix gathered =
      wants_all ? hidden : b.scratch(kGathered, num_wanted, config_.hidden_size, Holds::kResidual);
  const Matrix normed = b.scratch(kNormed, rows, config_.hidden_size, Holds::kActivations);
  const Matrix qkv =
      b.scratch(kQkv, rows, config_.q_size() + 2 * config_.kv_size(), Holds::kActivations);
  const Matrix attended = b.scratch(kAttended, rows, config_.q_size(), Holds::kActivations);
  // Lies where qkv does, which nothing reads any more when the last layer has attended.
  const Matrix gathered_attended =
      wants_all ? attended : Matrix{qkv.data, qkv.type, num_wanted, config_.q_size()};
  const Matrix gate_up =
      b.scratch(kGateUp, rows, 2 * config_.intermediate_size, Holds::kActivations);
  const Matrix activated =
      b.scratch(kActivated, rows, config_.intermediate_size, Holds::kActivations);

  const auto tail_of = [&](const Layer& layer, Matrix from, Matrix x) {
    return LayerTail{.attended = from,
                     .x = x,
                     .o = layer.o,
                     .norm = layer.post_norm,
                     .gate_up = layer.gate_up,
                     .down = layer.down,
                     .next_norm = {},
                     .next = {},
                     .next_out = qkv,
                     .eps = config_.rms_norm_eps,
                     .normed = rows_of(normed, 0, x.rows),
                     .gate_up_out = rows_of(gate_up, 0, x.rows),
                     .activated = rows_of(activated, 0, x.rows)};
  };

  b.embed(embedding_, batch, hidden);
  b.enter_layer(0);
  b.norm_linear(hidden, layers_[0].input_norm, config_.rms_norm_eps, layers_[0].qkv, normed, qkv);
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    const auto index = static_cast<int64_t>(i);
    const AttentionShape shape{config_.num_heads, config_.num_kv_heads, config_.head_dim,
                               attention_[i]};
    const bool last = i + 1 == layers_.size();
    b.enter_layer(index);
    if (last && wanted.empty() && !check) {
      b.rope_append(qkv, batch, shape, inverse_frequencies_, index, kv);
      break;  // nothing reads the rest any more
    }
    if (probe) {
      b.rope_append(qkv, batch, shape, inverse_frequencies_, index, kv);
      b.attention(qkv, batch, shape, index, kv, attended);
    } else {
      b.append_and_attend(qkv, batch, shape, inverse_frequencies_, index, kv, attended);
    }
    if (check && !b.all_finite(attended)) {
      throw NotFinite(fmt::format("NaN or Inf appears in the attention of layer {} ({})", i,
                                  describe_attention(attention_[i])));
    }
    if (probe) probe(index, copy_to_host(b, qkv), copy_to_host(b, attended));
    if (last && wanted.empty()) break;
    LayerTail tail =
        last ? tail_of(layer, gathered_attended, gathered) : tail_of(layer, attended, hidden);
    if (!last) {
      tail.next_norm = layers_[i + 1].input_norm;
      tail.next = layers_[i + 1].qkv;
    } else if (!wants_all) {
      b.gather_rows(wanted, {{hidden, gathered}, {attended, gathered_attended}});
    }
    b.layer_tail(tail);
    if (check && !b.all_finite(tail.x)) {
      throw NotFinite(fmt::format("NaN or Inf appears in the output of layer {}", i));
    }
  }
  b.enter_layer(-1);
  return gathered;
}

Matrix Llama::head(Matrix hidden) {
  Backend& b = *backend_;
  const Matrix normed = b.scratch(kNormed, hidden.rows, config_.hidden_size, Holds::kActivations);
  const Matrix logits = b.scratch(kLogits, hidden.rows, config_.vocab_size, Holds::kLogits);
  b.norm_linear(hidden, final_norm_, config_.rms_norm_eps, lm_head_, normed, logits);
  return logits;
}

template <typename Want, typename Read>
void Llama::run(std::span<const StepInput> inputs, bool with_head, const Want& want,
                const Read& read) {
  if (inputs.empty()) return;
  advance(inputs, config_);
  const Batch batch = batch_of(inputs);
  KvStorage& kv = inputs.front().sequence->cache().storage();
  try {
    const std::vector<int32_t> wanted = want(batch);
    backend_->begin(batch);
    Matrix result;
    if (with_head) {
      check_tokens(batch);  // embed may not run
      backend_->repeat(kv, attention_, [&] { head(run_layers(batch, kv, wanted, false)); });
      result = backend_->scratch(kLogits, static_cast<int64_t>(wanted.size()), config_.vocab_size,
                                 Holds::kLogits);
    } else {
      result = run_layers(batch, kv, wanted, false);
    }
    try {
      read(result);
    } catch (const Error&) {
      // If the logits are not finite: run again with a check after each step, to name the layer. A
      // device that failed otherwise will again, and what it said first counts.
      try {
        run_layers(batch, kv, wanted, true);
      } catch (const NotFinite&) {
        throw;
      } catch (const Error&) {
      }
      throw;
    }
  } catch (...) {
    roll_back(inputs);
    throw;
  }
}

std::vector<float> Llama::step(std::span<const StepInput> inputs) {
  std::vector<float> logits(inputs.size() * static_cast<size_t>(config_.vocab_size));
  const bool decoding = is_decoding(inputs);  // the same work every time
  run(inputs, decoding, last_rows,
      [&](Matrix result) { backend_->read_logits(decoding ? result : head(result), logits); });
  return logits;
}

void Llama::extend(std::span<const StepInput> inputs) {
  run(
      inputs, false, [](const Batch&) { return std::vector<int32_t>(); }, [](Matrix) {});
}

int32_t Llama::draw(std::span<const StepInput> inputs, std::span<const TokenDraw> draws) {
  advance(inputs, config_);
  try {
    const Batch batch = batch_of(inputs);
    check_tokens(batch);
    const std::vector<int32_t> wanted = last_rows(batch);
    KvStorage& kv = inputs.front().sequence->cache().storage();
    backend_->begin(batch, draws);
    const auto work = [&] { backend_->draw(head(run_layers(batch, kv, wanted, false))); };
    if (is_decoding(inputs)) {
      backend_->repeat(kv, attention_, work);
    } else {
      work();
    }
    return backend_->drawn_name();
  } catch (...) {
    roll_back(inputs);
    throw;
  }
}

std::vector<int32_t> Llama::read_drawn(int32_t name, size_t count) {
  std::vector<int32_t> tokens(count);
  backend_->read_drawn(name, tokens);
  return tokens;
}

void Llama::explain_not_finite(std::span<const StepInput> inputs) {
  try {
    const Batch batch = batch_of(inputs);
    backend_->begin(batch);
    run_layers(batch, inputs.front().sequence->cache().storage(), last_rows(batch), true);
  } catch (const Error&) {
    roll_back(inputs);
    throw;
  }
  roll_back(inputs);
  fail("the logits hold NaN or Inf");
}

template <typename Function>
void Llama::run_scored(std::span<const StepInput> inputs, std::span<const int64_t> first_scored,
                       const Function& read) {
  std::vector<LogitsRow> places;
  // The logits of a row predict the token of the next one.
  const auto rows_before = [&](const Batch& batch) {
    std::vector<int32_t> rows;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const int64_t end = num_scored(inputs[i]);
      const int64_t first = first_scored.empty() ? 1 : std::max<int64_t>(1, first_scored[i]);
      for (int64_t j = first; j < end; ++j) {
        rows.push_back(static_cast<int32_t>(batch.sequences[i].first_row + j - 1));
        places.push_back({.input = i, .token = j});
      }
    }
    return rows;
  };
  run(inputs, false, rows_before, [&](Matrix hidden) {
    for (int64_t begin = 0; begin < hidden.rows; begin += kLogitsRows) {
      const int64_t count = std::min(kLogitsRows, hidden.rows - begin);
      read(std::span<const LogitsRow>(places).subspan(static_cast<size_t>(begin),
                                                      static_cast<size_t>(count)),
           head(rows_of(hidden, begin, count)));
    }
  });
}

std::vector<std::vector<TokenScore>> Llama::score(std::span<const StepInput> inputs,
                                                  std::span<const int64_t> first_scored) {
  std::vector<std::vector<TokenScore>> scores;
  for (const StepInput& input : inputs) scores.emplace_back(static_cast<size_t>(num_scored(input)));
  std::vector<int32_t> targets;
  std::vector<TokenScore> block(kLogitsRows);
  run_scored(inputs, first_scored, [&](std::span<const LogitsRow> rows, Matrix logits) {
    targets.clear();
    for (const LogitsRow& row : rows) {
      const StepInput& input = inputs[row.input];
      const auto j = static_cast<size_t>(row.token);
      targets.push_back(j < input.tokens.size() ? input.tokens[j] : input.next_token);
    }
    backend_->score(logits, targets, std::span(block).first(rows.size()));
    for (size_t k = 0; k < rows.size(); ++k) {
      scores[rows[k].input][static_cast<size_t>(rows[k].token)] = block[k];
    }
  });
  return scores;
}

void Llama::score_logits(std::span<const StepInput> inputs, std::span<const int64_t> first_scored,
                         const LogitsCallback& on_block) {
  std::vector<float> block;
  run_scored(inputs, first_scored, [&](std::span<const LogitsRow> rows, Matrix logits) {
    block.resize(rows.size() * static_cast<size_t>(config_.vocab_size));
    backend_->read_logits(logits, block);
    on_block(rows, block);
  });
}

void Llama::probe_attention(const StepInput& input, const AttentionProbe& probe) {
  advance({&input, 1}, config_);
  const Batch batch = batch_of({&input, 1});
  try {
    backend_->begin(batch);
    run_layers(batch, input.sequence->cache().storage(), {}, true, probe);
  } catch (...) {
    roll_back({&input, 1});
    throw;
  }
}

}  // namespace sagelm
