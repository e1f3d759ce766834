// Arrays of the operations' element types for tests: made on the host, read back as doubles.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "base/dtype.h"
#include "gpu/gpu_attention.h"
#include "kernels/ops/element.h"

namespace sagelm::testing {

inline size_t element_bytes(kernels::Element type) {
  return type == kernels::Element::kF32 ? sizeof(float) : sizeof(uint16_t);
}

// Relative error of rounding to the type once.
inline double rounding(kernels::Element type) {
  return type == kernels::Element::kF32   ? 0x1p-24
         : type == kernels::Element::kF16 ? 0x1p-11
                                          : 0x1p-8;
}

// Values rounded to a type, on the host and on the device. Inputs end with their memory, so that
// compute-sanitizer sees what is read beyond; behind outputs lie bytes that nothing may touch.
class GpuArray {
 public:
  GpuArray(kernels::Element type, std::vector<float> values)
      : type_(type), values_(std::move(values)), bytes_(values_.size() * element_bytes(type)) {
    std::vector<std::byte> raw(bytes_);
    for (size_t i = 0; i < values_.size(); ++i) {
      if (type == kernels::Element::kF32) {
        std::memcpy(raw.data() + 4 * i, &values_[i], 4);
        continue;
      }
      const bool half = type == kernels::Element::kF16;
      const uint16_t bits = half ? float_to_half(values_[i]) : float_to_bfloat16(values_[i]);
      values_[i] = half ? half_to_float(bits) : bfloat16_to_float(bits);
      std::memcpy(raw.data() + 2 * i, &bits, 2);
    }
    device_ = DeviceBuffer(raw.size());
    device_.upload(raw.data(), raw.size());
  }
  // Poisoned: what is read of it and was not written stands out.
  GpuArray(kernels::Element type, size_t count)
      : type_(type), values_(count), bytes_(count * element_bytes(type)), guard_(kGuard) {
    const std::vector<std::byte> raw(bytes_ + guard_, kPoison);
    device_ = DeviceBuffer(raw.size());
    device_.upload(raw.data(), raw.size());
  }

  void* data() const { return device_.data(); }
  double operator[](size_t i) const { return values_[i]; }  // as uploaded
  size_t size() const { return values_.size(); }

  // The device's bytes now. Throws if what lies behind them was written to.
  std::vector<std::byte> raw() const {
    std::vector<std::byte> raw(bytes_ + guard_);
    device_.download(raw.data(), raw.size());
    for (size_t i = bytes_; i < raw.size(); ++i) {
      if (raw[i] != kPoison) throw std::runtime_error("a kernel wrote past the end of its output");
    }
    raw.resize(bytes_);
    return raw;
  }
  std::vector<double> download() const {
    const std::vector<std::byte> bytes = raw();
    std::vector<double> result(values_.size());
    for (size_t i = 0; i < result.size(); ++i) {
      if (type_ == kernels::Element::kF32) {
        float value;
        std::memcpy(&value, bytes.data() + 4 * i, 4);
        result[i] = value;
      } else {
        uint16_t bits;
        std::memcpy(&bits, bytes.data() + 2 * i, 2);
        result[i] = type_ == kernels::Element::kF16 ? half_to_float(bits) : bfloat16_to_float(bits);
      }
    }
    return result;
  }

  static constexpr std::byte kPoison{0x5A};

 private:
  static constexpr size_t kGuard = 512;

  kernels::Element type_;
  std::vector<float> values_;
  size_t bytes_;
  size_t guard_ = 0;
  DeviceBuffer device_;
};

inline std::vector<float> normal_values(size_t count, float deviation, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

inline DeviceBuffer upload_integers(const std::vector<int32_t>& values) {
  DeviceBuffer buffer(values.size() * sizeof(int32_t));
  buffer.upload(values.data(), values.size() * sizeof(int32_t));
  return buffer;
}

// The result of a launch and of what it ran.
inline void expect_done(cudaError_t launched, const char* what) {
  check_cuda(launched, what);
  check_cuda(cudaDeviceSynchronize(), what);
}

}  // namespace sagelm::testing
