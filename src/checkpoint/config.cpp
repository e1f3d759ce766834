#include "checkpoint/config.h"

#include <cmath>
#include <limits>
#include <optional>
#include <string>

#include "base/error.h"
#include "base/json_bytes.h"

namespace sagelm {
namespace {

using nlohmann::json;

class Fields {
 public:
  Fields(const json& object, std::string_view where) : object_(object), where_(where) {}

  bool has(const char* key) const { return object_.contains(key) && !object_.at(key).is_null(); }
  const json& at(const char* key) const { return object_.at(key); }
  std::string_view where() const { return where_; }

  int64_t size(const char* key, int64_t largest) const {
    if (!has(key)) fail("{}: {} is missing", where_, key);
    const json& value = object_.at(key);
    const bool whole = value.is_number_integer();
    const bool fits = whole && (!value.is_number_unsigned() ||
                                value.get<uint64_t>() <= std::numeric_limits<int64_t>::max());
    if (!fits || value.get<int64_t>() < 1 || value.get<int64_t>() > largest) {
      fail("{}: {} is {}; it must be a whole number from 1 to {}", where_, key, shown(value),
           largest);
    }
    return value.get<int64_t>();
  }

  int64_t size_or(const char* key, int64_t otherwise, int64_t largest) const {
    return has(key) ? size(key, largest) : otherwise;
  }

  double positive(const char* key, std::optional<double> otherwise = {}) const {
    if (!has(key)) {
      if (otherwise) return *otherwise;
      fail("{}: {} is missing", where_, key);
    }
    const json& value = object_.at(key);
    const double number = value.is_number() ? value.get<double>() : -1.0;
    if (!std::isfinite(number) || number <= 0) {
      fail("{}: {} is {}; it must be a positive number", where_, key, shown(value));
    }
    return number;
  }

  std::string text_or(const char* key, std::string otherwise) const {
    if (!has(key)) return otherwise;
    if (!object_.at(key).is_string()) {
      fail("{}: {} is {}; it must be a string", where_, key, shown(object_.at(key)));
    }
    return object_.at(key).get<std::string>();
  }

  bool flag(const char* key) const {
    if (!has(key)) return false;
    if (!object_.at(key).is_boolean()) {
      fail("{}: {} is {}; it must be true or false", where_, key, shown(object_.at(key)));
    }
    return object_.at(key).get<bool>();
  }

  // A setting of which this program knows one value only, the one it has where it is absent.
  void refuse_other_than(double known, const char* key) const {
    if (has(key) && !(object_.at(key).is_number() && object_.at(key).get<double>() == known)) {
      fail("{}: {} is {}; only {} is supported", where_, key, shown(object_.at(key)), known);
    }
  }

  static std::string shown(const json& value) {
    std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
    if (text.size() > 60) text = text.substr(0, 57) + "...";
    return text;
  }

