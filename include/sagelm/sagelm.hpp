// SageLM's public C++ API: load a Llama checkpoint, generate text from it, score text with it.
//
//   auto model = sagelm::Model::load({.model = "Llama-2-7b-hf", .attention = "sage"});
//   auto answer = model.generate("Once upon a time", {.max_tokens = 64},
//                                [](std::string_view text) { std::cout << text; return true; });
//
// Every function throws sagelm::Error (a std::runtime_error) with one sentence that says what is
// wrong and where; sagelm::UsageError if an option's value can't be meant. A Model and its
// Sessions are for one thread at a time; a Session may outlive its Model.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace sagelm {

struct LoadOptions {
  std::filesystem::path model = {};  // an HF directory or a .safetensors file in one
  // In place of a model: an architecture with made-up weights, "llama2-7b" for example, ":bf16"
  // behind it for BF16 instead of FP16. It has no tokenizer, so its text stays empty.
  std::string random_weights = {};
  // fp16, sage, sage1[-t|-b|-vt|-vb] or sage2[-8b|-4b]; or one of them per layer, separated by '/'.
  std::string attention = "sage";
  bool smooth_k = true;
  // fp16, int8 (full pages quantized: half the bytes; for sage2), int4 (their keys in 4 bits; for
  // sage2 and sage2-4b) or auto, which is int8, else int4, where the attention of every layer and
  // the device can read it. docs/kv-cache.md
  std::string kv_cache = "auto";
  std::string device = "auto";  // auto, cpu, cuda or cuda:N
  int threads = 0;              // 0: one per core
  int64_t context = 0;          // tokens of a session at most; 0: the model's own
  // Tokens per step at most: bounds the memory of activations. 0: 2,048 on a CPU, 4,096 on a GPU.
  int64_t batch_tokens = 0;
  int64_t sessions = 0;  // load throws Error unless a GPU has memory for so many at once
  std::function<void(double fraction)> progress = {};  // while loading
};

struct ModelInfo {
  std::string name;
  std::string architecture;  // e.g. "LlamaForCausalLM"
  std::string device;        // e.g. "cpu (2 threads, avx512-vnni attention, BF16 products)"
  std::string attention;     // the kernel that runs, e.g. "sage2-8b (INT8 QK per thread, …)"
  std::vector<std::string> layer_attention;  // the variant that runs in each layer
  // What an adaptive choice picks from on this device, fastest first, the last being fp16.
  std::vector<std::string> adaptive_attention;
  std::string dtype;  // of the stored weights
  int64_t num_parameters = 0;
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t batch_tokens = 0;      // as in LoadOptions, the device's choice included
  int64_t max_context = 0;       // the model's own
  int64_t context = 0;           // as loaded
  int64_t checkpoint_bytes = 0;  // of the weights, as stored
  int64_t weight_bytes = 0;      // of the weights, as the backend holds them; estimated by inspect
  std::string kv_cache;          // "fp16", "int8" or "int4"
  int64_t kv_bytes_per_token = 0;  // of a full page
  int64_t kv_bytes = 0;            // of a session of `context` tokens, whole pages
  int64_t activation_bytes = 0;    // of steps: all that is not weights or KV cache
  double rope_theta = 0;
  bool tied_embeddings = false;
};

// What a loaded model holds now, and what is known of the GPU that it is on (0 on the CPU).
struct ModelMemory {
  int64_t weight_bytes = 0;
  int64_t activation_bytes = 0;
  int64_t most_bytes = 0;  // of all our buffers on the GPU at once, KV caches with them
  int64_t device_bytes = 0;
  int64_t device_free_bytes = 0;  // whoever holds the rest
};

// Applied in this order: repeat penalty, temperature, top-k, top-p, min-p. The same seed, options,
// model and build give the same tokens.
struct SamplingOptions {
  double temperature = 0.8;     // 0: always the most probable token
  int top_k = 0;                // 0: off
  double top_p = 0.9;           // 1: off
  double min_p = 0.0;           // 0: off
  double repeat_penalty = 1.1;  // 1: off; divides positive and multiplies negative logits (CTRL)
  int repeat_last_n = 64;       // tokens it looks back on; 0: off, -1: all
  uint64_t seed = 0;
};

