// sagelm generate: continues a text.
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "commands.h"
#include "json_output.h"
#include "options.h"
#include "sagelm/sagelm.hpp"
#include "sampling_options.h"

namespace sagelm::cli {
namespace {

struct GenerateFlags {
  CommonOptions common;
  GenerationFlags generation;
  TextOption prompt;
  int64_t samples = 1;
  bool logprobs = false;
  bool no_bos = false;
};

double decode_rate(std::span<const Generation> samples) {
  int64_t steps = 0;
  for (const Generation& sample : samples) steps += sample.decode_steps;
  const double seconds = samples.front().decode_seconds;  // of all of them
  return steps > 0 && seconds > 0 ? static_cast<double>(steps) / seconds : 0.0;
}

// Sample i is drawn with this seed.
uint64_t seed_of(const GenerateOptions& options, size_t i) { return options.sampling.seed + i; }

void report(const ModelInfo& info, std::span<const Generation> samples,
            const GenerateOptions& options, bool bos, ResultOutput& output) {
  const Generation& generation = samples.front();
  Json result = {{"model", info.name},
                 {"attention", info.attention},
                 {"kv_cache", info.kv_cache},
                 {"device", info.device},
                 {"context", info.context},
                 {"prompt_ids", generation.prompt_ids},
                 {"ids", generation.ids},
                 {"text", generation.text},
                 {"stop_reason", stop_reason_name(generation.stop_reason)},
                 {"prefill_tokens_per_second", generation.prefill_tokens_per_second()},
                 {"decode_tokens_per_second", decode_rate(samples)},
                 {"seed", options.sampling.seed},
                 {"sampling", sampling_json(options.sampling)},
                 {"max_tokens", options.max_tokens},
                 {"stop", options.stop},
                 {"ignore_eos", options.ignore_eos},
                 {"bos", bos}};
  if (options.prompt_logprobs) result["prompt_logprobs"] = generation.prompt_logprobs;
  if (samples.size() > 1) {
    Json& all = result["samples"] = Json::array();
    for (size_t i = 0; i < samples.size(); ++i) {
      all.push_back({{"seed", seed_of(options, i)},
                     {"ids", samples[i].ids},
                     {"text", samples[i].text},
                     {"stop_reason", stop_reason_name(samples[i].stop_reason)}});
    }
  }
  output.json(result);
}

void run_generate(const GenerateFlags& flags) {
  GenerateOptions options = effective_options(flags.generation, flags.common.seed);
  options.prompt_logprobs = flags.logprobs;
  const std::string prompt = flags.prompt.read();
  ResultOutput output(flags.common.json);
  if (flags.logprobs && !output.wants_json()) {
    throw UsageError("--logprobs writes to the JSON object only: add --json");
  }
  Model model = load_model(flags.common, 0, 1);
  const std::vector<int32_t> ids = model.tokenize(prompt, !flags.no_bos);
  std::vector<Generation> samples;
  if (flags.samples == 1) {  // as it is drawn
    samples.push_back(
        model.start_session().generate(ids, options, [&output](std::string_view text) {
          output.text(text);
          return true;
        }));
    output.text("\n");
  } else {
    samples = model.generate_samples(ids, options, flags.samples);
    for (size_t i = 0; i < samples.size(); ++i) {
      output.text(
          fmt::format("--- sample {}, seed {}\n{}\n", i + 1, seed_of(options, i), samples[i].text));
    }
  }
  const bool bos = ids != model.tokenize(prompt, false);
  report(model.info(), samples, options, bos, output);
  if (flags.common.verbose) {
    fmt::print(
        stderr,
        "{}; seed {}\nstopped by {} after {} tokens; prompt of {} tokens at {:.1f} tokens/s, "
        "answer{} at {:.1f} tokens/s\n",
        describe_sampling(options.sampling), options.sampling.seed,
        stop_reason_name(samples.front().stop_reason), samples.front().ids.size(), ids.size(),
        samples.front().prefill_tokens_per_second(), samples.size() == 1 ? "" : "s together",
        decode_rate(samples));
  }
}

}  // namespace

void add_generate(CLI::App& app) {
  CLI::App* command = app.add_subcommand("generate", "Continue a text");
  auto flags = std::make_shared<GenerateFlags>();
  add_common_options(
      *command, flags->common,
      kModelGroup | kComputeGroup | kContextGroup | kSeedGroup | kJsonGroup | kVerboseGroup);
  flags->prompt.add(*command, "--prompt", "the text to continue");
  add_generation_options(*command, flags->generation, 128);
  command
      ->add_option("--samples", flags->samples,
                   "texts to draw, as one batch: the first with --seed, each with the next seed")
      ->option_text("N (default: 1)")
      ->check(CLI::Range(1, 256));
  command->add_flag("--logprobs", flags->logprobs,
                    "with --json: log-probability of each prompt token after the first");
  command->add_flag("--no-bos", flags->no_bos, "no beginning-of-sequence token before the text");
  command->callback([flags] { run_generate(*flags); });
}

}  // namespace sagelm::cli
