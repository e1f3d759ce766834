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
#include "sagelm/sagelm.hpp"

namespace sagelm::cli {
namespace {

struct PerplexityFlags {
  EvalFlags eval;
  std::string protocol = "nonoverlap";
  ProtocolOptions options;
};

std::string describe(const Json& json, const Protocol& protocol, const PerplexityResult& result) {
  std::string text = fmt::format(
      "model          {}\n"
      "device         {}\n"
      "attention      {}\n"
      "file           {} ({} tokens, {} BOS)\n"
      "sha256         {}\n"
      "protocol       {}: {}\n"
      "windows        {} of {}\n"
      "tokens scored  {}\n",
      json["model"].get<std::string>(), json["device"].get<std::string>(),
      json["attention"].get<std::string>(), json["file"].get<std::string>(),
      json["file_tokens"].get<size_t>(), json["bos"].get<bool>() ? "with" : "without",
      json["file_sha256"].get<std::string>(), protocol.name, protocol.description, result.windows,
      result.windows_of_text, result.tokens_scored);
  text += fmt::format(
      "nll            {} per token\n"
      "perplexity     {} ± {}{}\n"
      "speed          {:.0f} tokens/s\n",
      format_figure(result.nll_mean, 5), format_figure(result.perplexity, 4),
      format_figure(result.standard_error, 4), result.partial() ? " (partial: interrupted)" : "",
      result.tokens_per_second());
  return text;
}

void run(const PerplexityFlags& flags) {
  Protocol protocol = make_protocol(flags.protocol, flags.options);
  const std::string& file = flags.eval.file;
  const std::string bytes = read_text_file(file);
  check_text(file, bytes);
  ResultOutput output(flags.eval.common.json);
  PerplexityOptions options{.batch_tokens = flags.eval.batch_tokens, .limit = flags.eval.limit};
  std::vector<int32_t> ids;
  {
    const Tokenizer tokenizer = open_tokenizer(flags.eval.common);
    ids = encode_for_eval(tokenizer, protocol.prepare ? protocol.prepare(bytes) : bytes);
    if (adds_bos(tokenizer)) options.bos_id = tokenizer.bos_id();
  }
  const auto num_ids = static_cast<int64_t>(ids.size());
  const auto num_windows = static_cast<int64_t>(protocol.windows(num_ids).size());

  CommonOptions common = flags.eval.common;
  common.context = protocol.ctx;  // refused if it is beyond the model's
  Model model = load_model(common, flags.eval.batch_tokens);
  PerplexityResult result;
  run_with_progress(model, "windows", std::min(num_windows, options.limit.value_or(num_windows)),
                    [&](const Scorer& scorer, const EvalCallback& on_progress) {
                      result = run_perplexity(ids, protocol, options, scorer, on_progress);
                    });

  Json json = eval_json(model.info(), options.bos_id.has_value(), file, bytes);
  json.update({{"file_tokens", ids.size()},
               {"protocol", protocol.name},
               {"protocol_description", protocol.description},
               {"ctx", protocol.ctx},
               {"stride", protocol.stride},
               {"tokens_scored", result.tokens_scored},
               {"nll_mean", result.nll_mean},
               {"perplexity", result.perplexity},
               {"stderr", result.standard_error},
               {"tokens_per_second", result.tokens_per_second()},
               {"tokens_run", result.tokens_run},
               {"seconds", result.seconds},
               {"windows", result.windows},
               {"windows_of_text", result.windows_of_text},
               {"limit", flags.eval.limit ? Json(*flags.eval.limit) : Json()},
               {"batch_tokens", flags.eval.batch_tokens},
               {"partial", result.partial()}});
  output.text(describe(json, protocol, result));
  output.json(json);
  report_interrupt(result.windows, result.windows_planned, "windows");
}

}  // namespace

void add_perplexity(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "perplexity", "Measure how well the model predicts a text, under a named protocol");
  auto flags = std::make_shared<PerplexityFlags>();
  add_eval_options(*command, flags->eval, "the text, UTF-8; -: standard input", "windows");
  command
      ->add_option("--protocol", flags->protocol, "which windows are scored: " + protocol_names())
      ->option_text("NAME (default: nonoverlap)");
  command->add_option("--ctx", flags->options.ctx, "tokens of a window")
      ->option_text("N (default: the protocol's own)")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40));
  command
      ->add_option("--stride", flags->options.stride,
                   "tokens from one window to the next (strided only)")
      ->option_text("N (default: half a window)")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40));
  command->callback([flags] { run(*flags); });
}

}  // namespace sagelm::cli
