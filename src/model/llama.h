// The Llama forward pass over ragged batches (Llama 2, arXiv:2307.09288; GQA, RoPE and SwiGLU as in
// transformers' modeling_llama.py). It does not know which device or attention kernel runs.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/batch.h"
#include "base/model_spec.h"
#include "model/kv_cache.h"

namespace sagelm {

// What to compute for one sequence in a step.
struct StepInput {
  Sequence* sequence = nullptr;
  std::span<const int32_t> tokens;  // appended to the sequence; not empty
  int32_t next_token = -1;  // when scoring: the token after these, scored too though not appended
};

// Whose logits a row holds: those that predict inputs[input].tokens[token].
struct LogitsRow {
  size_t input = 0;
  int64_t token = 0;  // tokens.size(): the input's next_token
};
using LogitsCallback =
    std::function<void(std::span<const LogitsRow> rows, std::span<const float> logits)>;

// Sees what attention read and wrote in a layer, one row per token of the step: qkv [rows, q + k +
// v] with queries and keys rotated, out [rows, num_heads * head_dim].
using AttentionProbe =
    std::function<void(int64_t layer, std::span<const float> qkv, std::span<const float> out)>;

class Llama {
 public:
  // Rows of logits computed at once, which bounds their buffer: the most inputs of step().
  static constexpr int64_t kLogitsRows = 256;

  // Hands the weights to the backend; the views are not used after construction. progress, if set,
  // is called with the fraction done, 0 to 1. All layers begin with the same attention.
  Llama(const ModelConfig& config, const ModelWeights& weights, Backend& backend,
        const AttentionSpec& attention, const std::function<void(double)>& progress = {});

  const ModelConfig& config() const { return config_; }
  // One per layer.
  std::span<const AttentionSpec> attention() const { return attention_; }
  void set_attention(std::vector<AttentionSpec> layers);
  Backend& backend() { return *backend_; }
  KvCache make_cache(KvType type, const KvRoom& room);
  // The scratch memory that steps of up to `tokens` tokens take: the backend must have it reserved.
  static std::vector<ScratchSize> scratch_sizes(const ModelConfig& config, int64_t tokens);

  // All inputs' sequences are of one cache and distinct.

  // Appends every input's tokens to its sequence and returns the logits after each input's last
  // token: [inputs.size(), vocab_size]. Throws Error (NaN or Inf: names the layer; cache full;
  // context beyond the model's) and leaves the sequences as they were, or, where a page of a
  // quantized cache was filled, as Sequence::truncate leaves them.
  std::vector<float> step(std::span<const StepInput> inputs);
  // As step() without the logits: a GPU may still be at it afterwards, and what is not finite shows
  // in a later step's logits.
  void extend(std::span<const StepInput> inputs);

  // Appends tokens likewise and has tokens drawn by those logits (TokenDraw::row: of which input).
  // Returns before that is done: the name of the first one. On devices that run ahead, errors may
  // come with a later call. Inputs may hold names.
  int32_t draw(std::span<const StepInput> inputs, std::span<const TokenDraw> draws);
  // Waits for the tokens drawn in a step, whose first name this is; -1 for logits that were not
  // finite.
  std::vector<int32_t> read_drawn(int32_t name, size_t count);
  // After that: throws Error naming the layer, if it can be found. inputs: the step's, whose
  // sequences end with its tokens; afterwards they end before them, as step() leaves them.
  [[noreturn]] void explain_not_finite(std::span<const StepInput> inputs);

  // Appends tokens likewise and scores them given all before them in their sequence: out[i][j] is
  // about inputs[i].tokens[j] for j >= max(1, first_scored[i]), earlier entries hold zeros, and
  // out[i][tokens.size()] is about next_token where that is given. So a text is scored in chunks of
  // any size by passing each chunk the first token of the following one.
  std::vector<std::vector<TokenScore>> score(std::span<const StepInput> inputs,
                                             std::span<const int64_t> first_scored = {});
  // The same with on_block in place of scores: gets the logits [rows.size(), vocab_size] of the
  // tokens that score would score, block by block in their order.
  void score_logits(std::span<const StepInput> inputs, std::span<const int64_t> first_scored,
                    const LogitsCallback& on_block);
  // Appends input's tokens and shows probe every layer's attention; nothing is scored.
  void probe_attention(const StepInput& input, const AttentionProbe& probe);

 private:
  struct Layer {
    WeightHandle input_norm, qkv, o, post_norm, gate_up, down;
  };

  // Of sequences that have the inputs' tokens.
  static Batch batch_of(std::span<const StepInput> inputs);
  void check_tokens(const Batch& batch) const;
  // Of the batch that the backend was told to begin: returns the hidden states of the wanted rows,
  // in their order. With check, throws Error naming the first layer whose results are not finite.
  // probe may be empty.
  Matrix run_layers(const Batch& batch, KvStorage& kv, std::span<const int32_t> wanted, bool check,
                    const AttentionProbe& probe = {});
  Matrix head(Matrix hidden);  // logits
  // Runs the layers over the inputs and hands the hidden states of the rows that want(batch) names,
  // or with_head their logits, to read.
  template <typename Want, typename Read>
  void run(std::span<const StepInput> inputs, bool with_head, const Want& want, const Read& read);
  // Runs the inputs and calls read(rows, logits) for each block of what is to be scored.
  template <typename Function>
  void run_scored(std::span<const StepInput> inputs, std::span<const int64_t> first_scored,
                  const Function& read);

  ModelConfig config_;
  std::vector<AttentionSpec> attention_;
  Backend* backend_;
  std::vector<float> inverse_frequencies_;
  WeightHandle embedding_, final_norm_, lm_head_;
  std::vector<Layer> layers_;
};

// One inverse frequency per pair of rotated dimensions, [head_dim / 2], with the config's scaling.
std::vector<float> rope_inverse_frequencies(const ModelConfig& config);

}  // namespace sagelm
