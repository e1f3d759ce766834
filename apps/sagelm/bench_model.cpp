#include "bench_model.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <utility>

#include "base/error.h"
#include "engine/device.h"
#include "engine/open_checkpoint.h"
#include "model/kv_cache.h"

namespace sagelm::cli {
namespace {

using Clock = std::chrono::steady_clock;

std::vector<int32_t> random_ids(int64_t count, int64_t vocab_size) {
  std::mt19937 random(3);
  std::vector<int32_t> ids(static_cast<size_t>(count));
  // The first ids are control tokens in Llama's vocabularies.
  const auto first = std::min<int64_t>(3, vocab_size - 1);
  for (int32_t& id : ids) {
    id = static_cast<int32_t>(
        first + static_cast<int64_t>(random() % static_cast<uint64_t>(vocab_size - first)));
  }
  return ids;
}

GenerateOptions answer_of(const ModelBenchPlan& plan, int64_t tokens) {
  GenerateOptions options;
  options.max_tokens = tokens;
  options.sampling = plan.sampling;
  options.ignore_eos = true;
  return options;
}

// Tokens of an answer after which every buffer is there and the steps of decoding are recorded.
constexpr int64_t kSettleTokens = 4;

// The linear layers of one Llama layer on activations of a model's kind.
class LinearLayers {
 public:
  LinearLayers(Backend& backend, const Checkpoint& checkpoint)
      : backend_(&backend), config_(checkpoint.config()) {
    const ModelWeights& weights = checkpoint.weights();
    const LayerWeights& layer = weights.layers.front();
    embedding_ = backend.add_embedding(weights.embedding);
    norm_ = backend.add_vector(layer.input_norm);
    query_ = backend.add_linear({&layer.q_proj, 1});
    qkv_ = backend.add_linear(std::vector{layer.q_proj, layer.k_proj, layer.v_proj});
    o_ = backend.add_linear({&layer.o_proj, 1});
    gate_up_ = backend.add_gate_up(layer.gate_proj, layer.up_proj);
    down_ = backend.add_linear({&layer.down_proj, 1});
  }

  // Of all layers for `rows` tokens; the median of `runs`.
  double seconds(int64_t rows, int runs) {
    enum Slot : int { kHidden, kNormed, kQkv, kAttended, kGateUp, kActivated, kOne };
    const StepLimits limits{
        .scratch = {{rows, config_.hidden_size, Holds::kResidual},
                    {rows, config_.hidden_size, Holds::kActivations},
                    {rows, config_.q_size() + 2 * config_.kv_size(), Holds::kActivations},
                    {rows, config_.q_size(), Holds::kActivations},
                    {rows, 2 * config_.intermediate_size, Holds::kActivations},
                    {rows, config_.intermediate_size, Holds::kActivations},
                    {1, config_.hidden_size, Holds::kResidual}},
        .attention = {},
        .tokens = rows,
        .sequences = 1,
        .context = rows};
    backend_->reserve(limits);
    const auto matrix = [&](Slot slot) {
      const ScratchSize& size = limits.scratch[slot];
      return backend_->scratch(slot, size.rows, size.cols, size.holds);
    };
    const Matrix hidden = matrix(kHidden), normed = matrix(kNormed), qkv = matrix(kQkv),
                 attended = matrix(kAttended), gate_up = matrix(kGateUp),
                 activated = matrix(kActivated), one = matrix(kOne);

    Batch batch;
    batch.tokens = random_ids(rows, config_.vocab_size);
    std::vector<int32_t> pages(static_cast<size_t>(KvCache::pages_for(rows)));
    std::iota(pages.begin(), pages.end(), 0);
    batch.sequences.push_back({.first_row = 0, .q_len = rows, .kv_len = rows, .pages = pages});
    backend_->begin(batch);
    backend_->embed(embedding_, batch, hidden);
    backend_->rmsnorm(hidden, norm_, config_.rms_norm_eps, normed);
    backend_->linear(normed, query_, attended);
    backend_->linear_swiglu(normed, gate_up_, gate_up, activated);

    const int32_t first = 0;
    std::vector<float> one_row(static_cast<size_t>(config_.hidden_size));
    const auto wait = [&] {
      backend_->gather_rows({&first, 1}, {{hidden, one}});
      backend_->read_logits(one, one_row);
    };
    const auto layer = [&] {
      backend_->linear(normed, qkv_, qkv);
      backend_->linear_add(attended, o_, hidden);
      backend_->linear(normed, gate_up_, gate_up);
      backend_->linear_add(activated, down_, hidden);
    };
    layer();  // chooses the algorithms
    wait();
    std::vector<double> times;
    times.reserve(runs);
    for (int run = 0; run < runs; ++run) {
      times.push_back(seconds_of([&] {
        for (int64_t i = 0; i < config_.num_layers; ++i) layer();
        wait();
      }));
    }
    return spread_of(std::move(times)).median;
  }

