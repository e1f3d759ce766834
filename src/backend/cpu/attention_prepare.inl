// Quantization of K, V and Q rows. Included by attention_kernel.inl.
//
// Integers are rounded to nearest, ties to even, as the CUDA kernels' cvt.rni does, for every
// variant. A scale group that holds a NaN or an infinity gets a NaN scale, so the result shows it.

// Walks the rows of one head through the pages.
struct RowCursor {
  const uint16_t* const* pages;
  int64_t page_size;
  int64_t head_offset;  // elements
  int64_t head_dim;
  int64_t page = 0;
  int64_t slot = 0;

  const uint16_t* next() {
    const uint16_t* row = pages[page] + head_offset + slot * head_dim;
    if (++slot == page_size) {
      slot = 0;
      ++page;
    }
    return row;
  }
};

inline RowCursor rows_of(const KvHead& kv, const uint16_t* const* pages) {
  return {pages, kv.page_size, kv.head * kv.page_size * kv.head_dim, kv.head_dim};
}

// kLanes channels of an FP16 row from channel c on; zeros past head_dim, where nothing is read.
inline VecF load_channels(const uint16_t* row, int64_t c, int64_t head_dim) {
  if (c + kLanes <= head_dim) return load_half(row + c);
  uint16_t tail[kLanes] = {};
  for (int64_t i = c; i < head_dim; ++i) tail[i - c] = row[i];
  return load_half(tail);
}

