#include "backend/cpu/amx.h"

#include <omp.h>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define SAGELM_AMX
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "backend/cpu/ops.h"
#include "base/error.h"

namespace sagelm::cpu {
namespace {

// A tile is 16 rows of 64 bytes. One of activations is [16 rows][32 k], one of weights [16 pairs of
// k][16 features][2], one of results [16 rows][16 features] in float32.
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileDepth = 32;
constexpr int64_t kTileHalves = kTileRows * kTileDepth;  // BF16 numbers
constexpr int64_t kTileFloats = kTileRows * kTileRows;

// Results are computed in blocks of two by two tiles: every tile that is loaded is used twice, and
// four sums that do not wait for each other keep the unit busy.
constexpr int64_t kBlock = 2 * kTileRows;

// Of a block's split activations: a line more than the tiles take, so that the lines of a row of x
// do not all fall into one set of the first-level cache.
constexpr int64_t kDepthStride = 4 * kTileHalves + 32;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Weights: [panels][depth][2] tiles, a panel being 32 features, or 16 of gate and the same 16 of
// up. Split activations: [blocks][depth][high, low][2] tiles, and room.
int64_t depth_of(const AmxWeight& weight) { return divide_up(weight.in_features, kTileDepth); }
int64_t panel_features(const AmxWeight& weight) { return weight.gate_up ? kTileRows : kBlock; }
int64_t panels_of(const AmxWeight& weight) {
  return divide_up(weight.out_features, panel_features(weight));
}

// Row i of tensor becomes the feature where(i) of weight's panels, 32 to a panel.
template <typename Where>
void place(const TensorView& tensor, AmxWeight& weight, const Where& where) {
  const int64_t in = weight.in_features;
  const int64_t panel_size = 2 * depth_of(weight) * kTileHalves;
#pragma omp parallel for
  for (int64_t row = 0; row < tensor.shape.at(0); ++row) {
    const int64_t at = where(row);
    const std::byte* from = tensor.data + 2 * row * in;
    uint16_t* to = weight.tiles.data() + at / kBlock * panel_size +
                   at % kBlock / kTileRows * kTileHalves + at % kTileRows * 2;
    for (int64_t k = 0; k < in; k += 2) {
      std::memcpy(to + k / kTileDepth * 2 * kTileHalves + k % kTileDepth / 2 * kTileDepth,
                  from + 2 * k, k + 1 < in ? 4 : 2);
    }
  }
}

AmxWeight empty_weight(int64_t in, int64_t out, bool gate_up) {
  AmxWeight weight;
  weight.in_features = in;
  weight.out_features = out;
  weight.gate_up = gate_up;
  const int64_t count = panels_of(weight) * depth_of(weight) * 2 * kTileHalves;
  weight.bytes = count * static_cast<int64_t>(sizeof(uint16_t));
  std::fill_n(weight.tiles.reserve(count), count, uint16_t{0});
  return weight;
}

#ifdef SAGELM_AMX

// Blocks that a thread multiplies with all its weights before it goes on: more would fetch the
// weights less often, but what is written would no longer stay in the second-level cache.
constexpr int64_t kChunk = 2;

int64_t block_numbers(const AmxWeight& weight) { return depth_of(weight) * kDepthStride; }

struct Range {
  int64_t begin;
  int64_t end;
};

Range part_of(int64_t count, int64_t parts, int64_t index) {
  return {count * index / parts, count * (index + 1) / parts};
}

struct Share {
  Range blocks;
  Range panels;
};

// Threads form a grid over blocks of rows and panels of features, of the shape that takes least
// time: a thread splits its blocks (about two panels' work each), and fetches its panels (about one
// block's work each).
Share share_of(int64_t blocks, int64_t panels, int64_t threads, int64_t index) {
  int64_t across = 1;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t columns = 1; columns <= threads; ++columns) {
    if (threads % columns != 0) continue;
    const int64_t own_blocks = divide_up(blocks, threads / columns);
    const int64_t own_panels = divide_up(panels, columns);
    const int64_t cost = own_blocks * (own_panels + 2) + own_panels;
    if (cost < least) {
      least = cost;
      across = columns;
    }
  }
  return {part_of(blocks, threads / across, index / across),
          part_of(panels, across, index % across)};
}

#define SAGELM_AMX_TARGET \
  __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512bf16")))

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  std::array<uint8_t, 14> reserved = {};
  std::array<uint16_t, 16> row_bytes = {};
  std::array<uint8_t, 16> rows = {};
};

