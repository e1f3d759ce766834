// Session: the generation loop over one growing sequence.
#include <algorithm>
#include <chrono>
#include <limits>
#include <optional>
#include <utility>

#include "base/error.h"
#include "engine/engine_impl.h"
#include "engine/sampler.h"
#include "engine/text_stream.h"
#include "sagelm/sagelm.hpp"
#include "text/detokenizer.h"

namespace sagelm {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double rate(int64_t count, double seconds) {
  return count > 0 && seconds > 0 ? static_cast<double>(count) / seconds : 0.0;
}

void check_options(const GenerateOptions& options) {
  if (options.max_tokens < 0) fail_usage("the number of tokens to generate must not be negative");
  check_sampling_options(options.sampling);
  for (const std::string& stop : options.stop) {
    if (stop.empty()) fail_usage("a stop string must not be empty");
  }
}

}  // namespace

struct Session::Impl {
  Impl(std::shared_ptr<Model::Impl> shared_model, const KvRoom& room)
      : model(std::move(shared_model)),
        cache(std::make_shared<KvCache>(model->llama->make_cache(model->kv_type, room))),
        sequence(*cache) {}
  Impl(const Impl& other)
      : model(other.model),
        cache(other.cache),
        sequence(other.sequence.fork(other.sequence.length())),
        ids(other.ids) {}

  std::vector<float> run_prompt(const GenerateOptions& options, const TextCallback& on_text,
                                Generation& result);
  void decode(std::vector<float> logits, const GenerateOptions& options,
              const TextCallback& on_text, Generation& result);

  std::shared_ptr<Model::Impl> model;
  std::shared_ptr<KvCache> cache;  // of this session and its forks
  Sequence sequence;               // the first of ids, those that went through the model
  std::vector<int32_t> ids;        // all
};

std::string_view stop_reason_name(StopReason reason) {
  switch (reason) {
    case StopReason::kEndOfSequence:
      return "end-of-sequence";
    case StopReason::kMaxTokens:
      return "max-tokens";
    case StopReason::kStopString:
      return "stop-string";
    case StopReason::kCallback:
      return "callback";
    case StopReason::kContextFull:
      return "context-full";
  }
  return "?";
}

double Generation::prefill_tokens_per_second() const {
  return rate(prefill_tokens, prefill_seconds);
}

double Generation::decode_tokens_per_second() const { return rate(decode_steps, decode_seconds); }

