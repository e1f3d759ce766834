// sagelm mmlu: multiple-choice questions on 57 subjects.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "commands.h"
#include "eval/mmlu.h"
#include "eval_options.h"
#include "interrupt.h"
#include "json_output.h"
#include "mmlu_options.h"
#include "progress.h"
#include "sagelm/sagelm.hpp"

namespace sagelm::cli {
namespace {

struct MmluCommandFlags {
  EvalFlags eval;
  MmluFlags questions;
};

std::string with_error(double value, double error) {
  return format_figure(value, 4) + " ± " + format_figure(error, 4);
}

std::string describe(const Json& json, const MmluCommandFlags& flags, MmluPrompt prompt,
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
      json["attention"].get<std::string>(), flags.questions.data,
      json["bos"].get<bool>() ? "with" : "without", json["data_sha256"].get<std::string>(),
      mmlu_prompt_name(prompt), describe_mmlu_prompt(prompt), flags.questions.shots,
      result.subjects.size(), mmlu_subjects().size());
  text += fmt::format(
      "questions      {}{}{}\n"
      "shortened      {} prompts beyond the context of {} tokens\n"
      "speed          {:.0f} tokens/s ({} run of {}{})\n\n",
      result.overall.questions, limit_note(flags.eval),
      result.partial() ? " (partial: interrupted)" : "", result.shortened,
      json["context"].get<int64_t>(), result.tokens_per_second(), result.tokens_run,
      result.prompt_tokens, flags.questions.no_share ? "" : ": beginnings are shared");

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

void run(const MmluCommandFlags& flags) {
  const MmluData data = load_mmlu_data(flags.questions, flags.eval.limit);
  ResultOutput output(flags.eval.common.json);
  const MmluQuestions questions = prepare_questions(flags.questions, data, flags.eval.common);
  const std::vector<MmluTask>& tasks = questions.tasks;

  Model model = load_for_eval(flags.eval.common, flags.eval, longest_run(tasks));
  const ModelInfo info = model.info();
  int64_t total = 0;
  for (const MmluTask& task : tasks) total += static_cast<int64_t>(task.items.size());
  std::optional<Journal> journal = open_journal(flags.eval, "mmlu", info, questions.sha256,
                                                journal_header(flags.questions, questions));
  MmluResult result;
  {
    const InterruptGuard guard;
    Progress progress("scoring", "questions", total);
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
               {"device", info.device}};
  json.update(questions_json(flags.questions, questions));
  json.update({{"limit", flags.eval.limit ? Json(*flags.eval.limit) : Json()},
               {"batch_tokens", flags.eval.batch_tokens}});
  add_result(json, result);
  output.text(describe(json, flags, questions.prompt, result));
  output.json(json);
  report_interrupt(result.overall.questions, result.questions_planned, "questions",
                   flags.eval.resume);
}

}  // namespace

void add_mmlu(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "mmlu", "Measure how often the model picks the right answer of four (MMLU)");
  auto flags = std::make_shared<MmluCommandFlags>();
  add_common_options(*command, flags->eval.common,
                     kModelGroup | kComputeGroup | kContextGroup | kJsonGroup | kVerboseGroup);
  add_mmlu_options(*command, flags->questions);
  add_amount_options(*command, flags->eval, "questions of each subject");
  add_resume_option(*command, flags->eval);
  command->callback([flags] { run(*flags); });
}

}  // namespace sagelm::cli