 private:
  const json& object_;
  std::string_view where_;
};

void read_rope(const Fields& config, ModelConfig& model) {
  // transformers 5 keeps all of it in rope_parameters; 4 has rope_theta beside rope_scaling.
  const bool modern = config.has("rope_parameters");
  const char* key = modern ? "rope_parameters" : "rope_scaling";
  if (modern && config.has("rope_scaling") && config.at("rope_scaling") != config.at(key)) {
    fail("{}: rope_parameters and rope_scaling are both there and differ", config.where());
  }
  if (config.has("rope_theta")) model.rope_theta = config.positive("rope_theta");
  config.refuse_other_than(1.0, "partial_rotary_factor");
  if (!config.has(key)) return;
  if (!config.at(key).is_object()) fail("{}: {} is not an object", config.where(), key);
  const std::string where = fmt::format("{}: {}", config.where(), key);
  const Fields rope(config.at(key), where);
  if (rope.has("rope_theta")) model.rope_theta = rope.positive("rope_theta");
  rope.refuse_other_than(1.0, "partial_rotary_factor");
  const std::string type = rope.text_or("rope_type", rope.text_or("type", "default"));
  if (type == "default") return;
  RopeScaling& scaling = model.rope_scaling;
  if (type == "linear") {
    scaling.type = RopeScaling::Type::kLinear;
    scaling.factor = rope.positive("factor");
  } else if (type == "llama3") {
    scaling.type = RopeScaling::Type::kLlama3;
    scaling.factor = rope.positive("factor");
    scaling.low_freq_factor = rope.positive("low_freq_factor");
    scaling.high_freq_factor = rope.positive("high_freq_factor");
    scaling.original_max_position_embeddings =
        rope.size("original_max_position_embeddings", int64_t{1} << 32);
    if (scaling.high_freq_factor <= scaling.low_freq_factor) {
      fail("{}: high_freq_factor must be larger than low_freq_factor", where);
    }
  } else {
    fail("{}: rope type \"{}\" is not supported; default, linear and llama3 are", where,
         excerpt(type));
  }
}

int32_t token_id(const Fields& config, const char* key, const json& value, int64_t vocab_size) {
  // Unsigned numbers above the signed range would turn negative.
  const bool fits =
      value.is_number_integer() &&
      (!value.is_number_unsigned() || value.get<uint64_t>() <= std::numeric_limits<int64_t>::max());
  if (!fits || value.get<int64_t>() < 0 || value.get<int64_t>() >= vocab_size) {
    fail("{}: {} is {}, not a token id from 0 to below vocab_size {}", config.where(), key,
         Fields::shown(value), vocab_size);
  }
  return value.get<int32_t>();
}

// One id or a list of them; null is none.
std::vector<int32_t> end_ids(const Fields& config, int64_t vocab_size) {
  static constexpr const char* kKey = "eos_token_id";
  if (!config.has(kKey)) return {};
  const json& eos = config.at(kKey);
  if (!eos.is_array()) return {token_id(config, kKey, eos, vocab_size)};
  std::vector<int32_t> ids;
  for (const json& value : eos) ids.push_back(token_id(config, kKey, value, vocab_size));
  return ids;
}

}  // namespace

ModelConfig parse_config(std::string_view text, std::string_view where) {
  const json object = parse_json_object(text, where);
  const Fields config(object, where);

  const std::string model_type = config.text_or("model_type", "llama");
  std::string architecture = "LlamaForCausalLM";
  if (config.has("architectures")) {
    const json& list = config.at("architectures");
    if (!list.is_array() || list.empty() || !list.front().is_string()) {
      fail("{}: architectures is {}; it must be a list of names", where, Fields::shown(list));
    }
    architecture = list.front().get<std::string>();
  }
  if (model_type != "llama" || architecture != "LlamaForCausalLM") {
    fail("{}: this is a {} ({}); only Llama models (LlamaForCausalLM) are supported", where,
         excerpt(model_type), excerpt(architecture));
  }

  // Generous bounds: they keep every product of two sizes far from overflow.
  constexpr int64_t kWide = int64_t{1} << 20;
  ModelConfig model;
  model.vocab_size = config.size("vocab_size", int64_t{1} << 24);
  model.hidden_size = config.size("hidden_size", kWide);
  model.intermediate_size = config.size("intermediate_size", kWide);
  model.num_layers = config.size("num_hidden_layers", 4096);
  model.num_heads = config.size("num_attention_heads", 65536);
  model.num_kv_heads = config.size_or("num_key_value_heads", model.num_heads, 65536);
  model.max_position_embeddings = config.size_or("max_position_embeddings", 2048, int64_t{1} << 32);
  if (model.num_heads % model.num_kv_heads != 0) {
    fail("{}: num_attention_heads {} is not a multiple of num_key_value_heads {}", where,
         model.num_heads, model.num_kv_heads);
  }
  if (config.has("head_dim")) {
    model.head_dim = config.size("head_dim", kWide);
  } else if (model.hidden_size % model.num_heads == 0) {
    model.head_dim = model.hidden_size / model.num_heads;
  } else {
    fail("{}: head_dim is missing, and hidden_size {} is not a multiple of num_attention_heads {}",
         where, model.hidden_size, model.num_heads);
  }
  if (model.head_dim % 2 != 0 || model.head_dim > 256) {
    fail("{}: head_dim {} is not supported; even sizes up to 256 are", where, model.head_dim);
  }
  model.rms_norm_eps = config.positive("rms_norm_eps", 1e-6);
  model.tie_word_embeddings = config.flag("tie_word_embeddings");
  for (const char* bias : {"attention_bias", "mlp_bias"}) {
    if (config.flag(bias)) fail("{}: {} is true; biases are not supported", where, bias);
  }
  if (const std::string act = config.text_or("hidden_act", "silu"); act != "silu") {
    fail("{}: hidden_act \"{}\" is not supported; silu is", where, excerpt(act));
  }
  if (config.has("quantization_config")) {
    fail("{}: the weights are quantized (quantization_config); F32, F16 and BF16 are supported",
         where);
  }
  read_rope(config, model);
  if (config.has("bos_token_id")) {
    model.bos_token_id =
        token_id(config, "bos_token_id", config.at("bos_token_id"), model.vocab_size);
  }
  // Without a word of it they are Llama's own.
  if (object.contains("eos_token_id")) model.eos_token_ids = end_ids(config, model.vocab_size);
  return model;
}

void read_generation_config(std::string_view text, std::string_view where, ModelConfig& model) {
  const json object = parse_json_object(text, where);
  const Fields config(object, where);
  if (config.has("eos_token_id")) model.eos_token_ids = end_ids(config, model.vocab_size);
}

}  // namespace sagelm
