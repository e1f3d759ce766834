#include "support/float64_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "base/dtype.h"
#include "base/fp8.h"
#include "support/value_rounder.h"

namespace sagelm::testing {
namespace {

double to_half(double x) { return half_to_float(float_to_half(static_cast<float>(x))); }

// Rows of one head in double.
using Rows = std::vector<std::vector<double>>;

Rows kv_rows(const AttentionProblem& problem, const std::vector<uint16_t>& tensor,
             int64_t kv_head) {
  const AttentionShape& s = problem.shape;
  Rows rows;
  for (int64_t j = 0; j < s.kv_len; ++j) {
    std::vector<double> row;
    for (int64_t c = 0; c < s.head_dim; ++c) {
      const auto i = static_cast<size_t>((kv_head * s.kv_len + j) * s.head_dim + c);
      row.push_back(half_to_float(tensor[i]));
    }
    rows.push_back(std::move(row));
  }
  return rows;
}

Rows q_rows(const AttentionProblem& problem, int64_t head) {
  const AttentionShape& s = problem.shape;
  Rows rows;
  for (int64_t i = 0; i < s.q_len; ++i) {
    const auto begin = problem.q.begin() + (i * s.num_heads + head) * s.head_dim;
    rows.emplace_back(begin, begin + s.head_dim);
  }
  return rows;
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t c = 0; c < a.size(); ++c) sum += a[c] * b[c];
  return sum;
}

int64_t visible_keys(const AttentionShape& s, int64_t row) {
  return s.causal ? std::max<int64_t>(0, s.kv_len - s.q_len + row + 1) : s.kv_len;
}

std::vector<double> mean_row(const Rows& rows, size_t begin, size_t end) {
  std::vector<double> mean(rows[begin].size(), 0.0);
  for (size_t r = begin; r < end; ++r) {
    for (size_t c = 0; c < mean.size(); ++c) mean[c] += rows[r][c];
  }
  for (double& value : mean) value /= static_cast<double>(end - begin);
  return mean;
}

void subtract(std::vector<double>& row, const std::vector<double>& constant) {
  for (size_t c = 0; c < row.size(); ++c) row[c] -= constant[c];
}

// Rounds every row to integers of its group's scale; returns each row's scale.
template <typename GroupOf>
std::vector<double> quantize_groups(Rows& rows, double levels, GroupOf group_of) {
  std::map<int64_t, double> amax;
  for (size_t r = 0; r < rows.size(); ++r) {
    double& group = amax[group_of(static_cast<int64_t>(r))];
    for (const double x : rows[r]) group = std::max(group, std::abs(x));
  }
  std::vector<double> scales;
  for (size_t r = 0; r < rows.size(); ++r) {
    const double scale = std::max(amax[group_of(static_cast<int64_t>(r))], 1e-7) / levels;
    for (double& x : rows[r]) x = std::nearbyint(x / scale);
    scales.push_back(scale);
  }
  return scales;
}

struct Recipe {
  double levels = 127;
  bool smooth_q = false;
  int64_t q_block = 64;
  enum { kToken, kBlock, kThread } granularity = kToken;
  enum { kHalf, kHalfAccumulated, kInt8, kE4m3 } pv = kHalf;

