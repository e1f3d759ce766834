// sagelm bench attention: the attention kernels alone, speed and error beside each other.
#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <numbers>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "adaptive.h"
#include "backend/attention_runner.h"
#include "base/measure.h"
#include "bench_output.h"
#include "commands.h"
#include "engine/device.h"
#include "options.h"
#include "progress.h"

namespace sagelm::cli {
namespace {

struct Flags {
  CommonOptions common;
  std::vector<std::string> attention = {"fp16", "sage1", "sage2"};
  std::vector<int64_t> tokens, head_dims;
  int64_t batch = 0, heads = 0, kv_heads = 0;  // 0: the device's default
  std::string mask = "causal";
  int runs = 0;
  std::optional<double> rest_seconds;
  bool quick = false;
};

// Standard normal FP16 values: Q, K and V of the largest call; a smaller one takes the first of
// them, which are as good.
struct Inputs {
  std::vector<uint16_t> q, k, v;
};

std::vector<uint16_t> normal_halves(int64_t count, uint64_t seed) {
  std::vector<uint16_t> values(static_cast<size_t>(count));
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < count; ++i) {
    uint64_t h = (static_cast<uint64_t>(i) + (seed << 48)) * 0x9E3779B97F4A7C15u;
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9u;
    h = (h ^ (h >> 27)) * 0x94D049BB133111EBu;
    h ^= h >> 31;
    // Box and Muller's method.
    const float u = (static_cast<float>(h & 0xFFFFFFu) + 1.0f) * 0x1p-24f;
    const float angle = static_cast<float>(h >> 40) * 0x1p-23f * std::numbers::pi_v<float>;
    values[static_cast<size_t>(i)] =
        float_to_half(std::sqrt(-2.0f * std::log(u)) * std::cos(angle));
  }
  return values;
}

// Operations of the pairs that the mask leaves, counted as papers do: half of all when causal.
double operations(const AttentionCall& call) {
  const auto n = static_cast<double>(call.tokens);
  return 4.0 * static_cast<double>(call.batch * call.num_heads * call.head_dim) * n * n *
         (call.causal ? 0.5 : 1.0);
}

// What the variant's two products could do on this device; 0 if that was not measured.
double product_ceiling(AttentionVariant variant, const Ceilings& best) {
  const auto both = [](double qk, double pv) {
    return qk > 0 && pv > 0 ? 2 / (1 / qk + 1 / pv) : 0.0;
  };
  switch (variant) {
    case AttentionVariant::kFp16:
      return best.half_ops;
    case AttentionVariant::kSage1:
    case AttentionVariant::kSage1T:
    case AttentionVariant::kSage1B:
      return both(best.int8_ops, best.half_ops);
    case AttentionVariant::kSage1VT:
    case AttentionVariant::kSage1VB:
      return best.int8_ops;
    case AttentionVariant::kSage2_8b:
    case AttentionVariant::kSage2_4b:
      return both(best.int8_ops, best.fp8_ops);
  }
  return 0;
}

std::vector<double> exact_row(const AttentionCall& call, const Inputs& in, int64_t b, int64_t head,
                              int64_t token) {
  const int64_t dim = call.head_dim;
  const int64_t kv_head = head / (call.num_heads / call.num_kv_heads);
  const uint16_t* q = in.q.data() + ((b * call.num_heads + head) * call.tokens + token) * dim;
  const int64_t kv_start = (b * call.num_kv_heads + kv_head) * call.tokens * dim;
  const int64_t seen = call.causal ? token + 1 : call.tokens;
  std::vector<double> logits(static_cast<size_t>(seen));
  double most = -INFINITY;
  for (int64_t t = 0; t < seen; ++t) {
    const uint16_t* k = in.k.data() + kv_start + t * dim;
    double sum = 0;
    for (int64_t d = 0; d < dim; ++d) {
      sum += static_cast<double>(half_to_float(q[d])) * static_cast<double>(half_to_float(k[d]));
    }
    sum /= std::sqrt(static_cast<double>(dim));
    logits[static_cast<size_t>(t)] = sum;
    most = std::max(most, sum);
  }
  std::vector<double> out(static_cast<size_t>(dim));
  double total = 0;
  for (int64_t t = 0; t < seen; ++t) {
    const double p = std::exp(logits[static_cast<size_t>(t)] - most);
    const uint16_t* v = in.v.data() + kv_start + t * dim;
    total += p;
    for (int64_t d = 0; d < dim; ++d) {
      out[static_cast<size_t>(d)] += p * static_cast<double>(half_to_float(v[d]));
    }
  }
  for (double& value : out) value /= total;
  return out;
}

// Rows of one call's output and what they are in float64.
class ExactRows {
 public:
  ExactRows(const AttentionCall& call, const Inputs& inputs) {
    constexpr int64_t kRows = 24;
    for (int64_t i = 0; i < kRows; ++i) {
      // Evenly over the tokens, the last one included, and over the batch and the heads.
      Row row;
      row.batch = i * call.batch / kRows;
      row.head = i * 7 % call.num_heads;
      row.token = call.tokens * (i + 1) / kRows - 1;
      if (row.token >= 0) rows_.push_back(row);
    }
#pragma omp parallel for schedule(dynamic)
    for (Row& row : rows_) {
      row.exact = exact_row(call, inputs, row.batch, row.head, row.token);
    }
  }

