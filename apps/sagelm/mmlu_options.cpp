#include "mmlu_options.h"

#include <string_view>

#include "eval/line_encoder.h"
#include "eval/mmlu_data.h"
#include "sagelm/sagelm.hpp"

namespace sagelm::cli {

void add_mmlu_options(CLI::App& command, MmluFlags& flags) {
  command
      .add_option("--data", flags.data,
                  "directory with test/SUBJECT_test.csv and dev/SUBJECT_dev.csv, or with "
                  "test.jsonl and dev.jsonl")
      ->option_text("DIR")
      ->required();
  command.add_option("--shots", flags.shots, "worked examples before each question")
      ->option_text("0..5 (default: 5)")
      ->check(CLI::Range(0, 5));
  command
      .add_option("--prompt", flags.prompt,
                  "lm-eval: as lm-evaluation-harness asks; original: as the paper's program does")
      ->option_text("NAME (default: lm-eval)");
  command.add_option("--subjects", flags.subjects, "only these, e.g. anatomy,virology")
      ->option_text("NAME,…")
      ->delimiter(',');
  command.add_flag("--no-share", flags.no_share,
                   "run every prompt whole instead of sharing its examples through the cache: "
                   "slower, to check the results");
}

MmluData load_mmlu_data(const MmluFlags& flags, std::optional<int64_t> limit) {
  parse_mmlu_prompt(flags.prompt);
  return load_mmlu(flags.data, {.shots = flags.shots, .subjects = flags.subjects, .limit = limit});
}

MmluQuestions prepare_questions(const MmluFlags& flags, const MmluData& data,
                                const CommonOptions& common) {
  MmluQuestions questions{.prompt = parse_mmlu_prompt(flags.prompt),
                          .sha256 = data.sha256,
                          .bytes = data.bytes,
                          .context = Model::inspect(load_options(common)).context};
  const Tokenizer tokenizer = open_tokenizer(common);
  questions.bos = adds_bos(tokenizer);
  LineEncoder encoder(tokenizer, questions.bos);
  questions.tasks = prepare_mmlu(
      data, questions.prompt, [&encoder](std::string_view text) { return encoder.encode(text); },
      questions.context);
  if (flags.no_share) {
    for (MmluTask& task : questions.tasks) task.shared = 0;
  }
  return questions;
}

JournalHeader journal_header(const MmluFlags& flags, const MmluQuestions& questions) {
  std::string names;
  for (const MmluTask& task : questions.tasks) {
    names += fmt::format("{}{}", names.empty() ? "" : ",", task.subject->name);
  }
  return {{"prompt", std::string(mmlu_prompt_name(questions.prompt))},
          {"shots", fmt::format("{}", flags.shots)},
          {"subjects", names},
          {"shared_prefix", flags.no_share ? "no" : "yes"},
          {"context", fmt::format("{}", questions.context)}};
}

Json questions_json(const MmluFlags& flags, const MmluQuestions& questions) {
  return {{"bos", questions.bos},
          {"data", flags.data},
          {"data_bytes", questions.bytes},
          {"data_sha256", questions.sha256},
          {"prompt", mmlu_prompt_name(questions.prompt)},
          {"prompt_description", describe_mmlu_prompt(questions.prompt)},
          {"shots", flags.shots},
          {"context", questions.context},
          {"shared_prefix", !flags.no_share}};
}

}  // namespace sagelm::cli
