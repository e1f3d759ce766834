// Random attention shapes, for sweeps over what no list of cases thinks of. Needs no library, so
// that the tests of the kernels alone can use it too.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace sagelm::testing {

// $SAGELM_SWEEP_SEED, else 1.
inline uint32_t sweep_seed() {
  const char* text = std::getenv("SAGELM_SWEEP_SEED");
  return text != nullptr && *text != '\0' ? static_cast<uint32_t>(std::strtoul(text, nullptr, 10))
                                          : 1;
}

// Whether seconds have passed since it was made.
class TimeLimit {
 public:
  explicit TimeLimit(double seconds) : seconds_(seconds) {}
  bool passed() const {
    const std::chrono::duration<double> so_far = std::chrono::steady_clock::now() - start_;
    return so_far.count() > seconds_;
  }

 private:
  double seconds_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

struct SweepCase {
  std::vector<int> q_lens, kv_lens;  // of each sequence
  int num_heads = 1, num_kv_heads = 1, head_dim = 64;
  bool causal = true;

  bool equal_lengths() const {
    const auto same = [](const std::vector<int>& lens) {
      return std::ranges::all_of(lens, [&lens](int len) { return len == lens.front(); });
    };
    return same(q_lens) && same(kv_lens);
  }
  std::string describe() const {
    std::ostringstream text;
    text << num_heads << "/" << num_kv_heads << " heads of " << head_dim
         << (causal ? ", causal" : ", full") << ", lengths";
    for (size_t i = 0; i < q_lens.size(); ++i) text << " " << q_lens[i] << "/" << kv_lens[i];
    return text.str();
  }
};

class Sweep {
 public:
  Sweep(uint32_t seed, std::vector<int> head_dims) : random_(seed), dims_(std::move(head_dims)) {}

  int uniform(int least, int most) { return std::uniform_int_distribution(least, most)(random_); }
  bool one_in(int n) { return uniform(1, n) == 1; }

  // 1 to most, every order of magnitude alike, a quarter of them beside a multiple of 64.
  int length(int most) {
    if (most > 64 && one_in(4))
      return std::clamp(64 * uniform(1, most / 64) + uniform(-1, 1), 1, most);
    const double exponent = std::uniform_real_distribution(0.0, std::log(most + 1.0))(random_);
    return std::clamp(static_cast<int>(std::exp(exponent)), 1, most);
  }

  // One to four sequences of up to most_keys keys; as many queries as keys, one, a few, or any
  // number in between, at most most_rows for a head of all sequences.
  SweepCase next(int most_keys, int most_rows) {
    SweepCase result;
    result.head_dim = dims_[static_cast<size_t>(uniform(0, static_cast<int>(dims_.size()) - 1))];
    result.num_kv_heads = uniform(1, 3);
    result.num_heads = result.num_kv_heads * uniform(1, one_in(4) ? 8 : 2);
    result.causal = !one_in(3);
    const int sequences = uniform(1, 4);
    const int rows = std::max(1, most_rows / sequences);
    for (int i = 0; i < sequences; ++i) {
      int keys = length(most_keys);
      int queries = 1;
      switch (uniform(0, 3)) {
        case 0:
          break;
        case 1:
          keys = queries = std::min(keys, rows);
          break;
        case 2:
          queries = std::min(uniform(2, 16), keys);
          break;
        default:
          queries = std::min(uniform(1, keys), rows);
      }
      result.q_lens.push_back(queries);
      result.kv_lens.push_back(keys);
    }
    return result;
  }

 private:
  std::mt19937 random_;
  std::vector<int> dims_;
};

}  // namespace sagelm::testing
