// Quantized pages of a KV cache (QuantizedKv in attention.h): writing them, and one as a tile of
// attention. Included by attention_kernel.inl.

// kLanes channels of a key, smoothed.
inline VecF smoothed(const uint16_t* k, const float* padded_mean, int64_t c, int64_t head_dim) {
  return load_channels(k, c, head_dim) - load<VecF>(padded_mean + c);
}

// INT8 keys and values are quantized in FP16 arithmetic: what an operation yields is rounded to
// FP16.
inline void write_int8_keys(const uint16_t* k, const float* padded_mean, int64_t head_dim,
                            int64_t dim, uint8_t* out, float* scales) {
  VecI amax[kKeyGroups] = {};
  for (int64_t key = 0; key < kPageTokens; ++key) {
    VecI& group = amax[key / 4 % kKeyGroups];
    for (int64_t c = 0; c < dim; c += kLanes) {
      const VecF x = round_to_half(smoothed(k + key * head_dim, padded_mean, c, head_dim));
      group = max(group, magnitude_bits(x));
    }
  }
  Quantizer quantizers[kKeyGroups];
  for (int64_t g = 0; g < kKeyGroups; ++g) {
    quantizers[g] = make_half_quantizer(reduce_max(amax[g]), recipe::kInt8Max);
    scales[g] = quantizers[g].scale;
  }
  int8_t bytes[kPageTokens * kMaxHeadDim];
  for (int64_t key = 0; key < kPageTokens; ++key) {
    const Quantizer& quantizer = quantizers[key / 4 % kKeyGroups];
    for (int64_t c = 0; c < dim; c += kLanes) {
      const VecF x = round_to_half(smoothed(k + key * head_dim, padded_mean, c, head_dim));
      store_product_bytes(bytes + key * dim + c, x, quantizer.inverse, kByteOffset);
    }
  }
  transpose(bytes, dim / 4, out, kPageTokens, kPageTokens, dim / 4);
}

// The nearest BF16 of a finite number.
inline float round_to_bf16(float x) {
  const auto bits = load<uint32_t>(&x);
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u;
  return load<float>(&rounded);
}

// Integers of a key plus kInt4Middle, and the word that says what they mean.
inline uint32_t write_int4_key(const float* row, int64_t dim, int8_t* out) {
  VecF top = load<VecF>(row);
  VecF low = -top;
  VecI magnitude = {};
  for (int64_t c = 0; c < dim; c += kLanes) {
    const VecF x = load<VecF>(row + c);
    top = max(x, top);
    low = max(-x, low);
    magnitude = max(magnitude, magnitude_bits(x));
  }
  if (reduce_max(magnitude) >= 0x7F800000) {
    __builtin_memset(out, 0, static_cast<size_t>(dim));
    return 0x7FC0;  // NaN
  }
  const float least = -reduce_max(low);
  float range = reduce_max(top) - least;
  if (range < recipe::kAmaxFloor) range = recipe::kAmaxFloor;
  const float step = round_to_bf16(range / recipe::kInt4Steps);
  const float middle = round_to_bf16(least + recipe::kInt4Middle * step);
  const float inverse = 1.0f / step;
  for (int64_t c = 0; c < dim; c += kLanes) {
    VecF x = round_to_integer((load<VecF>(row + c) - middle) * inverse) + recipe::kInt4Middle;
    x = max(x, VecF{});
    x = -max(-x, VecF{} - recipe::kInt4Steps);
    store_bytes(out + c, x, 0);
  }
  return load<uint32_t>(&step) >> 16 | load<uint32_t>(&middle);
}

inline void write_int4_keys(const uint16_t* k, const float* padded_mean, int64_t head_dim,
                            int64_t dim, uint8_t* out, float* words) {
  constexpr int64_t kHalf = kPageTokens / 2;
  int8_t bytes[kPageTokens * kMaxHeadDim];
  float row[kMaxHeadDim];
  for (int64_t key = 0; key < kPageTokens; ++key) {
    for (int64_t c = 0; c < dim; c += kLanes) {
      store(row + c, smoothed(k + key * head_dim, padded_mean, c, head_dim));
    }
    rotate_key(row, dim);
    store(words + key, write_int4_key(row, dim, bytes + key * dim));
  }
  for (int64_t i = 0; i < kHalf * dim; ++i) {
    bytes[i] = static_cast<int8_t>(bytes[i] | bytes[i + kHalf * dim] << 4);
  }
  transpose(bytes, dim / 4, out, kHalf, kHalf, dim / 4);
}

inline float write_values(const uint16_t* v, int64_t head_dim, int64_t dim, uint8_t* codes) {
  VecI amax = {};
  for (int64_t key = 0; key < kPageTokens; ++key) {
    for (int64_t c = 0; c < dim; c += kLanes) {
      amax = max(amax, magnitude_bits(load_channels(v + key * head_dim, c, head_dim)));
    }
  }
  const Quantizer values = make_half_quantizer(reduce_max(amax), recipe::kTileValueMax);
  const int run = recipe::value_run(static_cast<int>(head_dim));
  const float gain = recipe::value_gain(static_cast<int>(head_dim));
  float moves[kMaxHeadDim];
  for (int64_t key = 0; key < kPageTokens; ++key) {
    if (key % run == 0) zero_row(moves, dim);
    for (int64_t c = 0; c < dim; c += kLanes) {
      const VecF value =
          round_to_half(load_channels(v + key * head_dim, c, head_dim) * values.inverse);
      store_e4m3(codes + key * dim + c, round_values<true>(value, gain, moves + c));
    }
  }
  return values.scale;
}

