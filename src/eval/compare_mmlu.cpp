#include "eval/compare_mmlu.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/error.h"
#include "eval/statistics.h"

namespace sagelm {
namespace {

// hits[subject]: of its questions, or what they change by.
std::vector<MmluSubjectResult> subjects_of(std::span<const MmluTask> tasks,
                                           std::span<const std::vector<int>> hits) {
  std::vector<MmluSubjectResult> subjects;
  for (size_t i = 0; i < hits.size(); ++i) {
    MmluSubjectResult& subject = subjects.emplace_back();
    subject.subject = tasks[i].subject;
    Moments moments;
    for (const int hit : hits[i]) {
      moments.add(hit);
      subject.correct += hit;
    }
    subject.questions = moments.count();
    subject.accuracy = moments.mean();
    subject.accuracy_stderr = moments.standard_error();
  }
  return subjects;
}

// Metrics of some subjects, filled setting by setting.
struct GroupMetrics {
  ComparedMetric micro;
  ComparedMetric macro;

  void add(const MmluGroupResult& own, const MmluGroupResult& change) {
    micro.figures.push_back({.value = own.micro,
                             .standard_error = own.micro_stderr,
                             .difference = change.micro,
                             .difference_error = change.micro_stderr});
    macro.figures.push_back({.value = own.macro,
                             .standard_error = own.macro_stderr,
                             .difference = change.macro,
                             .difference_error = change.macro_stderr});
  }
};

std::vector<MmluSubjectResult> of_category(std::span<const MmluSubjectResult> subjects,
                                           MmluCategory category) {
  std::vector<MmluSubjectResult> members;
  for (const MmluSubjectResult& subject : subjects) {
    if (subject.subject->category == category && subject.questions > 0) members.push_back(subject);
  }
  return members;
}

std::string metric_name(MmluCategory category) {
  std::string name = "accuracy_" + std::string(mmlu_category_name(category));
  std::replace(name.begin(), name.end(), ' ', '_');
  return name;
}

}  // namespace

MmluComparison::MmluComparison(std::span<const MmluTask> tasks, int64_t page_tokens)
    : tasks_(tasks) {
  for (size_t task = 0; task < tasks.size(); ++task) {
    for (const bool shortened : {false, true}) add_items(task, shortened, page_tokens);
  }
  for (const std::vector<int32_t>& ids : ids_) {
    inputs_.push_back({.ids = ids, .first_scored = static_cast<int64_t>(ids.size()) - 1});
  }
}

void MmluComparison::add_items(size_t task, bool shortened, int64_t page_tokens) {
  const size_t first = ids_.size();
  for (const MmluItem& item : tasks_[task].items) {
    if (item.shortened != shortened) continue;
    std::vector<int32_t>& choices = choices_.emplace_back();
    for (size_t c = 0; c < item.choices.size(); ++c) {
      if (item.choices[c].size() != 1) {
        fail(
            "{}, question {}: the letter {} has {} tokens, and settings can be compared where each "
            "has one",
            tasks_[task].subject->name, &item - tasks_[task].items.data() + 1, kMmluLetters[c],
            item.choices[c].size());
      }
      choices.push_back(item.choices[c].front());
    }
    std::vector<int32_t> ids = item.context;
    ids.push_back(choices[static_cast<size_t>(item.answer)]);
    ids_.push_back(std::move(ids));
    task_of_.push_back(task);
  }
  if (ids_.size() == first) return;
  const int64_t shared = shortened ? 0 : tasks_[task].shared / page_tokens * page_tokens;
  groups_.push_back({.end = ids_.size(), .shared = shared});
}

std::vector<ComparedMetric> MmluComparison::metrics(const Comparison& comparison) const {
  GroupMetrics overall{.micro = {.name = "accuracy", .figures = {}},
                       .macro = {.name = "accuracy_macro", .figures = {}}};
  std::vector<std::pair<MmluCategory, GroupMetrics>> categories;
  std::vector<ComparedMetric> metrics;
  const std::vector<std::vector<double>> hits = input_hits(comparison);
  for (size_t s = 0; s < hits.size(); ++s) {
    std::vector<std::vector<int>> own(tasks_.size());
    std::vector<std::vector<int>> change(tasks_.size());
    for (size_t i = 0; i < hits[s].size(); ++i) {
      own[task_of_[i]].push_back(static_cast<int>(hits[s][i]));
      change[task_of_[i]].push_back(static_cast<int>(hits[s][i] - hits[0][i]));
    }
    const std::vector<MmluSubjectResult> subjects = subjects_of(tasks_, own);
    const std::vector<MmluSubjectResult> changes = subjects_of(tasks_, change);
    overall.add(group_mmlu(subjects), group_mmlu(changes));
    size_t present = 0;
    for (int c = 0; c < kNumMmluCategories; ++c) {
      const auto category = static_cast<MmluCategory>(c);
      const std::vector<MmluSubjectResult> members = of_category(subjects, category);
      if (members.empty()) continue;
      if (s == 0) {
        categories.push_back(
            {category, {.micro = {.name = metric_name(category), .figures = {}}, .macro = {}}});
      }
      categories[present++].second.add(group_mmlu(members),
                                       group_mmlu(of_category(changes, category)));
    }
  }
  metrics.push_back(std::move(overall.micro));
  metrics.push_back(std::move(overall.macro));
  if (categories.size() > 1) {
    for (auto& [category, group] : categories) metrics.push_back(std::move(group.micro));
  }
  metrics.push_back(paired_metric("nll_mean", token_losses(comparison)));
  return metrics;
}

}  // namespace sagelm
