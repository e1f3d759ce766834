#include "backend/cpu/token_draw.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/ops/token_weights.h"

namespace sagelm::cpu {
namespace {

constexpr int kPartBits = 10;
constexpr auto kFar = static_cast<int32_t>(weights::kFar);

uint64_t key_of(int32_t distance, size_t id) {
  return static_cast<uint64_t>(distance) << 32 | static_cast<uint64_t>(id);
}
size_t id_of(uint64_t key) { return key & 0xFFFFFFFFu; }

float largest_of(std::span<const float> logits) {
  float largest = logits[0];
#pragma omp simd reduction(max : largest)
  for (size_t i = 0; i < logits.size(); ++i) largest = std::max(largest, logits[i]);
  return largest;
}

}  // namespace

int32_t TokenDrawer::draw(std::span<const float> logits, const TokenDraw& draw) {
  logits_.assign(logits.begin(), logits.end());
  adjust(draw);
  const float largest = largest_of(logits_);
  if (draw.temperature == 0.0 || largest == -std::numeric_limits<float>::infinity()) {
    return static_cast<int32_t>(std::find(logits_.begin(), logits_.end(), largest) -
                                logits_.begin());
  }
  sum_parts(largest, weights::octaves_of(draw.temperature));
  uint64_t mass = total_.mass;
  uint64_t last = std::numeric_limits<uint64_t>::max();
  const auto keep_through = [&](const Found& found) {
    mass = found.mass;
    last = found.key;
  };
  const auto part_of = [&](double part) { return part * static_cast<double>(mass); };
  if (draw.top_k > 0) {
    keep_through(find(std::min<uint64_t>(static_cast<uint64_t>(draw.top_k), total_.count) - 1,
                      &Sums::count));
  }
  if (draw.top_p < 1.0) {
    const auto enough = static_cast<uint64_t>(std::ceil(part_of(draw.top_p)));
    keep_through(find(std::max<uint64_t>(enough, 1) - 1, &Sums::mass));
  }
  if (const uint32_t farthest = weights::distance_of(draw.min_p); farthest < weights::kFar) {
    mass = mass_through(std::min(last, uint64_t{farthest} << 32 | 0xFFFFFFFFu));
  }
  const auto target = static_cast<uint64_t>(part_of(draw.uniform));
  return static_cast<int32_t>(id_of(find(std::min(target, mass - 1), &Sums::mass).key));
}

// Each distinct token is penalized once (CTRL, arXiv:1909.05858, section 4.1).
void TokenDrawer::adjust(const TokenDraw& draw) {
  const auto exists = [this](int32_t id) {
    return id >= 0 && static_cast<size_t>(id) < logits_.size();
  };
  if (draw.penalty != 1.0F) {
    seen_.assign(draw.penalized.begin(), draw.penalized.end());
    std::sort(seen_.begin(), seen_.end());
    seen_.erase(std::unique(seen_.begin(), seen_.end()), seen_.end());
    for (const int32_t id : seen_) {
      if (!exists(id)) continue;
      float& logit = logits_[static_cast<size_t>(id)];
      logit = weights::penalized(logit, draw.penalty);
    }
  }
  for (const int32_t id : draw.banned) {
    if (exists(id)) logits_[static_cast<size_t>(id)] = -std::numeric_limits<float>::infinity();
  }
}

void TokenDrawer::sum_parts(float largest, float octaves) {
  const size_t size = logits_.size();
  distances_.resize(size);
  weights_.resize(size);
  const float* const logits = logits_.data();
  int32_t* const distances = distances_.data();
  int32_t* const tokens_weights = weights_.data();
  int32_t most = 0;  // of those that are not far
#pragma omp simd reduction(max : most)
  for (size_t i = 0; i < size; ++i) {
    const auto distance = static_cast<int32_t>(weights::distance(largest, logits[i], octaves));
    const auto weight = static_cast<int32_t>(weights::weight(static_cast<uint32_t>(distance)));
    const bool far = distance >= kFar;
    distances[i] = distance;
    tokens_weights[i] = far ? 0 : weight;
    most = std::max(most, far ? 0 : distance);
  }
  part_shift_ =
      std::max(0, static_cast<int>(std::bit_width(static_cast<uint32_t>(most))) - kPartBits);
  const int32_t beyond = (most >> part_shift_) + 1;  // those that are far
  parts_.assign(static_cast<size_t>(beyond) + 1, {});
  for (size_t i = 0; i < size; ++i) {
    Sums& part = parts_[static_cast<size_t>(std::min(distances_[i] >> part_shift_, beyond))];
    part.mass += static_cast<uint64_t>(weights_[i]);
    ++part.count;
  }
  parts_.pop_back();
  total_ = {};
  for (const Sums& part : parts_) {
    total_.mass += part.mass;
    total_.count += part.count;
  }
}

// The first token of the order at which the sum of weights, or the count, goes beyond target, which
// lies below the sum of all.
TokenDrawer::Found TokenDrawer::find(uint64_t target, uint64_t Sums::*value) {
  Sums before;
  size_t part = 0;
  while (before.*value + parts_[part].*value <= target) {
    before.mass += parts_[part].mass;
    before.count += parts_[part].count;
    ++part;
  }
  keys_.clear();
  for (size_t i = 0; i < distances_.size(); ++i) {
    if (static_cast<size_t>(distances_[i] >> part_shift_) == part) {
      keys_.push_back(key_of(distances_[i], i));
    }
  }
  std::sort(keys_.begin(), keys_.end());
  for (const uint64_t key : keys_) {
    before.mass += static_cast<uint64_t>(weights_[id_of(key)]);
    ++before.count;
    if (before.*value > target) return {.key = key, .mass = before.mass};
  }
  return {.key = keys_.back(), .mass = before.mass};
}

uint64_t TokenDrawer::mass_through(uint64_t last) const {
  uint64_t mass = 0;
  for (size_t i = 0; i < distances_.size(); ++i) {
    if (key_of(distances_[i], i) <= last) mass += static_cast<uint64_t>(weights_[i]);
  }
  return mass;
}

}  // namespace sagelm::cpu
