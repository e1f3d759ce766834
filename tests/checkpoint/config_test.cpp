#include "checkpoint/config.h"

#include <gtest/gtest.h>

#include <string>

#include "checkpoint/checkpoint_writer.h"
#include "checkpoint/expect_error.h"

namespace sagelm {
namespace {

using nlohmann::json;

json right_config(bool old_spelling = false) {
  CheckpointOptions options;
  options.old_spelling = old_spelling;
  return CheckpointWriter(options).config;
}

ModelConfig parse(const json& config) { return parse_config(config.dump(), "dir/config.json"); }

// `key` set to `value` in a config that is otherwise right gives an error that names both.
void expect_wrong(const char* key, const json& value, std::string_view mentioned) {
  SCOPED_TRACE(std::string(key) + " = " + value.dump());
  json config = right_config();
  config[key] = value;
  expect_error([&] { parse(config); }, {"dir/config.json", mentioned});
}

TEST(Config, ReadsBothSpellings) {
  for (const bool old_spelling : {false, true}) {
    SCOPED_TRACE(old_spelling);
    const ModelConfig model = parse(right_config(old_spelling));
    EXPECT_EQ(model.vocab_size, 24);
    EXPECT_EQ(model.hidden_size, 16);
    EXPECT_EQ(model.intermediate_size, 20);
    EXPECT_EQ(model.num_layers, 2);
    EXPECT_EQ(model.num_heads, 4);
    EXPECT_EQ(model.num_kv_heads, 2);
    EXPECT_EQ(model.head_dim, 4);
    EXPECT_EQ(model.max_position_embeddings, 128);
    EXPECT_EQ(model.rms_norm_eps, 1e-5);
    EXPECT_EQ(model.rope_theta, 50000.0);
    EXPECT_EQ(model.rope_scaling.type, RopeScaling::Type::kNone);
    EXPECT_FALSE(model.tie_word_embeddings);
    EXPECT_EQ(model.bos_token_id, 1);
    EXPECT_EQ(model.eos_token_ids, std::vector<int32_t>{2});
  }
}

TEST(Config, FillsInWhatOldConfigsLeaveOut) {
  const ModelConfig model = parse({{"vocab_size", 10},
                                   {"hidden_size", 16},
                                   {"intermediate_size", 8},
                                   {"num_hidden_layers", 1},
                                   {"num_attention_heads", 2},
                                   {"head_dim", nullptr}});
  EXPECT_EQ(model.num_kv_heads, 2);
  EXPECT_EQ(model.head_dim, 8);
  EXPECT_EQ(model.rope_theta, 10000.0);
  EXPECT_EQ(model.rms_norm_eps, 1e-6);
  EXPECT_FALSE(model.tie_word_embeddings);
}

TEST(Config, ReadsRopeScaling) {
  const json llama3 = {{"rope_type", "llama3"},
                       {"factor", 8.0},
                       {"low_freq_factor", 1.0},
                       {"high_freq_factor", 4.0},
                       {"original_max_position_embeddings", 8192}};
  json old_config = right_config(true);
  old_config["rope_scaling"] = llama3;
  json new_config = right_config();
  new_config["rope_parameters"].update(llama3);
  for (const json& config : {old_config, new_config}) {
    const ModelConfig model = parse(config);
    EXPECT_EQ(model.rope_theta, 50000.0);
    EXPECT_EQ(model.rope_scaling.type, RopeScaling::Type::kLlama3);
    EXPECT_EQ(model.rope_scaling.factor, 8.0);
    EXPECT_EQ(model.rope_scaling.low_freq_factor, 1.0);
    EXPECT_EQ(model.rope_scaling.high_freq_factor, 4.0);
    EXPECT_EQ(model.rope_scaling.original_max_position_embeddings, 8192);
  }
  json linear = right_config(true);
  linear["rope_scaling"] = {{"type", "linear"}, {"factor", 2.0}};
  EXPECT_EQ(parse(linear).rope_scaling.type, RopeScaling::Type::kLinear);
  EXPECT_EQ(parse(linear).rope_scaling.factor, 2.0);
}

TEST(Config, ReadsSeveralEndTokens) {
  json config = right_config();
  config["eos_token_id"] = {3, 5};
  EXPECT_EQ(parse(config).eos_token_ids, (std::vector<int32_t>{3, 5}));
}

TEST(Config, RejectsRopeThatIsNotSupported) {
  for (const char* type : {"dynamic", "yarn", "longrope", "other"}) {
    expect_wrong("rope_parameters", {{"rope_type", type}, {"factor", 2.0}}, type);
  }
  expect_wrong("rope_parameters", {{"rope_type", 3}}, "rope_type");
  expect_wrong("rope_parameters", "linear", "rope_parameters");
  expect_wrong("rope_parameters", {{"rope_type", "linear"}}, "factor");
  expect_wrong("rope_parameters", {{"rope_type", "linear"}, {"factor", 0}}, "factor");
  expect_wrong("rope_parameters", {{"rope_theta", -1.0}}, "rope_theta");
  json config = right_config(true);
  config["rope_scaling"] = {{"type", "yarn"}, {"factor", 2.0}};
  expect_error([&] { parse(config); }, {"dir/config.json", "rope_scaling", "yarn"});
  config["rope_scaling"] = {{"rope_type", "llama3"},
                            {"factor", 8.0},
                            {"low_freq_factor", 4.0},
                            {"high_freq_factor", 4.0},
                            {"original_max_position_embeddings", 8192}};
  expect_error([&] { parse(config); }, {"dir/config.json", "high_freq_factor"});
}

TEST(Config, RejectsARotationOfPartOfTheHead) {
  const json wrong_values = {0.5, 0, 2, -1.0, "1", true};
  for (const json& value : wrong_values) {
    for (const char* where : {"", "rope_parameters", "rope_scaling"}) {
      SCOPED_TRACE(value.dump() + " in " + where);
      json config = right_config(where == std::string_view("rope_scaling"));
      (*where == '\0' ? config : config[where])["partial_rotary_factor"] = value;
      expect_error([&] { parse(config); },
                   {"dir/config.json", where, "partial_rotary_factor is " + value.dump()});
    }
  }
  json config = right_config();
  config["partial_rotary_factor"] = 1.0;
  config["rope_parameters"]["partial_rotary_factor"] = 1;
  EXPECT_NO_THROW(parse(config));
}

TEST(Config, EndOfTextThatIsNullIsNone) {
  json config = right_config();
  config["eos_token_id"] = nullptr;
  EXPECT_TRUE(parse(config).eos_token_ids.empty());
  config.erase("eos_token_id");
  EXPECT_EQ(parse(config).eos_token_ids, std::vector<int32_t>{2});
}

TEST(Config, RejectsTwoDifferentRotations) {
  json config = right_config();
  config["rope_scaling"] = {{"rope_type", "linear"}, {"factor", 2.0}};
  expect_error([&] { parse(config); }, {"dir/config.json", "rope_parameters", "rope_scaling"});
  config["rope_scaling"] = config["rope_parameters"];
  EXPECT_NO_THROW(parse(config));
  config["rope_scaling"] = nullptr;
  EXPECT_NO_THROW(parse(config));
}

TEST(Config, QuotesForeignTextInPrintableForm) {
  const std::string hostile = "\x1B[2J\n\xC2\x9B";
  expect_wrong("model_type", hostile, R"(\x1b[2J\x0a\u{9b})");
  expect_wrong("hidden_act", hostile, R"(\x1b[2J\x0a\u{9b})");
  expect_wrong("architectures", json::array({hostile}), R"(\x1b[2J\x0a\u{9b})");
  expect_wrong("rope_parameters", {{"rope_type", hostile}}, R"(\x1b[2J\x0a\u{9b})");
  expect_wrong("vocab_size", hostile, R"("\u001b[2J\n\u009b")");
  std::string text = right_config().dump();
  text.insert(1, "\"a\\u001b\":1,\"a\\u001b\":2,");
  expect_error([&] { parse_config(text, "dir/config.json"); }, {R"("a\x1b" stands twice)"});
  expect_error([&] { parse_config("{\"a\":\"\xFF\"}", "dir/config.json"); }, {"UTF-8"});
  expect_error([&] { parse_config("{\"a\":", "dir/config.json"); },
               {"dir/config.json: not valid JSON (parse error at line 1"});
}

TEST(Config, RejectsSizesThatAreMissingAbsurdOrNoNumbers) {
  for (const char* key : {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                          "num_attention_heads"}) {
    json config = right_config();
    config.erase(key);
    expect_error([&] { parse(config); }, {"dir/config.json", key, "missing"});
    const json wrong_values = {
        0,          -1,       1.5, "16", true, json::array({16}), json::object(), int64_t{1} << 40,
        UINT64_MAX, INT64_MIN};
    for (const json& value : wrong_values) expect_wrong(key, value, key);
  }
  for (const char* key : {"num_key_value_heads", "head_dim", "max_position_embeddings"}) {
    const json wrong_values = {0, -1, 1.5, "16", UINT64_MAX};
    for (const json& value : wrong_values) expect_wrong(key, value, key);
  }
}

TEST(Config, RejectsWhatContradictsItself) {
  expect_wrong("num_key_value_heads", 3, "num_key_value_heads");
  expect_wrong("num_key_value_heads", 8, "num_key_value_heads");
  expect_wrong("head_dim", 7, "head_dim");
  expect_wrong("head_dim", 258, "head_dim");
  json config = right_config();
  config.erase("head_dim");
  config["hidden_size"] = 18;
  expect_error([&] { parse(config); }, {"dir/config.json", "head_dim", "18"});
}

TEST(Config, RejectsOtherModels) {
  expect_wrong("model_type", "mistral", "mistral");
  expect_wrong("model_type", 7, "model_type");
  expect_wrong("architectures", {"Qwen2ForCausalLM"}, "Qwen2ForCausalLM");
  expect_wrong("architectures", json::array(), "architectures");
  expect_wrong("architectures", "LlamaForCausalLM", "architectures");
  expect_wrong("hidden_act", "gelu", "hidden_act");
  expect_wrong("attention_bias", true, "attention_bias");
  expect_wrong("mlp_bias", true, "mlp_bias");
  expect_wrong("attention_bias", "no", "attention_bias");
  expect_wrong("tie_word_embeddings", 1, "tie_word_embeddings");
  expect_wrong("quantization_config", {{"quant_method", "gptq"}}, "quantization_config");
}

TEST(Config, RejectsWrongNumbersAndTokenIds) {
  for (const char* key : {"rms_norm_eps", "rope_theta"}) {
    const json wrong_values = {0, -1e-5, "1e-5", json::array()};
    for (const json& value : wrong_values) expect_wrong(key, value, key);
  }
  for (const char* key : {"bos_token_id", "eos_token_id"}) {
    const json wrong_values = {
        24, -1, -2, 1.0, "1", UINT64_MAX, INT64_MAX, INT64_MIN, UINT64_MAX - 1, json::object()};
    for (const json& value : wrong_values) expect_wrong(key, value, key);
  }
  expect_wrong("bos_token_id", json::array({1}), "bos_token_id");
  expect_wrong("eos_token_id", {2, -1}, "eos_token_id");
  expect_wrong("eos_token_id", {2, 24}, "eos_token_id");
  expect_wrong("eos_token_id", json::array({json::array({2})}), "eos_token_id");
}

TEST(Config, RejectsTextThatIsNotOneObject) {
  std::string deep = "{\"a\":";
  for (int i = 0; i < 100000; ++i) deep += '[';
  for (const std::string& text :
       {std::string(), std::string("{"), std::string("[]"), std::string("3"), std::string("{} {}"),
        std::string("{\"a\":1,}"), std::string("{\"a\":NaN}"), std::string("{\"a\":1e999}"),
        std::string("{\"\xff\":1}"), std::string(64, '\0'), deep}) {
    SCOPED_TRACE(text.substr(0, 20));
    expect_error([&] { parse_config(text, "dir/config.json"); }, {"dir/config.json"});
  }
}

TEST(Config, RejectsKeysThatStandTwice) {
  std::string text = right_config().dump();
  text.insert(1, "\"vocab_size\":32,");
  expect_error([&] { parse_config(text, "dir/config.json"); }, {"dir/config.json", "vocab_size"});
  text = right_config().dump();
  text.insert(1, "\"other\":{\"inner\":1,\"inner\":2},");
  expect_error([&] { parse_config(text, "dir/config.json"); }, {"dir/config.json", "inner"});
  // The same name in different objects is fine.
  text = right_config().dump();
  text.insert(1, "\"other\":[{\"inner\":{\"inner\":1}},{\"inner\":2}],");
  EXPECT_NO_THROW(parse_config(text, "dir/config.json"));
}

TEST(Config, RejectsEveryTruncation) {
  const std::string text = right_config().dump();
  for (size_t size = 0; size < text.size(); ++size) {
    EXPECT_THROW(parse_config(std::string_view(text).substr(0, size), "c"), Error) << size;
  }
}

}  // namespace
}  // namespace sagelm