  struct Error {
    double relative_l1 = 0, cosine = 0;
  };
  Error compare(const AttentionRunner& runner) const {
    double difference = 0, magnitude = 0, ab = 0, aa = 0, bb = 0;
    for (const Row& row : rows_) {
      const std::vector<float> actual = runner.output(row.batch, row.head, row.token);
      for (size_t d = 0; d < actual.size(); ++d) {
        const auto a = static_cast<double>(actual[d]);
        const double b = row.exact[d];
        difference += std::abs(a - b);
        magnitude += std::abs(b);
        ab += a * b;
        aa += a * a;
        bb += b * b;
      }
    }
    return {difference / magnitude, ab / std::sqrt(aa * bb)};
  }

 private:
  struct Row {
    int64_t batch = 0, head = 0, token = 0;
    std::vector<double> exact;
  };
  std::vector<Row> rows_;
};

std::vector<AttentionCall> calls_of(const Flags& flags, bool gpu) {
  const auto lengths = !flags.tokens.empty() ? flags.tokens
                       : !gpu                ? std::vector<int64_t>{512, 2048}
                       : flags.quick         ? std::vector<int64_t>{1024, 4096, 16384}
                                     : std::vector<int64_t>{1024, 2048, 4096, 8192, 16384, 32768};
  const auto dims = !flags.head_dims.empty() ? flags.head_dims
                    : flags.quick            ? std::vector<int64_t>{128}
                                             : std::vector<int64_t>{64, 128};
  AttentionCall call;
  call.batch = flags.batch > 0 ? flags.batch : gpu ? 4 : 1;
  call.num_heads = flags.heads > 0 ? flags.heads : gpu ? 32 : 4;
  call.num_kv_heads = flags.kv_heads > 0 ? flags.kv_heads : call.num_heads;
  if (call.num_heads % call.num_kv_heads != 0) {
    fail_usage("{} heads cannot share {} key-value heads evenly", call.num_heads,
               call.num_kv_heads);
  }
  std::vector<AttentionCall> calls;
  for (const bool causal : {true, false}) {
    if (flags.mask == (causal ? "full" : "causal")) continue;
    for (const int64_t dim : dims) {
      for (const int64_t length : lengths) {
        call.causal = causal;
        call.head_dim = dim;
        call.tokens = length;
        calls.push_back(call);
      }
    }
  }
  return calls;
}

Inputs make_inputs(const std::vector<AttentionCall>& calls) {
  int64_t q = 0, kv = 0;
  for (const AttentionCall& call : calls) {
    q = std::max(q, call.batch * call.num_heads * call.tokens * call.head_dim);
    kv = std::max(kv, call.batch * call.num_kv_heads * call.tokens * call.head_dim);
  }
  return {normal_halves(q, 1), normal_halves(kv, 2), normal_halves(kv, 3)};
}

// Median seconds of `runs` calls: one right behind the other or, with a rest, each behind one that
// follows a rest.
double measure(AttentionRunner& runner, const AttentionSpec& spec, int runs, double rest_seconds) {
  if (rest_seconds == 0) return runner.median_seconds(spec, runs);
  std::vector<double> seconds;
  seconds.reserve(runs);
  for (int i = 0; i < runs; ++i) {
    std::this_thread::sleep_for(std::chrono::duration<double>(rest_seconds));
    seconds.push_back(runner.median_seconds(spec, 1));
  }
  return spread_of(std::move(seconds)).median;
}

void run(const Flags& flags) {
  std::vector<AttentionVariant> variants;
  for (const std::string& name : flags.attention) {
    if (name == kAdaptive || name.find('/') != std::string::npos) {
      fail_usage("{} says what each layer of a model takes: name the kernels to measure", name);
    }
    variants.push_back(parse_attention_variant(name));
  }
  const bool smooth_k = !flags.common.no_smooth_k;
  ResultOutput output(flags.common.json);
  const std::unique_ptr<Backend> backend = make_backend(flags.common.device, flags.common.threads);
  const bool gpu = backend->device_name().starts_with("cuda");
  const std::vector<AttentionCall> calls = calls_of(flags, gpu);
  for (const AttentionCall& call : calls) {
    for (const AttentionVariant variant : variants) {
      backend->check_attention({.num_heads = call.num_heads,
                                .num_kv_heads = call.num_kv_heads,
                                .head_dim = call.head_dim,
                                .spec = {.variant = variant, .smooth_k = smooth_k}});
    }
  }
  const int runs = flags.runs > 0 ? flags.runs : gpu ? 21 : 5;
  const double rest_seconds = flags.rest_seconds.value_or(0);

  const Ceilings best = backend->measure_ceilings();
  output.text(fmt::format("{}\n{}", backend->device_name(), describe_ceilings(best)));
  output.text(fmt::format("{:>5} {:>7} {:>4} {:>7} {:>6}  {:<9} {:>10} {:>8} {:>8} {:>11} {:>9}\n",
                          "batch", "heads", "dim", "tokens", "mask", "attention", "ms", "TFLOPS",
                          "of peak", "relative L1", "cosine"));
  Json json = {{"device", backend->device_name()},
               {"ceilings", ceilings_json(best)},
               {"smooth_k", smooth_k},
               {"runs", runs},
               {"rest_seconds", rest_seconds},
               {"results", Json::array()}};
  const Inputs inputs = make_inputs(calls);
  Progress progress("measuring", "shapes", static_cast<int64_t>(calls.size()));
  int64_t done = 0;
  for (const AttentionCall& call : calls) {
    const auto q_count =
        static_cast<size_t>(call.batch * call.num_heads * call.tokens * call.head_dim);
    const size_t kv_count =
        q_count / static_cast<size_t>(call.num_heads) * static_cast<size_t>(call.num_kv_heads);
    const auto runner = backend->make_attention_runner(call, std::span(inputs.q).first(q_count),
                                                       std::span(inputs.k).first(kv_count),
                                                       std::span(inputs.v).first(kv_count));
    const ExactRows exact(call, inputs);
    for (const AttentionVariant variant : variants) {
      const double seconds =
          measure(*runner, {.variant = variant, .smooth_k = smooth_k}, runs, rest_seconds);
      const double rate = operations(call) / seconds;
      const double peak = product_ceiling(variant, best);
      const ExactRows::Error error = exact.compare(*runner);
      const std::string_view name = attention_variant_name(variant);
      const char* mask = call.causal ? "causal" : "full";
      output.text(fmt::format(
          "{:>5} {:>7} {:>4} {:>7} {:>6}  {:<9} {:>10.4f} {:>8.4g} {:>8} {:>11.5f} {:>9.6f}\n",
          call.batch, fmt::format("{}/{}", call.num_heads, call.num_kv_heads), call.head_dim,
          call.tokens, mask, name, seconds * 1e3, rate * 1e-12,
          peak > 0 ? fmt::format("{:.1f} %", percent(rate, peak)) : "-", error.relative_l1,
          error.cosine));
      json["results"].push_back(
          {{"batch", call.batch},
           {"heads", call.num_heads},
           {"kv_heads", call.num_kv_heads},
           {"head_dim", call.head_dim},
           {"tokens", call.tokens},
           {"mask", mask},
           {"attention", name},
           {"ms", seconds * 1e3},
           {"tflops", rate * 1e-12},
           {"percent_of_products", peak > 0 ? Json(percent(rate, peak)) : Json()},
           {"relative_l1", error.relative_l1},
           {"cosine", error.cosine}});
    }
    progress.update(++done);
  }
  output.json(json);
}

}  // namespace