  int64_t q_group(int64_t position) const {
    return granularity == kBlock ? position / 128 : position;
  }
  int64_t k_group(int64_t key) const {
    if (granularity == kToken) return key;
    if (granularity == kBlock) return key / 64;
    return key / 64 * 4 + key % 8 / 2;  // keys 8i + 2c and 8i + 2c + 1
  }
};

Recipe recipe_of(AttentionVariant variant) {
  Recipe r;
  switch (variant) {
    case AttentionVariant::kFp16:
      r.levels = 0;
      break;
    case AttentionVariant::kSage1:
      r.granularity = Recipe::kThread;
      r.pv = Recipe::kHalfAccumulated;
      break;
    case AttentionVariant::kSage1T:
      r.pv = Recipe::kHalfAccumulated;
      break;
    case AttentionVariant::kSage1B:
      r.granularity = Recipe::kBlock;
      r.pv = Recipe::kHalfAccumulated;
      break;
    case AttentionVariant::kSage1VT:
      r.pv = Recipe::kInt8;
      break;
    case AttentionVariant::kSage1VB:
      r.granularity = Recipe::kBlock;
      r.pv = Recipe::kInt8;
      break;
    case AttentionVariant::kSage2_4b:
      r.levels = 7;
      r.smooth_q = true;
      [[fallthrough]];
    case AttentionVariant::kSage2_8b:
      r.granularity = Recipe::kThread;
      r.pv = Recipe::kE4m3;
      break;
  }
  return r;
}

// Q, K and V of one head as the kernels see them, and what brings them back.
struct QuantizedHead {
  Rows q, k, v;
  std::vector<double> q_scale, k_scale, v_scale;
  Rows q_mean, k_smoothed;       // smoothed Q only: per row
  std::vector<double> lse_bias;  // per row
};

QuantizedHead quantize_head(const AttentionProblem& problem, const Recipe& recipe, bool smooth_k,
                            int64_t head) {
  const AttentionShape& s = problem.shape;
  const int64_t kv_head = head / (s.num_heads / s.num_kv_heads);
  QuantizedHead h;
  h.q = q_rows(problem, head);
  h.k = kv_rows(problem, problem.k, kv_head);
  h.v = kv_rows(problem, problem.v, kv_head);
  h.q_scale.assign(h.q.size(), 1.0);
  h.k_scale.assign(h.k.size(), 1.0);
  h.v_scale.assign(static_cast<size_t>(s.head_dim), 1.0);
  h.lse_bias.assign(h.q.size(), 0.0);
  const int64_t first_position = s.causal ? s.kv_len - s.q_len : 0;
  if (recipe.levels != 0) {
    if (smooth_k) {
      const auto mean = mean_row(h.k, 0, h.k.size());
      for (auto& row : h.k) subtract(row, mean);
      for (size_t i = 0; i < h.q.size(); ++i) h.lse_bias[i] = dot(h.q[i], mean);
    }
    if (recipe.smooth_q) {
      h.k_smoothed = h.k;
      // Rows that see no key belong to no block.
      const auto masked = static_cast<size_t>(std::max<int64_t>(0, -first_position));
      h.q_mean.assign(masked, std::vector<double>(h.q[0].size(), 0.0));
      for (size_t begin = masked; begin < h.q.size();) {
        const int64_t block = (first_position + static_cast<int64_t>(begin)) / recipe.q_block;
        const auto end = std::min<size_t>(
            h.q.size(), static_cast<size_t>((block + 1) * recipe.q_block - first_position));
        const auto mean = mean_row(h.q, begin, end);
        for (; begin < end; ++begin) {
          subtract(h.q[begin], mean);
          h.q_mean.push_back(mean);
        }
      }
    }
    h.q_scale = quantize_groups(h.q, recipe.levels,
                                [&](int64_t row) { return recipe.q_group(first_position + row); });
    h.k_scale =
        quantize_groups(h.k, recipe.levels, [&](int64_t key) { return recipe.k_group(key); });
  }
  if (recipe.pv == Recipe::kE4m3 || recipe.pv == Recipe::kInt8) {
    const double levels = recipe.pv == Recipe::kE4m3 ? 448.0 : 127.0;
    for (size_t c = 0; c < h.v_scale.size(); ++c) {
      double amax = 1e-7;
      for (const auto& row : h.v) amax = std::max(amax, std::abs(row[c]));
      h.v_scale[c] = amax / levels;
      ValueRounder rounder(s.head_dim);
      for (auto& row : h.v) {
        const double x = row[c] / h.v_scale[c];
        row[c] = recipe.pv == Recipe::kE4m3 ? e4m3_to_float(rounder.next(static_cast<float>(x)))
                                            : std::nearbyint(x);
      }
    }
  }
  return h;
}

// P as the PV product sees it, divided by its static scale; p is in [0, 1].
double round_probability(const Recipe& recipe, double p) {
  if (recipe.pv == Recipe::kE4m3) {
    return e4m3_to_float(float_to_e4m3(static_cast<float>(448.0 * p))) / 448.0;
  }
  if (recipe.pv == Recipe::kInt8) return std::nearbyint(127.0 * p) / 127.0;
  return to_half(p);
}

struct Row {
  std::vector<double> out;
  double lse = -std::numeric_limits<double>::infinity();
};

Row attend_row(const QuantizedHead& h, const Recipe& recipe, double scale, size_t row,
               int64_t visible) {
  constexpr int64_t kTile = 64;
  constexpr int64_t kHalfStep = 16;
  Row result;
  result.out.assign(h.v_scale.size(), 0.0);
  double max = -std::numeric_limits<double>::infinity();
  double sum = 0;
  for (int64_t first = 0; first < visible; first += kTile) {
    const int64_t last = std::min(visible, first + kTile);
    std::vector<double> logits;
    for (int64_t j = first; j < last; ++j) {
      const auto key = static_cast<size_t>(j);
      double logit = dot(h.q[row], h.k[key]) * h.q_scale[row] * h.k_scale[key];
      if (recipe.smooth_q) logit += dot(h.q_mean[row], h.k_smoothed[key]);
      logits.push_back(logit * scale);
    }
    const double new_max = std::max(max, *std::max_element(logits.begin(), logits.end()));
    const double alpha = std::exp(max - new_max);
    max = new_max;
    sum *= alpha;
    std::vector<double> p;
    for (const double logit : logits) {
      p.push_back(std::exp(logit - max));
      sum += p.back();
    }
    for (size_t c = 0; c < result.out.size(); ++c) {
      double partial = 0;
      for (size_t j = 0; j < p.size(); ++j) {
        partial += round_probability(recipe, p[j]) * h.v[static_cast<size_t>(first) + j][c];
        const bool step_ends = (j + 1) % kHalfStep == 0 || j + 1 == p.size();
        if (recipe.pv == Recipe::kHalfAccumulated && step_ends) partial = to_half(partial);
      }
      result.out[c] = result.out[c] * alpha + partial;
    }
  }
  if (visible == 0) return result;
  for (size_t c = 0; c < result.out.size(); ++c) result.out[c] *= h.v_scale[c] / sum;
  result.lse = max + std::log(sum) + h.lse_bias[row] * scale;
  return result;
}

}  // namespace

