// The operations of kernels/ops against float64. Needs a device; skips without one.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "gpu/gpu_ops.h"
#include "gpu/ops_fixture.h"
#include "kernels/ops/rmsnorm.h"
#include "kernels/ops/rope_append.h"
#include "kernels/ops/rows.h"
#include "kernels/ops/score.h"
#include "kernels/ops/swiglu.h"

namespace sagelm::testing {
namespace {

using kernels::Element;

INSTANTIATE_TEST_SUITE_P(Types, HalfOpsGpu, ::testing::Values(Element::kF16, Element::kBF16),
                         element_name);
INSTANTIATE_TEST_SUITE_P(Types, AllOpsGpu,
                         ::testing::Values(Element::kF32, Element::kF16, Element::kBF16),
                         element_name);

// --- Norms and activations ---

TEST_P(HalfOpsGpu, Rmsnorm) {
  constexpr double kEps = 1e-5;
  struct Size {
    int64_t rows, cols;
  };
  // Rows longer than 32,768 (from 65 rows on: 8,192) do not fit the registers.
  for (const Size size : {Size{1, 1},
                          {2, 3},
                          {3, 4},
                          {5, 7},
                          {1, 64},
                          {4, 100},
                          {3, 768},
                          {2, 4096},
                          {1, 4100},
                          {1, 4099},
                          {2, 40000},
                          {1, 40001},
                          {65, 12},
                          {70, 4096},
                          {66, 9000},
                          {66, 9001}}) {
    const auto cols = static_cast<size_t>(size.cols);
    const GpuArray x(Element::kF32, normal_values(static_cast<size_t>(size.rows) * cols, 5.0f, 1));
    const GpuArray weight(Element::kF32, normal_values(cols, 1.0f, 2));
    const GpuArray out(GetParam(), static_cast<size_t>(size.rows) * cols);
    expect_done(kernels::rmsnorm(static_cast<const float*>(x.data()),
                                 static_cast<const float*>(weight.data()), size.rows, size.cols,
                                 static_cast<float>(kEps), GetParam(), out.data(), nullptr),
                "rmsnorm");
    const std::vector<double> actual = out.download();
    for (size_t row = 0; row < static_cast<size_t>(size.rows); ++row) {
      double squares = 0;
      for (size_t i = 0; i < cols; ++i) squares += x[row * cols + i] * x[row * cols + i];
      const double scale = 1.0 / std::sqrt(squares / static_cast<double>(cols) + kEps);
      for (size_t i = 0; i < cols; ++i) {
        const double expected = x[row * cols + i] * scale * weight[i];
        expect_near(actual[row * cols + i], expected,
                    (rounding(GetParam()) + 2e-6) * std::abs(expected) + kSmallestHalf,
                    std::to_string(size.rows) + " x " + std::to_string(size.cols) + " at " +
                        std::to_string(row) + "," + std::to_string(i));
        if (HasFailure()) return;
      }
    }
  }
}

TEST_P(HalfOpsGpu, RmsnormOfZerosIsZero) {
  const GpuArray x(Element::kF32, std::vector<float>(256, 0.0f));
  const GpuArray weight(Element::kF32, std::vector<float>(256, 1.0f));
  const GpuArray out(GetParam(), 256);
  expect_done(kernels::rmsnorm(static_cast<const float*>(x.data()),
                               static_cast<const float*>(weight.data()), 1, 256, 1e-5f, GetParam(),
                               out.data(), nullptr),
              "rmsnorm");
  for (const double value : out.download()) EXPECT_EQ(value, 0.0);
}

TEST_P(HalfOpsGpu, Swiglu) {
  struct Size {
    int64_t rows, cols;
  };
  for (const Size size : {Size{1, 1}, {3, 7}, {2, 8}, {5, 100}, {1, 2056}, {2, 2049}, {300, 24}}) {
    const auto rows = static_cast<size_t>(size.rows), cols = static_cast<size_t>(size.cols);
    std::vector<float> values = normal_values(rows * 2 * cols, 4.0f, 1);
    // Far ends: where the exponential overflows, and where it vanishes.
    constexpr float kFar[] = {-60000.0f, -100.0f, -17.0f, 17.0f, 100.0f};
    for (size_t i = 0; i < std::min(cols, std::size(kFar)); ++i) values[i] = kFar[i];
    const GpuArray in(GetParam(), values);
    const GpuArray out(GetParam(), rows * cols);
    expect_done(kernels::swiglu(in.data(), GetParam(), size.rows, size.cols, out.data(), nullptr),
                "swiglu");
    const std::vector<double> actual = out.download();
    for (size_t row = 0; row < rows; ++row) {
      for (size_t i = 0; i < cols; ++i) {
        const double up = in[row * 2 * cols + cols + i];
        const double expected = silu(in[row * 2 * cols + i]) * up;
        expect_near(actual[row * cols + i], expected,
                    (rounding(GetParam()) + 1e-5) * std::abs(expected) + 1e-7 * std::abs(up) +
                        kSmallestHalf,
                    std::to_string(size.rows) + " x " + std::to_string(size.cols) + " at " +
                        std::to_string(row) + "," + std::to_string(i));
        if (HasFailure()) return;
      }
    }
  }
}

// --- Rows ---

TEST_P(AllOpsGpu, CopyRowsIsExact) {
  for (const int64_t cols : {1, 7, 8, 96, 1032, 4097}) {
    constexpr int64_t kTable = 37;
    const GpuArray table(GetParam(), normal_values(static_cast<size_t>(kTable * cols), 2.0f, 1));
    const std::vector<int32_t> ids = {36, 0, 5, 5, 17, 36, 1};
    const DeviceBuffer ids_device = upload_integers(ids);
    const GpuArray out(Element::kF32, ids.size() * static_cast<size_t>(cols));
    expect_done(
        kernels::copy_rows(table.data(), GetParam(), static_cast<const int32_t*>(ids_device.data()),
                           static_cast<int64_t>(ids.size()), cols, static_cast<float*>(out.data()),
                           nullptr),
        "copy_rows");
    const std::vector<double> actual = out.download();
    for (size_t row = 0; row < ids.size(); ++row) {
      for (int64_t i = 0; i < cols; ++i) {
        ASSERT_EQ(actual[row * static_cast<size_t>(cols) + static_cast<size_t>(i)],
                  table[static_cast<size_t>(ids[row] * cols + i)])
            << cols << " columns, row " << row << ", column " << i;
      }
    }
  }
}

// --- Scores ---

std::vector<kernels::RowScore> score(const GpuArray& logits, const std::vector<int32_t>& targets,
                                     int64_t cols) {
  const DeviceBuffer wanted = upload_integers(targets);
  DeviceBuffer out(targets.size() * sizeof(kernels::RowScore));
  expect_done(kernels::score_rows(static_cast<const float*>(logits.data()),
                                  static_cast<const int32_t*>(wanted.data()),
                                  static_cast<int64_t>(targets.size()), cols,
                                  static_cast<kernels::RowScore*>(out.data()), nullptr),
              "score_rows");
  std::vector<kernels::RowScore> scores(targets.size());
  out.download(scores.data(), out.bytes());
  return scores;
}

TEST_F(OpsGpu, ScoreRows) {
  struct Size {
    size_t rows, cols;
  };
  for (const Size size : {Size{1, 1}, {3, 4}, {2, 5}, {70, 1000}, {3, 32000}, {2, 32003}}) {
    std::vector<float> values = normal_values(size.rows * size.cols, 4.0f, 1);
    // The last row lies far from zero.
    for (size_t i = 0; i < size.cols; ++i) values[(size.rows - 1) * size.cols + i] += 3000.0f;
    const GpuArray logits(Element::kF32, values);
    std::vector<int32_t> targets;
    for (size_t row = 0; row < size.rows; ++row) {
      targets.push_back(static_cast<int32_t>((row * 7919) % size.cols));
    }
    const std::vector<kernels::RowScore> scores =
        score(logits, targets, static_cast<int64_t>(size.cols));
    for (size_t row = 0; row < size.rows; ++row) {
      const auto begin = values.begin() + static_cast<int64_t>(row * size.cols);
      const auto end = begin + static_cast<int64_t>(size.cols);
      const auto best = std::max_element(begin, end);
      double sum = 0;
      for (auto i = begin; i != end; ++i) {
        sum += std::exp(static_cast<double>(*i) - static_cast<double>(*best));
      }
      const double expected =
          static_cast<double>(begin[targets[row]]) - static_cast<double>(*best) - std::log(sum);
      expect_near(scores[row].logprob, expected, 3e-6 + 1e-7 * std::abs(expected),
                  std::to_string(size.cols) + " columns, row " + std::to_string(row));
      EXPECT_EQ(scores[row].argmax, best - begin);
    }
  }
}

TEST_F(OpsGpu, ScoreRowsTakesTheLowestIdAmongEquals) {
  constexpr size_t kCols = 5000;
  std::vector<float> values(2 * kCols, -1.0f);
  for (const size_t at : {4321u, 1234u, 4999u}) values[at] = 2.0f;
  const std::vector<kernels::RowScore> scores =
      score(GpuArray(Element::kF32, values), {0, 0}, kCols);
  EXPECT_EQ(scores[0].argmax, 1234);
  EXPECT_EQ(scores[1].argmax, 0);
}

TEST_F(OpsGpu, ScoreRowsShowsNanAndInfinity) {
  constexpr size_t kCols = 1001;
  std::vector<float> values = normal_values(4 * kCols, 1.0f, 1);
  values[0 * kCols + 1000] = std::numeric_limits<float>::quiet_NaN();
  values[1 * kCols + 17] = std::numeric_limits<float>::infinity();
  values[2 * kCols + 512] = -std::numeric_limits<float>::infinity();
  const std::vector<kernels::RowScore> scores =
      score(GpuArray(Element::kF32, values), {3, 3, 3, 3}, kCols);
  for (size_t row = 0; row < 3; ++row) EXPECT_TRUE(std::isnan(scores[row].logprob)) << row;
  EXPECT_TRUE(std::isfinite(scores[3].logprob));
}

int32_t read_flag(const DeviceBuffer& flag) {
  int32_t value = -1;
  flag.download(&value, sizeof value);
  return value;
}

TEST_P(AllOpsGpu, FindNonFinite) {
  for (const size_t count : {size_t{1}, size_t{5}, size_t{1000}, size_t{600001}}) {
    std::vector<float> values = normal_values(count, 1.0f, 1);
    DeviceBuffer flag(sizeof(int32_t));
    flag.fill(1);
    const auto found = [&] {
      const GpuArray x(GetParam(), values);
      expect_done(kernels::find_non_finite(x.data(), GetParam(), static_cast<int64_t>(count),
                                           static_cast<int32_t*>(flag.data()), nullptr),
                  "find_non_finite");
      return read_flag(flag);
    };
    values[0] = 65504.0f;  // the largest FP16 number
    EXPECT_EQ(found(), 0) << count;
    values[count - 1] = -std::numeric_limits<float>::infinity();
    EXPECT_EQ(found(), 1) << count;
    values[count - 1] = 0.0f;
    values[count / 2] = std::numeric_limits<float>::quiet_NaN();
    EXPECT_EQ(found(), 1) << count;
  }
}

TEST_F(OpsGpu, HashWords) {
  for (const size_t count : {size_t{1}, size_t{33}, size_t{600001}}) {
    std::vector<int32_t> values(count);
    std::iota(values.begin(), values.end(), 0);
    DeviceBuffer result(sizeof(uint64_t));
    const auto hash = [&] {
      const DeviceBuffer words = upload_integers(values);
      expect_done(kernels::hash_words(static_cast<const uint32_t*>(words.data()),
                                      static_cast<int64_t>(count),
                                      static_cast<uint64_t*>(result.data()), nullptr),
                  "hash_words");
      uint64_t value = 0;
      result.download(&value, sizeof value);
      return value;
    };
    const uint64_t before = hash();
    EXPECT_EQ(hash(), before) << count;
    values[count - 1] ^= int32_t{1} << 31;
    EXPECT_NE(hash(), before) << count;
    values[count - 1] ^= int32_t{1} << 31;
    std::swap(values.front(), values.back());
    EXPECT_EQ(hash() == before, count == 1) << count;
  }
}

// --- Rotary embedding and append ---

std::vector<float> inverse_frequencies(int32_t half) {
  std::vector<float> result;
  for (int32_t i = 0; i < half; ++i) {
    result.push_back(static_cast<float>(std::pow(10000.0, -static_cast<double>(i) / half)));
  }
  return result;
}

GpuArray make_rotations(int32_t half, int64_t positions) {
  const GpuArray frequencies(Element::kF32, inverse_frequencies(half));
  GpuArray rotations(Element::kF32, static_cast<size_t>(positions * 2 * half));
  expect_done(kernels::fill_rotations(static_cast<const float*>(frequencies.data()), half,
                                      positions, static_cast<float*>(rotations.data()), nullptr),
              "fill_rotations");
  return rotations;
}

TEST_F(OpsGpu, Rotations) {
  for (const int32_t half : {1, 6, 32, 64}) {
    constexpr int64_t kPositions = 5000;
    const std::vector<float> frequencies = inverse_frequencies(half);
    const std::vector<double> actual = make_rotations(half, kPositions).download();
    for (int64_t position = 0; position < kPositions; ++position) {
      for (int32_t i = 0; i < half; ++i) {
        const double angle = static_cast<float>(position) * frequencies[static_cast<size_t>(i)];
        const auto at = static_cast<size_t>(position * 2 * half + i);
        expect_near(actual[at], std::cos(angle), 1e-7, "cosine");
        expect_near(actual[at + static_cast<size_t>(half)], std::sin(angle), 1e-7, "sine");
        if (HasFailure()) return;
      }
    }
  }
}

struct RopeShape {
  int32_t heads, kv_heads, dim;
};

TEST_P(HalfOpsGpu, RopeAppendThroughPages) {
  constexpr int64_t kPageTokens = 128, kPages = 6, kPositions = 400;
  // Three sequences: from the start, a chunk that crosses a page's end, one decoded token.
  struct Chunk {
    int64_t start, tokens;
    std::vector<int64_t> pages;
  };
  const std::vector<Chunk> chunks = {{0, 5, {3}}, {120, 20, {5, 0}}, {383, 1, {2, 4, 1}}};
  std::vector<int32_t> positions, slots;
  for (const Chunk& chunk : chunks) {
    for (int64_t t = chunk.start; t < chunk.start + chunk.tokens; ++t) {
      const int64_t page = chunk.pages[static_cast<size_t>(t / kPageTokens)];
      positions.push_back(static_cast<int32_t>(t));
      slots.push_back(static_cast<int32_t>(page * kPageTokens + t % kPageTokens));
    }
  }
  const size_t rows = positions.size();
  const DeviceBuffer positions_device = upload_integers(positions);
  const DeviceBuffer slots_device = upload_integers(slots);

  // Halves that are multiples of 8, of 4, and of neither; more tasks than a block's threads.
  for (const RopeShape shape : {RopeShape{1, 1, 2},
                                {2, 1, 12},
                                {4, 2, 24},
                                {4, 4, 16},
                                {3, 1, 64},
                                {2, 2, 80},
                                {8, 2, 128},
                                {32, 8, 128},
                                {5, 5, 100}}) {
    const auto dim = static_cast<size_t>(shape.dim), half = dim / 2;
    const auto heads = static_cast<size_t>(shape.heads);
    const auto kv_heads = static_cast<size_t>(shape.kv_heads);
    const size_t width = (heads + 2 * kv_heads) * dim;
    const GpuArray rotations = make_rotations(shape.dim / 2, kPositions);
    const std::vector<double> table = rotations.download();
    const GpuArray qkv(GetParam(), normal_values(rows * width, 1.0f, 1));
    const size_t cache_size = static_cast<size_t>(kPages * kPageTokens) * kv_heads * dim;
    const GpuArray keys(GetParam(), cache_size), values(GetParam(), cache_size);

    kernels::RopeAppend args;
    args.type = GetParam();
    args.qkv = qkv.data();
    args.rows = static_cast<int64_t>(rows);
    args.num_heads = shape.heads;
    args.num_kv_heads = shape.kv_heads;
    args.head_dim = shape.dim;
    args.positions = static_cast<const int32_t*>(positions_device.data());
    args.slots = static_cast<const int32_t*>(slots_device.data());
    args.rotations = static_cast<const float*>(rotations.data());
    args.keys = keys.data();
    args.values = values.data();
    expect_done(kernels::rope_append(args, nullptr), "rope_append");

    const std::vector<double> after = qkv.download();
    const std::vector<double> cached_keys = keys.download(), cached_values = values.download();
    const std::string name = std::to_string(shape.heads) + "/" + std::to_string(shape.kv_heads) +
                             " heads of " + std::to_string(shape.dim);
    std::vector<bool> written(static_cast<size_t>(kPages * kPageTokens), false);
    for (size_t row = 0; row < rows; ++row) {
      written[static_cast<size_t>(slots[row])] = true;
      const double* angle = table.data() + static_cast<size_t>(positions[row]) * dim;
      for (size_t head = 0; head < heads + 2 * kv_heads; ++head) {
        const bool is_value = head >= heads + kv_heads;
        const bool is_key = !is_value && head >= heads;
        for (size_t i = 0; i < dim; ++i) {
          const size_t at = row * width + head * dim + i;
          const size_t partner = i < half ? at + half : at - half;
          const double cosine = angle[i % half], sine = angle[half + i % half];
          const double rotated =
              qkv[at] * cosine + (i < half ? -qkv[partner] : qkv[partner]) * sine;
          const double expected = is_value ? qkv[at] : rotated;
          const double bound = is_value ? 0.0
                                        : rounding(GetParam()) * std::abs(expected) +
                                              3e-7 * (std::abs(qkv[at]) + std::abs(qkv[partner])) +
                                              kSmallestHalf;
          expect_near(after[at], expected, bound, name + ", row " + std::to_string(row));
          if (is_key || is_value) {
            const size_t kv_head = head - heads - (is_value ? kv_heads : 0);
            const size_t place = (static_cast<size_t>(slots[row]) * kv_heads + kv_head) * dim + i;
            EXPECT_EQ((is_key ? cached_keys : cached_values)[place], after[at])
                << name << ", the cache's copy of row " << row;
          }
          if (HasFailure()) return;
        }
      }
    }
    // Rotated alone, the same columns change.
    const GpuArray plain(GetParam(), normal_values(rows * width, 1.0f, 1));
    kernels::RopeAppend rotation = args;
    rotation.qkv = plain.data();
    rotation.row_stride = static_cast<int64_t>(width);
    rotation.num_heads += rotation.num_kv_heads;
    rotation.num_kv_heads = 0;
    rotation.keys = rotation.values = nullptr;
    expect_done(kernels::rope_append(rotation, nullptr), "rope_append");
    EXPECT_EQ(plain.raw(), qkv.raw()) << name;
    // Appended alone, and then rotated in place, keys are the same too.
    const GpuArray apart(GetParam(), normal_values(rows * width, 1.0f, 1));
    const GpuArray apart_keys(GetParam(), cache_size);
    kernels::RopeAppend append = args;
    append.qkv = apart.data();
    append.keys = apart_keys.data();
    append.rotate_keys = false;
    expect_done(kernels::rope_append(append, nullptr), "rope_append");
    EXPECT_EQ(apart_keys.raw(), keys.raw()) << name;
    rotation.qkv = static_cast<std::byte*>(apart.data()) + 2 * heads * dim;
    rotation.num_heads = shape.kv_heads;
    expect_done(kernels::rope_append(rotation, nullptr), "rope_append");
    EXPECT_EQ(apart.raw(), qkv.raw()) << name;
    // Nothing else of the cache was touched.
    const std::vector<std::byte> raw_keys = keys.raw(), raw_values = values.raw();
    const size_t slot_bytes = kv_heads * dim * 2;
    for (size_t slot = 0; slot < written.size(); ++slot) {
      if (written[slot]) continue;
      for (size_t i = slot * slot_bytes; i < (slot + 1) * slot_bytes; ++i) {
        ASSERT_EQ(raw_keys[i], GpuArray::kPoison) << name << ", slot " << slot;
        ASSERT_EQ(raw_values[i], GpuArray::kPoison) << name << ", slot " << slot;
      }
    }
  }
}

}  // namespace
}  // namespace sagelm::testing
