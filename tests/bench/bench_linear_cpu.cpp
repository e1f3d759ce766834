// Time and rate of the CPU's products of BF16 weights: ours on AMX, oneDNN's, and the most that the
// tile units do (tiles that stay where they are), one after the other in every round. Run with
// OMP_NUM_THREADS; prints the median and the smallest of the rounds. A product of split activations
// is two BF16 products, and both count.
#include <omp.h>
#include <spdlog/fmt/fmt.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <string_view>
#include <vector>

#include "backend/cpu/linear.h"
#include "base/measure.h"

namespace sagelm::cpu {
namespace {

constexpr int kRounds = 15;

struct Layer {
  std::string_view name;
  int64_t in;
  int64_t out;
  bool swiglu;
};

// Those of books-llama2-58m and of the demo model.
constexpr Layer kLayers[] = {
    {"qkv", 512, 1536, false},      {"o", 512, 512, false},      {"gate, up", 512, 1376, true},
    {"down", 1376, 512, false},     {"head", 512, 32000, false}, {"demo qkv", 288, 864, false},
    {"demo down", 768, 288, false},
};

// Copies of a layer's weights, as many as a model has, so that none stays in a core's cache.
constexpr int64_t kCopiesBytes = int64_t{32} << 20;

struct Times {
  std::vector<double> seconds;
  void print(std::string_view name, double operations) {
    std::sort(seconds.begin(), seconds.end());
    const double median = seconds[seconds.size() / 2];
    fmt::print("    {:8} {:9.1f} us (least {:9.1f}) {:7.0f} GFLOPS (most {:7.0f})\n", name,
               1e6 * median, 1e6 * seconds.front(), 1e-9 * operations / median,
               1e-9 * operations / seconds.front());
  }
};

void run(const Layer& layer, int64_t rows) {
  const std::vector<uint16_t> numbers(static_cast<size_t>(layer.in * layer.out), 0x3C11);
  TensorView view;
  view.dtype = DType::kBF16;
  view.shape = {layer.out, layer.in};
  view.data = reinterpret_cast<const std::byte*>(numbers.data());
  view.bytes = numbers.size() * sizeof(uint16_t);
  const int64_t matrices = layer.swiglu ? 2 : 1;
  const int64_t copies =
      std::max<int64_t>(1, kCopiesBytes / (static_cast<int64_t>(view.bytes) * matrices));

  std::array<LinearEngine, 2> engines = {LinearEngine(has_amx()), LinearEngine(false)};
  std::array<std::vector<std::array<LinearWeight, 2>>, 2> weights;
  for (size_t e = 0; e < engines.size(); ++e) {
    for (int64_t i = 0; i < copies; ++i) {
      if (layer.swiglu) {
        weights[e].push_back(engines[e].pack_gate_up(view, view));
      } else {
        weights[e].push_back({engines[e].pack({&view, 1}), LinearWeight()});
      }
    }
  }
  const auto room = static_cast<size_t>((rows + kRowPadding) * layer.out);
  const std::vector<float> x(static_cast<size_t>(rows * layer.in), 0.37f);
  std::vector<float> gate_up(2 * room), out(room);
  const auto multiply = [&](size_t e) {
    for (const auto& weight : weights[e]) {
      if (layer.swiglu) {
        engines[e].run_swiglu(x.data(), rows, nullptr, weight[0], weight[1], gate_up.data(),
                              out.data());
      } else {
        engines[e].run(x.data(), rows, nullptr, weight[0], out.data(), false);
      }
    }
  };
  std::array<Times, 2> times;
  for (int round = 0; round <= kRounds; ++round) {
    for (size_t e = 0; e < engines.size(); ++e) {
      const double seconds = seconds_of([&] { multiply(e); }) / static_cast<double>(copies);
      if (round > 0) times[e].seconds.push_back(seconds);
    }
  }
  fmt::print("  {} [{}, {}] x {}\n", layer.name, layer.out, layer.in, rows);
  const double operations = 4.0 * static_cast<double>(rows * layer.in * layer.out * matrices);
  times[0].print(engines[0].units(), operations);
  times[1].print("oneDNN", operations);
}

#if defined(__x86_64__) && defined(__linux__)
// 16 rows of 64 bytes in each of the eight tiles.
alignas(64) constexpr std::array<uint8_t, 64> kTiles = [] {
  std::array<uint8_t, 64> config = {1};
  for (size_t tile = 0; tile < 8; ++tile) {
    config[16 + 2 * tile] = 64;
    config[48 + tile] = 16;
  }
  return config;
}();

__attribute__((target("amx-tile,amx-bf16"))) void multiply_tiles(int64_t count) {
  _tile_loadconfig(kTiles.data());
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t i = 0; i < count; i += 4) {
    _tile_dpbf16ps(0, 6, 4);
    _tile_dpbf16ps(1, 6, 5);
    _tile_dpbf16ps(2, 7, 4);
    _tile_dpbf16ps(3, 7, 5);
  }
  _tile_release();
}

void print_peak() {
  constexpr int64_t kCount = 1 << 20;
  Times times;
  int threads = 1;
  for (int round = 0; round <= kRounds; ++round) {
    const double seconds = seconds_of([&] {
#pragma omp parallel
      {
        multiply_tiles(kCount);
#pragma omp single
        threads = omp_get_num_threads();
      }
    });
    if (round > 0) times.seconds.push_back(seconds);
  }
  constexpr double kTileOperations = 2.0 * 16 * 16 * 32;
  fmt::print("  {} thread(s)\n", threads);
  times.print("tiles", kTileOperations * static_cast<double>(kCount * threads));
}
#endif

}  // namespace
}  // namespace sagelm::cpu

int main() {
  using namespace sagelm::cpu;
#if defined(__x86_64__) && defined(__linux__)
  if (has_amx()) print_peak();
#endif
  for (const Layer& layer : kLayers) {
    for (const int64_t rows : {1, 32, 512, 2048}) {
      if (layer.out < 32000 || rows < 2048) run(layer, rows);
    }
  }
  return 0;
}
