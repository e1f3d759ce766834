#include "eval/journal.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>

#include "base/error.h"
#include "eval/lambada.h"
#include "eval/perplexity.h"
#include "eval/toy_model.h"

namespace sagelm {
namespace {

using test::ToyModel;

const JournalHeader kHeader = {{"model", "toy"}, {"limit", "none"}};

class JournalTest : public testing::Test {
 protected:
  void SetUp() override {
    directory_ = testing::TempDir() + "journal_test_" +
                 testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::create_directories(directory_);
    path_ = directory_ / "journal";
    std::filesystem::remove(path_);
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  std::string bytes() const {
    std::ifstream file(path_, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  void write(std::string_view bytes) const {
    std::ofstream(path_, std::ios::binary | std::ios::trunc) << bytes;
  }
  std::string error_of_open(const JournalHeader& header = kHeader) const {
    try {
      Journal::open(path_, header);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  }
  std::vector<std::string> records() const {
    Journal journal = Journal::open(path_, kHeader);
    std::vector<std::string> found;
    while (const auto record = journal.next()) found.push_back(*record);
    return found;
  }

  std::filesystem::path directory_, path_;
};

using Records = std::vector<std::string>;

TEST_F(JournalTest, RecordsComeBackInOrder) {
  {
    Journal journal = Journal::open(path_, kHeader);
    EXPECT_FALSE(journal.next());
    journal.append("one");
    journal.append("two");
  }
  {
    Journal journal = Journal::open(path_, kHeader);
    EXPECT_THROW(journal.append("out of turn"), Error);
    EXPECT_EQ(journal.next(), "one");
    EXPECT_EQ(journal.next(), "two");
    EXPECT_FALSE(journal.next());
    journal.append("three");
    EXPECT_THROW(journal.append("two\nlines"), Error);
  }
  EXPECT_EQ(records(), (Records{"one", "two", "three"}));
}

TEST_F(JournalTest, CutAnywhereItKeepsTheWholeRecords) {
  Journal::open(path_, kHeader).append("one");
  const size_t one = bytes().size();
  {
    Journal journal = Journal::open(path_, kHeader);
    while (journal.next()) {
    }
    journal.append("two");
  }
  const std::string whole = bytes();
  for (size_t length = 0; length <= whole.size(); ++length) {
    write(whole.substr(0, length));
    const Records expected = length < one            ? Records{}
                             : length < whole.size() ? Records{"one"}
                                                     : Records{"one", "two"};
    EXPECT_EQ(records(), expected) << length;
    EXPECT_TRUE(whole.starts_with(bytes())) << length;
  }
}

TEST_F(JournalTest, ATornLastLineOfOtherBytesIsCutOff) {
  Journal::open(path_, kHeader).append("one");
  const std::string whole = bytes();
  for (const std::string tail : {"x", "0123456789abcdef two\n", "\n", "{}"}) {
    write(whole + tail);
    EXPECT_EQ(records(), Records{"one"});
    EXPECT_EQ(bytes(), whole);
  }
}

TEST_F(JournalTest, DamageBeforeTheEndIsRefused) {
  {
    Journal journal = Journal::open(path_, kHeader);
    for (const char* record : {"one", "two", "three"}) journal.append(record);
  }
  std::string damaged = bytes();
  damaged[damaged.find("two")] = 'x';
  write(damaged);
  // The line after it was chained to what is not there any more.
  EXPECT_EQ(error_of_open(), path_.string() + ":3: the journal is damaged here, before its end");
  EXPECT_EQ(bytes(), damaged);
}

TEST_F(JournalTest, AnotherRunsIsRefusedByName) {
  Journal::open(path_, kHeader).append("one");
  const std::string before = bytes();
  EXPECT_EQ(
      error_of_open({{"model", "toy"}, {"limit", "3"}}),
      "the journal " + path_.string() + " is another run's: its limit is \"none\", not \"3\"");
  EXPECT_EQ(error_of_open({{"model", "toy"}, {"limit", "none"}, {"ctx", "8"}}),
            "the journal " + path_.string() + " is another run's: its ctx is missing, not \"8\"");
  EXPECT_NE(error_of_open({{"model", "toy"}}).find("other fields"), std::string::npos);
  EXPECT_EQ(bytes(), before);
}

TEST_F(JournalTest, OtherFilesAreLeftAlone) {
  for (const std::string foreign : {"text", "text\n", "{\"journal\": \"sagelm 1\"}\n"}) {
    write(foreign);
    EXPECT_EQ(error_of_open(), path_.string() + " is not a journal of sagelm");
    EXPECT_EQ(bytes(), foreign);
  }
}

TEST_F(JournalTest, IsOneProcessesAtATime) {
  const Journal journal = Journal::open(path_, kHeader);
  EXPECT_NE(error_of_open().find("in use"), std::string::npos);
}

TEST_F(JournalTest, WhatCannotBeOpenedIsNamed) {
  path_ = directory_ / "none" / "journal";
  EXPECT_NE(error_of_open().find(path_.string()), std::string::npos);
}

// Log-probabilities that use all bits of a float, unlike the toy model's.
Scorer noisy(ToyModel& model) {
  return [&model](std::span<const Model::ScoreInput> inputs) {
    auto scores = model.score(inputs);
    for (size_t i = 0; i < scores.size(); ++i) {
      std::mt19937 random(static_cast<uint32_t>(inputs[i].ids.size() * 31 + inputs[i].ids[0]));
      for (Scored& score : scores[i]) {
        score.logprob -= static_cast<float>(random()) * 0x1p-33F;
      }
    }
    return scores;
  };
}

std::vector<int32_t> letters(std::string_view text) {
  std::vector<int32_t> ids;
  for (const char letter : text) ids.push_back(letter == 'b' ? 1 : 0);
  return ids;
}

std::string random_pages() {
  std::mt19937 random(3);
  std::string text;
  for (int page = 0; page < 6; ++page) {
    text += " = Title = \n";
    const size_t length = 20 + random() % 60;
    for (size_t i = 0; i < length; ++i) text += "ab "[random() % 3];
    text += '\n';
  }
  return text;
}

void expect_same(const PerplexityResult& a, const PerplexityResult& b) {  // to the last bit
  EXPECT_EQ(a.windows, b.windows);
  EXPECT_EQ(a.tokens_scored, b.tokens_scored);
  EXPECT_EQ(a.tokens_run, b.tokens_run);
  EXPECT_EQ(a.nll_mean, b.nll_mean);
  EXPECT_EQ(a.standard_error, b.standard_error);
  EXPECT_EQ(a.documents->word_perplexity, b.documents->word_perplexity);
  EXPECT_EQ(a.documents->word_perplexity_stderr, b.documents->word_perplexity_stderr);
  EXPECT_EQ(a.documents->bits_per_byte_stderr, b.documents->bits_per_byte_stderr);
}

// A journal cut at a random byte is what a run that was killed while it wrote leaves.
TEST_F(JournalTest, AResumedPerplexityIsThatOfAnUndisturbedRun) {
  constexpr int64_t kBatch = 24;
  const TextEncoder encoder = {.encode = letters, .bos_id = 0, .eos_id = 1, .adds_bos = true};
  const ScoringPlan plan(random_pages(), make_protocol("lm-eval-0.4.9.2", {.ctx = 8}), encoder);
  ToyModel model;
  const PerplexityResult undisturbed = run_perplexity(plan, kBatch, noisy(model));
  const size_t batches = model.batches.size();
  {
    Journal journal = Journal::open(path_, kHeader);
    expect_same(run_perplexity(plan, kBatch, noisy(model), {}, &journal), undisturbed);
  }
  const std::string whole = bytes();
  std::mt19937 random(11);
  for (int i = 0; i < 60; ++i) {
    write(whole.substr(0, random() % (whole.size() + 1)));
    const auto lines = static_cast<size_t>(std::ranges::count(bytes(), '\n'));
    ToyModel resumed;
    Journal journal = Journal::open(path_, kHeader);
    expect_same(run_perplexity(plan, kBatch, noisy(resumed), {}, &journal), undisturbed);
    EXPECT_EQ(resumed.batches.size(), batches - (lines > 0 ? lines - 1 : 0));  // nothing twice
    EXPECT_EQ(std::ranges::count(bytes(), '\n'), std::ranges::count(whole, '\n'));
  }
}

TEST_F(JournalTest, AResumedLambadaIsThatOfAnUndisturbedRun) {
  std::vector<LambadaExample> examples;
  std::mt19937 random(5);
  for (int i = 0; i < 40; ++i) {
    LambadaExample example;
    for (size_t j = 0; j < 3 + random() % 9; ++j) {
      example.ids.push_back(static_cast<int32_t>(random() % 2));
    }
    example.ids.push_back(1);
    example.first_scored = static_cast<int64_t>(example.ids.size()) - 2;
    examples.push_back(example);
  }
  ToyModel model;
  const LambadaResult undisturbed = run_lambada(examples, 20, noisy(model));
  {
    Journal journal = Journal::open(path_, kHeader);
    run_lambada(examples, 20, noisy(model), {}, &journal);
  }
  const std::string whole = bytes();
  for (int i = 0; i < 60; ++i) {
    write(whole.substr(0, random() % (whole.size() + 1)));
    // Stopped once more on the way, as by Ctrl-C.
    int64_t steps = 2;
    {
      Journal journal = Journal::open(path_, kHeader);
      run_lambada(
          examples, 20, noisy(model), [&](const EvalProgress&) { return --steps > 0; }, &journal);
    }
    Journal journal = Journal::open(path_, kHeader);
    const LambadaResult result = run_lambada(examples, 20, noisy(model), {}, &journal);
    EXPECT_EQ(result.correct, undisturbed.correct);
    EXPECT_EQ(result.perplexity, undisturbed.perplexity);
    EXPECT_EQ(result.perplexity_stderr, undisturbed.perplexity_stderr);
    EXPECT_EQ(result.accuracy_stderr, undisturbed.accuracy_stderr);
  }
}

TEST_F(JournalTest, RecordsOfOtherBatchesAreRefused) {
  const std::vector<int32_t> ids(40, 0);
  const Protocol protocol = make_protocol("nonoverlap", {.ctx = 4});
  const ScoringPlan plan(ids, protocol, {}, {});
  ToyModel model;
  {
    Journal journal = Journal::open(path_, kHeader);
    run_perplexity(plan, 8, model.scorer(), {}, &journal);
  }
  Journal journal = Journal::open(path_, kHeader);
  EXPECT_THROW(run_perplexity(plan, 16, model.scorer(), {}, &journal), Error);
}

}  // namespace
}  // namespace sagelm
