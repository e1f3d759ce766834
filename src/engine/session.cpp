// Session: answers to one growing sequence.
#include <algorithm>
#include <chrono>
#include <optional>
#include <utility>

#include "base/error.h"
#include "engine/answer.h"
#include "engine/decoding.h"
#include "engine/engine_impl.h"
#include "sagelm/sagelm.hpp"

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

  void append(std::span<const int32_t> prompt, const GenerateOptions& options, Generation& result);
  // An answer: where its tokens go and how they are drawn.
  struct Branch {
    Impl* session = nullptr;
    GenerateOptions options;
    TextCallback on_text;
    Generation* result = nullptr;
  };
  // Runs what has not run of the first session's ids and draws the answers to them as one batch.
  // The other sessions, forks of the first, have the same ids.
  static void answer(std::span<const Branch> branches);
  // The tokens that are drawn by the logits after the last of ids; none if on_text stopped it.
  std::optional<std::vector<int32_t>> run_prompt(const GenerateOptions& options,
                                                 const TextCallback& on_text,
                                                 std::span<const TokenDraw> draws,
                                                 Generation& result);

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
  const size_t length_before = impl_->ids.size();
  Generation result;
  try {
    impl_->append(ids, options, result);
    const Impl::Branch branch{
        .session = impl_.get(), .options = options, .on_text = on_text, .result = &result};
    Impl::answer({&branch, 1});
  } catch (...) {
    truncate(static_cast<int64_t>(length_before));
    throw;
  }
  return result;
}

void Session::Impl::append(std::span<const int32_t> prompt, const GenerateOptions& options,
                           Generation& result) {
  check_options(options);
  model->check_ids(prompt);
  const size_t needed = ids.size() + prompt.size();
  if (needed > static_cast<size_t>(model->info.context)) {
    fail("the context is full: {} tokens are in use, {} more do not fit its {}", ids.size(),
         prompt.size(), model->info.context);
  }
  if (needed == 0) fail("the prompt is empty: there is nothing to continue");
  result.prompt_ids.assign(prompt.begin(), prompt.end());
  ids.insert(ids.end(), prompt.begin(), prompt.end());
}

std::optional<std::vector<int32_t>> Session::Impl::run_prompt(const GenerateOptions& options,
                                                              const TextCallback& on_text,
                                                              std::span<const TokenDraw> draws,
                                                              Generation& result) {
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
  std::optional<std::vector<int32_t>> tokens = model->prefill(
      sequence, pending, draws, [&on_text] { return !on_text || on_text(std::string_view()); });
  result.prefill_tokens = options.prompt_logprobs ? length : static_cast<int64_t>(pending.size());
  result.prefill_seconds = seconds_since(start);
  return tokens;
}

void Session::Impl::answer(std::span<const Branch> branches) {
  const Branch& first = branches.front();
  Model::Impl& model = *first.session->model;
  const Answer::Of of{.tokenizer = model.tokenizer.get(),
                      .eos_ids = model.llama->config().eos_token_ids,
                      .context = model.info.context};
  std::vector<Answer> answers;
  answers.reserve(branches.size());  // what follows points into it
  std::vector<TokenDraw> draws;
  std::vector<DecodedAnswer> decoded;
  for (const Branch& branch : branches) {
    Answer& answer = answers.emplace_back(of, branch.options, branch.on_text, branch.session->ids,
                                          *branch.result);
    if (!answer.wants_token()) continue;
    draws.push_back(answer.next_draw(0));
    decoded.push_back({.answer = &answer,
                       .sequence = &branch.session->sequence,
                       .steps = &branch.result->decode_steps});
  }
  const std::optional<std::vector<int32_t>> tokens =
      first.session->run_prompt(first.options, first.on_text, draws, *first.result);
  if (!tokens) first.result->stop_reason = StopReason::kCallback;
  for (const Branch& branch : branches.subspan(1)) {
    *branch.result = *first.result;
    branch.session->sequence = first.session->sequence.fork(first.session->sequence.length());
  }
  if (!tokens) return;

  const auto start = std::chrono::steady_clock::now();
  model.backend->repeated_seconds();  // only what follows counts
  decode(*model.llama, model.backend->runs_ahead(), decoded, *tokens);
  const double seconds = seconds_since(start);
  const double device_seconds = model.backend->repeated_seconds();
  for (size_t i = 0; i < branches.size(); ++i) {
    answers[i].finish();
    branches[i].result->decode_seconds = seconds;
    branches[i].result->decode_device_seconds = device_seconds;
  }
}

std::vector<Generation> Model::generate_samples(std::span<const int32_t> prompt_ids,
                                                const GenerateOptions& options, int64_t samples,
                                                const SampleCallback& on_text) {
  const int64_t most_samples = std::min(impl_->options.batch_tokens, Llama::kLogitsRows);
  if (samples < 1 || samples > most_samples) {
    fail_usage("there can be 1 to {} samples, not {}", most_samples, samples);
  }
  // Whole pages of the prompt are there once, and what may follow them for each sample.
  const auto prompt_tokens = static_cast<int64_t>(prompt_ids.size());
  const int64_t context = impl_->info.context;
  const int64_t most = std::min(context, prompt_tokens + std::min(options.max_tokens, context));
  const KvRoom one = kv_room(impl_->kv_type, most);
  const int64_t shared = std::min(one.pages, prompt_tokens / kPageTokens);
  const KvRoom room{.pages = shared + samples * (one.pages - shared), .tails = samples * one.tails};

  std::vector<Session> sessions;
  sessions.push_back(Session(std::make_unique<Session::Impl>(impl_, room)));
  const auto text_of = [&on_text](int64_t sample) -> TextCallback {
    if (!on_text) return {};
    return [&on_text, sample](std::string_view text) { return on_text(sample, text); };
  };
  std::vector<Generation> results(static_cast<size_t>(samples));
  sessions.front().impl_->append(prompt_ids, options, results.front());
  while (static_cast<int64_t>(sessions.size()) < samples) {
    sessions.push_back(sessions.front().fork());
  }
  std::vector<Session::Impl::Branch> branches;
  for (size_t i = 0; i < sessions.size(); ++i) {
    branches.push_back({.session = sessions[i].impl_.get(),
                        .options = options,
                        .on_text = text_of(static_cast<int64_t>(i)),
                        .result = &results[i]});
    branches[i].options.sampling.seed += i;
  }
  Session::Impl::answer(branches);
  return results;
}

}  // namespace sagelm