// x [dim] times the Hadamard matrix of its size, a power of two, times factor. Only additions and,
// for a factor that is one too, exact products: the same on every instruction set.
inline void rotate(float* x, int64_t dim, float factor) {
  for (int64_t half = 1; half < dim; half *= 2) {
    for (int64_t begin = 0; begin < dim; begin += 2 * half) {
      for (int64_t i = begin; i < begin + half; ++i) {
        const float a = x[i];
        const float b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
    }
  }
  for (int64_t i = 0; i < dim; ++i) x[i] *= factor;
}

inline void rotate_key(float* x, int64_t dim) {
  rotate(x, dim, dim == 256 ? recipe::kRotatedKeyFactor<256> : recipe::kRotatedKeyFactor<128>);
}
inline void rotate_query(float* x, int64_t dim) {
  rotate(x, dim, dim == 64 ? recipe::kRotatedQueryFactor<64> : recipe::kRotatedQueryFactor<128>);
}

inline void zero_row(float* row, int64_t dim) {
  for (int64_t c = 0; c < dim; c += kLanes) store(row + c, VecF{});
}

// As integers the magnitudes of floats are ordered, with infinity and then NaN on top; a float
// maximum would lose NaN.
inline VecI magnitude_bits(VecF v) { return as_int(v) & INT32_MAX; }

struct Quantizer {
  float scale;    // of one integer step
  float inverse;  // x * inverse is then rounded
};

inline Quantizer make_quantizer(int32_t amax_bits, float levels, float floor) {
  if (amax_bits >= 0x7F800000) return {__builtin_nanf(""), 0.0f};
  float amax;
  __builtin_memcpy(&amax, &amax_bits, sizeof(amax));
  if (amax < floor) amax = floor;
  return {amax / levels, levels / amax};
}

// As the cache's pages are quantized: the factor is an FP16 number, and the scale its inverse.
inline Quantizer make_half_quantizer(int32_t amax_bits, float levels) {
  const float inverse = make_quantizer(amax_bits, levels, levels / recipe::kLargestHalf).inverse;
  if (inverse == 0.0f) return {__builtin_nanf(""), 0.0f};
  const float factor = round_to_half(VecF{} + inverse)[0];
  return {1.0f / factor, factor};
}

// amax holds the largest magnitudes of each group, still spread over lanes.
inline void make_quantizers(const Plan& plan, const VecI* amax, int32_t num_groups,
                            Quantizer* out) {
  for (int32_t g = 0; g < num_groups; ++g) {
    out[g] =
        make_quantizer(reduce_max(amax[g]), static_cast<float>(plan.qk_levels), plan.amax_floor);
  }
}

// Integers of a row; 0 where the group is not finite.
inline VecF quantize(const float* row, const Quantizer& quantizer) {
  if (quantizer.inverse == 0.0f) return VecF{};
  return round_to_integer(load<VecF>(row) * quantizer.inverse);
}

// To float (out may be row), or to bytes plus offset.
inline void quantize_row(const float* row, int64_t dim, const Quantizer& quantizer, float* out) {
  for (int64_t c = 0; c < dim; c += kLanes) store(out + c, quantize(row + c, quantizer));
}

inline void quantize_row(const float* row, int64_t dim, const Quantizer& quantizer, int32_t offset,
                         int8_t* bytes) {
  for (int64_t c = 0; c < dim; c += kLanes) {
    store_bytes(bytes + c, load<VecF>(row + c) * quantizer.inverse, offset);
  }
}

// Columns of four rows, 4 words of each in every 128-bit lane, V a vector of such lanes.
template <typename V>
inline void transpose_four(const char* src, int64_t src_stride, char* dst, int64_t dst_stride,
                           V ids) {
  constexpr int kWords = sizeof(V) / 4;
  const V a = load<V>(src);
  const V b = load<V>(src + 4 * src_stride);
  const V c = load<V>(src + 8 * src_stride);
  const V d = load<V>(src + 12 * src_stride);
  const V lane = ids & ~3;
  const V within = ids & 3;
  // {a0 b0 a1 b1}, {a2 b2 a3 b3} of every lane, then pairs of pairs.
  const V low = lane + within / 2 + (within & 1) * kWords;
  const V pair_low = lane + (within & 1) + within / 2 * kWords;
  const V ab_low = shuffle(a, b, low);
  const V ab_high = shuffle(a, b, low + 2);
  const V cd_low = shuffle(c, d, low);
  const V cd_high = shuffle(c, d, low + 2);
  const V columns[4] = {shuffle(ab_low, cd_low, pair_low), shuffle(ab_low, cd_low, pair_low + 2),
                        shuffle(ab_high, cd_high, pair_low),
                        shuffle(ab_high, cd_high, pair_low + 2)};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
    for (int l = 0; l < kWords / 4; ++l) {
      // Not by elements: GCC would take each through a general register.
      const auto quad = load<Quad>(reinterpret_cast<const char*>(&columns[i]) + 16 * l);
      store(dst + 4 * (4 * l + i) * dst_stride, quad);
    }
  }
}

// dst[i][r] = src[r][i] for 32-bit words; both extents are multiples of 4.
inline void transpose(const void* src, int64_t src_stride, void* dst, int64_t dst_stride,
                      int64_t rows, int64_t words) {
  for (int64_t r = 0; r < rows; r += 4) {
    const char* from = static_cast<const char*>(src) + 4 * r * src_stride;
    char* to = static_cast<char*>(dst) + 4 * r;
    int64_t i = 0;
    for (; i + kLanes <= words; i += kLanes) {
      transpose_four(from + 4 * i, src_stride, to + 4 * i * dst_stride, dst_stride, lane_ids());
    }
    for (; i < words; i += 4) {
      transpose_four(from + 4 * i, src_stride, to + 4 * i * dst_stride, dst_stride,
                     Quad{0, 1, 2, 3});
    }
  }
}