struct GenerateOptions {
  int64_t max_tokens = 128;
  SamplingOptions sampling = {};
  std::vector<std::string> stop = {};  // ends before the first of these strings
  std::vector<int32_t> end_ids;  // tokens that end the answer besides the model's end-of-sequence
  bool prompt_logprobs = false;
  bool ignore_eos = false;  // end-of-sequence is never sampled
};

enum class StopReason : uint8_t {
  kEndOfSequence,
  kMaxTokens,
  kStopString,
  kCallback,
  kContextFull
};

struct Generation {
  std::vector<int32_t> prompt_ids;
  std::vector<int32_t> ids;            // without the end-of-sequence token
  std::string text;                    // of ids, up to the stop string
  std::vector<float> prompt_logprobs;  // of each prompt token after the first
  StopReason stop_reason = StopReason::kMaxTokens;
  double prefill_seconds = 0;
  double decode_seconds = 0;         // of decode_steps steps
  double decode_device_seconds = 0;  // in which a GPU computed them; 0 where that is not known
  int64_t prefill_tokens = 0;
  int64_t decode_steps = 0;                  // tokens run through the model after the prompt
  double prefill_tokens_per_second() const;  // 0 if nothing was measured
  double decode_tokens_per_second() const;
};

// "end-of-sequence", "max-tokens", "stop-string", "callback" or "context-full".
std::string_view stop_reason_name(StopReason reason);

// Receives text as soon as it is printable (never half a character); false stops the generation.
// Also called with empty text after every step that yields none (a chunk of the prompt, a part of a
// character), so that a generation can be stopped at any time. It may not call the model or its
// sessions: the next step may be on its way.
using TextCallback = std::function<bool(std::string_view text)>;

struct Scored {
  float logprob = 0;    // natural log-probability of the token given those before it
  bool is_top = false;  // the token is the most probable one
};

// A growing token sequence with its KV cache: a chat, or a prompt being continued.
class Session {
 public:
  ~Session();
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;

  std::span<const int32_t> ids() const;  // all tokens so far, the last sampled one included
  int64_t context() const;               // the most tokens it can hold
  // Appends ids and samples an answer, which is appended too (an end-of-sequence token is not).
  // Throws Error with the counts when ids alone do not fit the context. A call that throws changes
  // nothing.
  Generation generate(std::span<const int32_t> ids, const GenerateOptions& options,
                      const TextCallback& on_text = {});
  // Back to the first `length` tokens. Where that leaves part of a quantized page of the KV cache,
  // the tokens of that part run again when the session goes on.
  void truncate(int64_t length);
  // A session that goes on from here by itself. Both share the pages of the KV cache that they have
  // in common; generate() throws Error when that cache, whose room start_session() took, is full.
  Session fork() const;

