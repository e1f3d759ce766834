// sagelm bench: how fast models run here, beside what the device does at best.
#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "adaptive.h"
#include "bench_model.h"
#include "bench_output.h"
#include "commands.h"
#include "json_output.h"
#include "options.h"
#include "progress.h"
#include "sampling_options.h"

namespace sagelm::cli {
namespace {

struct ModelFlags {
  CommonOptions common;
  std::vector<std::string> attention = {"fp16", "sage1", "sage2"};
  ModelBenchPlan plan;  // lists that are empty: what fits of the defaults
  GenerationFlags generation;
  int64_t batch_tokens = LoadOptions{}.batch_tokens;
  std::optional<double> rest_seconds;
};

std::string shown(const Spread& spread) {
  return fmt::format("{:.1f} ({:.1f} to {:.1f})", spread.median, spread.smallest, spread.largest);
}

Spread in_ms(const Spread& seconds) {
  return {seconds.median * 1e3, seconds.smallest * 1e3, seconds.largest * 1e3};
}

std::string in_gib(int64_t bytes) {
  return fmt::format("{:.3f} GiB", static_cast<double>(bytes) / (1 << 30));
}

// The options of one of the attentions that are measured.
CommonOptions with_attention(CommonOptions options, const std::string& name) {
  options.attention = name;
  if (!is_adaptive(options)) options.calibration.clear();
  return options;
}

// A list that was not given gets what of the defaults fits the model, or the longest that does.
void fill_in(std::vector<int64_t>& list, const std::vector<int64_t>& defaults, int64_t longest) {
  if (!list.empty()) return;
  for (const int64_t tokens : defaults) {
    if (tokens <= longest) list.push_back(tokens);
  }
  if (list.empty()) list.push_back(std::max<int64_t>(1, longest));
}

// One line and one JSON object of each result.
struct Shown {
  std::string text;
  Json json;
};

Shown show(const PrefillResult& r, const Ceilings& best) {
  const double of_products = percent(r.ops_per_second, best.half_ops);
  const double of_linear = percent(r.tokens_per_second.median, r.linear_tokens_per_second);
  return {fmt::format("  prefill {:>6}: {} tokens/s, {:.4g} TFLOPS, {:.1f} % of large products, "
                      "{:.1f} % of its linear layers alone ({:.1f} tokens/s)\n",
                      r.tokens, shown(r.tokens_per_second), r.ops_per_second * 1e-12, of_products,
                      of_linear, r.linear_tokens_per_second),
          {{"tokens", r.tokens},
           {"tokens_per_second", spread_json(r.tokens_per_second)},
           {"tflops", r.ops_per_second * 1e-12},
           {"percent_of_products", of_products},
           {"linear_layers_tokens_per_second", r.linear_tokens_per_second},
           {"percent_of_linear_layers", of_linear}}};
}

Shown show(const FirstTokenResult& r, const Ceilings& /*best*/) {
  const Spread ms = in_ms(r.seconds);
  return {
      fmt::format("  first token after {:>5}: {:.3f} ms ({:.3f} to {:.3f}), each prompt after a "
                  "rest of {:g} s\n",
                  r.tokens, ms.median, ms.smallest, ms.largest, r.rest_seconds),
      {{"tokens", r.tokens}, {"ms", spread_json(ms)}, {"rest_seconds", r.rest_seconds}}};
}

Shown show(const DecodeResult& r, const Ceilings& best) {
  const Spread step = in_ms(r.step_seconds);
  const double of_copy = percent(r.bytes_per_second, best.copy_bytes);
  const std::string host =
      r.host_share > 0 ? fmt::format(", host {:.1f} %", 100 * r.host_share) : std::string();
  return {fmt::format("  decode at {:>4}: {} tokens/s, steps {:.3f} ms ({:.3f} to {:.3f}), {:.1f} "
                      "GB/s, {:.1f} % of a copy{}\n",
                      r.at, shown(r.tokens_per_second), step.median, step.smallest, step.largest,
                      r.bytes_per_second * 1e-9, of_copy, host),
          {{"at", r.at},
           {"tokens_per_second", spread_json(r.tokens_per_second)},
           {"step_ms", spread_json(step)},
           {"gb_per_s", r.bytes_per_second * 1e-9},
           {"percent_of_copy", of_copy},
           {"host_percent", 100 * r.host_share}}};
}

// What the model with its session takes, beside what `info` says of it.
Shown show_memory(const Model& model, const ModelInfo& expected, const DeviceBounds& bounds) {
  const ModelMemory memory = model.memory();
  const ModelInfo info = model.info();
  const int64_t total = memory.weight_bytes + memory.activation_bytes + info.kv_bytes;
  const int64_t predicted = expected.weight_bytes + expected.activation_bytes + expected.kv_bytes;
  Shown shown = {
      fmt::format("  memory: weights {}, activations {}, KV cache {}, together {} (predicted: {})",
                  in_gib(memory.weight_bytes), in_gib(memory.activation_bytes),
                  in_gib(info.kv_bytes), in_gib(total), in_gib(predicted)),
      {{"weight_bytes", memory.weight_bytes},
       {"activation_bytes", memory.activation_bytes},
       {"kv_bytes", info.kv_bytes},
       {"total_bytes", total},
       {"predicted_bytes", predicted}}};
  if (memory.device_bytes > 0) {
    const int64_t taken = bounds.free_bytes - memory.device_free_bytes;
    shown.text += fmt::format("; most at once {}, taken from the GPU {}", in_gib(memory.most_bytes),
                              in_gib(taken));
    shown.json["most_bytes"] = memory.most_bytes;
    shown.json["device_taken_bytes"] = taken;
  }
  shown.text += '\n';
  return shown;
}

void run_model(const ModelFlags& flags) {
  CommonOptions common = flags.common;
  check_calibration_option(common, flags.attention);
  common = with_attention(common, flags.attention.front());
  ModelBenchPlan plan = flags.plan;
  plan.sampling = effective_options(flags.generation, 0).sampling;
  const int64_t longest = Model::inspect(load_options(common)).max_context - plan.decode_tokens - 1;
  fill_in(plan.prompt_tokens, {512, 2048}, longest);
  fill_in(plan.decode_at, {512}, longest);
  common.context = plan.context();
  LoadOptions load = load_options(common);
  load.sessions = 1;
  std::vector<ModelInfo> expected;  // refuses what cannot be, before the work
  for (const std::string& name : flags.attention) {
    LoadOptions with = load_options(with_attention(common, name));
    with.batch_tokens = flags.batch_tokens;
    expected.push_back(Model::inspect(with));
  }
  load.batch_tokens = expected.front().batch_tokens;
  ResultOutput output(common.json);

  const DeviceBounds bounds = measure_bounds(load, plan);
  const Ceilings& best = bounds.ceilings;
  const auto begin = std::chrono::steady_clock::now();
  Model model = load_model(common, load.batch_tokens, load.sessions);
  const double load_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  const ModelInfo info = model.info();
  plan.rest_seconds = flags.rest_seconds.value_or(model.memory().device_bytes > 0 ? 0.2 : 0.0);
  const double load_rate = static_cast<double>(info.checkpoint_bytes) / load_seconds * 1e-9;
  output.text(fmt::format("{}: {} parameters, {}, loaded in {:.1f} s ({:.2f} GB/s)\non {}\n{}",
                          info.name, info.num_parameters, info.dtype, load_seconds, load_rate,
                          info.device, describe_ceilings(best)));
  Json json = {{"model", info.name},
               {"parameters", info.num_parameters},
               {"dtype", info.dtype},
               {"device", info.device},
               {"load_seconds", load_seconds},
               {"load_gb_per_s", load_rate},
               {"ceilings", ceilings_json(best)},
               {"batch_tokens", info.batch_tokens},
               {"runs", plan.runs},
               {"decode_tokens", plan.decode_tokens},
               {"sampling", sampling_json(plan.sampling)},
               {"results", Json::array()}};
  std::vector<BenchSetting> settings;
  std::vector<std::string> texts;  // of settings: the header, and at the end memory
  std::vector<Shown> memory;
  for (size_t i = 0; i < flags.attention.size(); ++i) {
    const std::string& name = flags.attention[i];
    settings.push_back({.attention = resolve_attention(model, with_attention(flags.common, name)),
                        .smooth_k = !common.no_smooth_k,
                        .kv_cache = common.kv_cache});
    model.set_attention(settings[i].attention, settings[i].smooth_k, settings[i].kv_cache);
    const ModelInfo of = model.info();
    Session session = model.start_session();  // the only one, so that memory is this setting's
    grow_buffers(session, of, plan);
    memory.push_back(show_memory(model, expected[i], bounds));
    texts.push_back(fmt::format("{}, {} cache\n", of.attention, of.kv_cache));
    json["results"].push_back({{"attention", name},
                               {"kernel", of.attention},
                               {"kv_cache", of.kv_cache},
                               {"prefill", Json::array()},
                               {"first_token", Json::array()},
                               {"decode", Json::array()},
                               {"memory", memory[i].json}});
  }
  const BenchResults results = [&] {
    Progress progress("measuring", "runs",
                      static_cast<int64_t>(settings.size()) * plan.runs_of_setting());
    int64_t done = 0;
    return bench_settings(model, settings, plan, bounds, [&] { progress.update(++done); });
  }();
  json["in_turns"] = results.in_turns;
  if (settings.size() > 1) {
    output.text(results.in_turns
                    ? "The settings take turns, in an order that every round reverses.\n"
                    : "The settings' KV caches do not fit together: they run one after the other, "
                      "and the first may meet a colder device.\n");
  }
  for (size_t i = 0; i < settings.size(); ++i) {
    const auto add = [&](const char* key, const auto& measured) {
      for (const auto& one : measured) {
        Shown shown = show(one, best);
        texts[i] += shown.text;
        json["results"][i][key].push_back(std::move(shown.json));
      }
    };
    add("prefill", results.settings[i].prefill);
    add("first_token", results.settings[i].first_token);
    add("decode", results.settings[i].decode);
    output.text(texts[i] + memory[i].text);
  }
  output.json(json);
}

void add_bench_model(CLI::App& bench) {
  CLI::App* command = bench.add_subcommand(
      "model", "Prefill and decode speed, with what share of the device's own speed each is");
  auto flags = std::make_shared<ModelFlags>();
  add_common_options(*command, flags->common,
                     kModelGroup | kRandomGroup | kCalibrationGroup | kCacheGroup | kDeviceGroup |
                         kJsonGroup | kVerboseGroup);
  add_attention_list(*command, flags->attention);
  command->add_flag("--no-smooth-k", flags->common.no_smooth_k,
                    "quantize K as it is, its mean left in");
  add_number_list(*command, "--prompt-tokens", flags->plan.prompt_tokens,
                  "lengths of prompts to run", "512,2048");
  add_number_list(*command, "--decode-at", flags->plan.decode_at,
                  "tokens in the cache when decoding starts", "512");
  command->add_option("--decode-tokens", flags->plan.decode_tokens, "decode steps of a run")
      ->option_text("N (default: 64)")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20));
  flags->generation.options.sampling.temperature = 0;
  add_sampling_options(*command, flags->generation);
  command
      ->add_option("--runs", flags->plan.runs,
                   "measurements of each, after one to warm up; the attentions take turns")
      ->option_text("N (default: 5)")
      ->check(CLI::Range(1, 1000));
  add_rest(*command, flags->rest_seconds,
           "rest before each prompt whose time to the first token is taken, apart from the prompts "
           "that follow each other; 0: it is not",
           "0.2 on a GPU, 0 on a CPU");
  command->add_option("--batch-tokens", flags->batch_tokens, "tokens of a prompt run in one step")
      ->option_text("N (default: 4096 on a GPU, 2048 on a CPU)")
      ->check(CLI::Range(int64_t{2}, int64_t{1} << 24));
  command->callback([flags] { run_model(*flags); });
}

}  // namespace

void add_bench(CLI::App& app) {
  CLI::App* command = app.add_subcommand("bench", "Measure the speed of this build and machine");
  command->require_subcommand(1);
  add_bench_model(*command);
  add_bench_attention(*command);
}

}  // namespace sagelm::cli
