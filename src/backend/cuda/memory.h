// Owners of device memory, pinned host memory and events, and the copies of small arrays between
// the two.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <utility>

namespace sagelm::cuda {

// Frees what it holds when destroyed; not copyable.
template <typename T, auto kFree>
class Owner {
 public:
  Owner() = default;
  explicit Owner(T value) : value_(value) {}
  ~Owner() { reset(); }
  Owner(Owner&& other) noexcept : value_(std::exchange(other.value_, T{})) {}
  Owner& operator=(Owner&& other) noexcept {
    if (this != &other) {
      reset();
      value_ = std::exchange(other.value_, T{});
    }
    return *this;
  }
  Owner(const Owner&) = delete;
  Owner& operator=(const Owner&) = delete;

  T get() const { return value_; }
  void reset() {
    if (value_ != T{}) kFree(value_);
    value_ = T{};
  }

 private:
  T value_{};
};

using Stream = Owner<cudaStream_t, cudaStreamDestroy>;
using Event = Owner<cudaEvent_t, cudaEventDestroy>;

Stream make_stream();
Event make_event();                                    // for ordering alone
float milliseconds(cudaEvent_t from, cudaEvent_t to);  // waits for `to`
Event make_timing_event();

// Bytes of all DeviceBuffers of this process.
struct HeldMemory {
  int64_t now = 0;
  int64_t most = 0;  // at once, since the last restart_most
};
HeldMemory held_memory();
void restart_most();

// Device memory, 256-byte aligned.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  ~DeviceBuffer() { reset(); }
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  // Throws Error saying what needed how much, and how much is free.
  DeviceBuffer(size_t bytes, std::string_view what);
  template <typename T = void>
  T* get() const {
    return static_cast<T*>(memory_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void reset() noexcept;

  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

// Host memory that the GPU copies from and to directly.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  explicit PinnedBuffer(size_t bytes);

  template <typename T = void>
  T* get() const {
    return static_cast<T*>(memory_.get());
  }
  size_t bytes() const { return bytes_; }

 private:
  Owner<void*, cudaFreeHost> memory_;
  size_t bytes_ = 0;
};

// An array of integers written on the host and read on the device. Its device address only changes
// when it grows.
class DeviceIntegers {
 public:
  // Makes room for at least so many; the bytes that this takes.
  void reserve(size_t count);
  static int64_t room(size_t count);
  // Room for count integers on the host; waits until the last send has been read.
  std::span<int32_t> prepare(size_t count);
  // Enqueues the copy of what prepare returned; the device's copy.
  const int32_t* send(cudaStream_t stream);
  // Both in one.
  const int32_t* send(std::span<const int32_t> values, cudaStream_t stream);
  size_t bytes() const { return device_.bytes(); }

 private:
  PinnedBuffer host_;
  DeviceBuffer device_;
  Event sent_;
  size_t count_ = 0;
};

}  // namespace sagelm::cuda
