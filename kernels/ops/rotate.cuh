// The rotation of rotary position embedding, rounded alike in every kernel that rotates keys, so
// that a cache holds the same bits whichever kernel appended a token.
#pragma once

namespace sagelm::kernels {

// Element i of a head from itself, its partner, which is half a head away, and their angle.
__device__ inline float rotate_first(float x, float partner, float cosine, float sine) {
  return __fmaf_rn(x, cosine, -__fmul_rn(partner, sine));
}
__device__ inline float rotate_second(float x, float partner, float cosine, float sine) {
  return __fmaf_rn(x, cosine, __fmul_rn(partner, sine));
}

// N elements of the first half of a head and their partners.
template <int N>
__device__ inline void rotate_pairs(float (&a)[N], float (&b)[N], const float (&cosine)[N],
                                    const float (&sine)[N]) {
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const float x = a[e];
    a[e] = rotate_first(x, b[e], cosine[e], sine[e]);
    b[e] = rotate_second(b[e], x, cosine[e], sine[e]);
  }
}

}  // namespace sagelm::kernels