 private:
  Backend* backend_;
  ModelConfig config_;
  WeightHandle embedding_, norm_, query_, qkv_, o_, gate_up_, down_;
};

// What a decode step reads of the weights: all but the embedding, of which it reads one row.
int64_t decode_weight_bytes(const ModelConfig& config, const Backend& backend) {
  const auto product = static_cast<int64_t>(dtype_size(backend.product_type(config.dtype)));
  const int64_t layer = config.hidden_size *
                        (2 * config.q_size() + 2 * config.kv_size() + 3 * config.intermediate_size);
  const int64_t norms =
      (2 * config.num_layers + 1) * config.hidden_size * static_cast<int64_t>(sizeof(float));
  return product * (config.num_layers * layer + config.vocab_size * config.hidden_size) + norms;
}

// Settings of one model that take turns: each runs once, then each for the second time in the
// opposite order, and so on, so that none of them meets a colder device than the others. Every one
// has a session of its own.
class TurnBench {
 public:
  // Throws Error if the device has no room for all sessions.
  TurnBench(Model& model, std::span<const BenchSetting> settings, const ModelBenchPlan& plan,
            const std::function<void()>& on_run)
      : model_(&model), settings_(settings), plan_(&plan), on_run_(&on_run) {
    for (size_t i = 0; i < settings.size(); ++i) {
      use(i);
      infos_.push_back(model.info());
      sessions_.push_back(model.start_session());  // with the cache that goes with the attention
    }
  }

  // A round of turns has every length of prompt. Decoding takes its turns length by length, as its
  // prompt stays in the cache.
  std::vector<BenchResult> run(const DeviceBounds& bounds) {
    std::vector<BenchResult> results(settings_.size());
    run_prefill(bounds, results);
    if (plan_->rest_seconds > 0) run_first_token(results);
    for (const int64_t at : plan_->decode_at) run_decode(at, bounds, results);
    return results;
  }

 private:
  void use(size_t setting) {
    const BenchSetting& to = settings_[setting];
    model_->set_attention(to.attention, to.smooth_k, to.kv_cache);
    current_ = setting;
  }

  // turn(length, setting, run), run being -1 to warm up.
  template <typename Turn>
  void take_turns(size_t lengths, const Turn& turn) {
    const size_t count = settings_.size();
    for (int run = -1; run < plan_->runs; ++run) {
      for (size_t length = 0; length < lengths; ++length) {
        for (size_t i = 0; i < count; ++i) {
          turn(length, run % 2 == 0 ? i : count - 1 - i, run);
          (*on_run_)();
        }
      }
    }
  }

  // An answer of so many tokens to ids, of which the session keeps the first `held`; the device
  // rests before it.
  Generation generate(size_t setting, std::span<const int32_t> ids, int64_t held, int64_t tokens,
                      const TextCallback& on_text = {}, double rest_seconds = 0) {
    Session& session = sessions_[setting];
    const auto rest = ids.subspan(static_cast<size_t>(held));
    if (current_ != setting) {
      use(setting);
      // Not timed: what a change of the attention undoes is made again, and what is timed finds the
      // device as the same work leaves it, not as the other settings do.
      session.truncate(held);
      const auto step = static_cast<size_t>(infos_[setting].batch_tokens);
      session.generate(rest.first(std::min(rest.size(), step)),
                       answer_of(*plan_, std::min(tokens, kSettleTokens)));
    }
    session.truncate(held);
    std::this_thread::sleep_for(std::chrono::duration<double>(rest_seconds));
    return session.generate(rest, answer_of(*plan_, tokens), on_text);
  }

