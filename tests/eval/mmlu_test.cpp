// MMLU on a model whose probabilities are known by hand: scoring, sharing, shortening, averages,
// journals.
#include "eval/mmlu.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "support/error_of.h"

namespace sagelm {
namespace {

constexpr int64_t kLong = 100000;  // a context that everything fits
constexpr int32_t kBos = 1;
constexpr int32_t kSpaced = 256;  // added to a byte that a blank is joined to

// BOS, then a token for each byte, a blank being part of the byte behind it.
std::vector<int32_t> encode(std::string_view text) {
  std::vector<int32_t> ids = {kBos};
  int32_t blank = 0;
  for (const char c : text) {
    if (c == ' ') {
      blank = kSpaced;
      continue;
    }
    ids.push_back(blank + static_cast<unsigned char>(c));
    blank = 0;
  }
  return ids;
}

MmluQuestion question(std::string text, int answer) {
  return {
      .line = 7, .question = std::move(text), .choices = {"w", "x", "y", "z"}, .answer = answer};
}

// Two subjects: four questions and one.
MmluData two_subjects() {
  const std::vector<MmluQuestion> shots = {question("shot", 0), question("other shot", 1)};
  return {.subjects = {{.info = find_mmlu_subject("anatomy"),
                        .file = "anatomy_test.csv",
                        .shots = shots,
                        .questions = {question("Q0", 3), question("Q1", 0), question("Q2", 1),
                                      question("Q3", 1)}},
                       {.info = find_mmlu_subject("virology"),
                        .file = "virology_test.csv",
                        .shots = shots,
                        .questions = {question("Q1", 1)}}}};
}

// After a prompt whose last question is Qn, the letters A to D have the probabilities 0.1, 0.2,
// 0.3, 0.4, moved on by n places: so the answer to Q0 is D, to Q1 A, to Q2 B, to Q3 C.
struct ToyModel {
  std::vector<std::vector<int32_t>> prompts = {};
  std::vector<size_t> prefixes = {};  // tokens, of each call

