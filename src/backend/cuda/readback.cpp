#include "backend/cuda/readback.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "backend/cuda/check.h"
#include "backend/cuda/element.h"
#include "kernels/ops/score.h"

namespace sagelm::cuda {
namespace {

// Rows scored by one kernel.
constexpr int64_t kScoreRows = 1024;
// Rows of logits to copy that are worth a barrier.
constexpr int64_t kWorthThreads = 16;

void copy_to_floats(const std::byte* from, DType type, std::span<float> out) {
  if (type == DType::kF32) {
    std::copy_n(reinterpret_cast<const float*>(from), out.size(), out.begin());
    return;
  }
  const auto* raw = reinterpret_cast<const uint16_t*>(from);
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = type == DType::kF16 ? half_to_float(raw[i]) : bfloat16_to_float(raw[i]);
  }
}

bool is_finite(std::span<const float> values) {
  uint32_t worst = 0;  // infinities and NaN have the largest magnitudes
  for (const float value : values) {
    worst = std::max(worst, std::bit_cast<uint32_t>(value) & 0x7FFFFFFFu);
  }
  return worst < 0x7F800000u;
}

[[noreturn]] void fail_not_finite(int64_t row) {
  fail("the logits of row {} hold NaN or Inf", row);
}

}  // namespace

Readback::Readback(cudaStream_t stream)
    : stream_(stream),
      scores_(kScoreRows * sizeof(kernels::RowScore), "scores"),
      flag_(sizeof(int32_t), "a flag") {
  targets_.reserve(kScoreRows);
}

int64_t Readback::memory_bytes() {
  return kScoreRows * static_cast<int64_t>(sizeof(kernels::RowScore)) +
         static_cast<int64_t>(sizeof(int32_t)) + DeviceIntegers::room(kScoreRows);
}

void Readback::read_logits(Matrix logits, std::span<float> out) {
  const auto count = static_cast<size_t>(logits.rows * logits.cols);
  const std::byte* host = read(logits.data, count * dtype_size(logits.type), "reading logits");
  const auto cols = static_cast<size_t>(logits.cols);
  int64_t bad_row = logits.rows;  // the first one
#pragma omp parallel for reduction(min : bad_row) if (logits.rows >= kWorthThreads)
  for (int64_t i = 0; i < logits.rows; ++i) {
    const auto row = static_cast<size_t>(i);
    const std::span<float> values = out.subspan(row * cols, cols);
    copy_to_floats(host + row * cols * dtype_size(logits.type), logits.type, values);
    if (!is_finite(values)) bad_row = std::min(bad_row, i);
  }
  if (bad_row < logits.rows) fail_not_finite(bad_row);
}

void Readback::score(Matrix logits, std::span<const int32_t> targets, std::span<TokenScore> out) {
  for (int64_t first = 0; first < logits.rows; first += kScoreRows) {
    const int64_t rows = std::min(kScoreRows, logits.rows - first);
    const auto at = static_cast<size_t>(first);
    const auto count = static_cast<size_t>(rows);
    const int32_t* wanted = targets_.send(targets.subspan(at, count), stream_);
    check(kernels::score_rows(static_cast<const float*>(logits.data) + first * logits.cols, wanted,
                              rows, logits.cols, scores_.get<kernels::RowScore>(), stream_),
          "scoring");
    const auto* scores = reinterpret_cast<const kernels::RowScore*>(
        read(scores_.get(), count * sizeof(kernels::RowScore), "scoring"));
    for (size_t i = 0; i < count; ++i) {
      if (std::isnan(scores[i].logprob)) fail_not_finite(first + static_cast<int64_t>(i));
      out[at + i] = {scores[i].logprob, scores[i].argmax};
    }
  }
}

bool Readback::all_finite(Matrix x) {
  check(kernels::find_non_finite(x.data, element(x.type), x.rows * x.cols, flag_.get<int32_t>(),
                                 stream_),
        "looking for NaN");
  return *reinterpret_cast<const int32_t*>(read(flag_.get(), sizeof(int32_t), "looking for NaN")) ==
         0;
}

const std::byte* Readback::read(const void* from, size_t bytes, std::string_view doing) {
  if (bytes > buffer_.bytes()) buffer_ = PinnedBuffer(bytes);
  check_work(cudaMemcpyAsync(buffer_.get(), from, bytes, cudaMemcpyDeviceToHost, stream_), doing);
  check_work(cudaStreamSynchronize(stream_), doing);
  return buffer_.get<std::byte>();
}

}  // namespace sagelm::cuda
