// Hopper's asynchronous instructions, one thin function each (PTX ISA 9.0, sections on mbarrier,
// cp.async.bulk and wgmma). Names follow the instructions.
#pragma once

#include <cstdint>

#include "kernels/common/ptx.cuh"

namespace sagelm::kernels::sm90 {

using ptx::smem_address;

// mbarrier

__device__ inline void mbarrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

// Makes initialised barriers visible to the copy engine.
__device__ inline void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void mbarrier_expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ inline void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives once all of this thread's copies so far (ptx::copy_async) are in shared memory.
__device__ inline void arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Whether the phase of this parity is complete; does not wait.
__device__ inline bool mbarrier_test(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.b32 %0, 1, 0, done;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}
// The same; may wait for a while that the hardware chooses.
__device__ inline bool mbarrier_try(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred done;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.b32 %0, 1, 0, done;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}
// Waits without taking issue slots from the other warps of the scheduler.
__device__ inline void mbarrier_wait_idle(uint32_t barrier, uint32_t parity) {
  while (!mbarrier_try(barrier, parity)) __nanosleep(64);
}

// Returns once the phase of that parity has completed.
__device__ inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  while (!mbarrier_try(barrier, parity)) {
  }
}

// Named barriers, 1 to 15: one completes when `threads` threads have waited at it or arrived.
__device__ inline void named_barrier_wait(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Copies bytes (a multiple of 16, both ends 16-byte aligned) and counts them on the barrier.
__device__ inline void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// Four 8 x 8 matrices of halves as accumulators hold them; lane l gives the address of row l % 8 of
// matrix l / 8.
__device__ inline void store_matrices(uint32_t address, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

// Lets asynchronous products and copies of this thread see writes of shared memory that it has seen
// or made.
__device__ inline void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int kRegisters>
__device__ inline void set_more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void set_fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// A position in a ring of stages, with the parity of its next full barrier.
struct RingCursor {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// wgmma

enum class Swizzle : uint32_t { k128B = 1, k64B = 2, k32B = 3 };

// Describes a K-major operand whose rows are as wide as the swizzle, 8-row atoms one after another;
// a base on a 1024-byte boundary, below 256 KiB. The next slice of 32 bytes of the rows is the
// descriptor + 2. Also in two parts, since nothing but the low word depends on the base: a stage's
// is that of the first plus a multiple.
__device__ inline uint32_t wgmma_descriptor_low(uint32_t base) { return (base >> 4) | (1u << 16); }
__device__ inline uint64_t wgmma_descriptor_of(uint32_t low, Swizzle swizzle) {
  const uint32_t atom_bytes = swizzle == Swizzle::k128B  ? 1024
                              : swizzle == Swizzle::k64B ? 512
                                                         : 256;
  const uint32_t high = (atom_bytes >> 4) | (static_cast<uint32_t>(swizzle) << 30);
  return (static_cast<uint64_t>(high) << 32) | low;
}
__device__ inline uint64_t wgmma_descriptor(uint32_t base, Swizzle swizzle) {
  return wgmma_descriptor_of(wgmma_descriptor_low(base), swizzle);
}

// Describes a 16-bit operand B[k x n] as it lies in rows of n: blocks of 64 columns, block_bytes
// apart, each with rows of 128 bytes in 8-row atoms of the 128-byte swizzle one after another (the
// "MN-major" operand, PTX ISA on wgmma's matrix descriptor). 16 rows further is the descriptor +
// 128.
__device__ inline uint64_t wgmma_descriptor_rows(uint32_t base, uint32_t block_bytes) {
  const uint32_t high = (1024u >> 4) | (static_cast<uint32_t>(Swizzle::k128B) << 30);
  return (static_cast<uint64_t>(high) << 32) | ((base >> 4) | ((block_bytes >> 4) << 16));
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending committed groups are in flight.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses of accumulators across the asynchronous products.
template <int kCount>
__device__ inline void pin(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}
template <int kCount>
__device__ inline void pin(uint32_t (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(values[i])::"memory");
}
template <int kCount>
__device__ inline void pin(int32_t (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(values[i])::"memory");
}

// Products of a warp group. kFirst: the accumulator starts from zero, and its old contents are dead
// (reading them here would tie the next product to this one's registers and serialise both).

// The operands %0 .. %31 (.. %63, %95, %127) of an instruction, as its text names them, and their
// registers d[0] .. bound by `constraint`.
#define SAGELM_TEXT_32                       \
  "{%0, %1, %2, %3, %4, %5, %6, %7, "        \
  "%8, %9, %10, %11, %12, %13, %14, %15, "   \
  "%16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define SAGELM_TEXT_64                         \
  SAGELM_TEXT_32                               \
  ", %32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, "   \
  "%48, %49, %50, %51, %52, %53, %54, %55, "   \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define SAGELM_TEXT_96                         \
  SAGELM_TEXT_64                               \
  ", %64, %65, %66, %67, %68, %69, %70, %71, " \
  "%72, %73, %74, %75, %76, %77, %78, %79, "   \
  "%80, %81, %82, %83, %84, %85, %86, %87, "   \
  "%88, %89, %90, %91, %92, %93, %94, %95"
#define SAGELM_TEXT_128                              \
  SAGELM_TEXT_96                                     \
  ", %96, %97, %98, %99, %100, %101, %102, %103, "   \
  "%104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, " \
  "%120, %121, %122, %123, %124, %125, %126, %127"
#define SAGELM_BIND_8(constraint, i)                                                  \
  constraint(d[i]), constraint(d[i + 1]), constraint(d[i + 2]), constraint(d[i + 3]), \
      constraint(d[i + 4]), constraint(d[i + 5]), constraint(d[i + 6]), constraint(d[i + 7])
#define SAGELM_BIND_32(constraint, i)                             \
  SAGELM_BIND_8(constraint, i), SAGELM_BIND_8(constraint, i + 8), \
      SAGELM_BIND_8(constraint, i + 16), SAGELM_BIND_8(constraint, i + 24)
#define SAGELM_BIND_64(constraint) SAGELM_BIND_32(constraint, 0), SAGELM_BIND_32(constraint, 32)
#define SAGELM_BIND_96(constraint) SAGELM_BIND_64(constraint), SAGELM_BIND_32(constraint, 64)
#define SAGELM_BIND_128(constraint) SAGELM_BIND_96(constraint), SAGELM_BIND_32(constraint, 96)

// D[64 x 64] (+)= A[64 x 32] B[64 x 32]^T, INT8, A and B in shared memory.
template <bool kFirst>
__device__ inline void wgmma_s8(int32_t (&d)[32], uint64_t a, uint64_t b) {
  if constexpr (kFirst) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 " SAGELM_TEXT_32
                 "}, %32, %33, 0;"
                 : SAGELM_BIND_32("=r", 0)
                 : "l"(a), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 " SAGELM_TEXT_32
                 "}, %32, %33, 1;"
                 : SAGELM_BIND_32("+r", 0)
                 : "l"(a), "l"(b));
  }
}

// D[64 x 128] (+)= A[64 x 32] B[128 x 32]^T, INT8, A in registers, B in shared memory.
template <bool kFirst>
__device__ inline void wgmma_s8(int32_t (&d)[64], const uint32_t* a, uint64_t b) {
  if constexpr (kFirst) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 " SAGELM_TEXT_64
                 "}, {%64, %65, %66, %67}, %68, 0;"
                 : SAGELM_BIND_64("=r")
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 " SAGELM_TEXT_64
                 "}, {%64, %65, %66, %67}, %68, 1;"
                 : SAGELM_BIND_64("+r")
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}

// D[64 x 136] (+)= A[64 x 32] B[136 x 32]^T, e4m3, A in registers, B in shared memory, from zero
// unless accumulate; sums in halves, two columns to a register, of row g and of row g + 8 in turn.
__device__ inline void wgmma_e4m3(uint32_t (&d)[34], const uint32_t* a, uint64_t b,
                                  bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %39, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n136k32.f16.e4m3.e4m3 " SAGELM_TEXT_32
      ", %32, %33}, {%34, %35, %36, %37}, %38, accumulate, 1, 1;\n}"
      : SAGELM_BIND_32("+r", 0), "+r"(d[32]), "+r"(d[33])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}

// D[64 x 72] (+)= A[64 x 32] B[72 x 32]^T, likewise.
__device__ inline void wgmma_e4m3(uint32_t (&d)[18], const uint32_t* a, uint64_t b,
                                  bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %23, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n72k32.f16.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17}, "
      "{%18, %19, %20, %21}, %22, accumulate, 1, 1;\n}"
      : SAGELM_BIND_8("+r", 0), SAGELM_BIND_8("+r", 8), "+r"(d[16]), "+r"(d[17])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}

// The type of FP16 or BF16 operands, as it stands in an instruction's name.
template <bool kBf16>
struct HalfType {
  static constexpr char kName[] = ".f16";
};
template <>
struct HalfType<true> {
  static constexpr char kName[] = ".bf16";
};

// D[64 x 128] (+)= A[64 x 16] B[128 x 16]^T, FP16 or BF16, A and B in shared memory.
template <bool kBf16, bool kFirst>
__device__ inline void wgmma_half(float (&d)[64], uint64_t a, uint64_t b) {
  if constexpr (kFirst) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32%66%66 " SAGELM_TEXT_64
                 "}, %64, %65, 0, 1, 1, 0, 0;"
                 : SAGELM_BIND_64("=f")
                 : "l"(a), "l"(b), "C"(HalfType<kBf16>::kName));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32%66%66 " SAGELM_TEXT_64
                 "}, %64, %65, 1, 1, 1, 0, 0;"
                 : SAGELM_BIND_64("+f")
                 : "l"(a), "l"(b), "C"(HalfType<kBf16>::kName));
  }
}

