// Model: loading, reporting and scoring. Sessions are in session.cpp.
#include <algorithm>
#include <utility>

#include "backend/attention_variant.h"
#include "base/error.h"
#include "base/model_spec.h"
#include "checkpoint/checkpoint.h"
#include "engine/device.h"
#include "engine/engine_impl.h"
#include "engine/memory_plan.h"
#include "engine/open_checkpoint.h"
#include "sagelm/sagelm.hpp"

namespace sagelm {
namespace {

constexpr std::string_view kv_type_name(KvType type) {
  return type == KvType::kInt8 ? "int8" : type == KvType::kInt4 ? "int4" : "fp16";
}

// Checks that the backend has the layers' attention and the cache that goes with all of it; the
// type of that.
KvType check_attention(std::span<const AttentionSpec> layers, std::string_view kv_cache,
                       const ModelConfig& config, const Backend& backend) {
  constexpr std::array kTypes = {KvType::kInt8, KvType::kInt4, KvType::kFp16};  // auto's order
  const auto shape_of = [&](const AttentionSpec& spec) -> AttentionShape {
    return {.num_heads = config.num_heads,
            .num_kv_heads = config.num_kv_heads,
            .head_dim = config.head_dim,
            .spec = spec};
  };
  for (const AttentionSpec& spec : layers) backend.check_attention(shape_of(spec));
  for (const KvType type : kTypes) {
    if (kv_cache != "auto" && kv_cache != kv_type_name(type)) continue;
    const auto refuses = std::find_if(layers.begin(), layers.end(), [&](const AttentionSpec& spec) {
      return !backend.reads_kv(shape_of(spec), type);
    });
    if (refuses == layers.end()) return type;
    if (kv_cache == "auto") continue;
    fail_usage("attention {} on {} cannot read an {} KV cache: use --kv-cache auto or fp16",
               attention_variant_name(refuses->variant), backend.device_name(), kv_cache);
  }
  fail_usage("unknown type of KV cache '{}': use auto, fp16, int8 or int4", kv_cache);
}

void set_kv_info(KvType type, const ModelConfig& config, const Backend& backend, ModelInfo& info) {
  KvLayout layout = kv_layout(type, config, info.context);
  info.kv_cache = kv_type_name(type);
  info.kv_bytes = backend.kv_bytes(layout);
  layout.num_pages = 1;
  layout.num_tails = 0;
  info.kv_bytes_per_token = (backend.kv_bytes(layout) + kPageTokens - 1) / kPageTokens;
}

void set_attention_info(std::span<const AttentionSpec> layers, ModelInfo& info) {
  info.attention = describe_layer_attention(layers);
  info.layer_attention.clear();
  for (const AttentionSpec& spec : layers) {
    info.layer_attention.emplace_back(attention_variant_name(spec.variant));
  }
}

// The options with what they leave to the device.
LoadOptions complete(LoadOptions options, const Backend& backend) {
  if (options.batch_tokens == 0) options.batch_tokens = backend.default_step_tokens();
  return options;
}

// Checks the options that need the config, and reports the rest.
ModelInfo describe(const Checkpoint& checkpoint, const LoadOptions& options,
                   const Backend& backend) {
  const ModelConfig& config = checkpoint.config();
  if (options.context < 0) fail_usage("the context must be 1 token or more");
  if (options.context > config.max_position_embeddings) {
    fail_usage("a context of {} tokens is beyond the model's {}", options.context,
               config.max_position_embeddings);
  }
  if (options.batch_tokens < 2) {
    fail_usage("a step must take 2 tokens or more, not {}", options.batch_tokens);
  }
  const std::vector<AttentionSpec> attention =
      parse_layer_attention(options.attention, config.num_layers, options.smooth_k);
  const KvType kv_type = check_attention(attention, options.kv_cache, config, backend);
  ModelInfo info;
  info.name = config.name;
  info.architecture = "LlamaForCausalLM";
  info.device = backend.device_name();
  set_attention_info(attention, info);
  for (const AttentionVariant variant : backend.adaptive_variants()) {
    info.adaptive_attention.emplace_back(attention_variant_name(variant));
  }
  info.dtype = dtype_name(config.dtype);
  info.num_parameters = checkpoint.num_parameters();
  info.vocab_size = config.vocab_size;
  info.hidden_size = config.hidden_size;
  info.intermediate_size = config.intermediate_size;
  info.num_layers = config.num_layers;
  info.num_heads = config.num_heads;
  info.num_kv_heads = config.num_kv_heads;
  info.head_dim = config.head_dim;
  info.max_context = config.max_position_embeddings;
  info.context = options.context > 0 ? options.context : config.max_position_embeddings;
  info.checkpoint_bytes = checkpoint.bytes();
  info.weight_bytes = weight_bytes(checkpoint.weights(), backend);
  set_kv_info(kv_type, config, backend, info);
  info.batch_tokens = options.batch_tokens;
  info.activation_bytes =
      backend.step_bytes(limits_of_steps(config, attention, options.batch_tokens, info.context));
  info.rope_theta = config.rope_theta;
  info.tied_embeddings = config.tie_word_embeddings;
  return info;
}

// out gets those of step's tokens from `first` on, next_token included; scores as Llama::score
// returns them.
void append_scores(const StepInput& step, int64_t first, std::span<const TokenScore> scores,
                   std::vector<Scored>& out) {
  for (auto j = static_cast<size_t>(first); j < scores.size(); ++j) {
    const int32_t token = j < step.tokens.size() ? step.tokens[j] : step.next_token;
    out.push_back({.logprob = scores[j].logprob, .is_top = scores[j].argmax == token});
  }
}

// A step over ids[begin, end) that also scores the token after them, if there is one.
StepInput scoring_step(Sequence& sequence, std::span<const int32_t> ids, int64_t begin,
                       int64_t end) {
  const auto last = static_cast<size_t>(end);
  return {.sequence = &sequence,
          .tokens = ids.subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin)),
          .next_token = last < ids.size() ? ids[last] : -1};
}

}  // namespace

