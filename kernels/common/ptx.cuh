// The instructions that every kernel shares, sm_80 and later, one thin function each (PTX ISA:
// ldmatrix, mma, cp.async), and where a 16-byte chunk of a tile lies in shared memory.
//
// With lane = 4g + c, a 16 x 8 accumulator d holds d[0], d[1] = row g, columns 2c, 2c + 1 and
// d[2], d[3] = row g + 8, same columns. Every product consumes 32 bytes of a row of A and of a
// column of B a step: 16 halves or 32 bytes, so that the addresses are the same for all types.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace sagelm::kernels::ptx {

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Byte offset of chunk `chunk` of row `row` in a tile of kRowBytes a row. Eight rows that are read
// together at one chunk, as ldmatrix does, then lie in different banks.
template <int kRowBytes>
__host__ __device__ constexpr int chunk_offset(int row, int chunk) {
  static_assert(kRowBytes == 64 || kRowBytes % 128 == 0);
  const int swizzle = kRowBytes == 64 ? (row >> 1) & 3 : row & 7;
  return row * kRowBytes + (chunk ^ swizzle) * 16;
}

// Copies 16 bytes to shared memory; zeros, without reading, where `valid` is false.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kPending of this thread's committed groups are in flight.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 16 bytes of global memory that this multiprocessor does not read again: they do not take the
// place of others in its L1 cache.
__device__ __forceinline__ uint4 load_once(const void* from) {
  uint4 x;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}

// 16 bytes of shared memory.
__device__ __forceinline__ uint4 load_chunk(uint32_t from) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(from)
               : "memory");
  return x;
}
__device__ __forceinline__ void store_chunk(uint32_t to, const uint4& x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}

// Between blocks: adds, behind which all that this thread wrote or has seen written is visible to
// who reads the sum by load_acquired().
__device__ __forceinline__ void add_released(uint32_t* to, uint32_t x) {
  asm volatile("red.add.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}
__device__ __forceinline__ uint32_t load_acquired(const uint32_t* from) {
  uint32_t x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}

// Both at once; returns what was there.
__device__ __forceinline__ uint32_t add_released_acquired(uint32_t* to, uint32_t x) {
  uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(to), "r"(x)
               : "memory");
  return before;
}

// Brings the line that holds the address into L2.
__device__ __forceinline__ void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// Four 8 x 16-byte matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// An 8 x 8 matrix of 16-bit elements, whose row g thread 4g + c has columns 2c and 2c + 1 of, the
// other way round.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// d += a b, 16 x 8 x 16 halves.
template <bool kBf16>
__device__ __forceinline__ void multiply_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
  if constexpr (kBf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// The same with an FP16 accumulator: d[0] row g, d[1] row g + 8, two columns each.
__device__ __forceinline__ void multiply_half(uint32_t (&d)[2], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 "
      "{%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};"
      : "+r"(d[0]), "+r"(d[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d += a b, 16 x 8 x 32 INT8.
__device__ __forceinline__ void multiply_int8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// FP8 needs sm_89; callers refuse older devices, so that the traps below are never reached.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
#define SAGELM_HAS_E4M3 1
#else
#define SAGELM_HAS_E4M3 0
#endif

// d += a b, 16 x 8 x 32 e4m3.
__device__ __forceinline__ void multiply_e4m3(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
#if SAGELM_HAS_E4M3
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  __trap();
#endif
}

// The larger magnitude of each half of two words, with some sign; NaN if either is.
template <bool kBf16>
__device__ __forceinline__ uint32_t larger_magnitudes(uint32_t a, uint32_t b) {
  uint32_t most;
  if constexpr (kBf16) {
    asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  }
  return most;
}

// Two FP16 numbers, of which those of larger magnitude than the other word's get that magnitude.
__device__ __forceinline__ uint32_t limit_magnitudes(uint32_t x, uint32_t largest) {
  uint32_t limited;
  asm("min.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(limited) : "r"(x), "r"(largest & 0x7FFF7FFFu));
  return limited;
}

// 1 / x of a normal number, within two units of the last place.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers as e4m3, `low` in the low byte; beyond +-448 they saturate, NaN stays NaN.
__device__ __forceinline__ uint32_t to_e4m3(float low, float high) {
#if SAGELM_HAS_E4M3
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  __trap();
  return 0;
#endif
}
__device__ __forceinline__ uint32_t to_e4m3(float a, float b, float c, float d) {
  return to_e4m3(a, b) | (to_e4m3(c, d) << 16);
}

// Of a pair of FP16, likewise.
__device__ __forceinline__ uint16_t to_e4m3(uint32_t halves) {
#if SAGELM_HAS_E4M3
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(pair) : "r"(halves));
  return pair;
#else
  __trap();
  return 0;
#endif
}
// Four numbers from pairs of FP16.
__device__ __forceinline__ uint32_t e4m3_from_halves(uint32_t low_pair, uint32_t high_pair) {
  return to_e4m3(low_pair) | (uint32_t{to_e4m3(high_pair)} << 16);
}

// Two e4m3 as FP16, exactly; the low byte becomes the low half.
__device__ __forceinline__ uint32_t halves_from_e4m3(uint32_t low_bytes) {
#if SAGELM_HAS_E4M3
  uint32_t pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<uint16_t>(low_bytes)));
  return pair;
#else
  __trap();
  return 0;
#endif
}

template <bool kBf16>
__device__ __forceinline__ uint32_t to_halves(float low, float high) {
  uint32_t pair;
  if constexpr (kBf16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

__device__ __forceinline__ float2 from_halves(uint32_t pair, bool bf16) {
  if (bf16) return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// threadIdx.x, such that nothing computed from it is kept in registers through the loop over tiles.
__device__ __forceinline__ int thread_not_kept() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// x, of which the compiler knows nothing: it keeps the value in a register.
__device__ __forceinline__ uint32_t opaque(uint32_t x) {
  uint32_t y;
  asm volatile("mov.u32 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// 2^x; denormals are zero.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// NaN if either is.
__device__ __forceinline__ float min_or_nan(float a, float b) {
  float least;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(a), "f"(b));
  return least;
}
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
}

}  // namespace sagelm::kernels::ptx