// Mean of every channel over all keys. Summed tile by tile, so that a long sequence loses nothing,
// and in a fixed order. NaN and infinity spread to every key of the head from here.
inline void mean_of_keys(const KvHead& kv, int64_t tile, float* mean) {
  zero_row(mean, kv.dim);
  RowCursor cursor = rows_of(kv, kv.k_pages);
  const uint16_t* rows[kMaxKeyTile];
  for (int64_t first = 0; first < kv.kv_len; first += tile) {
    const int64_t count = kv.kv_len - first < tile ? kv.kv_len - first : tile;
    for (int64_t r = 0; r < count; ++r) rows[r] = cursor.next();
    for (int64_t c = 0; c < kv.dim; c += kLanes) {
      VecF even = {};  // two chains of additions, for speed
      VecF odd = {};
      int64_t r = 0;
      for (; r + 2 <= count; r += 2) {
        even += load_channels(rows[r], c, kv.head_dim);
        odd += load_channels(rows[r + 1], c, kv.head_dim);
      }
      if (r < count) even += load_channels(rows[r], c, kv.head_dim);
      store(mean + c, load<VecF>(mean + c) + (even + odd));
    }
  }
  const float length = static_cast<float>(kv.kv_len);
  for (int64_t c = 0; c < kv.dim; c += kLanes) store(mean + c, load<VecF>(mean + c) / length);
}

void prepare_keys(const Plan& plan, const KvHead& kv, const Workspace& work) {
  const int64_t tile = plan.key_tile;
  const int64_t dim = kv.dim;
  const bool quantized = plan.qk_levels != 0 && !plan.paged;
  const bool to_bytes = quantized && kPacksBytes;
  zero_row(kv.k_mean, dim);
  if (plan.paged && kv.mean != nullptr) {
    for (int64_t c = 0; c < kv.head_dim; ++c) kv.k_mean[c] = kv.mean[kv.head * kv.head_dim + c];
  } else if (quantized && plan.smooth_k) {
    mean_of_keys(kv, tile, kv.k_mean);
  }
  RowCursor cursor = rows_of(kv, kv.k_pages);
  const int64_t length = kv.kv_len - kv.first_prepared;
  for (int64_t first = 0; first < length; first += tile) {
    const int64_t count = length - first < tile ? length - first : tile;
    const int64_t padded = (count + kKeyPadding - 1) / kKeyPadding * kKeyPadding;
    VecI amax[kMaxKeyTile];
    for (int32_t g = 0; g < plan.num_k_groups; ++g) amax[g] = VecI{};
    for (int64_t r = 0; r < count; ++r) {
      const uint16_t* source = cursor.next();
      float* row = work.rows + r * dim;
      VecI row_max = {};
      for (int64_t c = 0; c < dim; c += kLanes) {
        const VecF x = load_channels(source, c, kv.head_dim) - load<VecF>(kv.k_mean + c);
        store(row + c, x);
        row_max = max(row_max, magnitude_bits(x));
      }
      amax[plan.k_group[r]] = max(amax[plan.k_group[r]], row_max);
    }
    for (int64_t r = count; r < padded; ++r) zero_row(work.rows + r * dim, dim);
    if (plan.smooth_q) transpose(work.rows, dim, kv.k_exact + first * dim, tile, padded, dim);

    float* scale = kv.k_scale + first;
    if (quantized) {
      Quantizer quantizers[kMaxKeyTile];
      make_quantizers(plan, amax, plan.num_k_groups, quantizers);
      for (int64_t r = 0; r < padded; ++r) {
        const Quantizer& quantizer = quantizers[plan.k_group[r]];
        scale[r] = quantizer.scale;
        if (to_bytes) {
          quantize_row(work.rows + r * dim, dim, quantizer, kByteOffset, work.bytes + r * dim);
        } else {
          quantize_row(work.rows + r * dim, dim, quantizer, work.rows + r * dim);
        }
      }
    } else {
      for (int64_t r = 0; r < padded; ++r) scale[r] = 1.0f;
    }
    if (to_bytes) {
      transpose(work.bytes, dim / 4, static_cast<int8_t*>(kv.k) + first * dim, tile, padded,
                dim / 4);
    } else {
      transpose(work.rows, dim, static_cast<float*>(kv.k) + first * dim, tile, padded, dim);
    }
  }
}

