// Vectors of the widest kind that this translation unit's target flags allow, as compiler vector
// extensions; intrinsics only where those have no word. Everything is in the includer's anonymous
// namespace so that nothing compiled for one instruction set is linked into another.

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kMaxVecs = 4;  // column vectors of a register block: 6 x 4 of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kMaxVecs = 2;  // 6 x 2 of 16 registers
#else
constexpr int kLanes = 4;
constexpr int kMaxVecs = 2;
#endif

using VecF [[gnu::vector_size(4 * kLanes)]] = float;
using VecI [[gnu::vector_size(4 * kLanes)]] = int32_t;
using VecU [[gnu::vector_size(4 * kLanes)]] = uint32_t;
using Quad [[gnu::vector_size(16)]] = int32_t;

inline VecF as_float(VecI v) { return reinterpret_cast<VecF>(v); }
// For exponent arithmetic, which wraps around for NaN.
inline VecF as_float(VecU v) { return reinterpret_cast<VecF>(v); }
inline VecU as_unsigned(VecF v) { return reinterpret_cast<VecU>(v); }
inline VecI as_int(VecF v) { return reinterpret_cast<VecI>(v); }

template <typename T>
inline T load(const void* p) {
  T v;
  __builtin_memcpy(&v, p, sizeof(T));
  return v;
}

template <typename T>
inline void store(void* p, T v) {
  __builtin_memcpy(p, &v, sizeof(T));
}

inline VecI lane_ids() {
#if defined(__AVX512F__)
  return VecI{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
  return VecI{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return VecI{0, 1, 2, 3};
#endif
}

// a * b, rounded: compilers may not fuse the product with an addition.
inline VecF rounded_product(VecF a, VecF b) {
#if defined(__clang__)  // fuses within one expression only
  return a * b;
#else
  return __builtin_assoc_barrier(a * b);
#endif
}

// b where a is NaN.
inline VecF max(VecF a, VecF b) { return a > b ? a : b; }
inline VecI max(VecI a, VecI b) { return a > b ? a : b; }

// Lane i is lane mask[i] of a and b side by side.
template <typename V, typename M>
[[gnu::always_inline]] inline V shuffle(V a, V b, M mask) {
#if defined(__clang__)  // has no shuffle by a vector
  constexpr int kCount = sizeof(M) / sizeof(mask[0]);
  V result;
  for (int i = 0; i < kCount; ++i) {
    result[i] = mask[i] < kCount ? a[mask[i]] : b[mask[i] - kCount];
  }
  return result;
#else
  return __builtin_shuffle(a, b, mask);
#endif
}

template <typename V>
inline V swap_halves(V v, int distance) {
  return shuffle(v, v, lane_ids() ^ distance);
}

template <typename V>
inline auto reduce_sum(V v) {
#pragma GCC unroll 4
  for (int distance = kLanes / 2; distance > 0; distance /= 2) v += swap_halves(v, distance);
  return v[0];
}

template <typename V>
inline auto reduce_max(V v) {
#pragma GCC unroll 4
  for (int distance = kLanes / 2; distance > 0; distance /= 2) v = max(v, swap_halves(v, distance));
  return v[0];
}

// FP16 to float, exact.
inline VecF load_half(const uint16_t* p) {
#if defined(__AVX512F__)
  // The zero-masking forms: GCC 12 warns about the plain ones' undefined source operand.
  return _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__) && defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  using VecH [[gnu::vector_size(2 * kLanes)]] = uint16_t;
  const VecI h = __builtin_convertvector(load<VecH>(p), VecI);
  const VecI magnitude = (h & 0x7FFF) << 13;
  // The exponent moves from bias 15 to 127 by a multiplication, which also handles subnormals.
  const VecI value = as_int(as_float(magnitude) * 0x1p112f);
  const VecI special = magnitude | 0x7F800000;
  return as_float((magnitude >= 0x0F800000 ? special : value) | ((h & 0x8000) << 16));
#endif
}

// Rounds to a format with `mantissa` explicit bits and smallest normal 2^min_exponent, to nearest
// even, subnormals included; no overflow handling, NaN stays NaN. Adding 1.5 * 2^(e + 23 -
// mantissa) makes the FPU round at the wanted bit.
template <int kMantissa, int kMinExponent>
inline VecF round_to(VecF x) {
  constexpr int32_t kSmallest = (127 + kMinExponent) << 23;
  const VecI exponent = as_int(x) & 0x7F800000;
  const VecI clamped = exponent > kSmallest ? exponent : VecI{} + kSmallest;
  const VecU bits = reinterpret_cast<VecU>(clamped);
  const VecF magic = as_float(bits + (((23 - kMantissa) << 23) | 0x400000u));
  return (x + magic) - magic;
}

inline VecF round_to_half(VecF x) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_maskz_cvtps_ph(0xFFFF, x, _MM_FROUND_TO_NEAREST_INT);
  return _mm512_maskz_cvtph_ps(0xFFFF, half);
#elif defined(__AVX2__) && defined(__F16C__)
  return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const VecI sign = as_int(x) & INT32_MIN;
  const VecF magnitude = as_float(as_int(x) & INT32_MAX);
  const VecF rounded = round_to<10, -14>(magnitude);
  const VecF infinity = VecF{} + __builtin_inff();
  const VecF limited = magnitude >= 65520.0f ? infinity : rounded;
  return as_float(as_int(limited) | sign);
#endif
}

