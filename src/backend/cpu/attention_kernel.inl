// The attention kernels, for whatever instruction set the including file is compiled for:
// attention_generic.cpp, attention_avx2.cpp and attention_avx512.cpp include this and add only
// their table. After FlashAttention (online softmax over key tiles) with the operands of
// SageAttention (arXiv 2410.02367) and SageAttention2 (arXiv 2411.10958).
//
// INT8 products use dpbusd where there is AVX-512 VNNI. Elsewhere the integers are kept as floats:
// sums stay below 127^2 * 256 < 2^24, so FP32 FMA is exact, and on AVX2 it is as fast as the
// sign/maddubs/madd/add sequence per product.

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>

#include "backend/cpu/attention_kernels.h"
#include "kernels/attention/recipe.h"

namespace sagelm::cpu {
namespace {

#include "backend/cpu/attention_simd.inl"

#if defined(__AVX512VNNI__)
constexpr bool kPacksBytes = true;
#else
constexpr bool kPacksBytes = false;
#endif
constexpr int32_t kByteOffset = 128;  // dpbusd wants one operand unsigned: K
constexpr float kNoMax = -1e30f;      // finite, so that -inf logits give exp2(-inf), not NaN
constexpr int64_t kHalfAccKeys = 16;  // keys of one FP16 mma step
constexpr int64_t kKeyPadding = 64;   // prepared keys are padded with zeros to a multiple of this

#include "backend/cpu/attention_prepare.inl"

inline VecF load_column(const float* p) { return load<VecF>(p); }
inline VecF load_column(const uint8_t* p) { return load_e4m3(p); }

// acc += a [kRows][depth] * b [depth][kVecs vectors], floats or codes of e4m3. With kRoundHalf the
// accumulator is rounded to FP16 after every kHalfAccKeys terms.
template <int kRows, int kVecs, bool kRoundHalf = false, typename T = float>
inline void multiply(const float* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t depth,
                     VecF (&acc)[kRows][kVecs]) {
  for (int64_t k = 0; k < depth; ++k) {
    VecF column[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) column[v] = load_column(b + k * b_stride + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float factor = a[r * a_stride + k];
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[r][v] += factor * column[v];
    }
    if constexpr (kRoundHalf) {
      if (k % kHalfAccKeys != kHalfAccKeys - 1) continue;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) acc[r][v] = round_to_half(acc[r][v]);
      }
    }
  }
}

#if defined(__AVX512VNNI__)
// acc += a [kRows][words] signed bytes * b [words][kVecs vectors] unsigned bytes, 4 to a word.
template <int kRows, int kVecs>
inline void multiply_bytes(const int8_t* a, int64_t a_stride, const uint8_t* b, int64_t b_stride,
                           int64_t words, __m512i (&acc)[kRows][kVecs]) {
  for (int64_t k = 0; k < words; ++k) {
    __m512i column[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) column[v] = load<__m512i>(b + 4 * (k * b_stride + v * kLanes));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512i factor = _mm512_set1_epi32(load<int32_t>(a + r * a_stride + 4 * k));
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], column[v], factor);
      }
    }
  }
}
#endif

// One key tile as a group of query rows sees it.
struct TileView {
  int64_t first_key;
  int64_t columns;  // keys to look at, rounded up as attend() says; the rest is masked for all
  bool has_bias;
  bool integers;         // Q and K are; else both are FP16
  const void* k;         // packed bytes where the kernels pack integers, else float [dim][key_tile]
  const float* k_scale;  // [key_tile]
  const float* k_shift;  // [key_tile] to add to all integers of a key, or null
  const float* v;        // [key_tile][dim], or null:
  const uint8_t* v_codes;  // the same as codes of e4m3, in units of kE4m3Unit
  float v_scale;           // of all values of the tile
};