// Scales of the channels of V from their largest magnitudes over all keys; inverse [dim] gets the
// factors to multiply by before rounding.
void scale_values(const Plan& plan, const KvHead& kv, float* amax, float* inverse) {
  zero_row(amax, kv.dim);
  RowCursor cursor = rows_of(kv, kv.v_pages);
  for (int64_t j = 0; j < kv.kv_len; ++j) {
    const uint16_t* row = cursor.next();
    for (int64_t c = 0; c < kv.dim; c += kLanes) {
      const VecI bits = magnitude_bits(load_channels(row, c, kv.head_dim));
      store(amax + c, max(load<VecI>(amax + c), bits));
    }
  }
  const float levels = plan.pv == PvKind::kE4m3 ? recipe::kE4m3Max : recipe::kInt8Max;
  for (int64_t c = 0; c < kv.dim; ++c) {
    const Quantizer quantizer = make_quantizer(load<int32_t>(amax + c), levels, plan.amax_floor);
    kv.v_scale[c] = quantizer.scale;
    inverse[c] = quantizer.inverse;
  }
}

// The next elements of runs of values (recipe.h), x already scaled, as e4m3 numbers. kHalves: what
// an operation yields is rounded to FP16. moves: the runs' next moves over kValueMove.
template <bool kHalves>
inline VecF round_values(VecF x, float gain, float* moves) {
  const auto round = [](VecF y) { return kHalves ? round_to_half(y) : y; };
  const VecF next = load<VecF>(moves);
  const VecF limit = as_float(magnitude_bits(x));
  const VecF move = -max(-max(next, -limit), -limit);
  const VecF rounded = round_to_e4m3(round(x + move * recipe::kValueMove));
  store(moves, round(next - round(rounded - x) * gain));
  return rounded;
}

// moves: scratch, [dim].
template <PvKind kPv>
void convert_values(const KvHead& kv, const float* inverse, float* moves) {
  const int run = recipe::value_run(static_cast<int>(kv.head_dim));
  const float gain = recipe::value_gain(static_cast<int>(kv.head_dim));
  RowCursor cursor = rows_of(kv, kv.v_pages);
  for (int64_t j = 0; j < kv.kv_len - kv.first_prepared; ++j) {
    const uint16_t* row = cursor.next();
    if (kPv == PvKind::kE4m3 && j % run == 0) zero_row(moves, kv.dim);
    for (int64_t c = 0; c < kv.dim; c += kLanes) {
      VecF x = load_channels(row, c, kv.head_dim);
      if constexpr (kPv == PvKind::kE4m3) {
        x = round_values<false>(rounded_product(x, load<VecF>(inverse + c)), gain, moves + c);
      } else if constexpr (kPv == PvKind::kInt8) {
        x = round_to_integer(x * load<VecF>(inverse + c));
      }
      store(kv.v + j * kv.dim + c, x);
    }
  }
}

void prepare_values(const Plan& plan, const KvHead& kv, const Workspace& work) {
  float* inverse = work.channel;
  float* other = work.channel + kv.dim;
  if (plan.pv == PvKind::kE4m3 && !plan.paged) {
    scale_values(plan, kv, other, inverse);
    convert_values<PvKind::kE4m3>(kv, inverse, other);
  } else if (plan.pv == PvKind::kInt8) {
    scale_values(plan, kv, other, inverse);
    convert_values<PvKind::kInt8>(kv, inverse, other);
  } else {
    for (int64_t c = 0; c < kv.dim; ++c) kv.v_scale[c] = 1.0f;
    convert_values<PvKind::kHalf>(kv, inverse, other);
  }
  const int64_t length = kv.kv_len - kv.first_prepared;
  const int64_t padded = (length + kKeyPadding - 1) / kKeyPadding * kKeyPadding;
  for (int64_t j = length; j < padded; ++j) zero_row(kv.v + j * kv.dim, kv.dim);
}

void prepare_kv(const Plan& plan, const KvHead& kv, const Workspace& work) {
  prepare_keys(plan, kv, work);
  prepare_values(plan, kv, work);
}

