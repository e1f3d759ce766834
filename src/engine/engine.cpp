// Model: loading, reporting and scoring. Sessions are in session.cpp.
#include <algorithm>
#include <utility>

#include "backend/attention_variant.h"
#include "base/error.h"
#include "base/model_spec.h"
#include "checkpoint/checkpoint.h"
#include "engine/device.h"
#include "engine/engine_impl.h"
#include "sagelm/sagelm.hpp"

namespace sagelm {
namespace {

// score() packs short sequences, each of which leaves most of a page unused: the pages of a batch
// may hold this many times its tokens.
constexpr int64_t kScorePagesFactor = 4;

// Of one step: hidden states, their normalised copy and the attention's output, queries, keys and
// values, gate, up and their product, and one row of logits.
int64_t estimate_activations(const ModelConfig& config, int64_t rows) {
  const int64_t per_row = 2 * config.hidden_size + 2 * config.q_size() + 2 * config.kv_size() +
                          3 * config.intermediate_size;
  return (rows * per_row + config.vocab_size) * static_cast<int64_t>(sizeof(float));
}

AttentionSpec attention_spec(std::string_view name, bool smooth_k) {
  return {.variant = parse_attention_variant(name), .smooth_k = smooth_k};
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
  ModelInfo info;
  info.name = config.name;
  info.architecture = "LlamaForCausalLM";
  info.device = backend.device_name();
  info.attention = describe_attention(attention_spec(options.attention, options.smooth_k));
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
  const KvLayout one_page{.num_layers = config.num_layers,
                          .num_kv_heads = config.num_kv_heads,
                          .head_dim = config.head_dim,
                          .num_pages = 1};
  info.kv_bytes_per_token = one_page.bytes() / kPageTokens;
  info.kv_bytes = one_page.bytes() * KvCache::pages_for(info.context);
  info.activation_bytes =
      estimate_activations(config, std::min(options.batch_tokens, info.context));
  info.rope_theta = config.rope_theta;
  info.tied_embeddings = config.tie_word_embeddings;
  return info;
}

}  // namespace

Model::Model(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
Model::~Model() = default;
Model::Model(Model&&) noexcept = default;
Model& Model::operator=(Model&&) noexcept = default;

Model Model::load(const LoadOptions& options) {
  // What can be refused without reading weights is refused first.
  const AttentionSpec attention = attention_spec(options.attention, options.smooth_k);
  auto impl = std::make_shared<Impl>();
  impl->options = options;
  impl->backend = make_backend(options.device, options.threads);
  const Checkpoint checkpoint = Checkpoint::open(options.model);
  const ModelConfig& config = checkpoint.config();
  impl->info = describe(checkpoint, options, *impl->backend);
  impl->tokenizer = std::make_unique<Tokenizer>(Tokenizer::open(checkpoint.directory()));
  impl->tokenizer->check_fits(config.vocab_size);
  check_weights_finite(checkpoint.weights());
  impl->llama = std::make_unique<Llama>(config, checkpoint.weights(), *impl->backend, attention,
                                        options.progress);
  impl->info.weight_bytes = impl->backend->memory_bytes();
  return Model(std::move(impl));
}

ModelInfo Model::inspect(const LoadOptions& options) {
  const std::unique_ptr<Backend> backend = make_backend(options.device, options.threads);
  return describe(Checkpoint::open(options.model), options, *backend);
}

ModelInfo Model::info() const { return impl_->info; }

const Tokenizer& Model::tokenizer() const { return *impl_->tokenizer; }

std::vector<int32_t> Model::tokenize(std::string_view text, bool add_bos) const {
  return impl_->tokenizer->encode(text, add_bos && impl_->tokenizer->add_bos_default());
}

std::string Model::detokenize(std::span<const int32_t> ids) const {
  return impl_->tokenizer->decode(ids);
}

void Model::set_attention(std::string_view name, bool smooth_k) {
  const AttentionSpec spec = attention_spec(name, smooth_k);
  impl_->llama->set_attention(spec);
  impl_->info.attention = describe_attention(spec);
}

Generation Model::generate(std::string_view prompt, const GenerateOptions& options,
                           const TextCallback& on_text) {
  const std::vector<int32_t> ids = tokenize(prompt);
  return start_session().generate(ids, options, on_text);
}

std::vector<std::vector<Scored>> Model::score(std::span<const ScoreInput> inputs) {
  const int64_t batch_tokens = impl_->options.batch_tokens;
  for (const ScoreInput& input : inputs) {
    const auto length = static_cast<int64_t>(input.ids.size());
    if (input.first_scored < 1) fail("the first token of a sequence cannot be scored");
    if (length > impl_->info.context) {
      fail("a sequence of {} tokens does not fit the context of {}", length, impl_->info.context);
    }
    impl_->check_ids(input.ids);
  }
  const int64_t max_pages = kScorePagesFactor * KvCache::pages_for(batch_tokens);
  std::vector<std::vector<Scored>> scores(inputs.size());
  for (size_t first = 0; first < inputs.size();) {
    const auto length = static_cast<int64_t>(inputs[first].ids.size());
    if (length > batch_tokens) {
      KvCache& cache = impl_->cache_for_scoring(KvCache::pages_for(length));
      Sequence sequence(cache);
      scores[first] = impl_->score_alone(sequence, inputs[first].ids, inputs[first].first_scored);
      ++first;
      continue;
    }
    size_t last = first;
    int64_t tokens = 0;
    int64_t pages = 0;
    for (; last < inputs.size(); ++last) {
      const auto next = static_cast<int64_t>(inputs[last].ids.size());
      if (tokens + next > batch_tokens || pages + KvCache::pages_for(next) > max_pages) break;
      tokens += next;
      pages += KvCache::pages_for(next);
    }
    impl_->cache_for_scoring(std::max<int64_t>(pages, 1));
    impl_->score_batch(inputs.subspan(first, last - first),
                       std::span(scores).subspan(first, last - first));
    first = last;
  }
  return scores;
}

void Model::Impl::check_ids(std::span<const int32_t> ids) const {
  for (const int32_t id : ids) {
    if (id < 0 || id >= info.vocab_size) {
      fail("token id {} is not in the vocabulary of {}", id, info.vocab_size);
    }
  }
}

KvCache& Model::Impl::cache_for_scoring(int64_t num_pages) {
  if (!score_cache || score_cache->num_pages() < num_pages) {
    score_cache.reset();  // not both at once
    score_cache.emplace(llama->make_cache(num_pages));
  }
  return *score_cache;
}

void Model::Impl::score_batch(std::span<const ScoreInput> inputs,
                              std::span<std::vector<Scored>> out) {
  std::vector<Sequence> sequences;
  std::vector<StepInput> steps;
  std::vector<int64_t> first_scored;
  std::vector<size_t> places;
  sequences.reserve(inputs.size());  // steps point into it
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i].first_scored >= static_cast<int64_t>(inputs[i].ids.size())) continue;
    sequences.emplace_back(*score_cache);
    steps.push_back({.sequence = &sequences.back(), .tokens = inputs[i].ids});
    first_scored.push_back(inputs[i].first_scored);
    places.push_back(i);
  }
  if (steps.empty()) return;
  const std::vector<std::vector<TokenScore>> scores = llama->score(steps, first_scored);
  for (size_t i = 0; i < steps.size(); ++i) {
    const std::span<const int32_t> ids = steps[i].tokens;
    std::vector<Scored>& result = out[places[i]];
    for (auto j = static_cast<size_t>(first_scored[i]); j < ids.size(); ++j) {
      result.push_back({.logprob = scores[i][j].logprob, .is_top = scores[i][j].argmax == ids[j]});
    }
  }
}

std::vector<Scored> Model::Impl::score_alone(Sequence& sequence, std::span<const int32_t> tokens,
                                             int64_t first_scored) {
  const auto length = static_cast<int64_t>(tokens.size());
  std::vector<Scored> result;
  if (first_scored >= length) return result;
  // A chunk starts with the last token of the one before: the score of its second token needs the
  // logits after it.
  for (int64_t start = 0; start + 1 < length;) {
    const int64_t end = std::min(start + options.batch_tokens, length);
    sequence.truncate(start);
    const StepInput input{
        .sequence = &sequence,
        .tokens = tokens.subspan(static_cast<size_t>(start), static_cast<size_t>(end - start))};
    const int64_t skip = std::clamp(first_scored - start, int64_t{1}, end - start);
    const std::vector<TokenScore> scores = std::move(llama->score({&input, 1}, {&skip, 1}).front());
    for (int64_t j = skip; j < end - start; ++j) {
      const TokenScore& score = scores[static_cast<size_t>(j)];
      result.push_back({.logprob = score.logprob,
                        .is_top = score.argmax == tokens[static_cast<size_t>(start + j)]});
    }
    start = end == length ? length : end - 1;
  }
  return result;
}

}  // namespace sagelm