// The same, A in registers.
template <bool kBf16, bool kFirst>
__device__ inline void wgmma_half(float (&d)[64], const uint32_t* a, uint64_t b) {
  if constexpr (kFirst) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32%69%69 " SAGELM_TEXT_64
                 "}, {%64, %65, %66, %67}, %68, 0, 1, 1, 0;"
                 : SAGELM_BIND_64("=f")
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "C"(HalfType<kBf16>::kName));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32%69%69 " SAGELM_TEXT_64
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
                 : SAGELM_BIND_64("+f")
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "C"(HalfType<kBf16>::kName));
  }
}

// D[64 x 256] (+)= A[64 x 16] B[256 x 16]^T, A and B in shared memory; from zero unless accumulate.
template <bool kBf16>
__device__ inline void wgmma_half(float (&d)[128], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32%131%131 " SAGELM_TEXT_128
      "}, %128, %129, accumulate, 1, 1, 0, 0;\n}"
      : SAGELM_BIND_128("+f")
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "C"(HalfType<kBf16>::kName));
}

// D[64 x 192] (+)= A[64 x 16] B[192 x 16]^T, likewise.
template <bool kBf16>
__device__ inline void wgmma_half(float (&d)[96], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %98, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n192k16.f32%99%99 " SAGELM_TEXT_96
      "}, %96, %97, accumulate, 1, 1, 0, 0;\n}"
      : SAGELM_BIND_96("+f")
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "C"(HalfType<kBf16>::kName));
}