// Raw products of rows row0 .. row0 + kRows of the query block with the tile's keys, as floats.
template <int kRows>
void scores_of(const Plan& plan, const QueryBlock& block, const Workspace& work, int64_t row0,
               const TileView& tile) {
  const KvHead& kv = *block.kv;
  constexpr int64_t kStep = kMaxVecs * kLanes;
  for (int64_t j = 0; j < tile.columns; j += kStep) {
    float* out = work.scores + j;
#if defined(__AVX512VNNI__)
    if (tile.integers) {
      const auto* b = static_cast<const uint8_t*>(tile.k) + 4 * j;
      __m512i acc[kRows][kMaxVecs];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512i offset = _mm512_set1_epi32(work.q_offset[row0 + r]);
#pragma GCC unroll 8
        for (int v = 0; v < kMaxVecs; ++v) acc[r][v] = offset;
      }
      multiply_bytes(work.bytes + row0 * kv.dim, kv.dim, b, plan.key_tile, kv.dim / 4, acc);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kMaxVecs; ++v) {
          const VecI sum = reinterpret_cast<VecI>(acc[r][v]);
          store(out + r * kMaxKeyTile + v * kLanes, __builtin_convertvector(sum, VecF));
        }
      }
      continue;
    }
#endif
    const float* b = static_cast<const float*>(tile.k) + j;
    const float* a = tile.integers && !kPacksBytes ? work.integers : work.rows;
    VecF acc[kRows][kMaxVecs] = {};
    const int64_t depth = tile.k_shift != nullptr ? kv.dim : kv.head_dim;  // rotated: all of dim
    multiply(a + row0 * kv.dim, kv.dim, b, plan.key_tile, depth, acc);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kMaxVecs; ++v) store(out + r * kMaxKeyTile + v * kLanes, acc[r][v]);
    }
  }
}

template <PvKind kPv>
inline VecF round_probability(VecF p) {
  if constexpr (kPv == PvKind::kE4m3) return round_to_e4m3(p);
  if constexpr (kPv == PvKind::kInt8) return round_to_integer(p * recipe::kInt8Max);
  return round_to<10, -14>(p);
}

// Online softmax of one row over one tile: scores become rounded probabilities. Returns the factor
// for what the row accumulated before.
template <PvKind kPv>
float softmax_row(const Plan& plan, const QueryBlock& block, const Workspace& work, int64_t row,
                  const TileView& tile, float* scores) {
  const KvHead& kv = *block.kv;
  const int64_t visible_keys =
      block.causal ? block.position + row + 1 - tile.first_key : kv.kv_len - tile.first_key;
  const float* k_scale = tile.k_scale;
  const float q_scale = tile.integers ? work.q_scale[row] : block.softmax_scale * recipe::kLog2E;
  VecF row_max = VecF{} + kNoMax;
  for (int64_t j = 0; j < tile.columns; j += kLanes) {
    VecF t = load<VecF>(scores + j);
    if (tile.k_shift != nullptr) t += load<VecF>(tile.k_shift + j) * work.q_sum[row];
    t *= load<VecF>(k_scale + j) * q_scale;
    if (tile.has_bias) t += load<VecF>(work.bias + j);
    if (j + kLanes > visible_keys) {  // after scaling: a NaN or zero scale must not unmask
      const VecI masked =
          lane_ids() + static_cast<int32_t>(j) >= static_cast<int32_t>(visible_keys);
      t = masked ? VecF{} - __builtin_inff() : t;
    }
    store(scores + j, t);
    row_max = max(t, row_max);
  }
  const float tile_max = reduce_max(row_max);
  const float old_max = work.row_max[row];
  const float new_max = tile_max > old_max ? tile_max : old_max;
  work.row_max[row] = new_max;
  const float shift = plan.pv == PvKind::kE4m3 ? new_max - recipe::kLog2E4m3Max : new_max;
  VecF sum = {};
  for (int64_t j = 0; j < tile.columns; j += kLanes) {
    const VecF p = exp2(load<VecF>(scores + j) - shift);
    sum += p;
    store(scores + j, round_probability<kPv>(p));
  }
  for (int64_t j = tile.columns; j < plan.key_tile; j += kLanes) store(scores + j, VecF{});
  const float alpha = exp2(VecF{} + (old_max - new_max))[0];
  work.row_sum[row] = work.row_sum[row] * alpha + reduce_sum(sum);
  return alpha;
}

