// The standard error of a perplexity as EleutherAI's lm-evaluation-harness prints it.
#pragma once

#include <span>

namespace sagelm {

// Sample standard deviation of exp(-mean) over 100000 samples drawn with replacement, each of as
// many values as there are: the harness's bootstrap, draw by draw (blocks of 1000 samples by
// Python's random.choices, the generator seeded with the block's number), so that its figure is
// reproduced and not only its kind. It takes nanoseconds per value and sample, in all threads. NaN
// for fewer than two values.
double bootstrap_perplexity_stderr(std::span<const double> log_likelihoods);

}  // namespace sagelm
