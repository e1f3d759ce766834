#include "kernels/ops/elements.cuh"
#include "kernels/ops/launch.cuh"
#include "kernels/ops/rope_append.h"
#include "kernels/ops/rotate.cuh"

namespace sagelm::kernels {
namespace {

constexpr int kThreads = 256;

// A thread handles N elements of the first half of a head and their partners in the second.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) rope_append_kernel(RopeAppend args) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int half = args.head_dim / 2;
  const int packs = half / N;  // per head
  const int heads = args.num_heads + 2 * args.num_kv_heads;
  const int task = static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x);
  if (task >= heads * packs) return;
  const int head = task / packs;
  const int i = (task - head * packs) * N;
  const int64_t row = blockIdx.x;
  T* at = static_cast<T*>(args.qkv) + row * args.row_stride +
          static_cast<int64_t>(head) * args.head_dim + i;
  float a[N], b[N];
  load(at, a);
  load(at + half, b);
  if (head < args.num_heads + args.num_kv_heads) {
    const float* angle = args.rotations + static_cast<int64_t>(args.positions[row]) * args.head_dim;
    float cosine[N], sine[N];
    load(angle + i, cosine);
    load(angle + half + i, sine);
    rotate_pairs(a, b, cosine, sine);
    if (head < args.num_heads || args.rotate_keys) {
      store(at, a);
      store(at + half, b);
    }
  }
  if (head < args.num_heads) return;
  const bool is_key = head < args.num_heads + args.num_kv_heads;
  const int kv_head = head - args.num_heads - (is_key ? 0 : args.num_kv_heads);
  T* to = static_cast<T*>(is_key ? args.keys : args.values) +
          (static_cast<int64_t>(args.slots[row]) * args.num_kv_heads + kv_head) * args.head_dim + i;
  store(to, a);
  store(to + half, b);
}

__global__ void fill_rotations_kernel(const float* inverse_frequencies, int half, int64_t count,
                                      float* rotations) {
  wait_for_previous_kernel();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count * half) return;
  const int64_t position = index / half;
  const auto i = static_cast<int>(index - position * half);
  const float angle = static_cast<float>(position) * inverse_frequencies[i];
  double sine, cosine;
  sincos(static_cast<double>(angle), &sine, &cosine);
  rotations[position * 2 * half + i] = static_cast<float>(cosine);
  rotations[position * 2 * half + half + i] = static_cast<float>(sine);
}

}  // namespace

cudaError_t rope_append(const RopeAppend& call, cudaStream_t stream) {
  if (call.rows == 0) return cudaSuccess;
  RopeAppend args = call;
  if (args.row_stride == 0) {
    args.row_stride = int64_t{args.num_heads + 2 * args.num_kv_heads} * args.head_dim;
  }
  return with_half_type(args.type, [&](auto element) {
    using T = decltype(element);
    const int half = args.head_dim / 2;
    // Rows and heads start where head_dim elements do; their halves must be aligned too.
    const int wide = half % 8 == 0 ? 8 : half % 4 == 0 ? 4 : 1;
    const auto kernel = wide == 8   ? rope_append_kernel<T, 8>
                        : wide == 4 ? rope_append_kernel<T, 4>
                                    : rope_append_kernel<T, 1>;
    const int64_t tasks = int64_t{args.num_heads + 2 * args.num_kv_heads} * (half / wide);
    const dim3 grid(static_cast<unsigned>(args.rows),
                    static_cast<unsigned>((tasks + kThreads - 1) / kThreads));
    return launch(kernel, grid, kThreads, stream, args);
  });
}

cudaError_t fill_rotations(const float* inverse_frequencies, int32_t half, int64_t count,
                           float* rotations, cudaStream_t stream) {
  const int64_t blocks = (count * half + kThreads - 1) / kThreads;
  if (blocks == 0) return cudaSuccess;
  return launch(fill_rotations_kernel, dim3(static_cast<unsigned>(blocks)), kThreads, stream,
                inverse_frequencies, half, count, rotations);
}

}  // namespace sagelm::kernels
