#include "model/kv_cache.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/kv_storage.h"
#include "base/dtype.h"
#include "base/error.h"

namespace sagelm {
namespace {

constexpr int64_t kDim = 16;

// A sequence and, next to it, the plain array of what it should hold: one number per token.
struct Mirrored {
  Sequence sequence;
  std::vector<float> numbers;
};

// Checks a cache of one layer and one head, read back through its storage, against plain arrays.
class Mirror {
 public:
  Mirror(KvType type, const KvRoom& room, uint32_t seed)
      : backend_(make_cpu_backend(1)), cache_(*backend_, type, 1, 1, kDim, room), random_(seed) {}

  KvCache& cache() { return cache_; }
  int64_t draw(int64_t below) {
    return static_cast<int64_t>(random_() % static_cast<uint64_t>(below));
  }

  // Appends counts[i] new numbers to sequence i as one step does; false if the cache is full.
  bool extend(std::vector<Mirrored*> to, const std::vector<int64_t>& counts) {
    std::vector<Sequence*> sequences;
    sequences.reserve(to.size());
    for (Mirrored* one : to) sequences.push_back(&one->sequence);
    try {
      Sequence::extend_all(sequences, counts);
    } catch (const Error&) {
      return false;
    }
    for (size_t i = 0; i < to.size(); ++i) write(*to[i], counts[i]);
    return true;
  }

  void check(const Mirrored& one) {
    ASSERT_EQ(one.sequence.length(), static_cast<int64_t>(one.numbers.size()));
    if (one.numbers.empty()) {
      ASSERT_TRUE(one.sequence.pages().empty());
      ASSERT_EQ(one.sequence.tail(), -1);
      return;
    }
    std::vector<const uint16_t*> k_pages, v_pages;
    cpu::AttentionArgs args;
    storage().locate(0, chunk_of(one, 0), k_pages, v_pages, args);
    for (size_t t = 0; t < one.numbers.size(); ++t) {
      const size_t page = t / kPageTokens;
      const size_t slot = t % kPageTokens;
      if (cache_.type() == KvType::kFp16) {
        ASSERT_EQ(half_to_float(k_pages[page][slot * kDim]), one.numbers[t]) << t;
        ASSERT_EQ(half_to_float(v_pages[page][slot * kDim]), -one.numbers[t]) << t;
      } else if (page == one.numbers.size() / kPageTokens) {
        ASSERT_EQ(half_to_float(args.quantized.tail_k[slot * kDim]), one.numbers[t]) << t;
        ASSERT_EQ(half_to_float(args.quantized.tail_v[slot * kDim]), -one.numbers[t]) << t;
      } else {
        const int64_t id = one.sequence.pages()[page];
        const uint8_t* keys = args.quantized.operands + id * 2 * kPageTokens * kDim;
        const float scale =
            args.quantized.scales[id * kPageScales + static_cast<int64_t>(slot / 4 % 4)];
        const float key = static_cast<float>(keys[slot * 4] - 128) * scale + args.quantized.mean[0];
        // Half a step, and that of FP16, in which the mean is subtracted.
        ASSERT_NEAR(key, one.numbers[t], (0.51F + 127.0F / 2048.0F) * scale) << t;
      }
    }
  }

 private:
  cpu::CpuKv& storage() { return static_cast<cpu::CpuKv&>(cache_.storage()); }

  static SequenceChunk chunk_of(const Mirrored& one, int64_t count) {
    return {.first_row = 0,
            .q_len = count,
            .kv_len = one.sequence.length(),
            .pages = one.sequence.pages(),
            .tail = one.sequence.tail()};
  }

  void write(Mirrored& one, int64_t count) {
    std::vector<float> rows(static_cast<size_t>(count * 2 * kDim));
    for (int64_t i = 0; i < count; ++i) {
      const auto number = static_cast<float>(draw(2001) - 1000);
      one.numbers.push_back(number);
      rows[static_cast<size_t>(i * 2 * kDim)] = number;
      rows[static_cast<size_t>((i * 2 + 1) * kDim)] = -number;
    }
    if (count == 0) return;
    storage().append(0, chunk_of(one, count), 0, rows.data(), rows.data() + kDim, 2 * kDim, true);
  }

