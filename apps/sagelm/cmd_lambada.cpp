// sagelm lambada: how often the model finds the last word of a passage.
#include <algorithm>
#include <memory>
#include <optional>
#include <string>

#include "base/error.h"
#include "commands.h"
#include "eval/dataset.h"
#include "eval/lambada.h"
#include "eval_options.h"
#include "json_output.h"
#include "sagelm/sagelm.hpp"

namespace sagelm::cli {
namespace {

struct LambadaFlags {
  EvalFlags eval;
  std::string variant = "word";
  bool no_bos = false;
};

std::string describe(const Json& json, const LambadaFlags& flags, LambadaVariant variant,
                     const LambadaResult& result) {
  std::string text = fmt::format(
      "model          {}\n"
      "device         {}\n"
      "attention      {}\n"
      "file           {} ({} passages, {} BOS)\n"
      "sha256         {}\n"
      "variant        {}: {}\n",
      json["model"].get<std::string>(), json["device"].get<std::string>(),
      json["attention"].get<std::string>(), json["file"].get<std::string>(),
      json["file_passages"].get<size_t>(), json["bos"].get<bool>() ? "with" : "without",
      json["file_sha256"].get<std::string>(), lambada_variant_name(variant),
      describe_lambada_variant(variant));
  if (const auto shortened = json["shortened"].get<int64_t>(); shortened > 0) {
    text += fmt::format("shortened      {} passages beyond the model's context\n", shortened);
  }
  text += fmt::format(
      "examples       {} of {}{}{}\n"
      "accuracy       {} ± {} ({} correct)\n"
      "perplexity     {} ± {} per target\n"
      "±              standard error over the {} examples scored (lm-eval's: of the sample, and by "
      "bootstrap)\n"
      "speed          {:.0f} tokens/s\n",
      result.examples, json["file_passages"].get<size_t>(), limit_note(flags.eval),
      result.partial() ? " (partial: interrupted)" : "", format_figure(result.accuracy, 4),
      format_figure(result.accuracy_stderr, 4), result.correct, format_figure(result.perplexity, 4),
      format_figure(result.perplexity_stderr, 4), result.examples, result.tokens_per_second());
  return text;
}

void run(const LambadaFlags& flags) {
  const LambadaVariant variant = parse_lambada_variant(flags.variant);
  const std::string& file = flags.eval.file;
  const auto [bytes, passages, file_passages] = read_passages(flags.eval, variant);
  ResultOutput output(flags.eval.common.json);
  const Tokenizer tokenizer = open_tokenizer(flags.eval.common);
  const bool bos = adds_bos(tokenizer) && !flags.no_bos;
  const std::vector<LambadaExample> examples = prepare_lambada(
      file, passages, variant,
      [&tokenizer, bos](std::string_view text) { return tokenizer.encode(text, bos); },
      Model::inspect(load_options(flags.eval.common)).context);

  Model model = load_for_eval(flags.eval.common, flags.eval, longest_input(inputs_of(examples)));
  std::optional<Journal> journal = open_journal(
      flags.eval, "lambada", model.info(), bytes,
      {{"variant", std::string(lambada_variant_name(variant))}, {"bos", bos ? "yes" : "no"}});
  LambadaResult result;
  run_with_progress(model, "passages", static_cast<int64_t>(examples.size()),
                    [&](const Scorer& scorer, const EvalCallback& on_progress) {
                      result = run_lambada(examples, flags.eval.batch_tokens, scorer, on_progress,
                                           journal ? &*journal : nullptr);
                    });

  Json json = eval_json(model.info(), bos, file, bytes);
  json.update({{"file_passages", file_passages},
               {"variant", lambada_variant_name(variant)},
               {"variant_description", describe_lambada_variant(variant)},
               {"accuracy", result.accuracy},
               {"accuracy_stderr", result.accuracy_stderr},
               {"perplexity", result.perplexity},
               {"perplexity_stderr", result.perplexity_stderr},
               {"examples", result.examples},
               {"shortened", num_shortened(examples)},
               {"correct", result.correct},
               {"tokens_per_second", result.tokens_per_second()},
               {"tokens_run", result.tokens_run},
               {"seconds", result.seconds},
               {"limit", flags.eval.limit ? Json(*flags.eval.limit) : Json()},
               {"batch_tokens", flags.eval.batch_tokens},
               {"partial", result.partial()}});
  output.text(describe(json, flags, variant, result));
  output.json(json);
  report_interrupt(result.examples, result.examples_planned, "passages", flags.eval.resume);
}

}  // namespace

void add_lambada(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "lambada", "Measure how often the model finds the last word of a passage (LAMBADA)");
  auto flags = std::make_shared<LambadaFlags>();
  add_eval_options(*command, flags->eval,
                   "passages, one JSON object {\"text\": …} per line; -: standard input",
                   "passages");
  add_resume_option(*command, flags->eval);
  command
      ->add_option("--variant", flags->variant,
                   "word: the last word, as lm-evaluation-harness's lambada_openai; last-token: "
                   "the last token alone")
      ->option_text("NAME (default: word)");
  command->add_flag(
      "--no-bos", flags->no_bos,
      "no beginning-of-sequence token in front, as lm-evaluation-harness before 0.4.9.2");
  command->callback([flags] { run(*flags); });
}

}  // namespace sagelm::cli
