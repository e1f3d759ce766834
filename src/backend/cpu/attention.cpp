#include "backend/cpu/attention.h"

#include <omp.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "backend/cpu/aligned_buffer.h"
#include "backend/cpu/attention_kernels.h"
#include "backend/cpu/attention_plan.h"
#include "base/error.h"

namespace sagelm::cpu {
namespace {

constexpr int64_t kAlignFloats = 16;  // 64 bytes

// Prepared operands are kept for as many heads at once as fit here (at least one): enough to
// share the preparation between threads and query blocks.
constexpr int64_t kWaveFloats = int64_t{16} << 20;

// Calls whose longest sequence has at most this many query rows run one head to a thread; so do
// those of so many heads for every thread that none has long to wait for the others.
constexpr int64_t kDecodeRows = 16;
constexpr double kUnitsPerThread = 8;

// Operations (roughly) that are worth waking one more thread for, some microseconds' worth.
constexpr double kThreadWork = 32768;

// Hands out consecutive aligned pieces; with a null base it only adds up what they need.
class Carver {
 public:
  explicit Carver(float* base) : base_(base) {}
  float* take(int64_t floats) {
    float* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (floats + kAlignFloats - 1) / kAlignFloats * kAlignFloats;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  float* base_;
  int64_t used_ = 0;
};

Workspace carve_workspace(Carver& carver, int64_t dim) {
  static_assert(kMaxQueryBlock >= kMaxKeyTile);
  Workspace work;
  work.rows = carver.take(kMaxQueryBlock * dim);
  work.bytes = reinterpret_cast<int8_t*>(carver.take(kMaxQueryBlock * dim / 4));
  work.integers = carver.take(kMaxQueryBlock * dim);
  work.tile_k = carver.take(kMaxKeyTile * dim);
  work.tile_v = carver.take(kMaxKeyTile * dim);
  work.tile_scale = carver.take(kMaxKeyTile);
  work.tile_shift = carver.take(kMaxKeyTile);
  work.out = carver.take(kMaxQueryBlock * dim);
  work.scores = carver.take(kRowBlock * kMaxKeyTile);
  work.bias = carver.take(kMaxKeyTile);
  work.channel = carver.take(2 * dim);
  work.q_scale = carver.take(kMaxQueryBlock);
  work.q_sum = carver.take(kMaxQueryBlock);
  work.row_max = carver.take(kMaxQueryBlock);
  work.row_sum = carver.take(kMaxQueryBlock);
  work.q_offset = reinterpret_cast<int32_t*>(carver.take(kMaxQueryBlock));
  return work;
}

int64_t padded_dim(const Plan& plan, int64_t head_dim) {
  return page_shape(plan.int4_keys ? KvType::kInt4 : KvType::kInt8, head_dim).dim;
}

KvHead carve_kv(Carver& carver, const KernelTable& kernels, const Plan& plan,
                const AttentionArgs& args, int64_t head) {
  KvHead kv = {};
  kv.head = head;
  kv.head_dim = args.head_dim;
  kv.dim = padded_dim(plan, args.head_dim);
  kv.kv_len = args.kv_len;
  if (plan.paged) {
    kv.k_pages = &args.quantized.tail_k;
    kv.v_pages = &args.quantized.tail_v;
    kv.page_size = kPageTokens;
    kv.first_prepared = args.kv_len / kPageTokens * kPageTokens;
    const PageShape shape =
        page_shape(plan.int4_keys ? KvType::kInt4 : KvType::kInt8, args.head_dim);
    kv.page_bytes = shape.operand_bytes();
    kv.page_scales = shape.scales;
    kv.operands = args.quantized.operands;
    kv.scales = args.quantized.scales;
    kv.page_ids = args.quantized.pages.data();
    kv.num_kv_heads = args.num_kv_heads;
    kv.mean = args.quantized.mean;
  } else {
    kv.k_pages = args.kv.k_pages.data();
    kv.v_pages = args.kv.v_pages.data();
    kv.page_size = args.kv.page_size;
  }
  const int64_t prepared = args.kv_len - kv.first_prepared;
  const int64_t keys = (prepared + plan.key_tile - 1) / plan.key_tile * plan.key_tile;
  const bool bytes = kernels.packs_bytes && plan.qk_levels != 0 && !plan.paged;
  kv.k = carver.take(bytes ? keys * kv.dim / 4 : keys * kv.dim);
  kv.k_exact = plan.smooth_q ? carver.take(keys * kv.dim) : nullptr;
  kv.k_scale = carver.take(keys);
  kv.k_mean = carver.take(kv.dim);
  kv.v = carver.take(keys * kv.dim);
  kv.v_scale = carver.take(kv.dim);
  return kv;
}

void check(const AttentionArgs& args, size_t index, KvType cache) {
  const auto refuse = [index](std::string_view what) {
    fail("attention of sequence {} of the batch: {}", index, what);
  };
  if (args.q_len < 0 || args.kv_len < 0 || args.kv_len > std::numeric_limits<int32_t>::max() ||
      args.q_len > std::numeric_limits<int32_t>::max()) {
    refuse(fmt::format("lengths {} and {} are out of range", args.q_len, args.kv_len));
  }
  if (args.head_dim < 1 || args.head_dim > kMaxHeadDim) {
    refuse(fmt::format("head size {} is not in 1..{}", args.head_dim, kMaxHeadDim));
  }
  if (args.num_heads < 1 || args.num_kv_heads < 1 || args.num_heads % args.num_kv_heads != 0) {
    refuse(
        fmt::format("{} heads cannot share {} key/value heads", args.num_heads, args.num_kv_heads));
  }
  if (!std::isfinite(args.softmax_scale)) refuse("the softmax scale is not finite");
  if (args.q_len == 0) return;
  const int64_t width = args.num_heads * args.head_dim;
  if (args.q == nullptr || args.out == nullptr) refuse("no query or no output");
  if (args.q_row_stride < width || args.out_row_stride < width) {
    refuse(fmt::format("row strides {} and {} are less than the {} elements of a row",
                       args.q_row_stride, args.out_row_stride, width));
  }
  if (args.kv_len == 0) return;
  if (is_quantized(cache)) {
    const QuantizedKv& kv = args.quantized;
    const int64_t full = args.kv_len / kPageTokens;
    if (full > static_cast<int64_t>(kv.pages.size())) {
      refuse(fmt::format("{} pages of {} tokens do not hold {} keys", kv.pages.size(), kPageTokens,
                         args.kv_len));
    }
    if (full > 0 && (kv.operands == nullptr || kv.scales == nullptr || kv.mean == nullptr)) {
      refuse("the quantized pages are missing");
    }
    if (args.kv_len % kPageTokens != 0 && (kv.tail_k == nullptr || kv.tail_v == nullptr)) {
      refuse("the tail of the cache is missing");
    }
    return;
  }
  const auto pages = static_cast<int64_t>(std::min(args.kv.k_pages.size(), args.kv.v_pages.size()));
  if (args.kv.page_size < 1 || (args.kv_len - 1) / args.kv.page_size >= pages) {
    refuse(fmt::format("{} pages of {} tokens do not hold {} keys", pages, args.kv.page_size,
                       args.kv_len));
  }
  const int64_t used = (args.kv_len - 1) / args.kv.page_size + 1;
  for (int64_t p = 0; p < used; ++p) {
    if (args.kv.k_pages[static_cast<size_t>(p)] == nullptr ||
        args.kv.v_pages[static_cast<size_t>(p)] == nullptr) {
      refuse(fmt::format("page {} is missing", p));
    }
  }
}

// Rows before the first that sees a key: 0, or all of them.
int64_t count_masked_rows(const AttentionArgs& args) {
  if (args.kv_len == 0) return args.q_len;
  return args.causal ? std::clamp<int64_t>(args.q_len - args.kv_len, 0, args.q_len) : 0;
}

void clear_masked_rows(const AttentionArgs& args) {
  const int64_t masked = count_masked_rows(args);
  for (int64_t r = 0; r < masked; ++r) {
    std::fill_n(args.out + r * args.out_row_stride, args.num_heads * args.head_dim, 0.0f);
  }
  if (args.lse == nullptr) return;
  for (int64_t h = 0; h < args.num_heads; ++h) {
    std::fill_n(args.lse + h * args.q_len, masked, -std::numeric_limits<float>::infinity());
  }
}

// Appends the query blocks of one head, the longest rows first: they take longest.
void add_query_blocks(const Plan& plan, const AttentionArgs& args, const KvHead& kv, int64_t head,
                      std::vector<QueryBlock>& blocks) {
  const int64_t masked = count_masked_rows(args);
  const int64_t first_position = args.causal ? args.kv_len - args.q_len : 0;
  for (int64_t end = args.q_len; end > masked;) {
    const int64_t last = first_position + end - 1;  // position, not negative
    const int64_t block_start = last / plan.query_block * plan.query_block;
    const int64_t begin = std::max(masked, block_start - first_position);
    const int64_t position = first_position + begin;
    blocks.push_back(
        {&kv, args.q + begin * args.q_row_stride + head * args.head_dim, args.q_row_stride,
         args.out + begin * args.out_row_stride + head * args.head_dim, args.out_row_stride,
         args.lse == nullptr ? nullptr : args.lse + head * args.q_len + begin, end - begin,
         position - block_start, position, args.softmax_scale, args.causal});
    end = begin;
  }
}

struct Unit {  // one key/value head of one sequence
  const AttentionArgs* args;
  int64_t kv_head;
  int64_t floats;  // of its prepared operands
  int64_t first_block;
  int64_t end_block;
};

// Kept between calls so that a decode step allocates nothing.
struct Scratch {
  AlignedBuffer<float> operands;
  AlignedBuffer<float> workspaces;
  std::vector<Unit> units;
  std::vector<KvHead> heads;  // of units
  std::vector<QueryBlock> blocks;
  std::vector<Workspace> threads;
};

// Lists the query blocks of every unit; the operands they point to are carved later.
void list_blocks(const Plan& plan, Scratch& scratch) {
  scratch.blocks.clear();
  scratch.heads.resize(scratch.units.size());
  for (size_t u = 0; u < scratch.units.size(); ++u) {
    Unit& unit = scratch.units[u];
    const int64_t group = unit.args->num_heads / unit.args->num_kv_heads;
    unit.first_block = static_cast<int64_t>(scratch.blocks.size());
    for (int64_t g = 0; g < group; ++g) {
      add_query_blocks(plan, *unit.args, scratch.heads[u], unit.kv_head * group + g,
                       scratch.blocks);
    }
    unit.end_block = static_cast<int64_t>(scratch.blocks.size());
  }
}

// Prefill: as many units as kWaveFloats holds are prepared in parallel, then all their query
// blocks are computed in parallel.
void run_waves(const KernelTable& kernels, const Plan& plan, Scratch& scratch) {
  const std::vector<Unit>& units = scratch.units;
  for (size_t begin = 0; begin < units.size();) {
    int64_t floats = 0;
    size_t end = begin;
    while (end < units.size() && (end == begin || floats + units[end].floats <= kWaveFloats)) {
      floats += units[end++].floats;
    }
    Carver carver(scratch.operands.reserve(floats));
    for (size_t u = begin; u < end; ++u) {
      scratch.heads[u] = carve_kv(carver, kernels, plan, *units[u].args, units[u].kv_head);
    }
    const auto threads = static_cast<int>(scratch.threads.size());
#pragma omp parallel num_threads(threads)
    {
      const Workspace& work = scratch.threads[static_cast<size_t>(omp_get_thread_num())];
#pragma omp for schedule(dynamic, 1)
      for (size_t u = begin; u < end; ++u) kernels.prepare_kv(plan, scratch.heads[u], work);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = units[begin].first_block; i < units[end - 1].end_block; ++i) {
        kernels.attend(plan, scratch.blocks[static_cast<size_t>(i)], work);
      }
    }
    begin = end;
  }
}

// Decode and many short sequences: one thread prepares and uses a unit's operands while its cache
// holds them, and reuses the memory for its next unit.
void run_units(const KernelTable& kernels, const Plan& plan, Scratch& scratch) {
  int64_t floats = 0;
  for (const Unit& unit : scratch.units) floats = std::max(floats, unit.floats);
  const size_t count = scratch.units.size();
  const auto threads = static_cast<int>(std::min(scratch.threads.size(), count));
  float* operands = scratch.operands.reserve(floats * threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (size_t u = 0; u < count; ++u) {
    const int thread = omp_get_thread_num();
    const Workspace& work = scratch.threads[static_cast<size_t>(thread)];
    const Unit& unit = scratch.units[u];
    Carver carver(operands + thread * floats);
    scratch.heads[u] = carve_kv(carver, kernels, plan, *unit.args, unit.kv_head);
    kernels.prepare_kv(plan, scratch.heads[u], work);
    for (int64_t i = unit.first_block; i < unit.end_block; ++i) {
      kernels.attend(plan, scratch.blocks[static_cast<size_t>(i)], work);
    }
  }
}

bool cpu_has_avx2() {
#if defined(__x86_64__)
  // F16C from its CPUID bit: clang's __builtin_cpu_supports does not know the name.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0 &&
         __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
#else
  return false;
#endif
}

bool cpu_has_avx512() {
#if defined(__x86_64__)
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") != 0 &&
         __builtin_cpu_supports("avx512bw") != 0 && __builtin_cpu_supports("avx512vl") != 0 &&
         __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512vnni") != 0;
#else
  return false;
#endif
}

const KernelTable& selected_kernels() {
  static const KernelTable& selected = []() -> const KernelTable& {
    const auto available = available_attention_kernels();
    const char* forced = std::getenv("SAGELM_CPU_ISA");
    if (forced == nullptr || *forced == '\0') return *available.front();
    for (const KernelTable* kernels : available) {
      if (std::string_view(forced) == kernels->name) return *kernels;
    }
    std::string names;
    for (const KernelTable* kernels : available) {
      names += fmt::format("{}{}", names.empty() ? "" : ", ", kernels->name);
    }
    fail_usage("SAGELM_CPU_ISA is '{}'; on this machine it can be one of {}", forced, names);
  }();
  return selected;
}

}  // namespace

std::span<const KernelTable* const> available_attention_kernels() {
  static const std::vector<const KernelTable*> tables = [] {
    std::vector<const KernelTable*> found;
    if (cpu_has_avx512()) found.push_back(attention_kernels_avx512());
    if (cpu_has_avx2()) found.push_back(attention_kernels_avx2());
    found.push_back(attention_kernels_generic());
    std::erase(found, nullptr);
    return found;
  }();
  return tables;
}

void attention_with(const KernelTable& kernels, std::span<const AttentionArgs> sequences,
                    const AttentionSpec& spec, KvType cache) {
  const Plan plan = make_plan(spec, cache);
  thread_local Scratch scratch;
  scratch.units.clear();
  int64_t dim = 0;
  int64_t longest = 0;
  double work = 0;
  double most = 0;  // of a unit
  for (size_t i = 0; i < sequences.size(); ++i) {
    const AttentionArgs& args = sequences[i];
    check(args, i, cache);
    clear_masked_rows(args);
    if (count_masked_rows(args) == args.q_len) continue;
    Carver measure(nullptr);
    carve_kv(measure, kernels, plan, args, 0);
    for (int64_t head = 0; head < args.num_kv_heads; ++head) {
      scratch.units.push_back({&args, head, measure.used(), 0, 0});
    }
    dim = std::max(dim, padded_dim(plan, args.head_dim));
    longest = std::max(longest, args.q_len);
    const auto heads = static_cast<double>(args.num_kv_heads);
    const double unit = static_cast<double>(measure.used()) +
                        static_cast<double>(args.num_heads * padded_dim(plan, args.head_dim)) /
                            (16 * heads) * static_cast<double>(args.q_len) *
                            static_cast<double>(args.kv_len);
    work += heads * unit;
    most = std::max(most, unit);
  }
  if (scratch.units.empty()) return;

  Carver measure(nullptr);
  carve_workspace(measure, dim);
  const auto threads =
      static_cast<int>(std::min<double>(omp_get_max_threads(), 1 + work / kThreadWork));
  Carver carver(scratch.workspaces.reserve(measure.used() * threads));
  scratch.threads.clear();
  for (int t = 0; t < threads; ++t) scratch.threads.push_back(carve_workspace(carver, dim));

  list_blocks(plan, scratch);
  if (longest <= kDecodeRows || most * kUnitsPerThread * threads <= work) {
    run_units(kernels, plan, scratch);
  } else {
    run_waves(kernels, plan, scratch);
  }
}

void attention(std::span<const AttentionArgs> sequences, const AttentionSpec& spec, KvType cache) {
  attention_with(selected_kernels(), sequences, spec, cache);
}

void quantize_page(KvType type, const uint16_t* k, const uint16_t* v, const float* mean,
                   int64_t head_dim, uint8_t* operands, float* scales) {
  selected_kernels().quantize_page(type, k, v, mean, head_dim, operands, scales);
}

const char* attention_isa() { return selected_kernels().name; }

}  // namespace sagelm::cpu