// The block's rows, rounded to FP16 as the GPU kernels receive them, to the QK operand in
// work.rows (FP16 QK), work.integers or work.bytes, with q_scale including softmax_scale and
// log2(e), so that logits come out in powers of two. With smooth_q the mean of the rows, in
// work.channel, is subtracted first.
void prepare_queries(const Plan& plan, const QueryBlock& block, const Workspace& work) {
  const int64_t dim = block.kv->dim;
  const int64_t head_dim = block.kv->head_dim;
  const float log2_scale = block.softmax_scale * recipe::kLog2E;
  for (int64_t r = 0; r < block.rows; ++r) {
    float* row = work.rows + r * dim;
    const float* q = block.q + r * block.q_row_stride;
    for (int64_t c = 0; c < head_dim; ++c) row[c] = q[c];
    for (int64_t c = head_dim; c < dim; ++c) row[c] = 0.0f;
    for (int64_t c = 0; c < dim; c += kLanes) {
      store(row + c, round_to_half(load<VecF>(row + c)));
    }
    work.q_scale[r] = log2_scale;
    if (block.lse != nullptr) {
      // What smoothing took out of this row's logits; read again when the row is finished.
      VecF dot = {};
      for (int64_t c = 0; c < dim; c += kLanes) {
        dot += load<VecF>(row + c) * load<VecF>(block.kv->k_mean + c);
      }
      block.lse[r] = reduce_sum(dot) * block.softmax_scale;
    }
  }
  if (plan.qk_levels == 0) return;

  if (plan.smooth_q) {
    const float count = static_cast<float>(block.rows);
    for (int64_t c = 0; c < dim; c += kLanes) {
      VecF sum = {};
      for (int64_t r = 0; r < block.rows; ++r) sum += load<VecF>(work.rows + r * dim + c);
      const VecF mean = sum / count;
      store(work.channel + c, mean);
      for (int64_t r = 0; r < block.rows; ++r) {
        float* row = work.rows + r * dim;
        store(row + c, load<VecF>(row + c) - mean);
      }
    }
  }
  float* rows = work.rows;
  if (plan.int4_keys) {
    rows = work.integers;
    for (int64_t r = 0; r < block.rows; ++r) {
      for (int64_t c = 0; c < dim; c += kLanes) {
        store(rows + r * dim + c, load<VecF>(work.rows + r * dim + c));
      }
      rotate_query(rows + r * dim, dim);
    }
  }
  const uint8_t* group_of = plan.q_group + block.first_in_block;
  VecI amax[kMaxQueryBlock];
  for (int32_t g = 0; g < plan.num_q_groups; ++g) amax[g] = VecI{};
  for (int64_t r = 0; r < block.rows; ++r) {
    VecI& group = amax[group_of[r]];
    for (int64_t c = 0; c < dim; c += kLanes) {
      group = max(group, magnitude_bits(load<VecF>(rows + r * dim + c)));
    }
  }
  Quantizer quantizers[kMaxQueryBlock];
  make_quantizers(plan, amax, plan.num_q_groups, quantizers);
  for (int64_t r = 0; r < block.rows; ++r) {
    const Quantizer& quantizer = quantizers[group_of[r]];
    const float* row = rows + r * dim;
    work.q_scale[r] = quantizer.scale * log2_scale;
    VecF sum = {};
    for (int64_t c = 0; c < dim; c += kLanes) sum += quantize(row + c, quantizer);
    work.q_sum[r] = reduce_sum(sum);
    if (!kPacksBytes) {
      quantize_row(row, dim, quantizer, work.integers + r * dim);
      continue;
    }
    quantize_row(row, dim, quantizer, 0, work.bytes + r * dim);
    // K bytes carry +128: their products with this row are too large by 128 times the row's sum.
    work.q_offset[r] = -kByteOffset * static_cast<int32_t>(work.q_sum[r]);
  }
}
