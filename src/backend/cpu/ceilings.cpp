#include "backend/cpu/ceilings.h"

#include <omp.h>

#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "base/dtype.h"
#include "base/measure.h"

namespace sagelm::cpu {
namespace {

constexpr int kRuns = 7;

double median_seconds(const std::function<void()>& work) {
  work();  // generates oneDNN's kernels, touches the memory
  std::vector<double> seconds;
  seconds.reserve(kRuns);
  for (int i = 0; i < kRuns; ++i) seconds.push_back(seconds_of(work));
  return spread_of(std::move(seconds)).median;
}

double copy_rate() {
  constexpr size_t kBytes = size_t{256} << 20;
  const std::vector<std::byte> from(kBytes, std::byte{1});
  std::vector<std::byte> to(kBytes);
  const double seconds = median_seconds([&] {
#pragma omp parallel
    {
      const auto parts = static_cast<size_t>(omp_get_num_threads());
      const auto part = static_cast<size_t>(omp_get_thread_num());
      const size_t begin = kBytes / parts * part;
      const size_t end = part + 1 == parts ? kBytes : kBytes / parts * (part + 1);
      std::memcpy(to.data() + begin, from.data() + begin, end - begin);
    }
  });
  return 2.0 * static_cast<double>(kBytes) / seconds;
}

double product_rate(LinearEngine& linear) {
  constexpr int64_t kRows = 512, kSize = 2048;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> weights(kSize * kSize);
  for (uint16_t& w : weights) w = float_to_bfloat16(normal(random));
  TensorView view;
  view.dtype = DType::kBF16;
  view.shape = {kSize, kSize};
  view.data = reinterpret_cast<const std::byte*>(weights.data());
  view.bytes = weights.size() * sizeof(uint16_t);
  const LinearWeight packed = linear.pack({&view, 1});
  std::vector<float> x(kRows * kSize), out((kRows + kRowPadding) * kSize);
  for (float& value : x) value = normal(random);
  const double seconds =
      median_seconds([&] { linear.run(x.data(), kRows, nullptr, packed, out.data(), false); });
  return 2.0 * kRows * kSize * kSize / seconds;
}

}  // namespace

Ceilings measure_ceilings(LinearEngine& linear) {
  return {.copy_bytes = copy_rate(), .half_ops = product_rate(linear)};
}

}  // namespace sagelm::cpu
