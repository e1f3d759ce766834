// sagelm mmlu: multiple-choice questions on 57 subjects.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "commands.h"
#include "eval/line_encoder.h"
#include "eval/mmlu.h"
#include "eval_options.h"
#include "interrupt.h"
#include "json_output.h"
#include "progress.h"
#include "sagelm/sagelm.hpp"

namespace sagelm::cli {
namespace {

struct MmluFlags {
  EvalFlags eval;  // file: the directory
  std::string prompt = "lm-eval";
  int64_t shots = 5;
  std::vector<std::string> subjects;
  bool no_share = false;
};

std::string with_error(double value, double error) {
  return format_figure(value, 4) + " ± " + format_figure(error, 4);
}

std::string describe(const Json& json, const MmluFlags& flags, MmluPrompt prompt,
                     const MmluResult& result) {
  std::string text = fmt::format(
      "model          {}\n"
      "device         {}\n"
      "attention      {}\n"
      "data           {} ({} BOS)\n"
      "sha256         {}\n"
      "prompt         {}: {}\n"
      "shots          {}\n"
      "subjects       {} of {}\n",
      json["model"].get<std::string>(), json["device"].get<std::string>(),
      json["attention"].get<std::string>(), flags.eval.file,
      json["bos"].get<bool>() ? "with" : "without", json["data_sha256"].get<std::string>(),
      mmlu_prompt_name(prompt), describe_mmlu_prompt(prompt), flags.shots, result.subjects.size(),
      mmlu_subjects().size());
  text += fmt::format(
      "questions      {}{}{}\n"
      "shortened      {} prompts beyond the context of {} tokens\n"
      "speed          {:.0f} tokens/s ({} run of {}{})\n\n",
      result.overall.questions, limit_note(flags.eval),
      result.partial() ? " (partial: interrupted)" : "", result.shortened,
      json["context"].get<int64_t>(), result.tokens_per_second(), result.tokens_run,
      result.prompt_tokens, flags.no_share ? "" : ": beginnings are shared");

  // Widths count characters, and every ± takes the same number of them.
  text += fmt::format("{:<36}{:<16}{:>10}{:>9}  accuracy\n", "subject", "category", "questions",
                      "correct");
  for (const MmluSubjectResult& subject : result.subjects) {
    if (subject.questions == 0) continue;
    text += fmt::format(
        "{:<36}{:<16}{:>10}{:>9}  {}{}\n", subject.subject->name,
        mmlu_category_name(subject.subject->category), subject.questions, subject.correct,
        with_error(subject.accuracy, subject.accuracy_stderr),
        subject.shortened > 0 ? fmt::format("  ({} shortened)", subject.shortened) : "");
  }
  text += fmt::format("\n{:<16}{:>9}{:>11}{:>9}  {:<19}  macro (by subject)\n", "category",
                      "subjects", "questions", "correct", "micro (by question)");
  const auto group_line = [](std::string_view name, const MmluGroupResult& group) {
    return fmt::format("{:<16}{:>9}{:>11}{:>9}  {:<19}  {}\n", name, group.subjects,
                       group.questions, group.correct, with_error(group.micro, group.micro_stderr),
                       with_error(group.macro, group.macro_stderr));
  };
  for (int i = 0; i < kNumMmluCategories; ++i) {
    const MmluGroupResult& group = result.categories[static_cast<size_t>(i)];
    if (group.questions == 0) continue;
    text += group_line(mmlu_category_name(static_cast<MmluCategory>(i)), group);
  }
  return text + group_line("overall", result.overall);
}

Json group_json(const MmluGroupResult& group) {
  return {{"subjects", group.subjects},         {"questions", group.questions},
          {"correct", group.correct},           {"accuracy_micro", group.micro},
          {"stderr_micro", group.micro_stderr}, {"accuracy_macro", group.macro},
          {"stderr_macro", group.macro_stderr}};
}

void add_result(Json& json, const MmluResult& result) {
  json["overall"] = group_json(result.overall);
  json["categories"] = Json::object();
  for (int i = 0; i < kNumMmluCategories; ++i) {
    const MmluGroupResult& group = result.categories[static_cast<size_t>(i)];
    if (group.questions == 0) continue;
    json["categories"][std::string(mmlu_category_name(static_cast<MmluCategory>(i)))] =
        group_json(group);
  }
  json["subjects"] = Json::array();
  for (const MmluSubjectResult& subject : result.subjects) {
    json["subjects"].push_back({{"subject", subject.subject->name},
                                {"category", mmlu_category_name(subject.subject->category)},
                                {"questions", subject.questions},
                                {"correct", subject.correct},
                                {"answers", subject.answers},
                                {"accuracy", subject.accuracy},
                                {"stderr", subject.accuracy_stderr},
                                {"shortened", subject.shortened},
                                {"prompt_tokens", subject.prompt_tokens},
                                {"tokens_run", subject.tokens_run},
                                {"seconds", subject.seconds}});
  }
  json.update({{"shortened", result.shortened},
               {"prompt_tokens", result.prompt_tokens},
               {"tokens_run", result.tokens_run},
               {"tokens_per_second", result.tokens_per_second()},
               {"seconds", result.seconds},
               {"partial", result.partial()}});
}

void run(const MmluFlags& flags) {
  const MmluPrompt prompt = parse_mmlu_prompt(flags.prompt);
  const MmluData data =
      load_mmlu(flags.eval.file,
                {.shots = flags.shots, .subjects = flags.subjects, .limit = flags.eval.limit});
  ResultOutput output(flags.eval.common.json);
  const int64_t context = Model::inspect(load_options(flags.eval.common)).context;
  const Tokenizer tokenizer = open_tokenizer(flags.eval.common);
  std::vector<MmluTask> tasks;
  {
    LineEncoder encoder(tokenizer, adds_bos(tokenizer));
    tasks = prepare_mmlu(
        data, prompt, [&encoder](std::string_view text) { return encoder.encode(text); }, context);
  }
  if (flags.no_share) {
    for (MmluTask& task : tasks) task.shared = 0;
  }

  Model model = load_model(flags.eval.common, flags.eval.batch_tokens);
  const ModelInfo info = model.info();
  std::string names;
  int64_t questions = 0;
  for (const MmluTask& task : tasks) {
    names += fmt::format("{}{}", names.empty() ? "" : ",", task.subject->name);
    questions += static_cast<int64_t>(task.items.size());
  }
  std::optional<Journal> journal = open_journal(flags.eval, "mmlu", info, data.sha256,
                                                {{"prompt", std::string(mmlu_prompt_name(prompt))},
                                                 {"shots", fmt::format("{}", flags.shots)},
                                                 {"subjects", names},
                                                 {"shared_prefix", flags.no_share ? "no" : "yes"},
                                                 {"context", fmt::format("{}", context)}});
  MmluResult result;
  {
    const InterruptGuard guard;
    Progress progress("scoring", "questions", questions);
    result = run_mmlu(
        tasks,
        [&model](std::span<const int32_t> prefix, std::span<const Model::ChoiceInput> inputs,
                 const Model::ChoiceCallback& take) {
          return model.score_choices(prefix, inputs, take);
        },
        [&progress](const MmluProgress& state) {
          progress.skip(state.resumed);
          progress.update(state.done, "accuracy " + format_figure(state.accuracy, 3));
          return !interrupted();
        },
        journal ? &*journal : nullptr);
  }

  Json json = {{"model", info.name},
               {"attention", info.attention},
               {"kv_cache", info.kv_cache},
               {"device", info.device},
               {"bos", adds_bos(tokenizer)},
               {"data", flags.eval.file},
               {"data_bytes", data.bytes},
               {"data_sha256", data.sha256},
               {"prompt", mmlu_prompt_name(prompt)},
               {"prompt_description", describe_mmlu_prompt(prompt)},
               {"shots", flags.shots},
               {"context", context},
               {"shared_prefix", !flags.no_share},
               {"limit", flags.eval.limit ? Json(*flags.eval.limit) : Json()},
               {"batch_tokens", flags.eval.batch_tokens}};
  add_result(json, result);
  output.text(describe(json, flags, prompt, result));
  output.json(json);
  report_interrupt(result.overall.questions, result.questions_planned, "questions",
                   flags.eval.resume);
}

}  // namespace

void add_mmlu(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "mmlu", "Measure how often the model picks the right answer of four (MMLU)");
  auto flags = std::make_shared<MmluFlags>();
  add_common_options(*command, flags->eval.common,
                     kModelGroup | kComputeGroup | kContextGroup | kJsonGroup | kVerboseGroup);
  command
      ->add_option("--data", flags->eval.file,
                   "directory with test/SUBJECT_test.csv and dev/SUBJECT_dev.csv, or with "
                   "test.jsonl and dev.jsonl")
      ->option_text("DIR")
      ->required();
  command->add_option("--shots", flags->shots, "worked examples before each question")
      ->option_text("0..5 (default: 5)")
      ->check(CLI::Range(0, 5));
  command
      ->add_option("--prompt", flags->prompt,
                   "lm-eval: as lm-evaluation-harness asks; original: as the paper's program does")
      ->option_text("NAME (default: lm-eval)");
  command->add_option("--subjects", flags->subjects, "only these, e.g. anatomy,virology")
      ->option_text("NAME,…")
      ->delimiter(',');
  command->add_flag("--no-share", flags->no_share,
                    "run every prompt whole instead of sharing its examples through the cache: "
                    "slower, to check the results");
  add_amount_options(*command, flags->eval, "questions of each subject");
  add_resume_option(*command, flags->eval);
  command->callback([flags] { run(*flags); });
}

}  // namespace sagelm::cli
