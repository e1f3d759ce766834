#include "backend/cuda/upload.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "backend/cuda/check.h"
#include "base/error.h"

namespace sagelm::cuda {
namespace {

constexpr size_t kBufferBytes = size_t{64} << 20;
// Elements that a thread copies at a time.
constexpr int64_t kPart = int64_t{1} << 18;

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

// The first of count elements that is finite and has no finite value of type `into`; -1 if none.
int64_t convert(const std::byte* from, DType type, int64_t count, std::byte* to, DType into) {
  const size_t from_size = dtype_size(type), to_size = dtype_size(into);
  int64_t bad = -1;
  for (int64_t i = 0; i < count; ++i) {
    const auto at = static_cast<size_t>(i);
    const float value = read_element(from + at * from_size, type);
    std::byte* place = to + at * to_size;
    write_element(value, place, into);
    if (bad < 0 && std::isfinite(value) && !std::isfinite(read_element(place, into))) bad = i;
  }
  return bad;
}

// Fills `to` with `count` elements of the tensor from element `first` on.
void fill(const TensorView& tensor, int64_t first, int64_t count, DType type, std::byte* to) {
  const size_t from_size = dtype_size(tensor.dtype), to_size = dtype_size(type);
  int64_t worst = -1;
#pragma omp parallel for schedule(static) reduction(max : worst)
  for (int64_t part = 0; part < (count + kPart - 1) / kPart; ++part) {
    const int64_t begin = part * kPart;
    const int64_t size = std::min(kPart, count - begin);
    const std::byte* source = tensor.data + static_cast<size_t>(first + begin) * from_size;
    std::byte* target = to + static_cast<size_t>(begin) * to_size;
    if (tensor.dtype == type) {
      std::memcpy(target, source, static_cast<size_t>(size) * to_size);
    } else {
      const int64_t bad = convert(source, tensor.dtype, size, target, type);
      if (bad >= 0) worst = std::max(worst, first + begin + bad);
    }
  }
  if (worst >= 0) {
    const double value =
        read_element(tensor.data + static_cast<size_t>(worst) * from_size, tensor.dtype);
    fail(
        "tensor {} holds {} at element {}, which {} cannot hold: the GPU computes with 16-bit "
        "weights; use --device cpu",
        tensor.name, value, worst, dtype_name(type));
  }
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