Float64Result float64_attention(const AttentionProblem& problem) {
  const AttentionShape& s = problem.shape;
  Float64Result result;
  result.out.assign(problem.q.size(), 0.0);
  result.lse.assign(static_cast<size_t>(s.num_heads * s.q_len),
                    -std::numeric_limits<double>::infinity());
  for (int64_t head = 0; head < s.num_heads; ++head) {
    const int64_t kv_head = head / (s.num_heads / s.num_kv_heads);
    const Rows q = q_rows(problem, head);
    const Rows k = kv_rows(problem, problem.k, kv_head);
    const Rows v = kv_rows(problem, problem.v, kv_head);
    for (int64_t i = 0; i < s.q_len; ++i) {
      const int64_t visible = visible_keys(s, i);
      if (visible == 0) continue;
      std::vector<double> p;
      for (int64_t j = 0; j < visible; ++j) {
        p.push_back(dot(q[static_cast<size_t>(i)], k[static_cast<size_t>(j)]) *
                    problem.softmax_scale);
      }
      const double max = *std::max_element(p.begin(), p.end());
      double sum = 0;
      for (double& x : p) sum += x = std::exp(x - max);
      double* out = &result.out[static_cast<size_t>((i * s.num_heads + head) * s.head_dim)];
      for (size_t j = 0; j < p.size(); ++j) {
        for (int64_t c = 0; c < s.head_dim; ++c) {
          out[c] += p[j] / sum * v[j][static_cast<size_t>(c)];
        }
      }
      result.lse[static_cast<size_t>(head * s.q_len + i)] = max + std::log(sum);
    }
  }
  return result;
}

Float64Result quantized_float64_attention(const AttentionProblem& problem,
                                          const AttentionSpec& spec) {
  const AttentionShape& s = problem.shape;
  const Recipe recipe = recipe_of(spec.variant);
  Float64Result result;
  result.out.resize(problem.q.size());
  result.lse.resize(static_cast<size_t>(s.num_heads * s.q_len));
  for (int64_t head = 0; head < s.num_heads; ++head) {
    const QuantizedHead h = quantize_head(problem, recipe, spec.smooth_k, head);
    for (int64_t i = 0; i < s.q_len; ++i) {
      const Row row =
          attend_row(h, recipe, problem.softmax_scale, static_cast<size_t>(i), visible_keys(s, i));
      std::copy(row.out.begin(), row.out.end(),
                result.out.begin() + (i * s.num_heads + head) * s.head_dim);
      result.lse[static_cast<size_t>(head * s.q_len + i)] = row.lse;
    }
  }
  return result;
}

AttentionError compare(std::span<const double> actual, std::span<const double> expected) {
  AttentionError error;
  double difference = 0, magnitude = 0, product = 0, actual2 = 0, expected2 = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double a = actual[i];
    const double e = expected[i];
    const double d = std::abs(a - e);
    difference += d;
    magnitude += std::abs(e);
    product += a * e;
    actual2 += a * a;
    expected2 += e * e;
    error.max_abs = std::isnan(d) ? d : std::max(error.max_abs, d);
  }
  error.relative_l1 = difference / magnitude;
  error.cosine = product / std::sqrt(actual2 * expected2);
  return error;
}

}  // namespace sagelm::testing