  // Of each setting, of each length of prompt, one figure per run.
  using PromptFigures = std::vector<std::vector<std::vector<double>>>;
  PromptFigures run_prompts(double rest_seconds, double (*figure)(const Generation&)) {
    const std::vector<int64_t>& lengths = plan_->prompt_tokens;
    const std::vector<int32_t> ids =
        random_ids(std::ranges::max(lengths), infos_.front().vocab_size);
    PromptFigures figures(settings_.size(), std::vector<std::vector<double>>(lengths.size()));
    take_turns(lengths.size(), [&](size_t length, size_t setting, int run) {
      const auto prompt = std::span(ids).first(static_cast<size_t>(lengths[length]));
      const Generation result = generate(setting, prompt, 0, 1, {}, run < 0 ? 0 : rest_seconds);
      if (run >= 0) figures[setting][length].push_back(figure(result));
    });
    return figures;
  }

  void run_first_token(std::vector<BenchResult>& results) {
    PromptFigures seconds =
        run_prompts(plan_->rest_seconds, [](const Generation& g) { return g.prefill_seconds; });
    for (size_t setting = 0; setting < settings_.size(); ++setting) {
      for (size_t i = 0; i < plan_->prompt_tokens.size(); ++i) {
        results[setting].first_token.push_back(
            {.tokens = plan_->prompt_tokens[i],
             .rest_seconds = plan_->rest_seconds,
             .seconds = spread_of(std::move(seconds[setting][i]))});
      }
    }
  }

  void run_prefill(const DeviceBounds& bounds, std::vector<BenchResult>& results) {
    const std::vector<int64_t>& lengths = plan_->prompt_tokens;
    const ModelInfo& info = infos_.front();
    PromptFigures rates =
        run_prompts(0, [](const Generation& g) { return g.prefill_tokens_per_second(); });
    for (size_t setting = 0; setting < settings_.size(); ++setting) {
      for (size_t i = 0; i < lengths.size(); ++i) {
        const auto tokens = static_cast<double>(lengths[i]);
        PrefillResult result;
        result.tokens = lengths[i];
        result.tokens_per_second = spread_of(std::move(rates[setting][i]));
        result.ops_per_second =
            prefill_ops(info, lengths[i]) / tokens * result.tokens_per_second.median;
        result.linear_tokens_per_second = tokens / bounds.linear_seconds[i];
        results[setting].prefill.push_back(result);
      }
    }
  }

  void run_decode(int64_t at, const DeviceBounds& bounds, std::vector<BenchResult>& results) {
    struct Measured {
      std::vector<double> rates, steps, host_shares;
    };
    std::vector<Measured> measured(settings_.size());
    const std::vector<int32_t> ids = random_ids(at, infos_.front().vocab_size);
    take_turns(1, [&](size_t /*length*/, size_t setting, int run) {
      std::vector<Clock::time_point> times;
      const auto on_text = [&times](std::string_view) {
        times.push_back(Clock::now());
        return true;
      };
      // The prompt stays in the cache: its last token alone is run again, and not timed. An answer
      // needs a step fewer than it has tokens: the last one isn't run.
      const Generation result =
          generate(setting, ids, run < 0 ? 0 : at - 1, plan_->decode_tokens + 1, on_text);
      if (run < 0) return;
      Measured& to = measured[setting];
      to.rates.push_back(result.decode_tokens_per_second());
      if (result.decode_device_seconds > 0) {
        to.host_shares.push_back(1 - result.decode_device_seconds / result.decode_seconds);
      }
      // One call per id, and one for what the detokenizer held back.
      const size_t timed = std::min(times.size(), static_cast<size_t>(plan_->decode_tokens) + 1);
      for (size_t i = 1; i < timed; ++i) {
        to.steps.push_back(std::chrono::duration<double>(times[i] - times[i - 1]).count());
      }
    });
    for (size_t setting = 0; setting < settings_.size(); ++setting) {
      Measured& from = measured[setting];
      DecodeResult result;
      result.at = at;
      result.tokens_per_second = spread_of(std::move(from.rates));
      result.step_seconds = spread_of(std::move(from.steps));
      if (!from.host_shares.empty()) {
        result.host_share = spread_of(std::move(from.host_shares)).median;
      }
      const double tokens = static_cast<double>(at) + static_cast<double>(plan_->decode_tokens) / 2;
      const double cache = static_cast<double>(infos_[setting].kv_bytes_per_token) * tokens;
      result.bytes_per_second = (static_cast<double>(bounds.weight_bytes_per_token) + cache) *
                                result.tokens_per_second.median;
      results[setting].decode.push_back(result);
    }
  }

