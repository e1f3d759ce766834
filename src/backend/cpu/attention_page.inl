// Quantized pages of a KvType::kInt8 cache (QuantizedKv in attention.h): writing them, and one as a
// tile of attention. Included by attention_kernel.inl.

void write_page(const uint16_t* k, const uint16_t* v, const float* mean, int64_t head_dim,
                uint8_t* operands, float* scales) {
  static_assert(kMaxKeyTile == kPageTokens);
  const int64_t dim = (head_dim + kDimAlign - 1) / kDimAlign * kDimAlign;
  float padded_mean[kMaxHeadDim] = {};
  for (int64_t c = 0; c < head_dim; ++c) padded_mean[c] = mean[c];
  const auto smoothed = [&](int64_t key, int64_t c) {
    return load_channels(k + key * head_dim, c, head_dim) - load<VecF>(padded_mean + c);
  };
  VecI k_amax[kKeyGroups] = {};
  VecI v_amax = {};
  for (int64_t key = 0; key < kPageTokens; ++key) {
    VecI& group = k_amax[key / 4 % kKeyGroups];
    for (int64_t c = 0; c < dim; c += kLanes) {
      group = max(group, magnitude_bits(smoothed(key, c)));
      v_amax = max(v_amax, magnitude_bits(load_channels(v + key * head_dim, c, head_dim)));
    }
  }
  Quantizer quantizers[kKeyGroups];
  for (int64_t g = 0; g < kKeyGroups; ++g) {
    quantizers[g] = make_quantizer(reduce_max(k_amax[g]), recipe::kInt8Max, recipe::kAmaxFloor);
    scales[g] = quantizers[g].scale;
  }
  const Quantizer values = make_quantizer(reduce_max(v_amax), recipe::kE4m3Max, recipe::kAmaxFloor);
  scales[kKeyGroups] = values.scale;

  int8_t bytes[kPageTokens * kMaxHeadDim];
  uint8_t* codes = operands + kPageTokens * dim;
  for (int64_t key = 0; key < kPageTokens; ++key) {
    const Quantizer& quantizer = quantizers[key / 4 % kKeyGroups];
    for (int64_t c = 0; c < dim; c += kLanes) {
      store_product_bytes(bytes + key * dim + c, smoothed(key, c), quantizer.inverse, kByteOffset);
      const VecF value = load_channels(v + key * head_dim, c, head_dim);
      store_e4m3(codes + key * dim + c, round_to_e4m3(value * values.inverse));
    }
  }
  transpose(bytes, dim / 4, operands, kPageTokens, kPageTokens, dim / 4);
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

// The page that begins at first_key. Few rows decode the values as they use them.
TileView view_page(const KvHead& kv, const Workspace& work, int64_t first_key, bool few_rows) {
  const int64_t page = kv.page_ids[first_key / kPageTokens];
  const int64_t index = page * kv.num_kv_heads + kv.head;
  const int64_t size = kPageTokens * kv.dim;
  const uint8_t* keys = kv.operands + index * 2 * size;
  const float* scales = kv.scales + index * kPageScales;
  constexpr int64_t kPeriod = 4 * kKeyGroups;
  float scale_of[kPeriod];
  for (int64_t key = 0; key < kPeriod; ++key) scale_of[key] = scales[key / 4];
  for (int64_t key = 0; key < kPageTokens; key += kLanes) {
    store(work.tile_scale + key, load<VecF>(scale_of + key % kPeriod));
  }
  TileView tile = {};
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
    tile.v_codes = keys + size;
  } else {
    for (int64_t i = 0; i < size; i += kLanes) store(work.tile_v + i, load_e4m3(keys + size + i));
    tile.v = work.tile_v;
  }
  return tile;
}
