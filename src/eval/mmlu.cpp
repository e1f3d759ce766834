#include "eval/mmlu.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "base/error.h"

namespace sagelm {
namespace {

constexpr double kUndefined = std::numeric_limits<double>::quiet_NaN();

MmluItem encode_item(const std::string& text, const std::string& where, const MmluEncoder& encode) {
  MmluItem item{.context = encode(text)};
  for (size_t i = 0; i < item.choices.size(); ++i) {
    const std::vector<int32_t> whole = encode(text + ' ' + kMmluLetters[i]);
    if (item.context.empty() || whole.size() <= item.context.size()) {
      fail("{}: the answer {} has no tokens of its own after those of the prompt", where,
           kMmluLetters[i]);
    }
    item.choices[i].assign(whole.begin() + static_cast<std::ptrdiff_t>(item.context.size()),
                           whole.end());
  }
  return item;
}

// Tokens of the context and of the longest letter but its last one, which is predicted only.
int64_t run_length(const MmluItem& item) {
  size_t longest = 0;
  for (const auto& choice : item.choices) longest = std::max(longest, choice.size());
  return static_cast<int64_t>(item.context.size() + longest - 1);
}

// How many tokens of item's context are beyond max_tokens.
int64_t excess(const MmluItem& item, int64_t max_tokens) { return run_length(item) - max_tokens; }

MmluTask prepare_subject(const MmluSubject& subject, MmluPrompt prompt, const MmluEncoder& encode,
                         int64_t max_tokens) {
  MmluTask task{.subject = subject.info};
  const std::string beginning = mmlu_beginning(prompt, subject.info->name, subject.shots);
  std::vector<int32_t> shared = encode(beginning);
  for (const MmluQuestion& question : subject.questions) {
    const std::string where = fmt::format("{}:{}", subject.file, question.line);
    const std::string text = mmlu_item(prompt, question);
    MmluItem item = encode_item(beginning + text, where, encode);
    item.shortened = excess(item, max_tokens) > 0;
    if (prompt == MmluPrompt::kOriginal) {
      for (size_t shots = subject.shots.size(); shots > 0 && excess(item, max_tokens) > 0;) {
        --shots;
        item = encode_item(
            mmlu_beginning(prompt, subject.info->name, std::span(subject.shots).first(shots)) +
                text,
            where, encode);
        item.shortened = true;
      }
    }
    if (const int64_t cut = excess(item, max_tokens); cut > 0) {
      if (cut >= static_cast<int64_t>(item.context.size())) {
        fail("{}: a context of {} tokens is too short for an answer", where, max_tokens);
      }
      item.context.erase(item.context.begin(),
                         item.context.begin() + static_cast<std::ptrdiff_t>(cut));
    }
    item.answer = question.answer;
    if (!item.shortened) {
      // At least one token is the question's own: it is run to have the logits after it.
      const auto end = item.context.end() - 1;
      shared.erase(std::mismatch(shared.begin(), shared.end(), item.context.begin(), end).first,
                   shared.end());
    }
    task.items.push_back(std::move(item));
  }
  task.shared = static_cast<int64_t>(shared.size());
  return task;
}

// Scores the task's items that are, or are not, shortened and tells take the choice made in each,
// until it returns false. Returns the tokens run.
int64_t score_items(const MmluTask& task, bool shortened, const ChoiceScorer& scorer,
                    const std::function<bool(const MmluItem& item, int choice)>& take) {
  std::vector<const MmluItem*> items;
  std::vector<Model::ChoiceInput> inputs;
  const auto shared = static_cast<size_t>(shortened ? 0 : task.shared);
  for (const MmluItem& item : task.items) {
    if (item.shortened != shortened) continue;
    items.push_back(&item);
    inputs.push_back({.context = std::span(item.context).subspan(shared), .choices = item.choices});
  }
  if (items.empty()) return 0;
  const auto take_logprobs = [&](int64_t index, std::span<const double> logprobs) {
    const MmluItem& item = *items.at(static_cast<size_t>(index));
    if (logprobs.size() != kMmluChoices ||
        !std::ranges::all_of(logprobs, [](double x) { return std::isfinite(x); })) {
      fail("{}, question {}: the model gave no log-probabilities of the four letters",
           task.subject->name, &item - task.items.data() + 1);
    }
    return take(item, static_cast<int>(std::ranges::max_element(logprobs) - logprobs.begin()));
  };
  return scorer(std::span(items.front()->context).first(shared), inputs, take_logprobs);
}

void set_accuracy(MmluSubjectResult& subject) {
  const auto n = static_cast<double>(subject.questions);
  subject.accuracy = subject.questions > 0 ? static_cast<double>(subject.correct) / n : kUndefined;
  // Of ones and zeros: squared distances from their mean sum up to n p (1 - p).
  subject.accuracy_stderr = subject.questions > 1
                                ? std::sqrt(subject.accuracy * (1 - subject.accuracy) / (n - 1))
                                : kUndefined;
}

// A subject scored to its end as a line of the journal.
std::string to_record(const MmluSubjectResult& subject) {
  return nlohmann::ordered_json{
      {"subject", subject.subject->name}, {"questions", subject.questions},
      {"correct", subject.correct},       {"answers", subject.answers},
      {"shortened", subject.shortened},   {"prompt_tokens", subject.prompt_tokens},
      {"tokens_run", subject.tokens_run}, {"seconds", subject.seconds}}
      .dump();
}

// Nothing if record is not of all of the task's questions.
std::optional<MmluSubjectResult> from_record(const std::string& record, const MmluTask& task) {
  const auto json = nlohmann::json::parse(record, nullptr, /*allow_exceptions=*/false);
  MmluSubjectResult subject{.subject = task.subject};
  try {
    subject.questions = json.at("questions").get<int64_t>();
    subject.correct = json.at("correct").get<int64_t>();
    subject.answers = json.at("answers").get<std::string>();
    subject.shortened = json.at("shortened").get<int64_t>();
    subject.prompt_tokens = json.at("prompt_tokens").get<int64_t>();
    subject.tokens_run = json.at("tokens_run").get<int64_t>();
    subject.seconds = json.at("seconds").get<double>();
    if (json.at("subject") != task.subject->name || subject.correct < 0 ||
        subject.correct > subject.questions ||
        subject.questions != static_cast<int64_t>(task.items.size()) ||
        subject.answers.size() != task.items.size()) {
      return {};
    }
  } catch (const nlohmann::json::exception&) {
    return {};
  }
  return subject;
}

void add_up(MmluResult& result) {
  for (MmluSubjectResult& subject : result.subjects) {
    set_accuracy(subject);
    result.shortened += subject.shortened;
    result.prompt_tokens += subject.prompt_tokens;
    result.tokens_run += subject.tokens_run;
    result.seconds += subject.seconds;
  }
  for (int category = 0; category < kNumMmluCategories; ++category) {
    std::vector<MmluSubjectResult> members;
    for (const MmluSubjectResult& subject : result.subjects) {
      if (static_cast<int>(subject.subject->category) == category) members.push_back(subject);
    }
    result.categories[static_cast<size_t>(category)] = group_mmlu(members);
  }
  result.overall = group_mmlu(result.subjects);
}

}  // namespace

std::vector<MmluTask> prepare_mmlu(const MmluData& data, MmluPrompt prompt,
                                   const MmluEncoder& encode, int64_t max_tokens) {
  std::vector<MmluTask> tasks;
  for (const MmluSubject& subject : data.subjects) {
    tasks.push_back(prepare_subject(subject, prompt, encode, max_tokens));
  }
  return tasks;
}

int64_t longest_run(std::span<const MmluTask> tasks) {
  int64_t longest = 0;
  for (const MmluTask& task : tasks) {
    for (const MmluItem& item : task.items) longest = std::max(longest, run_length(item));
  }
  return longest;
}

MmluGroupResult group_mmlu(std::span<const MmluSubjectResult> subjects) {
  MmluGroupResult group;
  double pooled = 0;    // sum of squared distances from the subject's own mean
  double accuracy = 0;  // sums over subjects
  double variance = 0;
  for (const MmluSubjectResult& subject : subjects) {
    if (subject.questions == 0) continue;
    const auto n = static_cast<double>(subject.questions);
    const double squared = subject.accuracy_stderr * subject.accuracy_stderr;
    ++group.subjects;
    group.questions += subject.questions;
    group.correct += subject.correct;
    accuracy += subject.accuracy;
    variance += squared;
    if (subject.questions > 1) pooled += (n - 1) * squared * n;
  }
  const auto k = static_cast<double>(group.subjects);
  const auto n = static_cast<double>(group.questions);
  group.micro = group.questions > 0 ? static_cast<double>(group.correct) / n : kUndefined;
  group.micro_stderr =
      group.questions > group.subjects ? std::sqrt(pooled / (n - k) / n) : kUndefined;
  group.macro = group.subjects > 0 ? accuracy / k : kUndefined;
  group.macro_stderr = group.subjects > 0 ? std::sqrt(variance) / k : kUndefined;
  return group;
}

double MmluResult::tokens_per_second() const {
  return seconds > 0 ? static_cast<double>(tokens_run) / seconds : 0;
}

MmluResult run_mmlu(std::span<const MmluTask> tasks, const ChoiceScorer& scorer,
                    const MmluCallback& on_progress, Journal* journal) {
  MmluResult result;
  for (const MmluTask& task : tasks) {
    result.questions_planned += static_cast<int64_t>(task.items.size());
  }
  MmluProgress progress{.total = result.questions_planned};
  int64_t correct = 0;
  const auto tell = [&](int64_t questions, int64_t hits) {
    progress.done += questions;
    correct += hits;
    progress.accuracy = static_cast<double>(correct) / static_cast<double>(progress.done);
    return !on_progress || on_progress(progress);
  };
  bool go_on = true;
  for (const MmluTask& task : tasks) {
    MmluSubjectResult& subject = result.subjects.emplace_back();
    subject.subject = task.subject;
    subject.answers.assign(task.items.size(), '-');
    if (!go_on) continue;
    if (const auto record = journal != nullptr ? journal->next() : std::nullopt) {
      const std::optional<MmluSubjectResult> recorded = from_record(*record, task);
      if (!recorded)
        fail("the journal {} does not hold this run's subjects", journal->path().string());
      subject = *recorded;
      progress.resumed += subject.questions;
      go_on = tell(subject.questions, subject.correct);
      continue;
    }
    const auto take = [&](const MmluItem& item, int choice) {
      const int64_t hit = choice == item.answer ? 1 : 0;
      ++subject.questions;
      subject.correct += hit;
      subject.answers[static_cast<size_t>(&item - task.items.data())] =
          kMmluLetters[static_cast<size_t>(choice)];
      subject.shortened += item.shortened ? 1 : 0;
      subject.prompt_tokens += static_cast<int64_t>(item.context.size());
      return go_on = tell(1, hit);
    };
    const auto start = std::chrono::steady_clock::now();
    // Shortened prompts do not begin as the others do.
    for (const bool shortened : {false, true}) {
      if (go_on) subject.tokens_run += score_items(task, shortened, scorer, take);
    }
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    subject.seconds = elapsed.count();
    if (journal != nullptr && subject.questions == static_cast<int64_t>(task.items.size())) {
      journal->append(to_record(subject));
    }
  }
  add_up(result);
  return result;
}

}  // namespace sagelm