Model::Model(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
Model::~Model() = default;
Model::Model(Model&&) noexcept = default;
Model& Model::operator=(Model&&) noexcept = default;

Model Model::load(const LoadOptions& options) {
  auto impl = std::make_shared<Impl>();
  impl->backend = make_backend(options.device, options.threads);
  impl->options = complete(options, *impl->backend);
  const Checkpoint checkpoint = open_checkpoint(options);
  const ModelConfig& config = checkpoint.config();
  impl->info = describe(checkpoint, impl->options, *impl->backend);
  std::vector<AttentionSpec> attention =
      parse_layer_attention(options.attention, config.num_layers, options.smooth_k);
  impl->kv_type = check_attention(attention, options.kv_cache, config, *impl->backend);
  if (options.random_weights.empty()) {
    impl->tokenizer = std::make_unique<Tokenizer>(Tokenizer::open(checkpoint.directory()));
    impl->tokenizer->fit_to(config.vocab_size);
    if (!impl->backend->checks_weights()) check_weights_finite(checkpoint.weights());
  }
  check_fits(impl->memory_needs(config, attention, options.sessions), false, *impl->backend);
  impl->llama = std::make_unique<Llama>(config, checkpoint.weights(), *impl->backend,
                                        attention.front(), options.progress);
  impl->llama->set_attention(std::move(attention));
  impl->reserve_steps();
  impl->info.weight_bytes = impl->backend->weight_bytes();
  impl->info.device = impl->backend->device_name();  // it knows its types now
  return Model(std::move(impl));
}

ModelInfo Model::inspect(const LoadOptions& options) {
  const std::unique_ptr<Backend> backend = make_backend(options.device, options.threads);
  return describe(open_checkpoint(options), complete(options, *backend), *backend);
}

ModelInfo Model::info() const { return impl_->info; }

ModelMemory Model::memory() const {
  const Backend& backend = *impl_->backend;
  const DeviceMemory device = backend.device_memory();
  return {.weight_bytes = backend.weight_bytes(),
          .activation_bytes = backend.activation_bytes(),
          .most_bytes = device.held_most,
          .device_bytes = device.total,
          .device_free_bytes = device.free};
}

const Tokenizer& Model::tokenizer() const {
  if (impl_->tokenizer == nullptr) fail("{} has no tokenizer", impl_->info.name);
  return *impl_->tokenizer;
}

std::vector<int32_t> Model::tokenize(std::string_view text, bool add_bos) const {
  return tokenizer().encode(text, add_bos && tokenizer().add_bos_default());
}

std::string Model::detokenize(std::span<const int32_t> ids) const {
  return tokenizer().decode(ids);
}

void Model::set_attention(std::string_view name, bool smooth_k, std::string_view kv_cache) {
  const ModelConfig& config = impl_->llama->config();
  std::vector<AttentionSpec> layers = parse_layer_attention(name, config.num_layers, smooth_k);
  impl_->kv_type = check_attention(layers, kv_cache, config, *impl_->backend);
  set_kv_info(impl_->kv_type, config, *impl_->backend, impl_->info);
  set_attention_info(layers, impl_->info);
  impl_->llama->set_attention(std::move(layers));
  impl_->reserve_steps();
}

Generation Model::generate(std::string_view prompt, const GenerateOptions& options,
                           const TextCallback& on_text) {
  const std::vector<int32_t> ids = tokenize(prompt);
  return start_session().generate(ids, options, on_text);
}

std::vector<std::vector<Scored>> Model::score(std::span<const ScoreInput> inputs) {
  std::vector<std::vector<Scored>> scores(inputs.size());
  impl_->for_each_step(inputs, [&](std::span<const StepInput> steps,
                                   std::span<const int64_t> first_scored,
                                   std::span<const Impl::StepPlace> places) {
    const std::vector<std::vector<TokenScore>> of_steps = impl_->llama->score(steps, first_scored);
    for (size_t i = 0; i < steps.size(); ++i) {
      append_scores(steps[i], first_scored[i], of_steps[i], scores[places[i].input]);
    }
  });
  return scores;
}

void Model::score_distributions(std::span<const ScoreInput> inputs,
                                const DistributionCallback& on_block, int64_t shared) {
  if (shared > 0) return impl_->score_shared(inputs, shared, on_block);
  std::vector<ScoredToken> tokens;
  impl_->for_each_step(inputs, [&](std::span<const StepInput> steps,
                                   std::span<const int64_t> first_scored,
                                   std::span<const Impl::StepPlace> places) {
    impl_->llama->score_logits(
        steps, first_scored, [&](std::span<const LogitsRow> rows, std::span<const float> logits) {
          tokens.clear();
          for (const LogitsRow& row : rows) {
            const Impl::StepPlace& place = places[row.input];
            tokens.push_back({.input = place.input, .position = place.start + row.token});
          }
          on_block({.tokens = tokens, .logits = logits});
        });
  });
}

void Model::probe_attention(std::span<const int32_t> ids,
                            const std::function<void(const AttentionRecord& record)>& on_layer) {
  const auto length = static_cast<int64_t>(ids.size());
  const int64_t most = std::min(impl_->options.batch_tokens, impl_->info.context);
  if (length < 1 || length > most) {
    fail("a sequence of {} tokens cannot be probed: 1 to {} can", length, most);
  }
  impl_->check_ids(ids);
  Sequence sequence(impl_->cache_for_scoring(kv_room(impl_->kv_type, length)));
  impl_->llama->probe_attention(
      {.sequence = &sequence, .tokens = ids},
      [&](int64_t layer, std::span<const float> qkv, std::span<const float> out) {
        on_layer({.layer = layer, .tokens = length, .qkv = qkv, .out = out});
      });
}

MemoryNeeds Model::Impl::memory_needs(const ModelConfig& config,
                                      std::span<const AttentionSpec> attention,
                                      int64_t sessions) const {
  return {.config = &config,
          .attention = attention,
          .kv_type = kv_type,
          .weight_bytes = llama ? 0 : info.weight_bytes,
          .batch_tokens = options.batch_tokens,
          .context = info.context,
          .sessions = sessions};
}

void Model::Impl::reserve_steps() {
  const StepLimits limits =
      limits_of_steps(llama->config(), llama->attention(), options.batch_tokens, info.context);
  info.activation_bytes = backend->step_bytes(limits);
  backend->reserve(limits);
}

void Model::Impl::check_ids(std::span<const int32_t> ids) const {
  for (const int32_t id : ids) {
    if (id < 0 || id >= info.vocab_size) {
      fail("token id {} is not in the vocabulary of {}", id, info.vocab_size);
    }
  }
}

KvCache& Model::Impl::cache_for_scoring(const KvRoom& room) {
  if (!score_cache || score_cache->type() != kv_type || score_cache->room().pages < room.pages ||
      score_cache->room().tails < room.tails) {
    score_cache.reset();  // not both at once
    score_cache.emplace(llama->make_cache(kv_type, room));
  }
  return *score_cache;
}

void Model::Impl::for_each_step(std::span<const ScoreInput> inputs, const ScoreStep& run_step) {
  const int64_t batch_tokens = options.batch_tokens;
  for (const ScoreInput& input : inputs) {
    const auto length = static_cast<int64_t>(input.ids.size());
    if (input.first_scored < 1) fail("the first token of a sequence cannot be scored");
    if (length - 1 > info.context) {  // the last token may be a target only
      fail("a sequence of {} tokens does not fit the context of {}", length, info.context);
    }
    check_ids(input.ids);
  }
  const int64_t max_pages = pages_of_step(batch_tokens);
  for (size_t first = 0; first < inputs.size();) {
    const auto length = static_cast<int64_t>(inputs[first].ids.size());
    if (length > batch_tokens) {
      KvCache& cache = cache_for_scoring(kv_room(kv_type, length));
      Sequence sequence(cache);
      for_each_chunk(sequence, inputs[first].ids, inputs[first].first_scored, first, run_step);
      ++first;
      continue;
    }
    size_t last = first;
    int64_t tokens = 0;
    int64_t pages = 0;
    KvRoom room;
    for (; last < inputs.size(); ++last) {
      const auto next = static_cast<int64_t>(inputs[last].ids.size());
      if (tokens + next > batch_tokens || pages + KvCache::pages_for(next) > max_pages) break;
      tokens += next;
      pages += KvCache::pages_for(next);
      room += kv_room(kv_type, next);
    }
    KvCache& cache = cache_for_scoring(room);
    std::vector<Sequence> sequences;
    std::vector<StepInput> steps;
    std::vector<int64_t> first_scored;
    std::vector<StepPlace> places;
    sequences.reserve(last - first);  // steps point into it
    for (size_t i = first; i < last; ++i) {
      if (inputs[i].first_scored >= static_cast<int64_t>(inputs[i].ids.size())) continue;
      sequences.emplace_back(cache);
      const auto size = static_cast<int64_t>(inputs[i].ids.size());
      steps.push_back(
          scoring_step(sequences.back(), inputs[i].ids, 0, std::min(size, info.context)));
      first_scored.push_back(inputs[i].first_scored);
      places.push_back({.input = i});
    }
    if (!steps.empty()) run_step(steps, first_scored, places);
    first = last;
  }
}

void Model::Impl::for_each_chunk(Sequence& sequence, std::span<const int32_t> tokens,
                                 int64_t first_scored, size_t input, const ScoreStep& run_step) {
  const auto length = static_cast<int64_t>(tokens.size());
  if (first_scored >= length) return;
  const int64_t to_run = std::min(length, info.context);
  for (int64_t start = 0; start < to_run;) {
    const int64_t end = std::min(start + options.batch_tokens, to_run);
    const StepInput step = scoring_step(sequence, tokens, start, end);
    // The first token of a chunk was scored with the chunk before.
    const int64_t skip = std::clamp(first_scored - start, int64_t{1}, end - start + 1);
    const StepPlace place{.input = input, .start = start};
    run_step({&step, 1}, {&skip, 1}, {&place, 1});
    start = end;
  }
}

std::vector<Scored> Model::Impl::score_alone(Sequence& sequence, std::span<const int32_t> tokens,
                                             int64_t first_scored) {
  std::vector<Scored> result;
  for_each_chunk(sequence, tokens, first_scored, 0,
                 [&](std::span<const StepInput> steps, std::span<const int64_t> first,
                     std::span<const StepPlace> /*places*/) {
                   append_scores(steps[0], first[0], llama->score(steps, first).front(), result);
                 });
  return result;
}

}  // namespace sagelm
