// Ctrl-C while the CPU computes: oneDNN's products do not leave the stack as handlers expect it.
#include "apps/sagelm/interrupt.h"

#include <gtest/gtest.h>
#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <span>
#include <thread>
#include <vector>

#include "backend/cpu/linear.h"
#include "base/tensor_view.h"

namespace sagelm::cli {
namespace {

TEST(Interrupt, SetsAFlagAndNothingElse) {
  struct sigaction before {};
  sigaction(SIGINT, nullptr, &before);  // ignored, if a shell has put the tests into the background
  {
    const InterruptGuard guard;
    EXPECT_FALSE(interrupted());
    std::raise(SIGINT);
    EXPECT_TRUE(interrupted());
    clear_interrupt();
    EXPECT_FALSE(interrupted());
  }
  struct sigaction after {};
  sigaction(SIGINT, nullptr, &after);
  EXPECT_EQ(after.sa_handler, before.sa_handler);
}

std::vector<float> numbers(int64_t count) {
  std::vector<float> result(static_cast<size_t>(count));
  for (size_t i = 0; i < result.size(); ++i) result[i] = static_cast<float>(i % 251) - 125;
  return result;
}

struct Shape {
  int64_t rows, in, out;
};

// On a CPU without AVX-512, with handlers on the ordinary stack: free(): invalid pointer.
TEST(Interrupt, ProductsAreTheSameUnderManySignals) {
  const int threads = omp_get_max_threads();
  omp_set_num_threads(1);
  const InterruptGuard guard;
  std::atomic<bool> done = false;
  std::thread sender([&done, main = pthread_self()] {
    while (!done) {
      pthread_kill(main, SIGINT);
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
  });
  cpu::LinearEngine engine;
  for (const Shape& shape :
       {Shape{128, 288, 864}, {100, 768, 288}, {7, 288, 8192}, {1, 288, 1536}}) {
    const std::vector<float> x = numbers(shape.rows * shape.in), w = numbers(shape.out * shape.in);
    const TensorView view = {.name = "w",
                             .dtype = DType::kF32,
                             .shape = {shape.out, shape.in},
                             .data = reinterpret_cast<const std::byte*>(w.data()),
                             .bytes = w.size() * sizeof(float)};
    const cpu::LinearWeight weight = engine.pack({&view, 1});
    std::vector<float> y(static_cast<size_t>((shape.rows + cpu::kRowPadding) * shape.out)), once;
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(300);
    bool same = true;
    while (same && std::chrono::steady_clock::now() < end) {
      engine.run(x.data(), shape.rows, nullptr, weight, y.data(), false);
      const std::span<const float> rows(y.data(), static_cast<size_t>(shape.rows * shape.out));
      if (once.empty()) once.assign(rows.begin(), rows.end());
      same = std::ranges::equal(rows, once);
    }
    EXPECT_TRUE(same) << shape.rows << " rows, " << shape.in << " to " << shape.out;
  }
  done = true;
  sender.join();
  omp_set_num_threads(threads);
  EXPECT_TRUE(interrupted());
}

}  // namespace
}  // namespace sagelm::cli