Session::Session(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Session::~Session() = default;
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;

Session Model::start_session(int64_t forks) {
  if (forks < 0) fail("a session cannot have {} forks", forks);
  const Llama& llama = *impl_->llama;
  check_fits(impl_->memory_needs(llama.config(), llama.attention(), forks + 1), true,
             *impl_->backend);
  const KvRoom one = kv_room(impl_->kv_type, impl_->info.context);
  const KvRoom room{.pages = one.pages * (forks + 1), .tails = one.tails * (forks + 1)};
  return Session(std::make_unique<Session::Impl>(impl_, room));
}

Session Session::fork() const { return Session(std::make_unique<Impl>(*impl_)); }

std::span<const int32_t> Session::ids() const { return impl_->ids; }

int64_t Session::context() const { return impl_->model->info.context; }

void Session::truncate(int64_t length) {
  if (length < 0 || length > static_cast<int64_t>(impl_->ids.size())) {
    fail("a session of {} tokens cannot be cut to {}", impl_->ids.size(), length);
  }
  impl_->ids.resize(static_cast<size_t>(length));
  if (length < impl_->sequence.length()) impl_->sequence.truncate(length);
}

Generation Session::generate(std::span<const int32_t> ids, const GenerateOptions& options,
                             const TextCallback& on_text) {
  check_options(options);
  impl_->model->check_ids(ids);
  const size_t length_before = impl_->ids.size();
  const size_t needed = length_before + ids.size();
  if (needed > static_cast<size_t>(context())) {
    fail("the context is full: {} tokens are in use, {} more do not fit its {}", length_before,
         ids.size(), context());
  }
  if (needed == 0) fail("the prompt is empty: there is nothing to continue");

  Generation result;
  result.prompt_ids.assign(ids.begin(), ids.end());
  impl_->ids.insert(impl_->ids.end(), ids.begin(), ids.end());
  try {
    std::vector<float> logits = impl_->run_prompt(options, on_text, result);
    if (logits.empty()) {
      result.stop_reason = StopReason::kCallback;
    } else {
      impl_->decode(std::move(logits), options, on_text, result);
    }
  } catch (...) {
    truncate(static_cast<int64_t>(length_before));
    throw;
  }
  return result;
}

// The logits after the last token of ids; empty if on_text stopped it.
std::vector<float> Session::Impl::run_prompt(const GenerateOptions& options,
                                             const TextCallback& on_text, Generation& result) {
  const auto start = std::chrono::steady_clock::now();
  const auto length = static_cast<int64_t>(ids.size());
  if (options.prompt_logprobs) {
    const auto first =
        std::max<int64_t>(1, length - static_cast<int64_t>(result.prompt_ids.size()) + 1);
    sequence.truncate(0);
    for (const Scored& scored : model->score_alone(sequence, ids, first)) {
      result.prompt_logprobs.push_back(scored.logprob);
    }
  }
  // The last token must run for its logits, even if the cache holds it already.
  if (sequence.length() >= length) sequence.truncate(length - 1);
  const auto pending = std::span(ids).subspan(static_cast<size_t>(sequence.length()));
  std::vector<float> logits = model->prefill(
      sequence, pending, [&on_text] { return !on_text || on_text(std::string_view()); });
  result.prefill_tokens = options.prompt_logprobs ? length : static_cast<int64_t>(pending.size());
  result.prefill_seconds = seconds_since(start);
  return logits;
}

void Session::Impl::decode(std::vector<float> logits, const GenerateOptions& options,
                           const TextCallback& on_text, Generation& result) {
  const auto start = std::chrono::steady_clock::now();
  Sampler sampler(options.sampling);
  std::optional<Detokenizer> detokenizer;
  if (model->tokenizer != nullptr) detokenizer.emplace(*model->tokenizer);
  TextStream stream(options.stop);
  std::vector<int32_t> ends = options.end_ids;
  const std::vector<int32_t>& eos = model->llama->config().eos_token_ids;
  ends.insert(ends.end(), eos.begin(), eos.end());
  const auto show = [&](const std::string& text) {
    result.text += text;
    return !on_text || on_text(text);
  };

  result.stop_reason = StopReason::kMaxTokens;
  model->backend->repeated_seconds();  // only what follows counts
  while (static_cast<int64_t>(result.ids.size()) < options.max_tokens) {
    if (static_cast<int64_t>(ids.size()) >= model->info.context) {
      result.stop_reason = StopReason::kContextFull;
      break;
    }
    if (options.ignore_eos) {
      for (const int32_t end : ends) {
        if (end >= 0 && static_cast<size_t>(end) < logits.size()) {
          logits[static_cast<size_t>(end)] = -std::numeric_limits<float>::infinity();
        }
      }
    }
    const int32_t id = sampler.sample(logits, ids);
    if (std::find(ends.begin(), ends.end(), id) != ends.end()) {
      result.stop_reason = StopReason::kEndOfSequence;
      break;
    }
    ids.push_back(id);
    result.ids.push_back(id);
    if (!show(stream.push(detokenizer ? detokenizer->push(id) : std::string()))) {
      result.stop_reason = StopReason::kCallback;
      break;
    }
    if (stream.stopped()) {
      result.stop_reason = StopReason::kStopString;
      break;
    }
    if (static_cast<int64_t>(result.ids.size()) == options.max_tokens) break;
    const StepInput input{.sequence = &sequence, .tokens = {&ids.back(), 1}};
    logits = model->llama->step({&input, 1});
    ++result.decode_steps;
  }
  const std::string rest =
      stream.push(detokenizer ? detokenizer->flush() : std::string()) + stream.finish();
  if (result.stop_reason == StopReason::kCallback) {
    result.text += rest;  // on_text wanted no more
  } else if (!rest.empty()) {
    show(rest);
  }
  result.decode_seconds = seconds_since(start);
  result.decode_device_seconds = model->backend->repeated_seconds();
}

}  // namespace sagelm