// For products of 0 to 16 rows: tiles 0 to 3 are results, 4 and 5 weights, 6 and 7 activations.
constexpr std::array<TileConfig, kTileRows + 1> make_configs() {
  std::array<TileConfig, kTileRows + 1> configs = {};
  for (size_t rows = 0; rows < configs.size(); ++rows) {
    for (size_t tile = 0; tile < 8; ++tile) {
      const bool is_weight = tile == 4 || tile == 5;
      configs[rows].row_bytes[tile] = 64;
      configs[rows].rows[tile] = static_cast<uint8_t>(is_weight ? kTileRows : rows);
    }
  }
  return configs;
}
constexpr std::array<TileConfig, kTileRows + 1> kConfigs = make_configs();

class TileSession {
 public:
  explicit SAGELM_AMX_TARGET TileSession(int64_t rows) {
    _tile_loadconfig(&kConfigs[static_cast<size_t>(rows)]);
  }
  SAGELM_AMX_TARGET ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

SAGELM_AMX_TARGET __m512 widen(__m256i bf16) {
  const __m512i bits = _mm512_maskz_cvtepu16_epi32(0xFFFF, bf16);
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xFFFF, bits, 16));
}

SAGELM_AMX_TARGET __m512i to_bf16(__m512 first, __m512 second) {
  return reinterpret_cast<__m512i>(_mm512_maskz_cvtne2ps_pbh(~0u, second, first));
}

// high + low = x to 16 significant bits: high = bf16(x), low = bf16(x - high), nearest even. 32
// numbers of each go to a row of a tile.
SAGELM_AMX_TARGET void split_row(const float* x, int64_t in, uint16_t* high, uint16_t* low) {
  for (int64_t k = 0; k < in; k += kTileDepth) {
    const uint32_t present = in - k >= kTileDepth ? ~0u : (1u << (in - k)) - 1;
    const __m512 first = _mm512_maskz_loadu_ps(static_cast<__mmask16>(present), x + k);
    const __m512 second = _mm512_maskz_loadu_ps(static_cast<__mmask16>(present >> 16), x + k + 16);
    const __m512i top = to_bf16(first, second);
    const __m512 first_top = widen(_mm512_maskz_extracti64x4_epi64(0xFF, top, 0));
    const __m512 second_top = widen(_mm512_maskz_extracti64x4_epi64(0xFF, top, 1));
    _mm512_store_si512(high, top);
    _mm512_store_si512(low,
                       to_bf16(_mm512_sub_ps(first, first_top), _mm512_sub_ps(second, second_top)));
    high += kDepthStride;
    low += kDepthStride;
  }
}

// Half a tile's lines of the first-level cache.
constexpr int64_t kFetch = kTileHalves / 2;

SAGELM_AMX_TARGET void fetch(const uint16_t* half_tile) {
  for (int64_t line = 0; line < kFetch; line += 32) _mm_prefetch(half_tile + line, _MM_HINT_T0);
}

// Where four tiles of results go: strides are in floats, between rows, between the halves of 16
// rows and between those of 16 features.
struct Destination {
  float* data;
  int64_t row_stride;
  int64_t row_half;
  int64_t feature_half;
};