void write_page(KvType type, const uint16_t* k, const uint16_t* v, const float* mean,
                int64_t head_dim, uint8_t* operands, float* scales) {
  static_assert(kMaxKeyTile == kPageTokens);
  float padded_mean[kMaxHeadDim] = {};
  for (int64_t c = 0; c < head_dim; ++c) padded_mean[c] = mean[c];
  const PageShape shape = page_shape(type, head_dim);
  if (type == KvType::kInt8) {
    write_int8_keys(k, padded_mean, head_dim, shape.dim, operands, scales);
  } else {
    for (int64_t g = 0; g < kKeyGroups; ++g) scales[g] = 0.0f;
    write_int4_keys(k, padded_mean, head_dim, shape.dim, operands, scales + kPageScales);
  }
  scales[kKeyGroups] = write_values(v, head_dim, shape.dim, operands + shape.key_bytes);
}

// The integers of a page's keys as floats, [dim][kPageTokens].
inline void expand_keys(const uint8_t* bytes, int64_t dim, float* out) {
  for (int64_t word = 0; word < dim / 4; ++word) {
    for (int64_t key = 0; key < kPageTokens; key += kLanes) {
      const VecI four = load<VecI>(bytes + 4 * (word * kPageTokens + key));
      for (int i = 0; i < 4; ++i) {
        const VecI integer = ((four >> (8 * i)) & 0xFF) - kByteOffset;
        store(out + (4 * word + i) * kPageTokens + key, __builtin_convertvector(integer, VecF));
      }
    }
  }
}

// INT4 keys as INT8 ones are stored.
inline void unpack_nibbles(const uint8_t* nibbles, int64_t dim, uint8_t* out) {
  constexpr int64_t kHalf = kPageTokens / 2;
  constexpr uint32_t kOffset = 0x01010101u * (kByteOffset - 8);
  for (int64_t word = 0; word < dim / 4; ++word) {
    for (int64_t key = 0; key < kHalf; key += kLanes) {
      const VecU pairs = load<VecU>(nibbles + 4 * (word * kHalf + key));
      uint8_t* to = out + 4 * (word * kPageTokens + key);
      store(to, (pairs & 0x0F0F0F0Fu) + kOffset);
      store(to + 4 * kHalf, (pairs >> 4 & 0x0F0F0F0Fu) + kOffset);
    }
  }
}

// The page that begins at first_key. Few rows decode the values as they use them.
TileView view_page(const Plan& plan, const KvHead& kv, const Workspace& work, int64_t first_key,
                   bool few_rows) {
  const int64_t page = kv.page_ids[first_key / kPageTokens];
  const int64_t index = page * kv.num_kv_heads + kv.head;
  const int64_t size = kPageTokens * kv.dim;
  const uint8_t* keys = kv.operands + index * kv.page_bytes;
  const uint8_t* values = keys + kv.page_bytes - size;
  const float* scales = kv.scales + index * kv.page_scales;
  TileView tile = {};
  if (plan.int4_keys) {
    for (int64_t key = 0; key < kPageTokens; key += kLanes) {
      const VecU word = load<VecU>(scales + kPageScales + key);
      const VecF step = as_float(word << 16);
      store(work.tile_scale + key, step);
      store(work.tile_shift + key, as_float(word & 0xFFFF0000u) / step);
    }
    tile.k_shift = work.tile_shift;
    // Queries are in work.bytes where bytes are multiplied, else in work.integers.
    auto* bytes = kPacksBytes ? reinterpret_cast<uint8_t*>(work.tile_k)
                              : reinterpret_cast<uint8_t*>(work.bytes);
    unpack_nibbles(keys, kv.dim, bytes);
    keys = bytes;
  } else {
    constexpr int64_t kPeriod = 4 * kKeyGroups;
    float scale_of[kPeriod];
    for (int64_t key = 0; key < kPeriod; ++key) scale_of[key] = scales[key / 4];
    for (int64_t key = 0; key < kPageTokens; key += kLanes) {
      store(work.tile_scale + key, load<VecF>(scale_of + key % kPeriod));
    }
  }
  tile.first_key = first_key;
  tile.integers = true;
  tile.k = keys;
  tile.k_scale = work.tile_scale;
  tile.v_scale = scales[kKeyGroups] / kE4m3Unit;
  if (!kPacksBytes) {
    expand_keys(keys, kv.dim, work.tile_k);
    tile.k = work.tile_k;
  }
  if (few_rows) {
    tile.v_codes = values;
  } else {
    for (int64_t i = 0; i < size; i += kLanes) store(work.tile_v + i, load_e4m3(values + i));
    tile.v = work.tile_v;
  }
  return tile;
}
