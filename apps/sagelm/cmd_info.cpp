// sagelm info: what a model is and what it needs, from its checkpoint's headers alone.
#include <spdlog/fmt/fmt.h>

#include <memory>
#include <optional>
#include <string>

#include "adaptive.h"
#include "commands.h"
#include "json_output.h"
#include "options.h"
#include "sagelm/sagelm.hpp"

namespace sagelm::cli {
namespace {

std::string in_mib(int64_t bytes) {
  return fmt::format("{:.1f} MiB", static_cast<double>(bytes) / (1024.0 * 1024.0));
}

// The rows of the table, which are the fields of the JSON object too.
struct Row {
  const char* label;
  const char* key;
  Json value;
  std::string shown;
};

std::vector<Row> make_rows(const ModelInfo& info) {
  const int64_t total = info.weight_bytes + info.kv_bytes + info.activation_bytes;
  const auto plain = [](const char* label, const char* key, int64_t value) {
    return Row{label, key, value, std::to_string(value)};
  };
  const auto bytes = [](const char* label, const char* key, int64_t value) {
    return Row{label, key, value, in_mib(value)};
  };
  const auto text = [](const char* label, const char* key, const std::string& value) {
    return Row{label, key, value, value};
  };
  return {
      text("model", "model", info.name),
      text("architecture", "architecture", info.architecture),
      text("type of the weights", "dtype", info.dtype),
      plain("parameters", "parameters", info.num_parameters),
      plain("vocabulary", "vocab_size", info.vocab_size),
      plain("layers", "num_layers", info.num_layers),
      plain("hidden size", "hidden_size", info.hidden_size),
      plain("intermediate size", "intermediate_size", info.intermediate_size),
      plain("attention heads", "num_heads", info.num_heads),
      plain("key-value heads", "num_kv_heads", info.num_kv_heads),
      plain("head size", "head_dim", info.head_dim),
      {"RoPE theta", "rope_theta", info.rope_theta, fmt::format("{}", info.rope_theta)},
      {"tied embeddings", "tied_embeddings", info.tied_embeddings,
       info.tied_embeddings ? "yes" : "no"},
      plain("longest context", "max_context", info.max_context),
      plain("context", "context", info.context),
      bytes("weights in the checkpoint", "checkpoint_bytes", info.checkpoint_bytes),
      bytes("memory: weights, about", "weight_bytes", info.weight_bytes),
      text("type of the KV cache", "kv_cache", info.kv_cache),
      {"memory: KV cache per token", "kv_bytes_per_token", info.kv_bytes_per_token,
       fmt::format("{} bytes", info.kv_bytes_per_token)},
      bytes("memory: KV cache", "kv_bytes", info.kv_bytes),
      bytes("memory: activations, about", "activation_bytes", info.activation_bytes),
      bytes("memory: together, about", "total_bytes", total),
      text("attention", "attention", info.attention),
      text("device", "device", info.device),
  };
}

void run_info(const CommonOptions& options) {
  ResultOutput output(options.json);
  Json object = Json::object();
  std::string table;
  ModelInfo info = Model::inspect(load_options(options));
  std::optional<Calibration> calibration;
  if (is_adaptive(options)) calibration = stored_calibration(options);
  if (is_adaptive(options) && !calibration) {
    info.attention = fmt::format(
        "{}: not chosen yet, the first run with it or sagelm calibrate does that", kAdaptive);
    info.layer_attention.clear();
  }
  for (const Row& row : make_rows(info)) {
    object[row.key] = row.value;
    table += fmt::format("{:<28}{}\n", row.label, row.shown);
  }
  object["layer_attention"] = info.layer_attention;
  if (calibration) {
    object["calibration"] = Json::parse(calibration_json(*calibration));
    table += describe_calibration(*calibration, calibration_file(options, calibration->key));
  }
  output.text(table);
  output.json(object);
}

}  // namespace

void add_info(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("info", "Show a model's architecture and the memory it needs");
  auto options = std::make_shared<CommonOptions>();
  add_common_options(*command, *options,
                     kModelGroup | kRandomGroup | kComputeGroup | kContextGroup | kJsonGroup);
  command->callback([options] { run_info(*options); });
}

}  // namespace sagelm::cli