 private:
  friend class Model;
  struct Impl;
  explicit Session(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

class Tokenizer;

// On a CPU, signal handlers that may run on the calling thread while it computes need a stack of
// their own (sigaltstack, SA_ONSTACK): products of oneDNN 2.6 on CPUs without AVX-512 do not leave
// the ordinary one as handlers expect it.
class Model {
 public:
  static Model load(const LoadOptions& options);
  // What load would report, from the checkpoint's headers alone: reads no weights.
  static ModelInfo inspect(const LoadOptions& options);
  ~Model();
  Model(Model&&) noexcept;
  Model& operator=(Model&&) noexcept;

  ModelInfo info() const;
  ModelMemory memory() const;
  const Tokenizer& tokenizer() const;  // src/text/tokenizer.h; throws Error if there is none
  // With BOS in front if the model's tokenizer configuration wants it; never if add_bos is false.
  std::vector<int32_t> tokenize(std::string_view text, bool add_bos = true) const;
  std::string detokenize(std::span<const int32_t> ids) const;

  // With room for so many forks of it, each of a whole context.
  Session start_session(int64_t forks = 0);
  // A session for one prompt; on_text gets the continuation only.
  Generation generate(std::string_view prompt, const GenerateOptions& options = {},
                      const TextCallback& on_text = {});
  // Several answers to one prompt, drawn as one batch: the prompt runs once and they share its
  // whole pages of the KV cache. Answer i is drawn with seed options.sampling.seed + i. Their times
  // are those of all of them together. on_text is told whose text it gets; false ends that answer.
  using SampleCallback = std::function<bool(int64_t sample, std::string_view text)>;
  std::vector<Generation> generate_samples(std::span<const int32_t> prompt_ids,
                                           const GenerateOptions& options, int64_t samples,
                                           const SampleCallback& on_text = {});
  // Scores ids[first_scored ...] of each sequence given all before them (ids[0] has no score:
  // first_scored >= 1). Packs the sequences into ragged batches of batch_tokens and returns them in
  // the order given; a sequence's scores do not depend on its neighbours. A sequence may be one
  // token longer than the context: its last token is a target only.
  struct ScoreInput {
    std::span<const int32_t> ids;
    int64_t first_scored = 1;
  };
  std::vector<std::vector<Scored>> score(std::span<const ScoreInput> inputs);
  // As score, but hands over whole next-token distributions, in blocks and in the order of score's
  // results. The logits of a block are valid during the call only.
  struct ScoredToken {
    size_t input = 0;      // of inputs
    int64_t position = 0;  // its ids[position] is the token whose distribution this is
  };
  struct LogitsBlock {
    std::span<const ScoredToken> tokens;
    std::span<const float> logits;  // [tokens.size(), vocab_size], not normalised, all finite
  };
  using DistributionCallback = std::function<void(const LogitsBlock& block)>;
  // shared: all inputs begin with the same so many tokens, fewer than any one's first_scored, and
  // those are run once: see score_choices.
  void score_distributions(std::span<const ScoreInput> inputs, const DistributionCallback& on_block,
                           int64_t shared = 0);
  // Runs ids (at most batch_tokens and the context) as a sequence of its own and hands over what
  // attention read and wrote, layer by layer. The spans are valid during the call only.
  struct AttentionRecord {
    int64_t layer = 0;
    int64_t tokens = 0;
    // [tokens, (num_heads + 2 * num_kv_heads) * head_dim]: queries and keys with their positions
    // rotated in, then values, before the kernel rounds or quantizes them.
    std::span<const float> qkv;
    std::span<const float> out;  // [tokens, num_heads * head_dim]
  };
  void probe_attention(std::span<const int32_t> ids,
                       const std::function<void(const AttentionRecord& record)>& on_layer);
  // Multiple choice: a context after a common beginning, and texts that may follow it.
  struct ChoiceInput {
    std::span<const int32_t> context;               // not empty
    std::span<const std::vector<int32_t>> choices;  // none of them empty
  };
  // Told of each input, in order and as soon as they are known, the natural log-probability of each
  // choice after prefix and context; false ends the call.
  using ChoiceCallback =
      std::function<bool(int64_t input, std::span<const double> choice_logprobs)>;
  // Scores the choices of every input. The prefix (which may be empty) is run once and its whole
  // pages of the KV cache are shared by all inputs; choices of one token share one pass over their
  // context. An input's figures depend on prefix and input alone. fp16: the same, up to rounding,
  // as score() of all tokens in one; kernels that quantize: as if a prompt is given in two parts.
  // Returns how many tokens were run through the model.
  int64_t score_choices(std::span<const int32_t> prefix, std::span<const ChoiceInput> inputs,
                        const ChoiceCallback& take);
  // Changes the attention kernel and the type of KV cache (as LoadOptions have them) for what
  // follows; A/B on one loaded model. A session goes on with the cache that it began with, and
  // throws Error if the kernel cannot read that.
  void set_attention(std::string_view name, bool smooth_k, std::string_view kv_cache = "auto");

 private:
  friend class Session;
  struct Impl;
  explicit Model(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;  // sessions share it
};

}  // namespace sagelm
