// MMLU as a comparison: every question is one input whose last token is the right letter, so that
// the settings are compared in what they make of the place after "Answer:".
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "eval/compare.h"
#include "eval/mmlu.h"

namespace sagelm {

class MmluComparison {
 public:
  // The questions in the order in which run_mmlu asks them; a subject's are one group, and its
  // shortened ones another, which shares nothing. Beginnings are shared by multiples of
  // `page_tokens`. tasks must outlive it. Throws Error for a letter of several tokens, which one
  // distribution does not tell of.
  MmluComparison(std::span<const MmluTask> tasks, int64_t page_tokens);

  std::span<const Model::ScoreInput> inputs() const { return inputs_; }
  const std::vector<CompareGroup>& groups() const { return groups_; }  // as CompareOptions has
  const std::vector<std::vector<int32_t>>& choices() const { return choices_; }  // them

  // Accuracy by question and by subject, overall, and by question in every category, with the
  // errors that run_mmlu gives them, those of the differences likewise; and the mean negative
  // log-probability of the right letter. comparison is of inputs() with choices().
  std::vector<ComparedMetric> metrics(const Comparison& comparison) const;

 private:
  void add_items(size_t task, bool shortened, int64_t page_tokens);

  std::span<const MmluTask> tasks_;
  std::vector<std::vector<int32_t>> ids_;  // of inputs_
  std::vector<Model::ScoreInput> inputs_;
  std::vector<std::vector<int32_t>> choices_;
  std::vector<CompareGroup> groups_;
  std::vector<size_t> task_of_;  // by input
};

}  // namespace sagelm