  Model* model_;
  std::span<const BenchSetting> settings_;
  const ModelBenchPlan* plan_;
  const std::function<void()>* on_run_;
  size_t current_ = 0;  // setting that the model is in
  std::vector<ModelInfo> infos_;
  std::vector<Session> sessions_;
};

}  // namespace

int64_t ModelBenchPlan::context() const {
  int64_t most = 1;
  for (const int64_t tokens : prompt_tokens) most = std::max(most, tokens + 1);
  for (const int64_t at : decode_at) most = std::max(most, at + decode_tokens + 1);
  return most;
}

int64_t ModelBenchPlan::runs_of_setting() const {
  const size_t series = (rest_seconds > 0 ? 2 : 1) * prompt_tokens.size() + decode_at.size();
  return static_cast<int64_t>(series) * (runs + 1);
}

double prefill_ops(const ModelInfo& info, int64_t tokens) {
  const auto hidden = static_cast<double>(info.hidden_size);
  const auto q_size = static_cast<double>(info.num_heads * info.head_dim);
  const auto kv_size = static_cast<double>(info.num_kv_heads * info.head_dim);
  const auto n = static_cast<double>(tokens);
  const double weights =
      hidden * (2 * q_size + 2 * kv_size + 3 * static_cast<double>(info.intermediate_size));
  const double attention = 4 * q_size * n * (n + 1) / 2;  // every query sees those before it
  return static_cast<double>(info.num_layers) * (2 * weights * n + attention) +
         2 * hidden * static_cast<double>(info.vocab_size);
}

DeviceBounds measure_bounds(const LoadOptions& options, const ModelBenchPlan& plan) {
  const std::unique_ptr<Backend> backend = make_backend(options.device, options.threads);
  const Checkpoint checkpoint = open_checkpoint(options);
  const ModelConfig& config = checkpoint.config();
  DeviceBounds bounds;
  bounds.device = backend->device_name();
  bounds.free_bytes = backend->device_memory().free + backend->activation_bytes();
  bounds.ceilings = backend->measure_ceilings();
  bounds.weight_bytes_per_token = decode_weight_bytes(config, *backend);
  LinearLayers layers(*backend, checkpoint);
  for (const int64_t tokens : plan.prompt_tokens) {
    // In the chunks that the model runs.
    double seconds = 0;
    const int64_t chunks = tokens / options.batch_tokens, rest = tokens % options.batch_tokens;
    if (chunks > 0) {
      seconds += static_cast<double>(chunks) * layers.seconds(options.batch_tokens, plan.runs);
    }
    if (rest > 0) seconds += layers.seconds(rest, plan.runs);
    bounds.linear_seconds.push_back(seconds);
  }
  return bounds;
}

void grow_buffers(Session& session, const ModelInfo& info, const ModelBenchPlan& plan) {
  const int64_t tokens = std::min(plan.context() - 1, info.batch_tokens);
  session.generate(random_ids(tokens, info.vocab_size), answer_of(plan, kSettleTokens));
}

BenchResults bench_settings(Model& model, std::span<const BenchSetting> settings,
                            const ModelBenchPlan& plan, const DeviceBounds& bounds,
                            const std::function<void()>& on_run) {
  std::unique_ptr<TurnBench> together;
  try {
    together = std::make_unique<TurnBench>(model, settings, plan, on_run);
  } catch (const Error&) {
    if (settings.size() == 1) throw;
  }
  if (together != nullptr) return {.in_turns = true, .settings = together->run(bounds)};
  BenchResults results{.in_turns = false, .settings = {}};
  for (size_t i = 0; i < settings.size(); ++i) {
    TurnBench alone(model, settings.subspan(i, 1), plan, on_run);
    results.settings.push_back(std::move(alone.run(bounds).front()));
  }
  return results;
}

}  // namespace sagelm::cli
