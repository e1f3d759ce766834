// What `sagelm bench model` measures: how fast a loaded model reads a prompt and writes an answer,
// beside what the device does at best.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "base/measure.h"
#include "sagelm/sagelm.hpp"

namespace sagelm::cli {

struct ModelBenchPlan {
  std::vector<int64_t> prompt_tokens;
  std::vector<int64_t> decode_at;  // tokens in the cache before the first one that is timed
  int64_t decode_tokens = 64;      // steps timed per run
  int runs = 5;
  SamplingOptions sampling;  // of the answers

  int64_t context() const;  // that all of it needs
};

struct PrefillResult {
  int64_t tokens = 0;
  Spread tokens_per_second;
  double ops_per_second = 0;            // useful ones, at the median
  double linear_tokens_per_second = 0;  // bound: the linear layers alone
};

struct DecodeResult {
  int64_t at = 0;
  Spread tokens_per_second;     // of the runs
  Spread step_seconds;          // of single steps, of all runs
  double bytes_per_second = 0;  // weights and cache read, at the median
  double host_share = 0;  // of all time: what the GPU did not compute in; 0 where that is not known
};

// The device's ceilings and the bounds that follow from them, measured before the model is loaded.
struct DeviceBounds {
  std::string device;
  Ceilings ceilings;
  // Seconds that the linear layers of the whole model take for so many tokens, by prompt length.
  std::vector<double> linear_seconds;
  int64_t weight_bytes_per_token = 0;  // read by one decode step
  int64_t free_bytes = 0;              // of the GPU's memory, before we take any
};
DeviceBounds measure_bounds(const LoadOptions& options, const ModelBenchPlan& plan);

// Runs plan under the model's current attention. session must be new.
std::vector<PrefillResult> bench_prefill(const Model& model, Session& session,
                                         const ModelBenchPlan& plan, const DeviceBounds& bounds);
std::vector<DecodeResult> bench_decode(const Model& model, Session& session,
                                       const ModelBenchPlan& plan, const DeviceBounds& bounds);

// Operations of a prefill of `tokens` tokens that are of use: products of the linear layers, causal
// attention, and the logits of the last token.
double prefill_ops(const ModelInfo& info, int64_t tokens);

}  // namespace sagelm::cli
