// Attention of steps of many rows over the quantized KV cache (kernels/cache/quantized_kv.h)
// against float64. Needs a Hopper device; skips without one.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "gpu/gpu_quantized_kv.h"
#include "gpu/quantized_kv_fixture.h"

namespace sagelm::testing {
namespace {

using kernels::Element;
using Steps = std::vector<std::vector<int>>;  // tokens of each sequence, step by step

class PrefillGpu : public QuantizedKvGpu {};

const std::vector<KvShape> kShapes = {
    {Element::kF16, 4, 4, 128},       {Element::kBF16, 4, 2, 128},
    {Element::kF16, 3, 1, 64},        {Element::kF16, 2, 2, 96},
    {Element::kF16, 4, 1, 80},        {Element::kBF16, 2, 1, 16},
    {Element::kF16, 4, 2, 128, true}, {Element::kBF16, 2, 2, 96, true},
    {Element::kF16, 3, 1, 64, true},  {Element::kBF16, 2, 1, 48, true}};

std::vector<int> total(const Steps& steps) {
  std::vector<int> lengths(steps.front().size());
  for (const std::vector<int>& counts : steps) {
    for (size_t i = 0; i < counts.size(); ++i) lengths[i] += counts[i];
  }
  return lengths;
}

// The attention of the last step.
void check_prefill(const KvShape& shape, const Steps& steps, bool smooth_k = true) {
  GpuQuantizedKv cache(shape, total(steps), smooth_k);
  for (const std::vector<int>& counts : steps) {
    cache.append_for_prefill(counts);
    cache.check_untouched();
  }
  const GpuQuantizedKv::Output output = cache.prefill();
  const std::vector<int>& counts = steps.back();
  const auto dim = static_cast<size_t>(shape.dim);
  // With INT4 keys what they lose is much the larger part, so the rest is measured by itself.
  double error = 0, size = 0, int4_error = 0;
  size_t row = 0;
  for (size_t sequence = 0; sequence < counts.size(); ++sequence) {
    const int last = counts[sequence] - 1;
    for (int query = 0; query <= last; ++query, ++row) {
      // The oracle is slow: the first rows, the last ones and some between, of one head each.
      if (query > 3 && last - query > 3 && query % 61 != 0) continue;
      for (int head = 0; head < shape.heads; ++head) {
        if (last > 3 && query % shape.heads != head) continue;
        const auto b = static_cast<int>(sequence);
        const GpuQuantizedKv::Row exact = cache.exact(b, query, head);
        const GpuQuantizedKv::Row of_pages = shape.int4_keys ? cache.oracle(b, query, head) : exact;
        const size_t at =
            (row * static_cast<size_t>(shape.heads) + static_cast<size_t>(head)) * dim;
        double row_error = 0, row_size = 0;
        for (size_t c = 0; c < dim; ++c) {
          row_error += std::abs(output.out[at + c] - of_pages.out[c]);
          row_size += std::abs(of_pages.out[c]);
          int4_error += std::abs(output.out[at + c] - exact.out[c]);
        }
        ASSERT_LT(row_error, 0.25 * row_size)
            << shape.heads << "/" << shape.kv_heads << " heads of " << shape.dim << ", sequence "
            << sequence << " of " << cache.length(b) << ", query " << query << ", head " << head;
        error += row_error;
        size += row_size;
      }
    }
  }
  EXPECT_LT(error, 0.08 * size) << shape.heads << " heads of " << shape.dim;
  if (shape.int4_keys) {
    EXPECT_LT(int4_error, 0.25 * size) << shape.heads << " heads of " << shape.dim;
  }
}

TEST_F(PrefillGpu, OfNewSequences) {
  for (const KvShape& shape : kShapes) {
    for (const int length : {1, 17, 63, 127, 128, 129, 191, 256, 300, 700}) {
      check_prefill(shape, {{length}});
      if (HasFatalFailure()) return;
    }
    check_prefill(shape, {{5, 700, 64, 128, 1, 300, 129}});
    if (HasFatalFailure()) return;
  }
}

TEST_F(PrefillGpu, ContinuesFromPages) {
  for (const KvShape& shape : kShapes) {
    // Onto nothing but a tail, onto pages, onto both; ending in a tail, at a page's end, past
    // several; ragged, beside sequences that begin, that stand still and that decode.
    for (const Steps& steps : {Steps{{50}, {20}},
                               {{100}, {28}},
                               {{100}, {200}},
                               {{128}, {17}},
                               {{256}, {300}},
                               {{130, 7}, {60, 200}, {66, 1}},
                               {{700, 3, 128, 0, 515}, {129, 130, 1, 90, 0}},
                               {{1100, 1000}, {200, 333}},
                               {{2400, 600}, {100, 30}}}) {
      check_prefill(shape, steps);
      if (HasFatalFailure()) return;
    }
    check_prefill(shape, {{200, 10}, {70, 40}}, false);
    if (HasFatalFailure()) return;
  }
}

// However the tokens come, and for either kernel.
TEST_F(PrefillGpu, PagesAreTheSame) {
  for (const KvShape& shape : kShapes) {
    GpuQuantizedKv decoding(shape, {400, 300}), prefilling(shape, {400, 300});
    decoding.append({400, 300});
    for (const std::vector<int>& counts : Steps{{100, 128}, {60, 20}, {240, 152}}) {
      prefilling.append_for_prefill(counts);
    }
    for (int head = 0; head < shape.kv_heads; ++head) {
      for (int sequence = 0; sequence < 2; ++sequence) {
        for (int i = 0; i < decoding.length(sequence) / kernels::kTileTokens; ++i) {
          EXPECT_EQ(prefilling.page(sequence, i, head), decoding.page(sequence, i, head));
        }
        EXPECT_EQ(prefilling.mean(sequence, head), decoding.mean(sequence, head));
        for (int place = 0; place < decoding.length(sequence) % kernels::kTileTokens; ++place) {
          EXPECT_EQ(prefilling.tail(sequence, place, 0, head, 1),
                    decoding.tail(sequence, place, 0, head, 1));
        }
      }
    }
  }
}

TEST_F(PrefillGpu, SequenceDoesNotDependOnItsNeighbours) {
  for (const KvShape& shape :
       {KvShape{Element::kF16, 4, 2, 128}, KvShape{Element::kF16, 4, 2, 128, true}}) {
    GpuQuantizedKv together(shape, {2100, 300, 2000, 5, 130}), alone(shape, {2100});
    together.append_for_prefill({1700, 20, 1500, 0, 0});
    together.append_for_prefill({400, 280, 500, 5, 130});
    alone.append_for_prefill({1700});
    alone.append_for_prefill({400});
    const std::vector<std::byte> both = together.prefill().raw, one = alone.prefill().raw;
    EXPECT_TRUE(std::equal(one.begin(), one.end(), both.begin()));
    for (const int at_once : {1, 2, 3, 5}) EXPECT_EQ(together.prefill(at_once).raw, both);
  }
}

}  // namespace
}  // namespace sagelm::testing