void add_bench_attention(CLI::App& bench) {
  CLI::App* command = bench.add_subcommand(
      "attention",
      "Attention from FP16 tensors, quantization included: time, share of the device's own product "
      "rate, and error against float64 on standard normal inputs");
  auto flags = std::make_shared<Flags>();
  add_common_options(*command, flags->common, kDeviceGroup | kJsonGroup);
  add_attention_list(*command, flags->attention);
  command->add_flag("--no-smooth-k", flags->common.no_smooth_k,
                    "quantize K as it is, its mean left in");
  add_number_list(*command, "--tokens", flags->tokens, "lengths of the sequences",
                  "1024 to 32768 on a GPU; 512,2048 on a CPU");
  add_number_list(*command, "--head-dim", flags->head_dims, "head sizes, up to 256", "64,128");
  command->get_option("--head-dim")->check(CLI::Range(1, 256));
  const auto number = [&](const char* name, int64_t& value, const char* help, const char* text) {
    command->add_option(name, value, help)
        ->option_text(text)
        ->check(CLI::Range(int64_t{1}, int64_t{1} << 16));
  };
  number("--batch", flags->batch, "sequences", "N (default: 4 on a GPU, 1 on a CPU)");
  number("--heads", flags->heads, "query heads", "N (default: 32 on a GPU, 4 on a CPU)");
  number("--kv-heads", flags->kv_heads, "key-value heads", "N (default: as many)");
  command->add_option("--mask", flags->mask, "which keys a query sees")
      ->option_text("causal|full|both (default: causal)")
      ->check(CLI::IsMember({"causal", "full", "both"}));
  command->add_option("--runs", flags->runs, "measurements of each, of which the median counts")
      ->option_text("N (default: 21 on a GPU, 5 on a CPU)")
      ->check(CLI::Range(1, 10000));
  add_rest(
      *command, flags->rest_seconds,
      "rest before each measurement, so that it shows a GPU below its power limit, where calls "
      "without end hold it",
      "0");
  command->add_flag("--quick", flags->quick, "fewer lengths, head size 128 alone");
  command->callback([flags] { run(*flags); });
}

}  // namespace sagelm::cli
