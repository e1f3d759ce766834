// Sums over rows of logits in float64, whose exponentials are computed several at a time.
#pragma once

#include <cstdint>
#include <span>

namespace sagelm {

struct RowSummary {
  double log_sum_exp = 0;  // log of the sum of exp(logit)
  int32_t argmax = 0;      // the first of the largest
};

// Of a row that is not empty. log_sum_exp is not finite where a logit is not.
RowSummary summarize(std::span<const float> logits);

// KL(p || q) = sum of p (log p - log q) of two rows of logits of one length, with the log_sum_exp
// of each; never below 0. Not finite where a logit is not.
double kl_divergence(std::span<const float> p, double p_log_sum_exp, std::span<const float> q,
                     double q_log_sum_exp);

}  // namespace sagelm