// out = out * alpha + P V scale, the product in a fresh accumulator.
template <int kRows, int kVecs, bool kRoundHalf, typename T>
inline void accumulate(const float* p, const T* v, int64_t dim, int64_t keys, const float* alpha,
                       float scale, float* out) {
  VecF acc[kRows][kVecs] = {};
  multiply<kRows, kVecs, kRoundHalf>(p, kMaxKeyTile, v, dim, keys, acc);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) {
      float* o = out + r * dim + i * kLanes;
      store(o, load<VecF>(o) * alpha[r] + acc[r][i] * scale);
    }
  }
}

template <int kRows, bool kRoundHalf, typename T>
void accumulate_columns(const float* p, const T* v, int64_t dim, int64_t keys, const float* alpha,
                        float scale, float* out) {
  int64_t c = 0;
  for (; c + kMaxVecs * kLanes <= dim; c += kMaxVecs * kLanes) {
    accumulate<kRows, kMaxVecs, kRoundHalf>(p, v + c, dim, keys, alpha, scale, out + c);
  }
  if constexpr (kLanes == kDimAlign) {  // narrower vectors always divide the padded head size
    for (; c + 2 * kLanes <= dim; c += 2 * kLanes) {
      accumulate<kRows, 2, kRoundHalf>(p, v + c, dim, keys, alpha, scale, out + c);
    }
    for (; c < dim; c += kLanes) {
      accumulate<kRows, 1, kRoundHalf>(p, v + c, dim, keys, alpha, scale, out + c);
    }
  }
}

template <int kRows, PvKind kPv>
void attend_rows(const Plan& plan, const QueryBlock& block, const Workspace& work, int64_t row0,
                 const TileView& tile) {
  scores_of<kRows>(plan, block, work, row0, tile);
  float alpha[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    alpha[r] = softmax_row<kPv>(plan, block, work, row0 + r, tile, work.scores + r * kMaxKeyTile);
  }
  const int64_t dim = block.kv->dim;
  float* out = work.out + row0 * dim;
  if constexpr (kPv == PvKind::kE4m3) {
    if (tile.v_codes != nullptr) {
      accumulate_columns<kRows, false>(work.scores, tile.v_codes, dim, tile.columns, alpha,
                                       tile.v_scale, out);
      return;
    }
  }
  accumulate_columns<kRows, kPv == PvKind::kHalfAccHalf>(work.scores, tile.v, dim, tile.columns,
                                                         alpha, tile.v_scale, out);
}

using AttendRows = void (*)(const Plan&, const QueryBlock&, const Workspace&, int64_t,
                            const TileView&);

template <PvKind kPv>
AttendRows attend_rows_for(int64_t rows) {
  static_assert(kRowBlock == 6);
  constexpr AttendRows kTable[kRowBlock] = {attend_rows<1, kPv>, attend_rows<2, kPv>,
                                            attend_rows<3, kPv>, attend_rows<4, kPv>,
                                            attend_rows<5, kPv>, attend_rows<6, kPv>};
  return kTable[rows - 1];
}

AttendRows select_attend_rows(PvKind pv, int64_t rows) {
  switch (pv) {
    case PvKind::kHalfAccHalf:
      return attend_rows_for<PvKind::kHalfAccHalf>(rows);
    case PvKind::kInt8:
      return attend_rows_for<PvKind::kInt8>(rows);
    case PvKind::kE4m3:
      return attend_rows_for<PvKind::kE4m3>(rows);
    default:
      return attend_rows_for<PvKind::kHalf>(rows);
  }
}

