// Decode over an FP16 or BF16 cache that appends the step's tokens itself
// (kernels/attention/mma_decode.h), beside the kernels that do one thing each and have their own
// tests: the same bits. Needs a device; skips without one.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "gpu/gpu_ops.h"
#include "kernels/attention/mma_decode.h"
#include "kernels/ops/probe.h"
#include "kernels/ops/rope_append.h"

namespace sagelm::testing {
namespace {

using kernels::Element;

constexpr int kPage = 128;

struct Shape {
  Element type;
  int32_t heads, kv_heads, dim;
};

// One step of sequences that have lengths[i] tokens with it.
class DecodeStep {
 public:
  DecodeStep(const Shape& shape, const std::vector<int32_t>& lengths)
      : shape_(shape),
        batch_(static_cast<int32_t>(lengths.size())),
        lengths_(lengths),
        rotations_(Element::kF32, make_angles(shape, lengths)) {
    std::vector<int32_t> starts(lengths.size()), positions;
    int32_t pages = 0, longest = 0;
    for (const int32_t length : lengths) {
      pages += (length + kPage - 1) / kPage;
      longest = std::max(longest, (length + kPage - 1) / kPage);
    }
    stride_ = longest;
    std::vector<int32_t> ids(static_cast<size_t>(pages));
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), std::mt19937(1));
    std::vector<int32_t> table(lengths.size() * static_cast<size_t>(stride_)), slots;
    size_t taken = 0;
    for (size_t i = 0; i < lengths.size(); ++i) {
      for (int32_t page = 0; page * kPage < lengths[i]; ++page) {
        table[i * static_cast<size_t>(stride_) + static_cast<size_t>(page)] = ids[taken++];
      }
      positions.push_back(lengths[i] - 1);
      slots.push_back(ids[taken - 1] * kPage + (lengths[i] - 1) % kPage);
    }
    table_ = upload_integers(table);
    lens_ = upload_integers(lengths);
    positions_ = upload_integers(positions);
    slots_ = upload_integers(slots);
    cache_size_ = static_cast<size_t>(pages * kPage * shape.kv_heads * shape.dim);
  }

  struct Result {
    std::vector<std::byte> out, keys, values;
    bool operator==(const Result&) const = default;
  };
  Result run(bool at_once) const {
    const int64_t width = int64_t{shape_.heads + 2 * shape_.kv_heads} * shape_.dim;
    const GpuArray qkv(shape_.type, normal_values(static_cast<size_t>(batch_ * width), 1.0f, 2));
    const GpuArray keys(shape_.type, normal_values(cache_size_, 1.0f, 3));
    const GpuArray values(shape_.type, normal_values(cache_size_, 1.0f, 4));
    const int64_t columns = int64_t{shape_.heads} * shape_.dim;
    const GpuArray out(shape_.type, static_cast<size_t>(batch_ * columns));
    const auto integers = [](const DeviceBuffer& x) {
      return static_cast<const int32_t*>(x.data());
    };
    kernels::Problem p{};
    const int64_t token = int64_t{shape_.kv_heads} * shape_.dim;
    p.q = {qkv.data(), width, width, shape_.dim};
    p.k = {keys.data(), kPage * token, token, shape_.dim};
    p.v = {values.data(), kPage * token, token, shape_.dim};
    p.out = {out.data(), columns, columns, shape_.dim};
    p.kv_lens = integers(lens_);
    p.page_table = integers(table_);
    p.page_table_stride = stride_;
    p.page_tokens = kPage;
    p.batch = batch_;
    p.num_heads = shape_.heads;
    p.num_kv_heads = shape_.kv_heads;
    p.head_dim = shape_.dim;
    p.max_q_len = 1;
    p.max_kv_len = *std::max_element(lengths_.begin(), lengths_.end());
    p.softmax_scale = 1.0f / std::sqrt(static_cast<float>(shape_.dim));
    p.causal = true;
    p.bf16 = shape_.type == Element::kBF16;
    DeviceBuffer arrivals(static_cast<size_t>(batch_ * shape_.kv_heads) * sizeof(uint32_t));
    arrivals.fill(0);
    if (at_once) {
      EXPECT_TRUE(kernels::mma_decode_appends(p));
      p.rotations = static_cast<const float*>(rotations_.data());
      p.arrivals = static_cast<uint32_t*>(arrivals.data());
    } else {
      kernels::RopeAppend append;
      append.type = shape_.type;
      append.qkv = qkv.data();
      append.rows = batch_;
      append.num_heads = shape_.heads;
      append.num_kv_heads = shape_.kv_heads;
      append.head_dim = shape_.dim;
      append.positions = integers(positions_);
      append.slots = integers(slots_);
      append.rotations = static_cast<const float*>(rotations_.data());
      append.keys = keys.data();
      append.values = values.data();
      expect_done(kernels::rope_append(append, nullptr), "rope_append");
    }
    DeviceBuffer workspace(std::max<size_t>(kernels::mma_decode_workspace_bytes(p), 256));
    workspace.fill(0xFF);
    expect_done(kernels::mma_decode(p, workspace.data(), nullptr), "mma_decode");
    std::vector<uint32_t> counts(arrivals.bytes() / sizeof(uint32_t));
    arrivals.download(counts.data(), arrivals.bytes());
    EXPECT_EQ(counts, std::vector<uint32_t>(counts.size())) << "counters left behind";
    return {out.raw(), keys.raw(), values.raw()};
  }

 private:
  // Cosines and sines of some angle for every position and pair.
  static std::vector<float> make_angles(const Shape& shape, const std::vector<int32_t>& lengths) {
    const int32_t positions = *std::max_element(lengths.begin(), lengths.end());
    std::vector<float> angles;
    for (int32_t position = 0; position < positions; ++position) {
      for (int32_t i = 0; i < shape.dim; ++i) {
        const float angle =
            0.37f * static_cast<float>(position) / static_cast<float>(1 + i % (shape.dim / 2));
        angles.push_back(i < shape.dim / 2 ? std::cos(angle) : std::sin(angle));
      }
    }
    return angles;
  }

  Shape shape_;
  int32_t batch_, stride_ = 0;
  std::vector<int32_t> lengths_;
  GpuArray rotations_;
  DeviceBuffer table_, lens_, positions_, slots_;
  size_t cache_size_ = 0;
};

TEST(DecodeGpu, AppendingIsTheSameAsAppendingBefore) {
  if (const std::string reason = no_device_reason(); !reason.empty()) GTEST_SKIP() << reason;
  ASSERT_EQ(kernels::probe_kernels(), cudaSuccess) << "built for another device";
  for (const Shape& shape : {Shape{Element::kF16, 4, 4, 128}, Shape{Element::kBF16, 8, 2, 128},
                             Shape{Element::kF16, 3, 1, 64}, Shape{Element::kF16, 32, 32, 64}}) {
    for (const std::vector<int32_t>& lengths :
         {std::vector<int32_t>{1}, {2, 16, 17, 64, 65}, {128, 129, 700, 3, 1281}, {5000}}) {
      const DecodeStep step(shape, lengths);
      const DecodeStep::Result apart = step.run(false), at_once = step.run(true);
      EXPECT_EQ(at_once.out, apart.out) << shape.dim << ", " << lengths.back();
      EXPECT_EQ(at_once.keys, apart.keys) << shape.dim << ", " << lengths.back();
      EXPECT_EQ(at_once.values, apart.values) << shape.dim << ", " << lengths.back();
      EXPECT_TRUE(step.run(true) == at_once) << "not the same again";
      if (::testing::Test::HasFailure()) return;
    }
  }
}

}  // namespace
}  // namespace sagelm::testing
