// What `sagelm bench model` measures: how fast a loaded model reads a prompt and writes an answer,
// beside what the device does at best.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
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
  // Before every prompt whose first token is timed; 0: none is. A prompt that is run right behind
  // others meets a device at its power limit, one that comes to a waiting device does not.
  double rest_seconds = 0;
  SamplingOptions sampling;  // of the answers

  int64_t context() const;          // that all of it needs
  int64_t runs_of_setting() const;  // warm-ups too
};

struct PrefillResult {
  int64_t tokens = 0;
  Spread tokens_per_second;
  double ops_per_second = 0;            // useful ones, at the median
  double linear_tokens_per_second = 0;  // bound: the linear layers alone
};

// Of prompts that come to a device that has rested.
struct FirstTokenResult {
  int64_t tokens = 0;
  double rest_seconds = 0;
  Spread seconds;  // from the call to the first token, which is chosen by then
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

// Runs a step of plan's size and some of decoding, so that all memory is taken that they take.
void grow_buffers(Session& session, const ModelInfo& info, const ModelBenchPlan& plan);

// What is measured, as Model::set_attention takes it.
struct BenchSetting {
  std::string attention;
  bool smooth_k = true;
  std::string kv_cache;
};

struct BenchResult {
  std::vector<PrefillResult> prefill;
  std::vector<FirstTokenResult> first_token;
  std::vector<DecodeResult> decode;
};
struct BenchResults {
  bool in_turns = true;
  std::vector<BenchResult> settings;
};

// Runs plan under every setting, in turns: each setting runs once, then each again in the opposite
// order, and so on, so that none meets a colder device than the others. Where the device has no
// room for the caches of all, one setting after the other. on_run is told of every run, warm-ups
// too.
BenchResults bench_settings(Model& model, std::span<const BenchSetting> settings,
                            const ModelBenchPlan& plan, const DeviceBounds& bounds,
                            const std::function<void()>& on_run);

// Operations of a prefill of `tokens` tokens that are of use: products of the linear layers, causal
// attention, and the logits of the last token.
double prefill_ops(const ModelInfo& info, int64_t tokens);

}  // namespace sagelm::cli
