// Prefill and decode speed of a checkpoint on the CPU, next to what the machine itself does: its
// copy bandwidth and oneDNN's rate for one large product of the kind the model uses.
//
//   bench_model_cpu MODEL [attention[/kv-cache] ...]      (default: fp16 sage1 sage2/fp16
//   sage2/int8)
//
// Every figure is the median of five runs with the smallest and largest beside it.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "backend/cpu/linear.h"
#include "base/dtype.h"
#include "sagelm/sagelm.hpp"

namespace {

constexpr int kRuns = 5;
constexpr int64_t kPrefill = 512;
constexpr int64_t kDecode = 128;
constexpr int64_t kDecodeAfter[] = {16, 1024, 2048};  // where the context allows

double seconds(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

struct Spread {
  double median, smallest, largest;
};

Spread measure(const std::function<double()>& rate) {
  std::array<double, kRuns> values{};
  for (double& value : values) value = rate();
  std::sort(values.begin(), values.end());
  return {values[kRuns / 2], values.front(), values.back()};
}

void print(const std::string& what, const Spread& spread, const char* unit) {
  std::printf("%-40s %10.1f %s   (%.1f to %.1f)\n", what.c_str(), spread.median, unit,
              spread.smallest, spread.largest);
}

Spread copy_bandwidth() {
  const size_t bytes = size_t{256} << 20;
  std::vector<std::byte> from(bytes, std::byte{1}), to(bytes, std::byte{2});
  const auto half = static_cast<std::ptrdiff_t>(bytes / 2);
  return measure([&] {
    const double time = seconds([&] {
#pragma omp parallel for
      for (std::ptrdiff_t part = 0; part < 2; ++part) {
        std::memcpy(to.data() + part * half, from.data() + part * half, bytes / 2);
      }
    });
    return 2.0 * static_cast<double>(bytes) / time * 1e-9;
  });
}

// The rate of useful operations: the two products of a split activation count once.
Spread product_rate() {
  constexpr int64_t kSize = 2048;
  sagelm::cpu::LinearEngine engine;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> weights(kSize * kSize);
  for (uint16_t& w : weights) w = sagelm::float_to_bfloat16(normal(random));
  sagelm::TensorView view;
  view.dtype = sagelm::DType::kBF16;
  view.shape = {kSize, kSize};
  view.data = reinterpret_cast<const std::byte*>(weights.data());
  view.bytes = weights.size() * 2;
  const auto packed = engine.pack(std::span(&view, 1));
  std::vector<float> x(kPrefill * kSize), y((kPrefill + sagelm::cpu::kRowPadding) * kSize);
  for (float& value : x) value = normal(random);
  engine.run(x.data(), kPrefill, packed, y.data(), false);
  return measure([&] {
    const double time = seconds([&] { engine.run(x.data(), kPrefill, packed, y.data(), false); });
    return 2.0 * kPrefill * kSize * kSize / time * 1e-9;
  });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: bench_model_cpu MODEL [attention[/kv-cache] ...]\n");
    return 2;
  }
  try {
    std::vector<std::string> variants(argv + 2, argv + argc);
    if (variants.empty()) variants = {"fp16", "sage1", "sage2/fp16", "sage2/int8"};
    auto model = sagelm::Model::load({.model = argv[1], .device = "cpu"});
    std::printf("%s on %s\n", model.info().name.c_str(), model.info().device.c_str());
    print("copy, read + written", copy_bandwidth(), "GB/s");
    print("product 512 x 2048 x 2048, as used", product_rate(), "GFLOPS");
    std::mt19937 random(3);
    std::vector<int32_t> ids(static_cast<size_t>(kDecodeAfter[2]));
    for (int32_t& id : ids) {
      id = 3 + static_cast<int32_t>(random() % static_cast<uint64_t>(model.info().vocab_size - 3));
    }
    sagelm::GenerateOptions options;
    options.max_tokens = kDecode;
    options.sampling.temperature = 0;
    options.sampling.repeat_penalty = 1;
    options.ignore_eos = true;
    for (const std::string& variant : variants) {
      const size_t slash = variant.find('/');
      model.set_attention(variant.substr(0, slash), true,
                          slash == std::string::npos ? "auto" : variant.substr(slash + 1));
      const auto run = [&](int64_t prompt, int64_t decode) {
        auto session = model.start_session();
        options.max_tokens = decode;
        return session.generate(std::span(ids).first(static_cast<size_t>(prompt)), options);
      };
      run(kPrefill, 1);  // generates oneDNN's kernels and touches the cache
      print(variant + ": prefill " + std::to_string(kPrefill),
            measure([&] { return run(kPrefill, 1).prefill_tokens_per_second(); }), "tokens/s");
      for (const int64_t after : kDecodeAfter) {
        if (after + kDecode > model.info().context) continue;
        print(variant + ": decode " + std::to_string(kDecode) + " after " + std::to_string(after),
              measure([&] { return run(after, kDecode).decode_tokens_per_second(); }), "tokens/s");
      }
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_model_cpu: error: %s\n", error.what());
    return 1;
  }
  return 0;
}