  int64_t score(std::span<const int32_t> prefix, std::span<const Model::ChoiceInput> inputs,
                const Model::ChoiceCallback& take) {
    prefixes.push_back(prefix.size());
    auto run = static_cast<int64_t>(prefix.size());
    for (size_t i = 0; i < inputs.size(); ++i) {
      std::vector<int32_t>& prompt = prompts.emplace_back(prefix.begin(), prefix.end());
      const auto context = inputs[i].context;
      prompt.insert(prompt.end(), context.begin(), context.end());
      run += static_cast<int64_t>(context.size());
      size_t at = prompt.size() - 1;
      while (prompt[at] % kSpaced != 'Q') --at;
      const int n = prompt[at + 1] - '0';
      std::vector<double> logprobs;
      for (int letter = 0; letter < kMmluChoices; ++letter) {
        EXPECT_EQ(inputs[i].choices[static_cast<size_t>(letter)],
                  (std::vector<int32_t>{kSpaced + 'A' + letter}));
        logprobs.push_back(std::log(0.1 * ((letter + 4 - n) % 4 + 1)));
      }
      if (!take(static_cast<int64_t>(i), logprobs)) break;
    }
    return run;
  }
  ChoiceScorer scorer() {
    return [this](std::span<const int32_t> prefix, std::span<const Model::ChoiceInput> inputs,
                  const Model::ChoiceCallback& take) { return score(prefix, inputs, take); };
  }
};

TEST(Mmlu, PromptsAndWhatTheyShare) {
  const MmluData data = two_subjects();
  const auto tasks = prepare_mmlu(data, MmluPrompt::kLmEval, encode, kLong);
  ASSERT_EQ(tasks.size(), 2u);
  const std::string beginning =
      mmlu_beginning(MmluPrompt::kLmEval, "anatomy", data.subjects[0].shots);
  const std::vector<int32_t> whole =
      encode(beginning + mmlu_item(MmluPrompt::kLmEval, data.subjects[0].questions[2]));
  EXPECT_EQ(tasks[0].items[2].context, whole);
  EXPECT_EQ(tasks[0].items[2].answer, 1);
  EXPECT_FALSE(tasks[0].items[2].shortened);
  for (size_t letter = 0; letter < kMmluChoices; ++letter) {
    EXPECT_EQ(tasks[0].items[2].choices[letter],
              (std::vector<int32_t>{kSpaced + 'A' + static_cast<int32_t>(letter)}));
  }
  EXPECT_EQ(tasks[0].shared, static_cast<int64_t>(encode(beginning).size()));
}

TEST(Mmlu, SharedTokensAreThoseThatTheWholePromptsHave) {
  // A tokenizer that joins line feeds in pairs with what follows: the beginning's last token is
  // not what the whole prompt has in that place, and is not shared.
  const auto joining = [](std::string_view text) {
    std::vector<int32_t> ids = {kBos};
    for (size_t i = 0; i < text.size(); ++i) {
      const bool joined = text.substr(i, 2) == "\n\n" && i + 2 < text.size();
      ids.push_back(joined ? 1000 + text[i + 2] : text[i]);
      if (joined) i += 2;
    }
    return ids;
  };
  const MmluData data = two_subjects();
  const auto tasks = prepare_mmlu(data, MmluPrompt::kLmEval, joining, kLong);
  const auto beginning =
      joining(mmlu_beginning(MmluPrompt::kLmEval, "anatomy", data.subjects[0].shots));
  EXPECT_EQ(tasks[0].shared, static_cast<int64_t>(beginning.size()) - 2);
  const auto end = beginning.begin() + tasks[0].shared;
  for (const MmluItem& item : tasks[0].items) {
    EXPECT_TRUE(std::equal(beginning.begin(), end, item.context.begin()));
  }
}

TEST(Mmlu, ScoresByHand) {
  const auto tasks = prepare_mmlu(two_subjects(), MmluPrompt::kLmEval, encode, kLong);
  ToyModel model;
  const MmluResult result = run_mmlu(tasks, model.scorer());
  // Q0 D, Q1 A, Q2 B are right; Q3 C is not B. The other subject's Q1 A is not B.
  ASSERT_EQ(result.subjects.size(), 2u);
  const MmluSubjectResult& anatomy = result.subjects[0];
  EXPECT_EQ(anatomy.questions, 4);
  EXPECT_EQ(anatomy.correct, 3);
  EXPECT_EQ(anatomy.answers, "DABC");
  EXPECT_DOUBLE_EQ(anatomy.accuracy, 0.75);
  // Distances from the mean: three of 1/4 and one of 3/4; 12/16 over n - 1 = 3, over n = 4.
  EXPECT_DOUBLE_EQ(anatomy.accuracy_stderr, std::sqrt(12.0 / 16 / 3 / 4));
  EXPECT_EQ(result.subjects[1].correct, 0);
  EXPECT_TRUE(std::isnan(result.subjects[1].accuracy_stderr));
  EXPECT_DOUBLE_EQ(result.overall.micro, 0.6);
  EXPECT_DOUBLE_EQ(result.overall.macro, 0.375);
  EXPECT_EQ(result.categories[static_cast<size_t>(MmluCategory::kStem)].correct, 3);
  EXPECT_EQ(result.categories[static_cast<size_t>(MmluCategory::kOther)].questions, 1);
  EXPECT_EQ(result.categories[static_cast<size_t>(MmluCategory::kHumanities)].questions, 0);
  EXPECT_FALSE(result.partial());

  // The prefix was run once a subject; the model saw every whole prompt.
  ASSERT_EQ(model.prompts.size(), 5u);
  for (size_t i = 0; i < 4; ++i) EXPECT_EQ(model.prompts[i], tasks[0].items[i].context);
  EXPECT_EQ(model.prefixes.size(), 2u);
  int64_t whole = 0;
  for (const auto& prompt : model.prompts) whole += static_cast<int64_t>(prompt.size());
  EXPECT_EQ(result.prompt_tokens, whole);
  EXPECT_EQ(result.tokens_run, whole - 3 * tasks[0].shared);
}

TEST(Mmlu, UnsharedPromptsGiveTheSame) {
  auto tasks = prepare_mmlu(two_subjects(), MmluPrompt::kOriginal, encode, kLong);
  ToyModel sharing;
  const MmluResult shared = run_mmlu(tasks, sharing.scorer());
  for (MmluTask& task : tasks) task.shared = 0;
  ToyModel whole;
  const MmluResult unshared = run_mmlu(tasks, whole.scorer());
  EXPECT_EQ(whole.prefixes, (std::vector<size_t>{0, 0}));
  EXPECT_EQ(whole.prompts, sharing.prompts);
  EXPECT_EQ(unshared.overall.correct, shared.overall.correct);
  EXPECT_EQ(unshared.tokens_run, unshared.prompt_tokens);
}

TEST(Mmlu, OfEqualLettersTheFirst) {
  const auto tasks = prepare_mmlu(two_subjects(), MmluPrompt::kLmEval, encode, kLong);
  const auto scorer = [](std::span<const int32_t>, std::span<const Model::ChoiceInput> inputs,
                         const Model::ChoiceCallback& take) {
    const std::vector<double> logprobs = {-2, -1, -1, -1};
    for (size_t i = 0; i < inputs.size(); ++i) take(static_cast<int64_t>(i), logprobs);
    return int64_t{1};
  };
  EXPECT_EQ(run_mmlu(tasks, scorer).overall.correct, 3);  // the three whose answer is B
}

TEST(Mmlu, LogProbabilitiesMustBeNumbers) {
  const auto tasks = prepare_mmlu(two_subjects(), MmluPrompt::kLmEval, encode, kLong);
  const auto scorer = [](std::span<const int32_t>, std::span<const Model::ChoiceInput>,
                         const Model::ChoiceCallback& take) {
    take(2, std::vector<double>{-1, -1, std::numeric_limits<double>::quiet_NaN(), -1});
    return int64_t{1};
  };
  EXPECT_EQ(error_of([&] { run_mmlu(tasks, scorer); }),
            "anatomy, question 3: the model gave no log-probabilities of the four letters");
}

TEST(Mmlu, LongPromptsAreShortenedAsEachProgramDoes) {
  const MmluData data = two_subjects();
  const auto whole = prepare_mmlu(data, MmluPrompt::kLmEval, encode, kLong);
  const std::vector<int32_t>& context = whole[0].items[0].context;
  const auto length = static_cast<int64_t>(context.size());

  // It just fits: the letter is predicted, not run.
  EXPECT_FALSE(prepare_mmlu(data, MmluPrompt::kLmEval, encode, length)[0].items[0].shortened);

  const auto cut = prepare_mmlu(data, MmluPrompt::kLmEval, encode, length - 3);
  const MmluItem& item = cut[0].items[0];
  EXPECT_TRUE(item.shortened);
  EXPECT_EQ(item.context, std::vector<int32_t>(context.begin() + 3, context.end()));

  const auto dropped = prepare_mmlu(data, MmluPrompt::kOriginal, encode, length - 3);
  EXPECT_TRUE(dropped[0].items[0].shortened);
  const auto first = std::span(data.subjects[0].shots).first(1);
  EXPECT_EQ(dropped[0].items[0].context,
            encode(mmlu_beginning(MmluPrompt::kOriginal, "anatomy", first) +
                   mmlu_item(MmluPrompt::kOriginal, data.subjects[0].questions[0])));

  ToyModel model;
  const MmluResult result = run_mmlu(cut, model.scorer());
  EXPECT_EQ(result.shortened, 5);
  EXPECT_EQ(result.overall.correct, 3);
  EXPECT_EQ(model.prefixes, (std::vector<size_t>{0, 0}));
}

TEST(Mmlu, ALetterNeedsATokenOfItsOwn) {
  const auto deaf = [](std::string_view) { return std::vector<int32_t>{kBos}; };
  EXPECT_EQ(error_of([&] { prepare_mmlu(two_subjects(), MmluPrompt::kLmEval, deaf, kLong); }),
            "anatomy_test.csv:7: the answer A has no tokens of its own after those of the prompt");
}

TEST(Mmlu, Averages) {
  const auto subject = [](int64_t questions, double accuracy, double error) {
    return MmluSubjectResult{.questions = questions,
                             .correct = std::lround(accuracy * static_cast<double>(questions)),
                             .accuracy = accuracy,
                             .accuracy_stderr = error};
  };
  const std::vector<MmluSubjectResult> subjects = {subject(100, 0.3, 0.046),
                                                   subject(300, 0.5, 0.03), subject(0, NAN, NAN)};
  const MmluGroupResult group = group_mmlu(subjects);
  EXPECT_EQ(group.subjects, 2);
  EXPECT_EQ(group.questions, 400);
  EXPECT_DOUBLE_EQ(group.micro, 0.45);
  EXPECT_DOUBLE_EQ(group.macro, 0.4);
  // (99 * 0.046^2 * 100 + 299 * 0.03^2 * 300) / 398 / 400 = (20.9484 + 80.73) / 159200
  EXPECT_NEAR(group.micro_stderr, std::sqrt(101.6784 / 159200), 1e-12);
  EXPECT_NEAR(group.macro_stderr, std::sqrt(0.002116 + 0.0009) / 2, 1e-12);

  const MmluGroupResult nothing = group_mmlu({});
  EXPECT_TRUE(std::isnan(nothing.micro));
  EXPECT_TRUE(std::isnan(nothing.macro));
}

TEST(Mmlu, AStoppedRunIsPartial) {
  const auto tasks = prepare_mmlu(two_subjects(), MmluPrompt::kLmEval, encode, kLong);
  ToyModel model;
  const MmluResult result = run_mmlu(
      tasks, model.scorer(), [](const MmluProgress& progress) { return progress.done < 2; });
  EXPECT_TRUE(result.partial());
  EXPECT_EQ(result.questions_planned, 5);
  EXPECT_EQ(result.overall.questions, 2);
  EXPECT_DOUBLE_EQ(result.overall.micro, 1);
  EXPECT_EQ(result.subjects[0].answers, "DA--");
  EXPECT_EQ(result.subjects[1].questions, 0);
}

TEST(Mmlu, AResumedRunGivesTheSame) {
  const std::filesystem::path path = testing::TempDir() + "mmlu_test.journal";
  std::filesystem::remove(path);
  const JournalHeader header = {{"model", "toy"}};
  const auto tasks = prepare_mmlu(two_subjects(), MmluPrompt::kLmEval, encode, kLong);
  ToyModel model;
  const MmluResult whole = run_mmlu(tasks, model.scorer());
  {
    // Stopped in the second question of the first subject: nothing is kept.
    Journal journal = Journal::open(path, header);
    run_mmlu(
        tasks, model.scorer(), [](const MmluProgress& p) { return p.done < 2; }, &journal);
    EXPECT_FALSE(Journal(std::move(journal)).next());
  }
  {
    Journal journal = Journal::open(path, header);
    run_mmlu(
        tasks, model.scorer(), [](const MmluProgress& p) { return p.done < 4; }, &journal);
  }
  Journal journal = Journal::open(path, header);
  ToyModel second;
  int64_t resumed = 0;
  const MmluResult result = run_mmlu(
      tasks, second.scorer(),
      [&resumed](const MmluProgress& p) {
        resumed = p.resumed;
        return true;
      },
      &journal);
  EXPECT_EQ(resumed, 4);
  EXPECT_EQ(second.prompts.size(), 1u);
  EXPECT_FALSE(result.partial());
  EXPECT_EQ(result.overall.correct, whole.overall.correct);
  EXPECT_EQ(result.overall.micro_stderr, whole.overall.micro_stderr);
  EXPECT_EQ(result.subjects[0].answers, "DABC");
  EXPECT_EQ(result.subjects[1].answers, "A");
  EXPECT_EQ(result.tokens_run, whole.tokens_run);
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace sagelm
