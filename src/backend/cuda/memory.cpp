#include "backend/cuda/memory.h"

#include <algorithm>
#include <bit>

#include "backend/cuda/check.h"

namespace sagelm::cuda {

Stream make_stream() {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
  return Stream(stream);
}

Event make_event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "creating an event");
  return Event(event);
}

Event make_timing_event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreate(&event), "creating an event");
  return Event(event);
}

float milliseconds(cudaEvent_t from, cudaEvent_t to) {
  float elapsed = 0;
  check(cudaEventSynchronize(to), "waiting for a measurement");
  check(cudaEventElapsedTime(&elapsed, from, to), "measuring a kernel");
  return elapsed;
}

DeviceBuffer::DeviceBuffer(size_t bytes, std::string_view what) {
  if (bytes == 0) return;
  *this = if_room(bytes);
  if (bytes_ != 0) return;
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "asking for the free memory");
  constexpr double kGib = 1 << 30;
  fail(
      "the GPU has no memory for {}: {:.2f} GiB are needed, {:.2f} of {:.1f} GiB are free; use a "
      "smaller --ctx",
      what, static_cast<double>(bytes) / kGib, static_cast<double>(free) / kGib,
      static_cast<double>(total) / kGib);
}

DeviceBuffer DeviceBuffer::if_room(size_t bytes) {
  DeviceBuffer buffer;
  void* memory = nullptr;
  const cudaError_t status = cudaMalloc(&memory, bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // it is handled: later launches shall not report it
    return buffer;
  }
  check(status, "allocating memory");
  buffer.memory_ = Owner<void*, cudaFree>(memory);
  buffer.bytes_ = bytes;
  return buffer;
}

PinnedBuffer::PinnedBuffer(size_t bytes) : bytes_(bytes) {
  void* memory = nullptr;
  check(cudaMallocHost(&memory, bytes), "allocating pinned host memory");
  memory_ = Owner<void*, cudaFreeHost>(memory);
}

std::span<int32_t> DeviceIntegers::prepare(size_t count) {
  if (sent_.get() == nullptr) sent_ = make_event();
  check(cudaEventSynchronize(sent_.get()), "waiting for a copy to the GPU");
  const size_t bytes = count * sizeof(int32_t);
  if (bytes > host_.bytes()) {
    // Work that still reads the old device memory has to end before it is given back: cudaFree
    // waits for it.
    const size_t room = std::bit_ceil(std::max<size_t>(bytes, 4096));
    device_ = {};
    device_ = DeviceBuffer(room, "a step's positions");
    host_ = PinnedBuffer(room);
  }
  count_ = count;
  return {host_.get<int32_t>(), count};
}

const int32_t* DeviceIntegers::send(cudaStream_t stream) {
  check(cudaMemcpyAsync(device_.get(), host_.get(), count_ * sizeof(int32_t),
                        cudaMemcpyHostToDevice, stream),
        "copying a step's positions");
  check(cudaEventRecord(sent_.get(), stream), "copying a step's positions");
  return device_.get<int32_t>();
}

const int32_t* DeviceIntegers::send(std::span<const int32_t> values, cudaStream_t stream) {
  const std::span<int32_t> host = prepare(values.size());
  std::copy(values.begin(), values.end(), host.begin());
  return send(stream);
}

}  // namespace sagelm::cuda
