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

// FP16 row to float, padded with zeros to a multiple of kDimAlign; reads nothing past the row.
inline void load_row(const uint16_t* row, int64_t head_dim, float* out) {
  int64_t c = 0;
  for (; c + kLanes <= head_dim; c += kLanes) store(out + c, load_half(row + c));
  if (c < head_dim) {
    uint16_t tail[kLanes] = {};
    for (int64_t i = c; i < head_dim; ++i) tail[i - c] = row[i];
    store(out + c, load_half(tail));
    c += kLanes;
  }
  for (; c % kDimAlign != 0; c += kLanes) store(out + c, VecF{});
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

// Largest magnitudes of groups of rows of [rows][dim]; row r belongs to group_of[r].
inline void group_quantizers(const Plan& plan, const float* rows, int64_t count, int64_t dim,
                             const uint8_t* group_of, int32_t num_groups, Quantizer* out) {
  VecI amax[kMaxKeyTile];
  for (int32_t g = 0; g < num_groups; ++g) amax[g] = VecI{};
  for (int64_t r = 0; r < count; ++r) {
    VecI row_max = {};
    for (int64_t c = 0; c < dim; c += kLanes) {
      row_max = max(row_max, magnitude_bits(load<VecF>(rows + r * dim + c)));
    }
    amax[group_of[r]] = max(amax[group_of[r]], row_max);
  }
  for (int32_t g = 0; g < num_groups; ++g) {
    out[g] = make_quantizer(reduce_max(amax[g]), static_cast<float>(plan.qk_levels),
                            plan.amax_floor);
  }
}

// In place; 0 where the group is not finite.
inline void quantize_row(float* row, int64_t dim, const Quantizer& quantizer) {
  if (quantizer.inverse == 0.0f) {
    zero_row(row, dim);
    return;
  }
  for (int64_t c = 0; c < dim; c += kLanes) {
    store(row + c, round_to_integer(load<VecF>(row + c) * quantizer.inverse));
  }
}

// dst[i][r] = src[r][i] for 32-bit words; both extents are multiples of 4.
inline void transpose(const void* src, int64_t src_stride, void* dst, int64_t dst_stride,
                      int64_t rows, int64_t words) {
  const auto* from = static_cast<const char*>(src);
  auto* to = static_cast<char*>(dst);
  for (int64_t r = 0; r < rows; r += 4) {
    for (int64_t i = 0; i < words; i += 4) {
      const char* p = from + 4 * (r * src_stride + i);
      const Quad a = load<Quad>(p);
      const Quad b = load<Quad>(p + 4 * src_stride);
      const Quad c = load<Quad>(p + 8 * src_stride);
      const Quad d = load<Quad>(p + 12 * src_stride);
      const Quad ab_low = __builtin_shuffle(a, b, Quad{0, 4, 1, 5});
      const Quad ab_high = __builtin_shuffle(a, b, Quad{2, 6, 3, 7});
      const Quad cd_low = __builtin_shuffle(c, d, Quad{0, 4, 1, 5});
      const Quad cd_high = __builtin_shuffle(c, d, Quad{2, 6, 3, 7});
      char* q = to + 4 * (i * dst_stride + r);
      store(q, __builtin_shuffle(ab_low, cd_low, Quad{0, 1, 4, 5}));
      store(q + 4 * dst_stride, __builtin_shuffle(ab_low, cd_low, Quad{2, 3, 6, 7}));
      store(q + 8 * dst_stride, __builtin_shuffle(ab_high, cd_high, Quad{0, 1, 4, 5}));
      store(q + 12 * dst_stride, __builtin_shuffle(ab_high, cd_high, Quad{2, 3, 6, 7}));
    }
  }
}

// Integers held as floats to bytes plus offset.
inline void narrow(const float* src, int64_t count, int32_t offset, int8_t* dst) {
  typedef int8_t VecB __attribute__((vector_size(kLanes)));
  for (int64_t c = 0; c < count; c += kLanes) {
    store(dst + c, __builtin_convertvector(to_integer(load<VecF>(src + c)) + offset, VecB));
  }
}

// Mean of every channel over all keys. Summed tile by tile, so that a long sequence loses nothing,
// and in a fixed order. NaN and infinity spread to every key of the head from here.
inline void mean_of_keys(const KvHead& kv, int64_t tile, float* buffer, float* mean) {
  zero_row(mean, kv.dim);
  RowCursor cursor = rows_of(kv, kv.k_pages);
  for (int64_t first = 0; first < kv.kv_len; first += tile) {
    const int64_t count = kv.kv_len - first < tile ? kv.kv_len - first : tile;
    for (int64_t r = 0; r < count; ++r) load_row(cursor.next(), kv.head_dim, buffer + r * kv.dim);
    for (int64_t c = 0; c < kv.dim; c += kLanes) {
      VecF sum = {};
      for (int64_t r = 0; r < count; ++r) sum += load<VecF>(buffer + r * kv.dim + c);
      store(mean + c, load<VecF>(mean + c) + sum);
    }
  }
  const float length = static_cast<float>(kv.kv_len);
  for (int64_t c = 0; c < kv.dim; c += kLanes) store(mean + c, load<VecF>(mean + c) / length);
}

void prepare_keys(const Plan& plan, const KvHead& kv, const Workspace& work) {
  const int64_t tile = plan.key_tile;
  const int64_t dim = kv.dim;
  const bool quantized = plan.qk_levels != 0;
  const bool smooth = quantized && plan.smooth_k;
  if (smooth) {
    mean_of_keys(kv, tile, work.rows, kv.k_mean);
  } else {
    zero_row(kv.k_mean, dim);
  }
  RowCursor cursor = rows_of(kv, kv.k_pages);
  Quantizer quantizers[kMaxKeyTile];
  for (int64_t first = 0; first < kv.kv_len; first += tile) {
    const int64_t count = kv.kv_len - first < tile ? kv.kv_len - first : tile;
    for (int64_t r = 0; r < tile; ++r) {
      float* row = work.rows + r * dim;
      if (r >= count) {
        zero_row(row, dim);
        continue;
      }
      load_row(cursor.next(), kv.head_dim, row);
      if (!smooth) continue;
      for (int64_t c = 0; c < dim; c += kLanes) {
        store(row + c, load<VecF>(row + c) - load<VecF>(kv.k_mean + c));
      }
    }
    if (plan.smooth_q) transpose(work.rows, dim, kv.k_exact + first * dim, tile, tile, dim);
    float* scale = kv.k_scale + first;
    if (quantized) {
      group_quantizers(plan, work.rows, count, dim, plan.k_group, plan.num_k_groups, quantizers);
    }
    for (int64_t r = 0; r < tile; ++r) {
      scale[r] = quantized ? quantizers[plan.k_group[r]].scale : 1.0f;
      if (quantized) quantize_row(work.rows + r * dim, dim, quantizers[plan.k_group[r]]);
    }
    if (quantized && kPacksBytes) {
      narrow(work.rows, tile * dim, kByteOffset, work.bytes);
      transpose(work.bytes, dim / 4, static_cast<int8_t*>(kv.k) + first * dim, tile, tile,
                dim / 4);
    } else {
      transpose(work.rows, dim, static_cast<float*>(kv.k) + first * dim, tile, tile, dim);
    }
  }
}

void prepare_values(const Plan& plan, const KvHead& kv, const Workspace& work) {
  const int64_t dim = kv.dim;
  const int64_t padded = (kv.kv_len + plan.key_tile - 1) / plan.key_tile * plan.key_tile;
  const bool quantized = plan.pv == PvKind::kE4m3 || plan.pv == PvKind::kInt8;
  RowCursor cursor = rows_of(kv, kv.v_pages);
  for (int64_t j = 0; j < kv.kv_len; ++j) load_row(cursor.next(), kv.head_dim, kv.v + j * dim);
  for (int64_t j = kv.kv_len; j < padded; ++j) zero_row(kv.v + j * dim, dim);
  for (int64_t c = 0; c < dim; ++c) kv.v_scale[c] = 1.0f;
  if (!quantized) return;

  const float levels = plan.pv == PvKind::kE4m3 ? recipe::kE4m3Max : recipe::kInt8Max;
  float* inverse = work.channel;
  float* amax = work.channel + dim;
  zero_row(amax, dim);
  for (int64_t j = 0; j < kv.kv_len; ++j) {
    for (int64_t c = 0; c < dim; c += kLanes) {
      store(amax + c, max(load<VecI>(amax + c), magnitude_bits(load<VecF>(kv.v + j * dim + c))));
    }
  }
  for (int64_t c = 0; c < dim; ++c) {
    const Quantizer quantizer = make_quantizer(load<int32_t>(amax + c), levels, plan.amax_floor);
    kv.v_scale[c] = quantizer.scale;
    inverse[c] = quantizer.inverse;
  }
  for (int64_t j = 0; j < kv.kv_len; ++j) {
    float* row = kv.v + j * dim;
    for (int64_t c = 0; c < dim; c += kLanes) {
      const VecF factor = load<VecF>(inverse + c);
      const VecF scaled = load<VecF>(row + c) * factor;
      const VecF rounded =
          plan.pv == PvKind::kE4m3 ? round_to_e4m3(scaled) : round_to_integer(scaled);
      store(row + c, factor == 0.0f ? VecF{} : rounded);
    }
  }
}

void prepare_kv(const Plan& plan, const KvHead& kv, const Workspace& work) {
  prepare_keys(plan, kv, work);
  prepare_values(plan, kv, work);
}

// The block's rows, rounded to FP16 as the GPU kernels receive them, to the QK operand in
// work.rows (float) or work.bytes, with q_scale including softmax_scale and log2(e), so that
// logits come out in powers of two. With smooth_q the mean of the rows, in work.channel, is
// subtracted first.
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
  Quantizer quantizers[kMaxQueryBlock];
  const uint8_t* group_of = plan.q_group + block.first_in_block;
  group_quantizers(plan, work.rows, block.rows, dim, group_of, plan.num_q_groups, quantizers);
  for (int64_t r = 0; r < block.rows; ++r) {
    const Quantizer& quantizer = quantizers[group_of[r]];
    quantize_row(work.rows + r * dim, dim, quantizer);
    work.q_scale[r] = quantizer.scale * log2_scale;
    if (!kPacksBytes) continue;
    // K bytes carry +128: their products with this row are too large by 128 times the row's sum.
    VecI sum = {};
    for (int64_t c = 0; c < dim; c += kLanes) {
      sum += to_integer(load<VecF>(work.rows + r * dim + c));
    }
    work.q_offset[r] = -kByteOffset * reduce_sum(sum);
  }
  if (kPacksBytes) narrow(work.rows, block.rows * dim, 0, work.bytes);
}