// to [row half][feature half] = the tiles of a block times those of a panel; the lower row half
// only if kTwo. No tile is multiplied into before its last sum is there: four sums take turns.
//
// Every tile instruction is followed by others that fetch what the next step reads. Without them
// tile instructions take twice as long while another hyperthread of the core is busy, whether
// anything is missing in the cache or not (docs/tuning-log.md).
template <bool kTwo>
SAGELM_AMX_TARGET void multiply_block(const uint16_t* halves, const uint16_t* panel, int64_t depth,
                                      const float* out, int64_t out_stride, const Destination& to) {
  constexpr int64_t kStride = 64;  // bytes
  const int64_t rows_a_step = divide_up(kTwo ? kBlock : kTileRows, depth);
  // GCC does not know that tiles are loaded from what was written before.
  std::atomic_signal_fence(std::memory_order_seq_cst);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < depth; ++k) {
    const uint16_t* next_halves = halves + kDepthStride;
    const uint16_t* next_panel = panel + 2 * kTileHalves;
    _tile_loadd(4, panel, kStride);
    fetch(next_panel);
    _tile_loadd(5, panel + kTileHalves, kStride);
    fetch(next_panel + kFetch);
    _tile_loadd(6, halves, kStride);
    fetch(next_panel + 2 * kFetch);
    if constexpr (kTwo) {
      _tile_loadd(7, halves + kTileHalves, kStride);
      fetch(next_halves + 2 * kFetch);
    }
    _tile_dpbf16ps(0, 6, 4);
    fetch(next_panel + 3 * kFetch);
    _tile_dpbf16ps(1, 6, 5);
    fetch(next_halves);
    if constexpr (kTwo) {
      _tile_dpbf16ps(2, 7, 4);
      fetch(next_halves + 3 * kFetch);
      _tile_dpbf16ps(3, 7, 5);
      fetch(next_halves + 6 * kFetch);
    }
    _tile_loadd(6, halves + 2 * kTileHalves, kStride);
    fetch(next_halves + kFetch);
    if constexpr (kTwo) {
      _tile_loadd(7, halves + 3 * kTileHalves, kStride);
      fetch(next_halves + 7 * kFetch);
    }
    _tile_dpbf16ps(0, 6, 4);
    fetch(next_halves + 4 * kFetch);
    _tile_dpbf16ps(1, 6, 5);
    fetch(next_halves + 5 * kFetch);
    if constexpr (kTwo) {
      _tile_dpbf16ps(2, 7, 4);
      fetch(next_panel + 4 * kFetch);
      _tile_dpbf16ps(3, 7, 5);
    }
    for (int64_t row = 0; row < rows_a_step; ++row, out += out_stride) {
      __builtin_prefetch(out, 1);
      __builtin_prefetch(out + kTileRows, 1);
    }
    halves = next_halves;
    panel = next_panel;
  }
  const int64_t row_bytes = to.row_stride * static_cast<int64_t>(sizeof(float));
  _tile_stored(0, to.data, row_bytes);
  _tile_stored(1, to.data + to.feature_half, row_bytes);
  if constexpr (kTwo) {
    _tile_stored(2, to.data + to.row_half, row_bytes);
    _tile_stored(3, to.data + to.row_half + to.feature_half, row_bytes);
  }
}

// Adds a tile of sums to out, or overwrites out: what of it lies in `rows` and `columns`.
SAGELM_AMX_TARGET void write_tile(const float* sums, int64_t rows, int64_t columns, bool accumulate,
                                  float* out, int64_t stride) {
  if (columns <= 0) return;
  const auto present = static_cast<__mmask16>(columns >= kTileRows ? 0xFFFFu : (1u << columns) - 1);
  for (int64_t row = 0; row < std::min(rows, kTileRows); ++row, out += stride) {
    __m512 values = _mm512_load_ps(sums + row * kTileRows);
    if (accumulate) values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(present, out));
    _mm512_mask_storeu_ps(out, present, values);
  }
}

struct Product {
  const float* x;
  int64_t rows;
  const RowNorm* norm;
  const AmxWeight* weight;
  float* out;
  bool accumulate;
};

// Room of one thread.
struct Workspace {
  float* normed;     // a row
  uint16_t* halves;  // blocks of a chunk
};

void split_block(const Product& product, int64_t block, const Workspace& work, uint16_t* halves) {
  const int64_t in = product.weight->in_features;
  const int64_t first = block * kBlock;
  const int64_t count = std::min(kBlock, product.rows - first);
  // Of fewer rows than a tile has, no others are loaded.
  if (count < kBlock && product.rows >= kTileRows)
    std::fill_n(halves, block_numbers(*product.weight), uint16_t{0});
  for (int64_t row = 0; row < count; ++row) {
    const float* x = product.x + (first + row) * in;
    if (product.norm != nullptr) {
      ops().rmsnorm(x, product.norm->weight, in, product.norm->eps, work.normed);
      x = work.normed;
    }
    uint16_t* high = halves + row / kTileRows * kTileHalves + row % kTileRows * kTileDepth;
    split_row(x, in, high, high + 2 * kTileHalves);
  }
}

void finish_block(const Product& product, int64_t block, int64_t panel, const float* sums) {
  const AmxWeight& weight = *product.weight;
  const int64_t first = panel * panel_features(weight);
  for (int64_t half = 0; half < 2; ++half, sums += 2 * kTileFloats) {
    const int64_t row = block * kBlock + half * kTileRows;
    const int64_t rows = product.rows - row;
    if (rows <= 0) return;
    const int64_t columns = weight.out_features - first;
    float* out = product.out + row * weight.out_features + first;
    if (weight.gate_up) {
      alignas(64) float activated[kTileFloats];
      ops().swiglu(sums, sums + kTileFloats, kTileFloats, activated);
      write_tile(activated, rows, columns, false, out, weight.out_features);
    } else {
      write_tile(sums, rows, columns, product.accumulate, out, weight.out_features);
      write_tile(sums + kTileFloats, rows, columns - kTileRows, product.accumulate, out + kTileRows,
                 weight.out_features);
    }
  }
}

