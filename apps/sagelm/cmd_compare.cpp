// sagelm compare: the same evaluation under two or more settings, token by token.
#include <memory>
#include <numbers>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "backend/kv_layout.h"
#include "base/error.h"
#include "commands.h"
#include "compare_task.h"
#include "eval/compare.h"
#include "eval/compare_layers.h"
#include "eval/compare_mmlu.h"
#include "eval/dataset.h"
#include "eval/lambada.h"
#include "eval/perplexity.h"
#include "eval/report.h"
#include "eval/sha256.h"
#include "eval_options.h"
#include "json_output.h"
#include "mmlu_options.h"
#include "protocol_options.h"
#include "sagelm/sagelm.hpp"

namespace sagelm::cli {
namespace {

// Facts that every task has of its file.
std::vector<std::pair<std::string, std::string>> file_facts(const std::string& file,
                                                            const std::string& bytes,
                                                            const std::string& content) {
  return {{"file", fmt::format("{} ({})", file, content)}, {"sha256", sha256_hex(bytes)}};
}

Json file_json(const std::string& file, const std::string& bytes, bool bos) {
  return {{"bos", bos},
          {"file", file},
          {"file_bytes", bytes.size()},
          {"file_sha256", sha256_hex(bytes)}};
}

const char* bos_note(bool bos) { return bos ? "with BOS" : "without BOS"; }

// Of the documents that were scored to their end.
struct DocumentLosses {
  std::vector<std::vector<double>> losses;  // [setting][document]
  std::vector<double> words;
  std::vector<double> bytes;
  std::vector<double> bits;  // bytes × ln 2, so that losses / bits is in bits per byte
};

DocumentLosses document_losses(const Comparison& comparison, const ScoringPlan& plan) {
  DocumentLosses result;
  std::vector<size_t> ends;
  for (const ScoringPlan::DocumentPlan& document : plan.documents()) {
    if (document.end_input > comparison.input_ends.size()) break;
    ends.push_back(document.end_input);
    const auto bytes = static_cast<double>(document.bytes);
    result.words.push_back(static_cast<double>(document.words));
    result.bytes.push_back(bytes);
    result.bits.push_back(bytes * std::numbers::ln2);
  }
  for (const std::vector<double>& inputs : input_losses(comparison)) {
    auto& documents = result.losses.emplace_back();
    size_t input = 0;
    for (const size_t end : ends) {
      double sum = 0;
      for (; input < end; ++input) sum += inputs[input];
      documents.push_back(sum);
    }
  }
  return result;
}

std::vector<ComparedMetric> perplexity_metrics(const Comparison& comparison,
                                               const ScoringPlan& plan) {
  const std::vector<std::vector<double>> losses = token_losses(comparison);
  std::vector<ComparedMetric> metrics;
  if (plan.has_documents()) {
    const DocumentLosses documents = document_losses(comparison, plan);
    metrics.push_back(paired_metric("word_perplexity", documents.losses,
                                    {.weights = documents.words, .exponential = true}));
    metrics.push_back(paired_metric("byte_perplexity", documents.losses,
                                    {.weights = documents.bytes, .exponential = true}));
    metrics.push_back(
        paired_metric("bits_per_byte", documents.losses, {.weights = documents.bits}));
    metrics.push_back(paired_metric("token_perplexity", losses, {.exponential = true}));
  } else {
    metrics.push_back(paired_metric("perplexity", losses, {.exponential = true}));
  }
  metrics.push_back(paired_metric("nll_mean", losses));
  return metrics;
}

void run_perplexity_task(const CompareFlags& flags, const ProtocolFlags& protocol_flags) {
  check_protocol_name(protocol_flags.name);
  const std::string& file = flags.eval.file;
  const std::string bytes = read_text_file(file);
  check_text(file, bytes);
  const std::vector<CompareSettingFlags> settings = parse_settings(flags.eval.common);
  const Protocol protocol = protocol_of(protocol_flags, settings[0].common);
  if (flags.report) prepare_report_directory(*flags.report);
  ResultOutput output(flags.eval.common.json);
  const Tokenizer tokenizer = open_tokenizer(flags.eval.common);
  const ScoringPlan plan(bytes, protocol, text_encoder(tokenizer), flags.eval.limit);
  const bool bos = adds_bos(tokenizer) || protocol.front != FrontTokens::kTokenizerBos;
  CompareTask task{
      .name = "perplexity",
      .title = "Perplexity",
      .units = "windows",
      .unit = "window",
      .inputs = plan.inputs(),
      .context = protocol.ctx,
      .metrics = [&plan](const Comparison& c) { return perplexity_metrics(c, plan); },
      .data = bytes,
      .journal_header = {{"protocol", protocol.name},
                         {"ctx", fmt::format("{}", protocol.ctx)},
                         {"stride", fmt::format("{}", protocol.stride)}},
      .facts = file_facts(file, bytes,
                          fmt::format("{} tokens, {}", plan.tokens_of_text(), bos_note(bos))),
      .json = file_json(file, bytes, bos)};
  task.facts.emplace_back("protocol", fmt::format("{}: {}", protocol.name, protocol.description));
  task.json.update({{"file_tokens", plan.tokens_of_text()},
                    {"protocol", protocol.name},
                    {"protocol_description", protocol.description},
                    {"ctx", protocol.ctx},
                    {"stride", protocol.stride},
                    {"windows_of_text", plan.windows_of_text()}});
  run_task(flags, task, settings, output);
}

void run_lambada_task(const CompareFlags& flags, const std::string& variant_name) {
  const LambadaVariant variant = parse_lambada_variant(variant_name);
  const std::string& file = flags.eval.file;
  const auto [bytes, passages, file_passages] = read_passages(flags.eval, variant);
  const std::vector<CompareSettingFlags> settings = parse_settings(flags.eval.common);
  if (flags.report) prepare_report_directory(*flags.report);
  ResultOutput output(flags.eval.common.json);
  const Tokenizer tokenizer = open_tokenizer(flags.eval.common);
  const std::vector<LambadaExample> examples = prepare_lambada(
      file, passages, variant,
      [&tokenizer](std::string_view text) { return encode_for_eval(tokenizer, text); },
      Model::inspect(load_options(settings[0].common)).context);
  const std::vector<Model::ScoreInput> inputs = inputs_of(examples);
  CompareTask task{
      .name = "lambada",
      .title = "LAMBADA",
      .units = "passages",
      .unit = "passage",
      .inputs = inputs,
      .metrics =
          [](const Comparison& comparison) {
            return std::vector<ComparedMetric>{
                paired_metric("accuracy", input_hits(comparison)),
                paired_metric("perplexity", input_losses(comparison), {.exponential = true})};
          },
      .data = bytes,
      .journal_header = {{"variant", std::string(lambada_variant_name(variant))}},
      .facts =
          file_facts(file, bytes,
                     fmt::format("{} passages, {}", file_passages, bos_note(adds_bos(tokenizer)))),
      .json = file_json(file, bytes, adds_bos(tokenizer))};
  task.facts.emplace_back("variant", fmt::format("{}: {}", lambada_variant_name(variant),
                                                 describe_lambada_variant(variant)));
  if (const int64_t shortened = num_shortened(examples); shortened > 0) {
    task.facts.emplace_back("shortened",
                            fmt::format("{} passages beyond the model's context", shortened));
  }
  task.json.update({{"file_passages", file_passages},
                    {"variant", lambada_variant_name(variant)},
                    {"variant_description", describe_lambada_variant(variant)},
                    {"shortened", num_shortened(examples)}});
  run_task(flags, task, settings, output);
}

void run_mmlu_task(const CompareFlags& flags, const MmluFlags& mmlu_flags) {
  const MmluData data = load_mmlu_data(mmlu_flags, flags.eval.limit);
  const std::vector<CompareSettingFlags> settings = parse_settings(flags.eval.common);
  if (flags.report) prepare_report_directory(*flags.report);
  ResultOutput output(flags.eval.common.json);
  const MmluQuestions questions = prepare_questions(mmlu_flags, data, settings[0].common);
  const MmluComparison plan(questions.tasks, kPageTokens);
  CompareTask task{
      .name = "mmlu",
      .title = "MMLU",
      .units = "questions",
      .unit = "question",
      .inputs = plan.inputs(),
      .context = questions.context,
      .metrics = [&plan](const Comparison& c) { return plan.metrics(c); },
      .data = questions.sha256,
      .journal_header = journal_header(mmlu_flags, questions),
      .groups = plan.groups(),
      .choices = plan.choices(),
      .facts = {{"data", fmt::format("{} ({} subjects, {})", mmlu_flags.data,
                                     questions.tasks.size(), bos_note(questions.bos))},
                {"sha256", questions.sha256},
                {"prompt", fmt::format("{}, {} shots: {}", mmlu_prompt_name(questions.prompt),
                                       mmlu_flags.shots, describe_mmlu_prompt(questions.prompt))},
                {"answers",
                 "the most probable of the four letters, which same top-1 "
                 "compares too; KL and Δp are those of the whole next-token "
                 "distribution after \"Answer:\""}},
      .json = questions_json(mmlu_flags, questions)};
  run_task(flags, task, settings, output);
}

// What follows the flags of an evaluation, whose --attention becomes a list of settings.
void add_compare_options(CLI::App& command, CompareFlags& flags, const std::string& units) {
  add_resume_option(command, flags.eval);
  command.get_option("--attention")
      ->description(
          "settings to compare, the first being the baseline: each is an attention kernel, "
          "followed by +no-smooth-k, +kv-cache=TYPE or +device=DEVICE where it differs from the "
          "flags below, as in fp16,sage2,sage2+no-smooth-k")
      ->option_text("LIST (default: fp16,sage1,sage2)");
  command
      .add_option("--report", flags.report,
                  "write the result with its charts as DIR/index.html, one page that needs no "
                  "network")
      ->option_text("DIR")
      ->check(not_empty);
  CLI::Option* layers = command.add_flag(
      "--layers", flags.layers,
      fmt::format("also measure every layer's attention against float64 attention, on the first "
                  "{} tokens of the first of the {}",
                  kProbedTokens, units));
  command.add_option("--layer-windows", flags.layer_windows, "that many of them for --layers")
      ->option_text("N (default: 1)")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->needs(layers);
}

constexpr const char* kDefaultSettings = "fp16,sage1,sage2";

void add_file_task_options(CLI::App& command, CompareFlags& flags, const std::string& file_help,
                           const std::string& units) {
  flags.eval.common.attention = kDefaultSettings;
  add_eval_options(command, flags.eval, file_help, units);
  add_compare_options(command, flags, units);
}

void add_perplexity_task(CLI::App& compare) {
  CLI::App* command = compare.add_subcommand(
      "perplexity", "Compare how well each setting predicts a text, under a named protocol");
  auto flags = std::make_shared<CompareFlags>();
  auto protocol = std::make_shared<ProtocolFlags>();
  add_file_task_options(*command, *flags, "the text, UTF-8; -: standard input",
                        "windows (lm-eval: documents)");
  add_protocol_options(*command, *protocol);
  command->callback([flags, protocol] { run_perplexity_task(*flags, *protocol); });
}

void add_lambada_task(CLI::App& compare) {
  CLI::App* command = compare.add_subcommand(
      "lambada", "Compare how often each setting finds the last word of a passage (LAMBADA)");
  auto flags = std::make_shared<CompareFlags>();
  auto variant = std::make_shared<std::string>("word");
  add_file_task_options(*command, *flags,
                        "passages, one JSON object {\"text\": …} per line; -: standard input",
                        "passages");
  command
      ->add_option("--variant", *variant,
                   "word: the last word, as lm-evaluation-harness's lambada_openai; last-token: "
                   "the last token alone")
      ->option_text("NAME (default: word)");
  command->callback([flags, variant] { run_lambada_task(*flags, *variant); });
}

void add_mmlu_task(CLI::App& compare) {
  CLI::App* command = compare.add_subcommand(
      "mmlu", "Compare how often each setting picks the right answer of four (MMLU)");
  auto flags = std::make_shared<CompareFlags>();
  auto questions = std::make_shared<MmluFlags>();
  flags->eval.common.attention = kDefaultSettings;
  add_common_options(*command, flags->eval.common,
                     kModelGroup | kComputeGroup | kContextGroup | kJsonGroup | kVerboseGroup);
  add_mmlu_options(*command, *questions);
  add_amount_options(*command, flags->eval, "questions of each subject");
  add_compare_options(*command, *flags, "questions");
  command->callback([flags, questions] { run_mmlu_task(*flags, *questions); });
}

}  // namespace

void add_compare(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "compare", "Evaluate two or more settings on the same tokens and tell them apart");
  command->require_subcommand(1);
  add_perplexity_task(*command);
  add_lambada_task(*command);
  add_mmlu_task(*command);
}

}  // namespace sagelm::cli
