#include "backend/cuda/memory.h"

#include <algorithm>
#include <atomic>
#include <bit>

#include "backend/cuda/check.h"

namespace sagelm::cuda {
namespace {

std::atomic<int64_t> held_now = 0, held_most = 0;

}  // namespace

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

HeldMemory held_memory() { return {held_now, held_most}; }

void restart_most() { held_most = held_now.load(); }

DeviceBuffer::DeviceBuffer(size_t bytes, std::string_view what) {
  if (bytes == 0) return;
  const cudaError_t status = cudaMalloc(&memory_, bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // it is handled: later launches shall not report it
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "asking for the free memory");
    constexpr double kGib = 1 << 30;
    fail("the GPU has no memory for {}: {:.2f} GiB are needed, {:.2f} of {:.1f} GiB are free", what,
         static_cast<double>(bytes) / kGib, static_cast<double>(free) / kGib,
         static_cast<double>(total) / kGib);
  }
  check(status, "allocating memory");
  bytes_ = bytes;
  const int64_t now = held_now += static_cast<int64_t>(bytes);
  held_most = std::max(held_most.load(), now);
}

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  if (this != &other) {
    reset();
    memory_ = std::exchange(other.memory_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
  }
  return *this;
}

void DeviceBuffer::reset() noexcept {
  if (memory_ != nullptr) cudaFree(memory_);
  memory_ = nullptr;
  held_now -= static_cast<int64_t>(std::exchange(bytes_, 0));
}

PinnedBuffer::PinnedBuffer(size_t bytes) : bytes_(bytes) {
  void* memory = nullptr;
  check(cudaMallocHost(&memory, bytes), "allocating pinned host memory");
  memory_ = Owner<void*, cudaFreeHost>(memory);
}

void DeviceIntegers::reserve(size_t count) {
  if (count * sizeof(int32_t) <= host_.bytes()) return;
  // Work that still reads the old device memory has to end before it is given back: cudaFree
  // waits for it.
  const auto bytes = static_cast<size_t>(room(count));
  device_ = {};
  device_ = DeviceBuffer(bytes, "a step's positions");
  host_ = PinnedBuffer(bytes);
}

int64_t DeviceIntegers::room(size_t count) {
  return static_cast<int64_t>(std::bit_ceil(std::max<size_t>(count * sizeof(int32_t), 4096)));
}

std::span<int32_t> DeviceIntegers::prepare(size_t count) {
  if (sent_.get() == nullptr) sent_ = make_event();
  check(cudaEventSynchronize(sent_.get()), "waiting for a copy to the GPU");
  reserve(count);
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
