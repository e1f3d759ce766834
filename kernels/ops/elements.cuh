// Loads, stores and sums that every operation needs: several elements at a time, in float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "kernels/ops/element.h"

namespace sagelm::kernels {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// N neighbours, read and written with accesses of up to 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T values[N];
};

// from lies on a multiple of the pack's alignment.
template <typename T, int N>
__device__ inline void load(const T* from, float (&x)[N]) {
  const auto pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = to_float(pack.values[i]);
}

// Rounds to nearest even; what FP16 cannot hold becomes infinite.
template <typename T, int N>
__device__ inline void store(T* to, const float (&x)[N]) {
  Pack<T, N> pack;
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < N; ++i) pack.values[i] = x[i];
  } else if constexpr (std::is_same_v<T, __half>) {
    if constexpr (N % 2 == 0) {
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        const __half2 pair = __floats2half2_rn(x[i], x[i + 1]);
        pack.values[i] = pair.x;
        pack.values[i + 1] = pair.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) pack.values[i] = __float2half_rn(x[i]);
    }
  } else {
    if constexpr (N % 2 == 0) {
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(x[i], x[i + 1]);
        pack.values[i] = pair.x;
        pack.values[i + 1] = pair.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) pack.values[i] = __float2bfloat16_rn(x[i]);
    }
  }
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// silu(gate) * up, alike in the kernels that compute it for many rows.
__device__ inline float gated(float gate, float up) {
  return up * __fdividef(gate, 1.0f + __expf(-gate));
}

// Combines a value of every thread of the block, in an order that depends on the block's size only;
// every thread gets the result. shared: 32 values, not read or written by others around the call.
template <typename T, typename Combine>
__device__ inline T block_reduce(T value, T* shared, const Combine& combine) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    T other;
    if constexpr (std::is_arithmetic_v<T>) {
      other = __shfl_xor_sync(0xFFFFFFFFu, value, step);
    } else {
      other = value.shuffled(step);
    }
    value = combine(value, other);
  }
  const int warps = static_cast<int>(blockDim.x / 32);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared[0];
  for (int i = 1; i < warps; ++i) value = combine(value, shared[i]);
  __syncthreads();
  return value;
}

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

// Calls function with a value of the C++ type behind a 16-bit element type.
template <typename Function>
cudaError_t with_half_type(Element type, const Function& function) {
  switch (type) {
    case Element::kF16:
      return function(__half{});
    case Element::kBF16:
      return function(__nv_bfloat16{});
    case Element::kF32:
      break;
  }
  return cudaErrorInvalidValue;
}

// Likewise for all element types.
template <typename Function>
cudaError_t with_type(Element type, const Function& function) {
  if (type == Element::kF32) return function(float{});
  return with_half_type(type, function);
}

}  // namespace sagelm::kernels