// The part of the logits that smoothing Q took out: mean row times smoothed, unquantized K.
void smoothing_bias(const Plan& plan, const QueryBlock& block, const Workspace& work,
                    int64_t first_key) {
  const KvHead& kv = *block.kv;
  const float log2_scale = block.softmax_scale * recipe::kLog2E;
  for (int64_t j = 0; j < plan.key_tile; j += kMaxVecs * kLanes) {
    VecF acc[1][kMaxVecs] = {};
    multiply(work.channel, 0, kv.k_exact + first_key * kv.dim + j, plan.key_tile, kv.head_dim, acc);
#pragma GCC unroll 8
    for (int v = 0; v < kMaxVecs; ++v) store(work.bias + j + v * kLanes, acc[0][v] * log2_scale);
  }
}

void finish_row(const Plan& plan, const QueryBlock& block, const Workspace& work, int64_t row) {
  const KvHead& kv = *block.kv;
  const float sum = work.row_sum[row];
  // A NaN sum stays; every visible logit -inf is 0/0, as in exact arithmetic.
  const float inverse = (plan.pv == PvKind::kInt8 ? 1.0f / recipe::kInt8Max : 1.0f) / sum;
  const float* acc = work.out + row * kv.dim;
  float* out = block.out + row * block.out_row_stride;
  for (int64_t c = 0; c < kv.head_dim; ++c) out[c] = acc[c] * inverse * kv.v_scale[c];
  if (block.lse == nullptr) return;
  const float extra = plan.pv == PvKind::kE4m3 ? recipe::kLog2E4m3Max : 0.0f;
  block.lse[row] += (work.row_max[row] - extra + __builtin_log2f(sum)) * recipe::kLn2;
}

#include "backend/cpu/attention_page.inl"

// The prepared tile that begins at first_key.
TileView view_prepared(const Plan& plan, const KvHead& kv, int64_t first_key) {
  const int64_t key = first_key - kv.first_prepared;
  TileView tile = {};
  tile.first_key = first_key;
  tile.has_bias = plan.smooth_q;
  tile.integers = plan.qk_levels != 0 && !plan.paged;
  tile.k = tile.integers && kPacksBytes
               ? static_cast<const void*>(static_cast<const uint8_t*>(kv.k) + key * kv.dim)
               : static_cast<const float*>(kv.k) + key * kv.dim;
  tile.k_scale = kv.k_scale + key;
  tile.v = kv.v + key * kv.dim;
  tile.v_scale = 1.0f;  // prepared values have scales per channel
  return tile;
}

void attend(const Plan& plan, const QueryBlock& block, const Workspace& work) {
  const KvHead& kv = *block.kv;
  prepare_queries(plan, block, work);
  for (int64_t r = 0; r < block.rows; ++r) {
    work.row_max[r] = kNoMax;
    work.row_sum[r] = 0.0f;
    zero_row(work.out + r * kv.dim, kv.dim);
  }
  const int64_t last_key = block.causal ? block.position + block.rows : kv.kv_len;
  // Whole register blocks and whole FP16 accumulation steps.
  constexpr int64_t kStep = kMaxVecs * kLanes > kHalfAccKeys ? kMaxVecs * kLanes : kHalfAccKeys;
  static_assert(kKeyPadding % kStep == 0);
  for (int64_t first_key = 0; first_key < last_key; first_key += plan.key_tile) {
    if (plan.smooth_q) smoothing_bias(plan, block, work, first_key);
    const bool page = first_key < kv.first_prepared;
    TileView tile = page ? view_page(plan, kv, work, first_key, block.rows <= kRowBlock)
                         : view_prepared(plan, kv, first_key);
    const PvKind pv = plan.paged && !page ? PvKind::kHalf : plan.pv;
    for (int64_t r = 0; r < block.rows; r += kRowBlock) {
      const int64_t rows = block.rows - r < kRowBlock ? block.rows - r : kRowBlock;
      int64_t visible = (block.causal ? block.position + r + rows : kv.kv_len) - first_key;
      if (visible <= 0) continue;
      if (visible > plan.key_tile) visible = plan.key_tile;
      tile.columns = (visible + kStep - 1) / kStep * kStep;
      select_attend_rows(pv, rows)(plan, block, work, r, tile);
    }
  }
  for (int64_t r = 0; r < block.rows; ++r) finish_row(plan, block, work, r);
}

}  // namespace
}  // namespace sagelm::cpu
