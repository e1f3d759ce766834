#include "sampling_options.h"

#include "base/error.h"
#include "engine/sampler.h"
#include "options.h"

namespace sagelm::cli {
namespace {

constexpr int64_t kMaxTokens = int64_t{1} << 40;

template <typename T>
std::string or_off(T value, T off) {
  return value == off ? "off" : fmt::format("{}", value);
}

}  // namespace

void add_sampling_options(CLI::App& command, GenerationFlags& flags) {
  const auto add = [&command](const char* name, auto& value, const char* unit, const char* help) {
    return command.add_option(name, value, help)
        ->option_text(fmt::format("{} (default: {})", unit, value))
        ->check(not_empty);
  };
  SamplingOptions& sampling = flags.options.sampling;
  add("--temp", sampling.temperature, "T", "temperature; 0: the most probable token");
  add("--top-k", sampling.top_k, "K", "draw from the K most probable; 0: off");
  add("--top-p", sampling.top_p, "P", "draw from the most probable that hold P; 1: off");
  add("--min-p", sampling.min_p, "P",
      "drop tokens less probable than this part of the most probable; 0: off");
  add("--repeat-penalty", sampling.repeat_penalty, "X",
      "divides the logits of recent tokens; 1: off (as without this flag at --temp 0)")
      ->each([&flags](const std::string&) { flags.penalty_given = true; });
  add("--repeat-last-n", sampling.repeat_last_n, "N",
      "recent tokens that the penalty looks at; -1: all");
}

void add_generation_options(CLI::App& command, GenerationFlags& flags, int64_t default_tokens) {
  flags.options.max_tokens = default_tokens;
  command.add_option("-n,--n-predict", flags.options.max_tokens, "tokens to generate at most")
      ->check(CLI::Range(int64_t{1}, kMaxTokens))
      ->option_text(fmt::format("N (default: {})", default_tokens));
  add_sampling_options(command, flags);
  command.add_option("--stop", flags.options.stop, "end before this text (may be repeated)")
      ->expected(1)
      ->take_all()
      ->option_text("TEXT");
  command.add_flag("--ignore-eos", flags.options.ignore_eos,
                   "never draw the end-of-sequence token");
}

GenerateOptions effective_options(const GenerationFlags& flags, uint64_t seed) {
  GenerateOptions options = flags.options;
  options.sampling.seed = seed;
  if (options.sampling.temperature == 0.0 && !flags.penalty_given) {
    options.sampling.repeat_penalty = 1.0;
  }
  check_sampling_options(options.sampling);
  return options;
}

std::string describe_sampling(const SamplingOptions& s) {
  const std::string penalty =
      s.repeat_penalty == 1.0 || s.repeat_last_n == 0
          ? "off"
          : fmt::format("{} over {} tokens", s.repeat_penalty,
                        s.repeat_last_n < 0 ? "all" : fmt::format("{}", s.repeat_last_n));
  if (s.temperature == 0.0) return fmt::format("repeat penalty {}, temp 0 (greedy)", penalty);
  return fmt::format("repeat penalty {}, temp {}, top-k {}, top-p {}, min-p {}", penalty,
                     s.temperature, or_off(s.top_k, 0), or_off(s.top_p, 1.0), or_off(s.min_p, 0.0));
}

Json sampling_json(const SamplingOptions& s) {
  return {{"temp", s.temperature},
          {"top_k", s.top_k},
          {"top_p", s.top_p},
          {"min_p", s.min_p},
          {"repeat_penalty", s.repeat_penalty},
          {"repeat_last_n", s.repeat_last_n}};
}

}  // namespace sagelm::cli