// What one thread does.
void run_share(const Product& product, const Share& share, const Workspace& work) {
  const AmxWeight& weight = *product.weight;
  const int64_t depth = depth_of(weight);
  const int64_t block_size = block_numbers(weight);
  const TileSession session(std::min(product.rows, kTileRows));
  alignas(64) float sums[4 * kTileFloats] = {};
  for (int64_t begin = share.blocks.begin; begin < share.blocks.end;) {
    const int64_t end = std::min(share.blocks.end, begin + kChunk);
    for (int64_t block = begin; block < end; ++block) {
      split_block(product, block, work, work.halves + (block - begin) * block_size);
    }
    for (int64_t panel = share.panels.begin; panel < share.panels.end; ++panel) {
      const uint16_t* tiles = weight.tiles.data() + panel * depth * 2 * kTileHalves;
      for (int64_t block = begin; block < end; ++block) {
        const int64_t rows = product.rows - block * kBlock;
        const int64_t first = panel * panel_features(weight);
        const int64_t stride = weight.out_features;
        float* out = product.out + block * kBlock * stride + first;
        const bool whole = rows >= kBlock && stride - first >= kBlock;
        const bool in_place = whole && !weight.gate_up && !product.accumulate;
        const Destination to = in_place
                                   ? Destination{out, stride, kTileRows * stride, kTileRows}
                                   : Destination{sums, kTileRows, 2 * kTileFloats, kTileFloats};
        (rows > kTileRows ? multiply_block<true>
                          : multiply_block<false>)(work.halves + (block - begin) * block_size,
                                                   tiles, depth, out, stride, to);
        if (in_place) continue;
        finish_block(product, block, panel, sums);
      }
    }
    begin = end;
  }
}

bool may_use_tiles() {
  const char* lower = std::getenv("SAGELM_CPU_ISA");
  if (lower != nullptr && *lower != '\0') return false;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
  if (__builtin_cpu_supports("avx512f") == 0 || __builtin_cpu_supports("avx512bw") == 0 ||
      __builtin_cpu_supports("avx512vl") == 0 || __builtin_cpu_supports("avx512bf16") == 0) {
    return false;
  }
  // Linux saves the large state of tiles only for processes that ask for it.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif  // SAGELM_AMX

}  // namespace

AmxWeight AmxEngine::pack(std::span<const TensorView> stacked) {
  int64_t out = 0;
  for (const TensorView& tensor : stacked) out += tensor.shape.at(0);
  AmxWeight weight = empty_weight(stacked.front().shape.at(1), out, false);
  int64_t first = 0;
  for (const TensorView& tensor : stacked) {
    place(tensor, weight, [first](int64_t row) { return first + row; });
    first += tensor.shape.at(0);
  }
  return weight;
}

AmxWeight AmxEngine::pack_gate_up(const TensorView& gate, const TensorView& up) {
  AmxWeight weight = empty_weight(gate.shape.at(1), gate.shape.at(0), true);
  const auto beside = [](int64_t row) { return row / kTileRows * kBlock + row % kTileRows; };
  place(gate, weight, beside);
  place(up, weight, [&](int64_t row) { return beside(row) + kTileRows; });
  return weight;
}

#ifdef SAGELM_AMX

bool has_amx() {
  static const bool may = may_use_tiles();
  return may;
}

void AmxEngine::run(const float* x, int64_t rows, const RowNorm* norm, const AmxWeight& weight,
                    float* out, bool accumulate) {
  const Product product{x, rows, norm, &weight, out, accumulate};
  const int64_t blocks = divide_up(rows, kBlock);
  const int64_t row = depth_of(weight) * kTileDepth;
  const int64_t size = std::min(blocks, kChunk) * block_numbers(weight);
  float* normed = normed_.reserve(row * omp_get_max_threads());
  uint16_t* halves = halves_.reserve(size * omp_get_max_threads());
#pragma omp parallel
  {
    const int64_t thread = omp_get_thread_num();
    const Share share = share_of(blocks, panels_of(weight), omp_get_num_threads(), thread);
    run_share(product, share, {normed + thread * row, halves + thread * size});
  }
}

#else

bool has_amx() { return false; }

void AmxEngine::run(const float*, int64_t, const RowNorm*, const AmxWeight&, float*, bool) {
  fail("this build has no products for AMX");
}

#endif

}  // namespace sagelm::cpu
