#include "eval/bootstrap.h"

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "eval/statistics.h"

// Code for newer CPUs beside that for all of them.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__)
#define SAGELM_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SAGELM_CLONES
#endif

namespace sagelm {
namespace {

// Python's random.Random(seed).choices: the Mersenne Twister MT19937 seeded by an array of one word
// (Matsumoto and Nishimura's init_by_array), two outputs to a double of 53 bits. Makes numbers by
// the state's length, in loops that the compiler vectorises.
class PythonChoices {
 public:
  // Indices below `count`.
  PythonChoices(uint32_t seed, size_t count) : count_(static_cast<double>(count)) {
    fill(19650218U);
    size_t i = 1;
    for (size_t k = 0; k < kWords; ++k) {
      state_[i] = (state_[i] ^ (spread(state_[i - 1]) * 1664525U)) + seed;
      advance(i);
    }
    for (size_t k = 0; k + 1 < kWords; ++k) {
      state_[i] = (state_[i] ^ (spread(state_[i - 1]) * 1566083941U)) - static_cast<uint32_t>(i);
      advance(i);
    }
    state_[0] = 0x80000000U;
  }

  size_t next() {
    if (at_ == indices_.size()) refill();
    return indices_[at_++];
  }

 private:
  static constexpr size_t kWords = 624;
  static constexpr size_t kShift = 397;

  static uint32_t spread(uint32_t word) { return word ^ (word >> 30); }

  void fill(uint32_t seed) {
    state_[0] = seed;
    for (size_t i = 1; i < kWords; ++i) {
      state_[i] = 1812433253U * spread(state_[i - 1]) + static_cast<uint32_t>(i);
    }
  }

  void advance(size_t& i) {
    if (++i < kWords) return;
    state_[0] = state_[kWords - 1];
    i = 1;
  }

  static uint32_t twisted(uint32_t word, uint32_t next, uint32_t far) {
    const uint32_t mixed = (word & 0x80000000U) | (next & 0x7FFFFFFFU);
    return far ^ (mixed >> 1) ^ ((mixed & 1U) * 0x9908B0DFU);
  }

  static uint32_t tempered(uint32_t word) {
    word ^= word >> 11;
    word ^= (word << 7) & 0x9D2C5680U;
    word ^= (word << 15) & 0xEFC60000U;
    return word ^ (word >> 18);
  }

  SAGELM_CLONES void refill() {
    for (size_t i = 0; i < kWords - kShift; ++i) {
      state_[i] = twisted(state_[i], state_[i + 1], state_[i + kShift]);
    }
    for (size_t i = kWords - kShift; i + 1 < kWords; ++i) {
      state_[i] = twisted(state_[i], state_[i + 1], state_[i + kShift - kWords]);
    }
    state_[kWords - 1] = twisted(state_[kWords - 1], state_[0], state_[kShift - 1]);
    for (size_t i = 0; i < indices_.size(); ++i) {
      const auto high = static_cast<int32_t>(tempered(state_[2 * i]) >> 5);
      const auto low = static_cast<int32_t>(tempered(state_[2 * i + 1]) >> 6);
      const double uniform = (high * 67108864.0 + low) * (1.0 / 9007199254740992.0);
      indices_[i] = static_cast<uint32_t>(static_cast<int32_t>(uniform * count_));
    }
    at_ = 0;
  }

  double count_;
  std::array<uint32_t, kWords> state_ = {};
  std::array<uint32_t, kWords / 2> indices_ = {};
  size_t at_ = kWords / 2;
};

}  // namespace

double bootstrap_perplexity_stderr(std::span<const double> log_likelihoods) {
  constexpr int kBlocks = 100;
  constexpr size_t kBlockSamples = 1000;
  const size_t count = log_likelihoods.size();
  if (count < 2 || count > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    return std::numeric_limits<double>::quiet_NaN();
  }
  std::vector<double> perplexities(kBlocks * kBlockSamples);
#pragma omp parallel for schedule(dynamic, 1)
  for (int block = 0; block < kBlocks; ++block) {
    PythonChoices choices(static_cast<uint32_t>(block), count);
    for (size_t sample = 0; sample < kBlockSamples; ++sample) {
      double sum = 0;
      for (size_t i = 0; i < count; ++i) sum += log_likelihoods[choices.next()];
      perplexities[static_cast<size_t>(block) * kBlockSamples + sample] =
          std::exp(-sum / static_cast<double>(count));
    }
  }
  Moments moments;
  for (const double perplexity : perplexities) moments.add(perplexity);
  return moments.standard_error() * std::sqrt(static_cast<double>(perplexities.size()));
}

}  // namespace sagelm
