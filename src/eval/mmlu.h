// MMLU: multiple-choice questions on 57 subjects. The answer taken is the letter, " A" to " D",
// that the model finds most probable after the prompt; of equal ones the first.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "eval/journal.h"
#include "eval/mmlu_data.h"
#include "eval/mmlu_prompt.h"
#include "sagelm/sagelm.hpp"

namespace sagelm {

struct MmluItem {
  std::vector<int32_t> context = {};  // the whole prompt, BOS included
  // The letters' ids: what the ids of prompt and letter have beyond the length of the prompt's. The
  // letters are never tokenized alone.
  std::array<std::vector<int32_t>, kMmluChoices> choices = {};
  int answer = 0;
  bool shortened = false;  // the prompt was too long
};

struct MmluTask {
  const MmluSubjectInfo* subject = nullptr;
  std::vector<MmluItem> items = {};
  // Tokens that the contexts of all items not shortened begin with, run once for all of them; at 0
  // each is run whole.
  int64_t shared = 0;
};

// Ids of a text, BOS in front if the tokenizer's configuration wants it.
using MmluEncoder = std::function<std::vector<int32_t>(std::string_view text)>;

// Prompts that with the longest letter but its last token exceed max_tokens are shortened:
// kOriginal leaves out examples from the last one on, which may suffice; then the first tokens are
// dropped, BOS among them, as lm-eval does. Throws Error with file and line where a letter has no
// tokens of its own.
std::vector<MmluTask> prepare_mmlu(const MmluData& data, MmluPrompt prompt,
                                   const MmluEncoder& encode, int64_t max_tokens);

// Tokens of the longest prompt together with what is run of a letter.
int64_t longest_run(std::span<const MmluTask> tasks);

struct MmluSubjectResult {
  const MmluSubjectInfo* subject = nullptr;
  int64_t questions = 0;
  int64_t correct = 0;
  std::string answers = {};   // letters the model chose, as the task's items; '-' if not asked
  int64_t shortened = 0;      // prompts
  int64_t prompt_tokens = 0;  // of the questions
  int64_t tokens_run = 0;     // through the model: fewer, since prompts share their beginning
  double seconds = 0;         // in the model
  double accuracy = 0;
  double accuracy_stderr = 0;  // sample sd / sqrt(n); NaN for fewer than two questions
};

// Several subjects together. Figures that need questions which are not there are NaN.
struct MmluGroupResult {
  int64_t subjects = 0;  // with at least one question
  int64_t questions = 0;
  int64_t correct = 0;
  // Every question counts the same, as in lm-eval; its error is lm-eval's pooled one, that of
  // independent questions around their own subject's accuracy.
  double micro = 0;
  double micro_stderr = 0;
  // Every subject counts the same, as some leaderboards have it.
  double macro = 0;
  double macro_stderr = 0;
};

MmluGroupResult group_mmlu(std::span<const MmluSubjectResult> subjects);

struct MmluResult {
  std::vector<MmluSubjectResult> subjects;  // as the tasks, those without a question done too
  std::array<MmluGroupResult, kNumMmluCategories> categories;
  MmluGroupResult overall;
  int64_t questions_planned = 0;  // more than overall.questions only if the run was stopped
  int64_t shortened = 0;          // this and the following: sums over the subjects
  int64_t prompt_tokens = 0;
  int64_t tokens_run = 0;
  double seconds = 0;

  bool partial() const { return overall.questions < questions_planned; }
  double tokens_per_second() const;  // run through the model; 0 if nothing was measured
};

// As Model::score_choices.
using ChoiceScorer = std::function<int64_t(std::span<const int32_t> prefix,
                                           std::span<const Model::ChoiceInput> inputs,
                                           const Model::ChoiceCallback& take)>;

struct MmluProgress {
  int64_t done = 0;  // questions
  int64_t total = 0;
  double accuracy = 0;  // of those done
  int64_t resumed = 0;  // of those done, taken from a journal
};
// Told after each question; false ends the run with what it has.
using MmluCallback = std::function<bool(const MmluProgress& progress)>;

// Throws Error for a log-probability that is not finite, naming subject and question. With a
// journal, every subject that was scored to its end is one record: those that are there are not
// scored again, the others are appended. A resumed run computes the same as an undisturbed one.
MmluResult run_mmlu(std::span<const MmluTask> tasks, const ChoiceScorer& scorer,
                    const MmluCallback& on_progress = {}, Journal* journal = nullptr);

}  // namespace sagelm
