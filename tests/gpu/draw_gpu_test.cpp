// Tokens drawn on the GPU against those drawn on the CPU: the same, whatever the logits.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "backend/cpu/token_draw.h"
#include "gpu/gpu_ops.h"
#include "gpu/ops_fixture.h"
#include "kernels/ops/draw.h"
#include "kernels/ops/token_weights.h"

namespace sagelm::testing {
namespace {

using kernels::Element;
using kernels::RowDraw;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Memory of the host that the device writes to.
class MappedIntegers {
 public:
  explicit MappedIntegers(size_t count) {
    check_cuda(cudaMallocHost(&data_, count * sizeof(int32_t)), "pinned memory");
    std::fill_n(data(), count, -7);
  }
  ~MappedIntegers() { cudaFreeHost(data_); }
  MappedIntegers(const MappedIntegers&) = delete;
  MappedIntegers& operator=(const MappedIntegers&) = delete;
  int32_t* data() const { return static_cast<int32_t*>(data_); }

 private:
  void* data_ = nullptr;
};

// Draws by rows of logits [rows, cols] on the GPU. Names among the penalized tokens mean
// `drawn_before`, which lie behind the places of these draws.
std::vector<int32_t> draw_on_gpu(const std::vector<float>& logits, size_t cols,
                                 const std::vector<TokenDraw>& draws,
                                 const std::vector<int32_t>& drawn_before = {}) {
  std::vector<RowDraw> rows;
  std::vector<int32_t> integers;
  for (size_t i = 0; i < draws.size(); ++i) {
    const TokenDraw& draw = draws[i];
    RowDraw row{};
    row.uniform = draw.uniform;
    row.top_p = draw.top_p;
    row.octaves = draw.temperature == 0 ? 0.0f : weights::octaves_of(draw.temperature);
    row.penalty = draw.penalty;
    row.farthest = weights::distance_of(draw.min_p);
    row.top_k = draw.top_k;
    row.row = static_cast<int32_t>(draw.row);
    row.place = static_cast<int32_t>(draws.size() - 1 - i);  // not in their order
    row.history = static_cast<int32_t>(integers.size());
    row.history_size = static_cast<int32_t>(draw.penalized.size());
    integers.insert(integers.end(), draw.penalized.begin(), draw.penalized.end());
    row.banned = static_cast<int32_t>(integers.size());
    row.banned_size = static_cast<int32_t>(draw.banned.size());
    integers.insert(integers.end(), draw.banned.begin(), draw.banned.end());
    rows.push_back(row);
  }
  integers.push_back(0);
  const GpuArray x(Element::kF32, logits);
  DeviceBuffer row_buffer(rows.size() * sizeof(RowDraw));
  row_buffer.upload(rows.data(), row_buffer.bytes());
  const DeviceBuffer integer_buffer = upload_integers(integers);
  std::vector<int32_t> places(draws.size(), -9);
  places.insert(places.end(), drawn_before.begin(), drawn_before.end());
  const DeviceBuffer drawn = upload_integers(places);
  const MappedIntegers on_host(draws.size());
  expect_done(kernels::draw_tokens(static_cast<const float*>(x.data()), static_cast<int64_t>(cols),
                                   static_cast<const RowDraw*>(row_buffer.data()),
                                   static_cast<int64_t>(rows.size()),
                                   static_cast<const int32_t*>(integer_buffer.data()),
                                   static_cast<int32_t*>(drawn.data()), on_host.data(), nullptr),
              "drawing");
  drawn.download(places.data(), places.size() * sizeof(int32_t));
  std::vector<int32_t> result(on_host.data(), on_host.data() + draws.size());
  for (size_t i = 0; i < result.size(); ++i) {
    EXPECT_EQ(places[i], std::max(result[i], 0)) << "place " << i;
  }
  std::reverse(result.begin(), result.end());
  return result;
}

// The same draws on both.
void expect_same(const std::string& what, const std::vector<float>& logits, size_t cols,
                 const std::vector<TokenDraw>& draws) {
  const std::vector<int32_t> actual = draw_on_gpu(logits, cols, draws);
  cpu::TokenDrawer drawer;
  for (size_t i = 0; i < draws.size(); ++i) {
    const TokenDraw& draw = draws[i];
    const auto row = std::span(logits).subspan(static_cast<size_t>(draw.row) * cols, cols);
    EXPECT_EQ(actual[i], drawer.draw(row, draw))
        << what << ", " << cols << " logits, draw " << i << ": temperature " << draw.temperature
        << ", top-k " << draw.top_k << ", top-p " << draw.top_p << ", min-p " << draw.min_p
        << ", uniform " << draw.uniform;
  }
}

// Every kind of draw from one row.
std::vector<TokenDraw> kinds_of_draws(std::mt19937& random, int64_t row) {
  std::uniform_real_distribution<double> uniform(0, 1);
  std::vector<TokenDraw> draws = {{.row = row}};
  for (const double temperature : {0.01, 0.8, 100.0}) {
    for (const double u : {0.0, uniform(random), std::nextafter(1.0, 0.0)}) {
      const TokenDraw plain{.row = row, .temperature = temperature, .uniform = u};
      draws.push_back(plain);
      for (const int32_t k : {1, 3, 40, 3000}) {
        draws.push_back(plain);
        draws.back().top_k = k;
        draws.push_back(draws.back());
        draws.back().top_p = 0.7;
      }
      for (const double p : {1e-9, 0.5, 0.9, 0.9999}) {
        draws.push_back(plain);
        draws.back().top_p = p;
      }
      for (const double p : {1.0, 0.1, 1e-4}) {
        draws.push_back(plain);
        draws.back().min_p = p;
        draws.push_back(draws.back());
        draws.back().top_p = 0.95;
      }
    }
  }
  return draws;
}

using Draw = OpsGpu;

// With every `step`th kind of draw.
void expect_draws_as_the_cpu(std::initializer_list<size_t> widths, size_t step = 1) {
  std::mt19937 random(5);
  struct Kind {
    const char* name;
    float (*logit)(float normal, size_t i);
  };
  const Kind kinds[] = {
      {"normal", [](float x, size_t) { return x; }},
      {"wide", [](float x, size_t) { return 10 * x; }},
      {"peaked", [](float x, size_t i) { return i == 5 ? 30.0f : x; }},
      {"equal", [](float, size_t) { return -2.5f; }},
      {"integers", [](float x, size_t) { return std::round(2 * x); }},
      {"zeros of both signs", [](float x, size_t) { return x > 1 ? 0.0f : -0.0f; }},
      {"two apart by one bit", [](float x, size_t) { return x > 0 ? 1.0f : 0x1.fffffep-1f; }},
      {"tiny", [](float x, size_t) { return 1e-30f * x; }},
      {"huge", [](float x, size_t) { return 1e37f * x; }},
  };
  for (const size_t cols : widths) {
    for (const Kind& kind : kinds) {
      std::vector<float> logits = normal_values(2 * cols, 1.0f, 17);
      for (size_t i = 0; i < logits.size(); ++i) logits[i] = kind.logit(logits[i], i % cols);
      std::vector<TokenDraw> draws;
      const std::vector<TokenDraw> all = kinds_of_draws(random, random() % 2);
      for (size_t i = 0; i < all.size(); i += step) draws.push_back(all[i]);
      expect_same(kind.name, logits, cols, draws);
      if (::testing::Test::HasFailure()) return;
    }
  }
}

TEST_F(Draw, IsTheCpus) { expect_draws_as_the_cpu({1, 7, 33, 1000, 32000, 32001, 128256}); }

// Little enough for a race checker.
TEST_F(Draw, OfFewTokensIsTheCpus) { expect_draws_as_the_cpu({33}, 17); }

TEST_F(Draw, PenalizesAndBans) {
  std::mt19937 random(6);
  for (const size_t cols : {1, 7, 32000, 32001}) {
    const std::vector<float> logits = normal_values(cols, 3.0f, 18);
    const auto top =
        static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
    std::vector<int32_t> history = {top, top, 0, static_cast<int32_t>(cols) - 1, 200000};
    for (int i = 0; i < 2000; ++i) history.push_back(static_cast<int32_t>(random() % cols));
    const std::vector<int32_t> banned = {0, 5, static_cast<int32_t>(cols)};
    std::vector<TokenDraw> draws;
    for (const float penalty : {1.0f, 1.1f, 0.5f, 100.0f}) {
      for (TokenDraw& draw : kinds_of_draws(random, 0)) {
        draw.penalty = penalty;
        draw.penalized = std::span(history).first(draws.size() % history.size());
        if (cols > 1) draw.banned = std::span(banned).first(draws.size() % 3);
        draws.push_back(draw);
      }
    }
    expect_same("penalized", logits, cols, draws);
  }
  // All banned: the first.
  const std::vector<int32_t> both = {0, 1};
  EXPECT_EQ(draw_on_gpu({1, 2}, 2, {{.banned = both}, {.temperature = 1, .banned = both}}),
            (std::vector<int32_t>{0, 0}));
}

TEST_F(Draw, PenalizesTokensThatWereJustDrawn) {
  const std::vector<float> logits = {1, 5, 4.9f, 2};
  const std::vector<int32_t> names = {std::numeric_limits<int32_t>::min() + 1};  // place 1
  const TokenDraw draw{.penalty = 2, .penalized = names};
  EXPECT_EQ(draw_on_gpu(logits, 4, {draw}, {1}), std::vector<int32_t>{2});
  EXPECT_EQ(draw_on_gpu(logits, 4, {draw}, {2}), std::vector<int32_t>{1});
}

TEST_F(Draw, ReportsWhatIsNotFinite) {
  for (const float bad : {std::nanf(""), kInfinity, -kInfinity}) {
    for (const size_t cols : {1, 7, 32000, 32001}) {
      std::vector<float> logits = normal_values(3 * cols, 1.0f, 19);
      logits[2 * cols - 1] = bad;  // of row 1
      std::vector<TokenDraw> draws;
      for (const int64_t row : {0, 1, 2}) {
        draws.push_back({.row = row});
        draws.push_back({.row = row, .temperature = 0.8, .top_p = 0.9, .uniform = 0.5});
      }
      const std::vector<int32_t> drawn = draw_on_gpu(logits, cols, draws);
      for (size_t i = 0; i < drawn.size(); ++i) {
        EXPECT_EQ(drawn[i] < 0, i / 2 == 1) << bad << " of " << cols << ", draw " << i;
      }
    }
  }
}

TEST_F(Draw, RefusesWhatItsSumsCannotHold) {
  EXPECT_EQ(kernels::draw_tokens(nullptr, 8 * kernels::kMostDrawCols, nullptr, 1, nullptr, nullptr,
                                 nullptr, nullptr),
            cudaErrorInvalidValue);
}

}  // namespace
}  // namespace sagelm::testing