// P is in [0, 448], so saturation has nothing to do there; V is scaled to the same range.
inline VecF round_to_e4m3(VecF x) { return round_to<3, -6>(x); }

// To integers, half to even; |x| < 2^22.
inline VecF round_to_integer(VecF x) {
  constexpr float kMagic = 0x1.8p23f;
  return (x + kMagic) - kMagic;
}

// The low byte of every lane.
inline void store_low_bytes(void* p, VecI x) {
#if defined(__AVX512F__)
  store(p, _mm512_maskz_cvtepi32_epi8(0xFFFF, reinterpret_cast<__m512i>(x)));
#else
  using VecB [[gnu::vector_size(kLanes)]] = int8_t;
  store(p, __builtin_convertvector(x, VecB));
#endif
}

// The same integers plus offset, as bytes: they are the low bits of the sum's mantissa.
inline void store_bytes(int8_t* p, VecF x, int32_t offset) {
  store_low_bytes(p, as_int(x + (0x1.8p23f + static_cast<float>(offset))));
}

// round(x * factor), rounded once, plus offset, as bytes.
inline void store_product_bytes(void* p, VecF x, float factor, int32_t offset) {
  const VecF shift = VecF{} + (0x1.8p23f + static_cast<float>(offset));
#if defined(__AVX512F__)
  const VecF sum = _mm512_fmadd_ps(x, VecF{} + factor, shift);
#elif defined(__AVX2__)
  const VecF sum = _mm256_fmadd_ps(x, VecF{} + factor, shift);
#else
  VecF sum;
  for (int i = 0; i < kLanes; ++i) sum[i] = __builtin_fmaf(x[i], factor, shift[i]);
#endif
  store_low_bytes(p, as_int(sum));
}

// The codes of values that are e4m3 numbers.
inline void store_e4m3(uint8_t* p, VecF x) {
  const VecI bits = as_int(x * 0x1p-120f);  // the exponent's bias is now e4m3's, 7
  store_low_bytes(p, ((bits >> 20) & 0x7F) | ((bits >> 24) & 0x80));
}

// The values of e4m3 codes, not NaN, times kE4m3Unit.
constexpr float kE4m3Unit = 0x1p-8f;
inline VecF load_e4m3(const uint8_t* p) {
  // An e4m3 number with its bits moved up is an FP16 number 2^-8 as large.
#if defined(__AVX512F__)
  const __m256i wide = _mm256_cvtepi8_epi16(load<__m128i>(p));
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(-0x4080));
  return _mm512_maskz_cvtph_ps(0xFFFF, half);
#elif defined(__AVX2__) && defined(__F16C__)
  const __m128i wide = _mm_cvtepi8_epi16(_mm_set1_epi64x(load<int64_t>(p)));
  const __m128i half = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(-0x4080));
  return _mm256_cvtph_ps(half);
#else
  using VecB [[gnu::vector_size(kLanes)]] = uint8_t;
  const VecI code = __builtin_convertvector(load<VecB>(p), VecI);
  const VecF magnitude = as_float((code & 0x7F) << 20) * 0x1p112f;
  return as_float(as_int(magnitude) | ((code & 0x80) << 24));
#endif
}

// 2^x for x <= 127, relative error below 2e-7; 0 below -126; NaN stays NaN.
inline VecF exp2(VecF x) {
  constexpr float kMagic = 0x1.8p23f;
  const VecF lowest = VecF{} - 126.0f;
  const VecI underflow = x < -126.0f;
  const VecF clamped = underflow ? lowest : x;
  const VecF shifted = clamped + kMagic;
  const VecF f = clamped - (shifted - kMagic);  // in [-0.5, 0.5]
  VecF p = f * 1.5403530e-4f + 1.3333558e-3f;   // Taylor: ln2^n / n!
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  const VecF power = as_float((as_unsigned(shifted) << 23) + (127u << 23));
  return as_float(as_int(p * power) & ~underflow);
}
