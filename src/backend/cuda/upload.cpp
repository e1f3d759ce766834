#include "backend/cuda/upload.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "backend/cuda/check.h"
#include "base/error.h"
#include "base/finite.h"

namespace sagelm::cuda {
namespace {

constexpr size_t kBufferBytes = size_t{64} << 20;
// Elements that a thread copies at a time.
constexpr int64_t kPart = int64_t{1} << 17;

float read_element(const std::byte* from, DType type) {
  if (type == DType::kF32) {
    float value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  uint16_t raw;
  std::memcpy(&raw, from, sizeof raw);
  return type == DType::kF16 ? half_to_float(raw) : bfloat16_to_float(raw);
}

void write_element(float value, std::byte* to, DType type) {
  if (type == DType::kF32) {
    std::memcpy(to, &value, sizeof value);
    return;
  }
  const uint16_t raw = type == DType::kF16 ? float_to_half(value) : float_to_bfloat16(value);
  std::memcpy(to, &raw, sizeof raw);
}

void convert(const std::byte* from, DType type, int64_t count, std::byte* to, DType into) {
  const size_t from_size = dtype_size(type), to_size = dtype_size(into);
  for (int64_t i = 0; i < count; ++i) {
    const auto at = static_cast<size_t>(i);
    write_element(read_element(from + at * from_size, type), to + at * to_size, into);
  }
}

// The kernel maps pages of a file that is in its cache one fault at a time otherwise.
void map_pages(const std::byte* from, size_t bytes) {
  static const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const auto start = reinterpret_cast<uintptr_t>(from) / page * page;
  madvise(reinterpret_cast<void*>(start), reinterpret_cast<uintptr_t>(from) + bytes - start,
          MADV_POPULATE_READ);  // advice: older kernels do not know it
}

// Fills `to` with `count` elements of the tensor from element `first` on.
void fill(const TensorView& tensor, int64_t first, int64_t count, DType type, std::byte* to) {
  const size_t from_size = dtype_size(tensor.dtype), to_size = dtype_size(type);
  const int64_t end = first + count;
  int64_t bad = end;
#pragma omp parallel for schedule(dynamic) reduction(min : bad)
  for (int64_t begin = first; begin < end; begin += kPart) {
    const int64_t size = std::min(kPart, end - begin);
    const std::byte* source = tensor.data + static_cast<size_t>(begin) * from_size;
    std::byte* target = to + static_cast<size_t>(begin - first) * to_size;
    map_pages(source, static_cast<size_t>(size) * from_size);
    if (tensor.dtype == type) {
      std::memcpy(target, source, static_cast<size_t>(size) * to_size);
    } else {
      convert(source, tensor.dtype, size, target, type);
    }
    // What became of NaN, infinity and numbers that are too large.
    const int64_t found = first_non_finite(target, type, size);
    if (found >= 0) bad = std::min(bad, begin + found);
  }
  if (bad == end) return;
  const double value =
      read_element(tensor.data + static_cast<size_t>(bad) * from_size, tensor.dtype);
  if (!std::isfinite(value)) fail("tensor {} holds NaN or Inf at element {}", tensor.name, bad);
  fail(
      "tensor {} holds {} at element {}, which {} cannot hold: the GPU computes with 16-bit "
      "weights; use --device cpu",
      tensor.name, value, bad, dtype_name(type));
}

}  // namespace

WeightUploader::WeightUploader(cudaStream_t stream)
    : stream_(stream),
      buffers_{PinnedBuffer(kBufferBytes), PinnedBuffer(kBufferBytes)},
      sent_{make_event(), make_event()} {}

WeightUploader::~WeightUploader() {
  // The GPU may still be reading the buffers.
  for (const Event& event : sent_) cudaEventSynchronize(event.get());
}

void WeightUploader::upload(const TensorView& tensor, DType type, void* to) {
  const int64_t elements = tensor.num_elements();
  const size_t size = dtype_size(type);
  const auto chunk = static_cast<int64_t>(kBufferBytes / size);
  for (int64_t first = 0; first < elements; first += chunk) {
    const int64_t count = std::min(chunk, elements - first);
    const PinnedBuffer& buffer = buffers_[next_];
    const Event& sent = sent_[next_];
    next_ = 1 - next_;
    check(cudaEventSynchronize(sent.get()), "copying weights");
    fill(tensor, first, count, type, buffer.get<std::byte>());
    check(cudaMemcpyAsync(static_cast<std::byte*>(to) + static_cast<size_t>(first) * size,
                          buffer.get(), static_cast<size_t>(count) * size, cudaMemcpyHostToDevice,
                          stream_),
          "copying weights");
    check(cudaEventRecord(sent.get(), stream_), "copying weights");
  }
}

}  // namespace sagelm::cuda