  std::unique_ptr<Backend> backend_;
  KvCache cache_;
  std::mt19937 random_;
};

class KvCaches : public testing::TestWithParam<KvType> {};

// Sequences that grow, fork, go back and end in any order always hold what plain arrays hold, and a
// full cache changes nothing.
TEST_P(KvCaches, RandomUseAgreesWithPlainArrays) {
  Mirror mirror(GetParam(), {.pages = 24, .tails = is_quantized(GetParam()) ? 7 : 0}, 7);
  std::vector<Mirrored> live;
  int full = 0, forks = 0, cuts = 0;
  for (int step = 0; step < 4000; ++step) {
    const int64_t action = mirror.draw(10);
    if (live.empty() || (action == 0 && live.size() < 9)) {
      live.push_back({Sequence(mirror.cache()), {}});
    } else if (action < 5) {  // some of them in one step
      std::vector<Mirrored*> some;
      std::vector<int64_t> counts;
      for (Mirrored& one : live) {
        if (mirror.draw(2) == 0) continue;
        some.push_back(&one);
        counts.push_back(mirror.draw(5) == 0 ? mirror.draw(400) : mirror.draw(40));
      }
      if (!mirror.extend(some, counts)) ++full;
    } else if (action < 7 && live.size() < 9) {
      const Mirrored& from =
          live[static_cast<size_t>(mirror.draw(static_cast<int64_t>(live.size())))];
      const int64_t length = mirror.draw(from.sequence.length() + 1);
      Mirrored fork{from.sequence.fork(length), from.numbers};
      ASSERT_LE(fork.sequence.length(), length);
      fork.numbers.resize(static_cast<size_t>(fork.sequence.length()));
      live.push_back(std::move(fork));
      ++forks;
    } else if (action < 9) {
      Mirrored& one = live[static_cast<size_t>(mirror.draw(static_cast<int64_t>(live.size())))];
      const int64_t before = one.sequence.length();
      const int64_t length = mirror.draw(before + 1);
      one.sequence.truncate(length);
      const bool whole_pages =
          is_quantized(GetParam()) && length / kPageTokens < before / kPageTokens;
      ASSERT_EQ(one.sequence.length(), whole_pages ? length / kPageTokens * kPageTokens : length);
      one.numbers.resize(static_cast<size_t>(one.sequence.length()));
      ++cuts;
    } else {
      live.erase(live.begin() + mirror.draw(static_cast<int64_t>(live.size())));
    }
    for (const Mirrored& one : live) mirror.check(one);
    if (HasFatalFailure()) FAIL() << "after step " << step;
  }
  EXPECT_GT(full, 50);
  EXPECT_GT(forks, 50);
  EXPECT_GT(cuts, 50);
  live.clear();
  EXPECT_EQ(mirror.cache().free_room().pages, mirror.cache().room().pages);
  EXPECT_EQ(mirror.cache().free_room().tails, mirror.cache().room().tails);
}

INSTANTIATE_TEST_SUITE_P(Types, KvCaches, testing::Values(KvType::kFp16, KvType::kInt8),
                         [](const testing::TestParamInfo<KvType>& type) {
                           return type.param == KvType::kFp16 ? "Fp16" : "Int8";
                         });

// What extend says when it throws.
std::string refusal(Sequence& sequence, int64_t count) {
  try {
    sequence.extend(count);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(KvCache, FullCacheSaysHowMuchIsMissing) {
  const auto backend = make_cpu_backend(1);
  KvCache cache(*backend, KvType::kFp16, 1, 1, 4, {.pages = 2});
  Sequence sequence(cache);
  sequence.extend(kPageTokens);
  const std::string error = refusal(sequence, 2 * kPageTokens);
  EXPECT_NE(error.find("1 of 2 are free"), std::string::npos) << error;
  EXPECT_EQ(sequence.length(), kPageTokens);
  sequence.truncate(0);  // makes room
  EXPECT_EQ(refusal(sequence, 2 * kPageTokens), "");
}

TEST(KvCache, FullQuantizedCacheSaysHowManySequencesFit) {
  const auto backend = make_cpu_backend(1);
  KvCache cache(*backend, KvType::kInt8, 1, 1, 4, {.pages = 2, .tails = 1});
  Sequence sequence(cache);
  sequence.extend(10);
  Sequence other(cache);
  const std::string error = refusal(other, 1);
  EXPECT_NE(error.find("room for 0 of 1"), std::string::npos) << error;
  Sequence fork = sequence.fork(5);  // shares the tail until it is written to
  EXPECT_NE(refusal(fork, 1), "");
  sequence.truncate(0);
  EXPECT_EQ(refusal(fork, 1), "");
}

TEST(KvCache, SamplesOfOnePromptNeedOneTailEach) {
  const auto backend = make_cpu_backend(1);
  KvCache cache(*backend, KvType::kInt8, 1, 1, 4, {.pages = 4, .tails = 3});
  Sequence prompt(cache);
  prompt.extend(300);
  Sequence a = prompt.fork(300), b = prompt.fork(300);
  EXPECT_EQ(cache.free_room().pages, 2);
  Sequence* const all[] = {&prompt, &a, &b};
  const int64_t one[] = {1, 1, 1};
  Sequence::extend_all(all, one);
  EXPECT_EQ(cache.free_room().tails, 0);
  EXPECT_EQ(cache.free_room().pages, 2);
}

TEST(KvCache, MovedSequenceOwnsItsPages) {
  const auto backend = make_cpu_backend(1);
  KvCache cache(*backend, KvType::kInt8, 1, 1, 4, {.pages = 4, .tails = 2});
  Sequence a(cache);
  a.extend(200);
  Sequence b(std::move(a));
  EXPECT_EQ(b.length(), 200);
  Sequence c(cache);
  c.extend(10);
  c = std::move(b);
  EXPECT_EQ(c.length(), 200);
  EXPECT_EQ(cache.free_room().pages, 3);
  EXPECT_EQ(cache.free_room().tails, 1);
}

TEST(KvLayout, QuantizedPagesTakeHalfTheBytes) {
  const std::unique_ptr<Backend> backend = make_cpu_backend(1);
  const auto bytes_per_token = [&](KvType type) {
    const KvLayout llama{
        .type = type, .num_layers = 32, .num_kv_heads = 32, .head_dim = 128, .num_pages = 1};
    return backend->kv_bytes(llama) / kPageTokens;
  };
  EXPECT_EQ(bytes_per_token(KvType::kFp16), 512 * 1024);
  EXPECT_EQ(bytes_per_token(KvType::kInt8), 256 * 1024 + 160);  // the scales: 20 bytes a page
  EXPECT_EQ(bytes_per_token(KvType::kInt4), 196 * 1024 + 160);  // and a word per key
}

}  // namespace
}  // namespace sagelm