// D[64 x 128] (+)= A[64 x 16] B[16 x 128], FP16 or BF16, A in registers, B in shared memory with
// the rows of wgmma_descriptor_rows; from zero unless accumulate.
template <bool kBf16>
__device__ inline void wgmma_half_rows(float (&d)[64], const uint32_t* a, uint64_t b,
                                       bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32%70%70 " SAGELM_TEXT_64
      "}, {%64, %65, %66, %67}, %68, accumulate, 1, 1, 1;\n}"
      : SAGELM_BIND_64("+f")
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),
        "C"(HalfType<kBf16>::kName));
}

// D[64 x 64] (+)= A[64 x 16] B[16 x 64], likewise.
template <bool kBf16>
__device__ inline void wgmma_half_rows(float (&d)[32], const uint32_t* a, uint64_t b,
                                       bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32%38%38 " SAGELM_TEXT_32
      "}, {%32, %33, %34, %35}, %36, accumulate, 1, 1, 1;\n}"
      : SAGELM_BIND_32("+f", 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),
        "C"(HalfType<kBf16>::kName));
}

#undef SAGELM_TEXT_32
#undef SAGELM_TEXT_64
#undef SAGELM_TEXT_96
#undef SAGELM_TEXT_128
#undef SAGELM_BIND_8
#undef SAGELM_BIND_32
#undef SAGELM_BIND_64
#undef SAGELM_BIND_96
#undef SAGELM_BIND_128

}  // namespace sagelm::kernels::sm90
