#include "backend/cpu/attention_plan.h"

#include <algorithm>
#include <bit>

#include "base/error.h"
#include "kernels/attention/recipe.h"

namespace sagelm::cpu {
namespace {

enum class Granularity : uint8_t { kToken, kBlock, kThread };

void set_groups(Plan& plan, Granularity granularity) {
  plan.query_block = 64;
  plan.key_tile = 64;
  switch (granularity) {
    case Granularity::kToken:
      plan.num_q_groups = plan.query_block;
      plan.num_k_groups = plan.key_tile;
      for (int r = 0; r < plan.query_block; ++r) plan.q_group[r] = static_cast<uint8_t>(r);
      for (int r = 0; r < plan.key_tile; ++r) plan.k_group[r] = static_cast<uint8_t>(r);
      return;
    case Granularity::kBlock:
      plan.query_block = 128;
      plan.num_q_groups = 1;
      plan.num_k_groups = 1;
      return;
    case Granularity::kThread:
      plan.num_q_groups = plan.query_block;
      plan.num_k_groups = 4;
      for (int r = 0; r < plan.query_block; ++r) plan.q_group[r] = static_cast<uint8_t>(r);
      for (int r = 0; r < plan.key_tile; ++r) plan.k_group[r] = static_cast<uint8_t>(r % 8 / 2);
      return;
  }
}

}  // namespace

Plan make_plan(const AttentionSpec& spec, KvType cache) {
  Plan plan = {};
  plan.amax_floor = recipe::kAmaxFloor;
  plan.qk_levels = static_cast<int32_t>(recipe::kInt8Max);
  plan.smooth_k = spec.smooth_k;
  switch (spec.variant) {
    case AttentionVariant::kFp16:
      set_groups(plan, Granularity::kToken);
      plan.qk_levels = 0;
      plan.smooth_k = false;
      plan.pv = PvKind::kHalf;
      break;
    case AttentionVariant::kSage1:
      set_groups(plan, Granularity::kThread);
      plan.pv = PvKind::kHalfAccHalf;
      break;
    case AttentionVariant::kSage1T:
    case AttentionVariant::kSage1VT:
      set_groups(plan, Granularity::kToken);
      break;
    case AttentionVariant::kSage1B:
    case AttentionVariant::kSage1VB:
      set_groups(plan, Granularity::kBlock);
      break;
    case AttentionVariant::kSage2_4b:
      plan.qk_levels = static_cast<int32_t>(recipe::kInt4Max);
      plan.smooth_q = true;
      [[fallthrough]];
    case AttentionVariant::kSage2_8b:
      set_groups(plan, Granularity::kThread);
      plan.pv = PvKind::kE4m3;
      break;
  }
  if (spec.variant == AttentionVariant::kSage1T || spec.variant == AttentionVariant::kSage1B) {
    plan.pv = PvKind::kHalfAccHalf;
  }
  if (spec.variant == AttentionVariant::kSage1VT || spec.variant == AttentionVariant::kSage1VB) {
    plan.pv = PvKind::kInt8;
  }
  if (is_quantized(cache)) {
    if (!reads_quantized_kv(spec.variant, cache)) {
      fail("attention {} cannot read {} KV cache: it holds what {} multiplies",
           attention_variant_name(spec.variant), cache == KvType::kInt8 ? "an 8-bit" : "a 4-bit",
           cache == KvType::kInt8 ? "sage2-8b" : "sage2");
    }
    plan.paged = true;
    plan.int4_keys = cache == KvType::kInt4;
    plan.qk_levels = static_cast<int32_t>(recipe::kInt8Max);  // of Q
    plan.smooth_q = false;
    set_groups(plan, Granularity::kToken);
    plan.key_tile = static_cast<int32_t>(kPageTokens);
  }
  return plan;
}

PageShape page_shape(KvType type, int64_t head_dim) {
  PageShape shape;
  if (type == KvType::kInt8) {
    shape.dim = (head_dim + kDimAlign - 1) / kDimAlign * kDimAlign;
    shape.key_bytes = kPageTokens * shape.dim;
    shape.scales = kPageScales;
  } else {
    shape.dim = static_cast<int64_t>(
        std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(head_dim, recipe::kRotatedDim))));
    shape.key_bytes = kPageTokens * shape.dim / 2;
    shape.scales = kPageScales + kPageTokens;
  }
  shape.value_bytes = kPageTokens * shape.dim;
  return shape;
}

double attention_split_bound(const AttentionSpec& spec, KvType cache) {
  if (cache == KvType::kInt8) return 0.08;
  if (cache == KvType::kInt4) return 0.3;
  switch (spec.variant) {
    case AttentionVariant::kFp16:
      return 0.0;
    case AttentionVariant::kSage1:
    case AttentionVariant::kSage1T:
      return 0.03;
    case AttentionVariant::kSage1VT:
      return 0.04;
    case AttentionVariant::kSage1B:
    case AttentionVariant::kSage1VB:
      return 0.06;
    case AttentionVariant::kSage2_8b:
      return 0.08;
    case AttentionVariant::kSage2_4b:
      return 0.5;
  }
  return 0.0;
}

}  // namespace sagelm::cpu
