#include "model/kv_cache.h"

#include <gtest/gtest.h>

#include <random>
#include <set>

#include "backend/cpu/cpu_backend.h"
#include "base/error.h"

namespace sagelm {
namespace {

TEST(KvCache, PagesAreExclusiveAndComeBack) {
  const auto backend = make_cpu_backend(1);
  KvCache cache(*backend, 1, 1, 4, 20);
  std::vector<Sequence> sequences;
  for (int i = 0; i < 4; ++i) sequences.emplace_back(cache);
  std::vector<int64_t> lengths(4, 0);  // the plain model
  std::mt19937 random(7);
  for (int step = 0; step < 3000; ++step) {
    const size_t i = random() % 4;
    const auto count = static_cast<int64_t>(random() % 300);
    if (random() % 2 == 0) {
      const int64_t needed =
          KvCache::pages_for(lengths[i] + count) - KvCache::pages_for(lengths[i]);
      if (needed > cache.free_pages()) {
        EXPECT_THROW(sequences[i].extend(count), Error);
      } else {
        sequences[i].extend(count);
        lengths[i] += count;
      }
    } else {
      sequences[i].truncate(count);
      lengths[i] = std::min(lengths[i], count);
    }
    std::set<int32_t> used;
    size_t total = 0;
    for (size_t j = 0; j < 4; ++j) {
      ASSERT_EQ(sequences[j].length(), lengths[j]);
      const auto pages = sequences[j].pages();
      ASSERT_EQ(static_cast<int64_t>(pages.size()), KvCache::pages_for(lengths[j]));
      used.insert(pages.begin(), pages.end());
      total += pages.size();
    }
    ASSERT_EQ(used.size(), total) << "a page belongs to two sequences";
    ASSERT_EQ(static_cast<int64_t>(total) + cache.free_pages(), cache.num_pages());
  }
  sequences.clear();
  EXPECT_EQ(cache.free_pages(), cache.num_pages());
}

TEST(KvCache, FullCacheSaysHowMuchIsMissing) {
  const auto backend = make_cpu_backend(1);
  KvCache cache(*backend, 1, 1, 4, 2);
  Sequence sequence(cache);
  sequence.extend(kPageTokens);
  try {
    sequence.extend(2 * kPageTokens);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("1 of 2 are free"), std::string::npos) << error.what();
  }
  EXPECT_EQ(sequence.length(), kPageTokens);
}

TEST(KvCache, MovedSequenceOwnsItsPages) {
  const auto backend = make_cpu_backend(1);
  KvCache cache(*backend, 1, 1, 4, 4);
  Sequence a(cache);
  a.extend(200);
  Sequence b(std::move(a));
  EXPECT_EQ(b.length(), 200);
  Sequence c(cache);
  c.extend(10);
  c = std::move(b);
  EXPECT_EQ(c.length(), 200);
  EXPECT_EQ(cache.free_pages(), 2);
}

}  // namespace
}  // namespace sagelm
