// sagelm perplexity: how well the model predicts a text, under a named protocol.
#include <algorithm>
#include <memory>
#include <optional>
#include <string>

#include "base/error.h"
#include "commands.h"
#include "eval/dataset.h"
#include "eval/perplexity.h"
#include "eval/protocol.h"
#include "eval_options.h"
#include "json_output.h"
#include "protocol_options.h"
#include "sagelm/sagelm.hpp"

namespace sagelm::cli {
namespace {

struct PerplexityFlags {
  EvalFlags eval;
  ProtocolFlags protocol;
};

std::string describe_figures(const PerplexityResult& result) {
  if (!result.documents) {
    return fmt::format(
        "perplexity     {} ± {}\n"
        "±              standard error over the {} tokens scored\n",
        format_figure(result.perplexity, 4), format_figure(result.standard_error, 4),
        result.tokens_scored);
  }
  const DocumentFigures& figures = *result.documents;
  return fmt::format(
      "per word       {} ± {} (word_perplexity, {} words)\n"
      "per byte       {} ± {} (byte_perplexity, {} bytes)\n"
      "bits per byte  {} ± {}\n"
      "±              standard error over the {} documents scored; lm-eval prints none\n"
      "per token      {} ± {} (not one of lm-eval's figures)\n",
      format_figure(figures.word_perplexity, 4), format_figure(figures.word_perplexity_stderr, 4),
      figures.words, format_figure(figures.byte_perplexity, 4),
      format_figure(figures.byte_perplexity_stderr, 4), figures.bytes,
      format_figure(figures.bits_per_byte, 4), format_figure(figures.bits_per_byte_stderr, 4),
      figures.documents, format_figure(result.perplexity, 4),
      format_figure(result.standard_error, 4));
}

std::string describe(const Json& json, const PerplexityFlags& flags, const Protocol& protocol,
                     const PerplexityResult& result) {
  std::string text = fmt::format(
      "model          {}\n"
      "device         {}\n"
      "attention      {}\n"
      "file           {} ({} tokens, {} BOS)\n"
      "sha256         {}\n"
      "protocol       {}: {}\n",
      json["model"].get<std::string>(), json["device"].get<std::string>(),
      json["attention"].get<std::string>(), json["file"].get<std::string>(),
      json["file_tokens"].get<int64_t>(), json["bos"].get<bool>() ? "with" : "without",
      json["file_sha256"].get<std::string>(), protocol.name, protocol.description);
  if (result.documents) {
    text += fmt::format("documents      {} of {}\n", result.documents->documents,
                        result.documents->documents_of_text);
  }
  text += fmt::format(
      "windows        {} of {}{}{}\n"
      "tokens scored  {}\n"
      "nll            {} per token\n",
      result.windows, result.windows_of_text, limit_note(flags.eval),
      result.partial() ? " (partial: interrupted)" : "", result.tokens_scored,
      format_figure(result.nll_mean, 5));
  return text + describe_figures(result) +
         fmt::format("speed          {:.0f} tokens/s\n", result.tokens_per_second());
}

// What the protocol is known for has the plain names: "perplexity" is per token, and an lm-eval
// protocol has that of words and bytes in its place.
Json figures_json(const PerplexityResult& result) {
  if (!result.documents) {
    return {{"perplexity", result.perplexity}, {"stderr", result.standard_error}};
  }
  const DocumentFigures& figures = *result.documents;
  return {{"word_perplexity", figures.word_perplexity},
          {"word_perplexity_stderr", figures.word_perplexity_stderr},
          {"byte_perplexity", figures.byte_perplexity},
          {"byte_perplexity_stderr", figures.byte_perplexity_stderr},
          {"bits_per_byte", figures.bits_per_byte},
          {"bits_per_byte_stderr", figures.bits_per_byte_stderr},
          {"token_perplexity", result.perplexity},
          {"token_perplexity_stderr", result.standard_error},
          {"documents", figures.documents},
          {"documents_of_text", figures.documents_of_text},
          {"words", figures.words},
          {"bytes", figures.bytes}};
}

void run(const PerplexityFlags& flags) {
  check_protocol_name(flags.protocol.name);
  const std::string& file = flags.eval.file;
  const std::string bytes = read_text_file(file);
  check_text(file, bytes);
  const Protocol protocol = protocol_of(flags.protocol, flags.eval.common);
  ResultOutput output(flags.eval.common.json);
  const Tokenizer tokenizer = open_tokenizer(flags.eval.common);
  const ScoringPlan plan(bytes, protocol, text_encoder(tokenizer), flags.eval.limit);

  CommonOptions common = flags.eval.common;
  common.context = protocol.ctx;  // refused if it is beyond the model's
  Model model = load_for_eval(common, flags.eval, protocol.ctx);
  std::optional<Journal> journal = open_journal(flags.eval, "perplexity", model.info(), bytes,
                                                {{"protocol", protocol.name},
                                                 {"ctx", fmt::format("{}", protocol.ctx)},
                                                 {"stride", fmt::format("{}", protocol.stride)}});
  PerplexityResult result;
  run_with_progress(model, "windows", static_cast<int64_t>(plan.inputs().size()),
                    [&](const Scorer& scorer, const EvalCallback& on_progress) {
                      result = run_perplexity(plan, flags.eval.batch_tokens, scorer, on_progress,
                                              journal ? &*journal : nullptr);
                    });

  Json json =
      eval_json(model.info(), adds_bos(tokenizer) || protocol.front != FrontTokens::kTokenizerBos,
                file, bytes);
  json.update({{"file_tokens", plan.tokens_of_text()},
               {"protocol", protocol.name},
               {"protocol_description", protocol.description},
               {"ctx", protocol.ctx},
               {"stride", protocol.stride},
               {"tokens_scored", result.tokens_scored},
               {"nll_mean", result.nll_mean}});
  json.update(figures_json(result));
  json.update({{"tokens_per_second", result.tokens_per_second()},
               {"tokens_run", result.tokens_run},
               {"seconds", result.seconds},
               {"windows", result.windows},
               {"windows_of_text", result.windows_of_text},
               {"limit", flags.eval.limit ? Json(*flags.eval.limit) : Json()},
               {"batch_tokens", flags.eval.batch_tokens},
               {"partial", result.partial()}});
  output.text(describe(json, flags, protocol, result));
  output.json(json);
  report_interrupt(result.windows, result.windows_planned, "windows", flags.eval.resume);
}

}  // namespace

void add_perplexity(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "perplexity", "Measure how well the model predicts a text, under a named protocol");
  auto flags = std::make_shared<PerplexityFlags>();
  add_eval_options(*command, flags->eval, "the text, UTF-8; -: standard input",
                   "windows (lm-eval: documents)");
  add_resume_option(*command, flags->eval);
  add_protocol_options(*command, flags->protocol);
  command->callback([flags] { run(*flags); });
}

}  // namespace sagelm::cli
