#include "checkpoint/checkpoint.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <functional>
#include <limits>
#include <string>

#include "checkpoint/checkpoint_writer.h"
#include "checkpoint/expect_error.h"

namespace sagelm {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

void expect_same(const TensorView& view, CheckpointWriter& writer, const std::string& name) {
  SCOPED_TRACE(name);
  const StoredTensor& stored = writer.tensor(name);
  EXPECT_EQ(view.name, name);
  EXPECT_EQ(dtype_name(view.dtype), stored.dtype);
  EXPECT_EQ(view.shape, stored.shape);
  EXPECT_EQ(decode(view), stored.values);
}

void expect_loaded(const Checkpoint& checkpoint, CheckpointWriter& writer, bool tied) {
  const ModelWeights& weights = checkpoint.weights();
  expect_same(weights.embedding, writer, "model.embed_tokens.weight");
  expect_same(weights.final_norm, writer, "model.norm.weight");
  if (tied) {
    EXPECT_EQ(weights.lm_head.data, weights.embedding.data);
  } else {
    expect_same(weights.lm_head, writer, "lm_head.weight");
  }
  ASSERT_EQ(weights.layers.size(), 2u);
  for (size_t i = 0; i < weights.layers.size(); ++i) {
    const LayerWeights& layer = weights.layers[i];
    const std::string at = fmt::format("model.layers.{}.", i);
    expect_same(layer.input_norm, writer, at + "input_layernorm.weight");
    expect_same(layer.q_proj, writer, at + "self_attn.q_proj.weight");
    expect_same(layer.k_proj, writer, at + "self_attn.k_proj.weight");
    expect_same(layer.v_proj, writer, at + "self_attn.v_proj.weight");
    expect_same(layer.o_proj, writer, at + "self_attn.o_proj.weight");
    expect_same(layer.post_norm, writer, at + "post_attention_layernorm.weight");
    expect_same(layer.gate_proj, writer, at + "mlp.gate_proj.weight");
    expect_same(layer.up_proj, writer, at + "mlp.up_proj.weight");
    expect_same(layer.down_proj, writer, at + "mlp.down_proj.weight");
  }
  int64_t parameters = 0;
  int64_t bytes = 0;
  for (const StoredTensor& tensor : writer.tensors) {
    parameters += static_cast<int64_t>(tensor.values.size());
    bytes += static_cast<int64_t>(tensor.bytes.size());
  }
  EXPECT_EQ(checkpoint.num_parameters(), parameters);
  EXPECT_EQ(checkpoint.bytes(), bytes);
  EXPECT_NO_THROW(check_weights_finite(weights));
}

TEST(Checkpoint, LoadsEveryForm) {
  struct Heads {
    int64_t q, kv, dim;
  };
  // Hidden size 16: multi-head, grouped, multi-query, and heads wider than the model.
  for (const Heads heads : {Heads{4, 4, 4}, Heads{4, 2, 4}, Heads{4, 1, 4}, Heads{2, 1, 32}}) {
    for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      for (const bool tied : {false, true}) {
        for (const bool old_spelling : {false, true}) {
          for (const size_t shards : {size_t{1}, size_t{3}}) {
            SCOPED_TRACE(fmt::format("{}/{}x{} {} tied {} old {} shards {}", heads.q, heads.kv,
                                     heads.dim, dtype_name(dtype), tied, old_spelling, shards));
            CheckpointOptions options;
            options.num_heads = heads.q;
            options.num_kv_heads = heads.kv;
            options.head_dim = heads.dim;
            options.dtype = dtype;
            options.tied = tied;
            options.old_spelling = old_spelling;
            CheckpointWriter writer(options);
            const TempDir dir;
            shards == 1 ? writer.write(dir.path()) : writer.write_sharded(dir.path(), shards);
            const Checkpoint checkpoint = Checkpoint::open(dir.path());
            EXPECT_EQ(checkpoint.config().dtype, dtype);
            EXPECT_EQ(checkpoint.config().head_dim, heads.dim);
            EXPECT_EQ(checkpoint.config().name, dir.path().filename().string());
            EXPECT_EQ(checkpoint.directory(), dir.path());
            expect_loaded(checkpoint, writer, tied);
          }
        }
      }
    }
  }
}

TEST(Checkpoint, LoadsAFileByName) {
  CheckpointWriter writer;
  const TempDir dir;
  writer.write(dir.path());
  const Checkpoint checkpoint = Checkpoint::open(dir.path() / "model.safetensors");
  EXPECT_EQ(checkpoint.directory(), dir.path());
  expect_loaded(checkpoint, writer, false);
}

TEST(Checkpoint, IgnoresWhatIsSafeToIgnore) {
  CheckpointOptions options;
  options.tied = true;
  CheckpointWriter writer(options);
  const std::vector<StoredTensor> needed = writer.tensors;
  writer.add("lm_head.weight", {24, 16}, DType::kF32);
  writer.add("model.layers.0.self_attn.rotary_emb.inv_freq", {2}, DType::kF32);
  const TempDir dir;
  writer.write(dir.path());
  writer.tensors = needed;
  expect_loaded(Checkpoint::open(dir.path()), writer, true);
}

TEST(Checkpoint, GenerationConfigNamesTheEndOfText) {
  const TempDir dir;
  CheckpointWriter().write(dir.path());
  const auto ends_with = [&](std::string_view generation_config) {
    write_file(dir.path() / "generation_config.json", generation_config);
    return Checkpoint::open(dir.path()).config().eos_token_ids;
  };
  EXPECT_EQ(Checkpoint::open(dir.path()).config().eos_token_ids, std::vector<int32_t>{2});
  EXPECT_EQ(ends_with(R"({"eos_token_id": [5, 7]})"), (std::vector<int32_t>{5, 7}));
  EXPECT_EQ(ends_with(R"({"eos_token_id": 5, "temperature": 0.6})"), std::vector<int32_t>{5});
  EXPECT_EQ(ends_with(R"({"eos_token_id": null})"), std::vector<int32_t>{2});
  EXPECT_EQ(ends_with("{}"), std::vector<int32_t>{2});
  for (const char* wrong : {"", "[]", R"({"eos_token_id": 24})", R"({"eos_token_id": "2"})"}) {
    SCOPED_TRACE(wrong);
    expect_error([&] { ends_with(wrong); }, {"generation_config.json"});
  }
}

TEST(Checkpoint, LoadsTheDemoModel) {
  const Checkpoint checkpoint = Checkpoint::open(SAGELM_SOURCE_DIR "/models/demo");
  EXPECT_EQ(checkpoint.config().name, "demo");
  EXPECT_EQ(checkpoint.config().dtype, DType::kBF16);
  EXPECT_EQ(checkpoint.config().num_layers, 6);
  EXPECT_GT(checkpoint.num_parameters(), 10'000'000);
  EXPECT_NO_THROW(check_weights_finite(checkpoint.weights()));
}

class WrongCheckpoint : public testing::Test {
 protected:
  void expect_wrong(std::initializer_list<std::string_view> mentioned) const {
    expect_error([&] { Checkpoint::open(dir_.path()); }, {dir_.path().string()});
    expect_error([&] { Checkpoint::open(dir_.path()); }, mentioned);
  }
  fs::path at(const std::string& name) const { return dir_.path() / name; }

  TempDir dir_;
  CheckpointWriter writer_;
};

TEST_F(WrongCheckpoint, FilesAreMissing) {
  expect_wrong({"model.safetensors", "model.safetensors.index.json"});
  write_file(at("pytorch_model.bin"), "PK");
  expect_wrong({"pytorch_model.bin", "safetensors"});
  expect_error([&] { Checkpoint::open(at("absent")); }, {"absent", "does not exist"});
  writer_.write(dir_.path());
  fs::remove(at("config.json"));
  expect_wrong({"config.json"});
  expect_error([&] { Checkpoint::open(at("model.safetensors")); }, {"config.json"});
  write_file(at("config.json"), writer_.config.dump());
  expect_error([&] { Checkpoint::open(at("config.json")); }, {"config.json", ".safetensors"});
  fs::remove(at("model.safetensors"));
  fs::create_directory(at("model.safetensors"));
  expect_wrong({"model.safetensors", "regular file"});
  fs::remove(at("model.safetensors"));
  ASSERT_EQ(::mkfifo(at("model.safetensors").c_str(), 0600), 0);  // not waited for
  expect_wrong({"model.safetensors", "regular file"});
  fs::remove(at("model.safetensors"));
  write_file(at("model.safetensors"), "version https://git-lfs.github.com/spec/v1\noid sha256:0\n");
  expect_wrong({"model.safetensors", "git lfs pull"});
}

TEST_F(WrongCheckpoint, FilesAreEmpty) {
  writer_.write(dir_.path());
  write_file(at("model.safetensors"), "");
  expect_wrong({"model.safetensors", "empty"});
  writer_.write(dir_.path());
  write_file(at("config.json"), "");
  expect_wrong({"config.json", "empty"});
}

TEST_F(WrongCheckpoint, FilesAreTruncated) {
  const std::string bytes = safetensors_bytes(writer_.tensors);
  writer_.write(dir_.path());
  for (size_t size = 0; size < bytes.size(); size += 64) {
    SCOPED_TRACE(size);
    write_file(at("model.safetensors"), std::string_view(bytes).substr(0, size));
    expect_wrong({"model.safetensors"});
  }
  write_file(at("model.safetensors"), bytes + '\0');
  expect_wrong({"model.safetensors", "1 bytes follow"});
}

TEST_F(WrongCheckpoint, TensorIsMissing) {
  std::vector<std::string> names;
  for (const StoredTensor& tensor : writer_.tensors) names.push_back(tensor.name);
  for (const std::string& name : names) {
    SCOPED_TRACE(name);
    CheckpointWriter writer;
    writer.remove(name);
    writer.write(dir_.path());
    expect_wrong({"model.safetensors", name, "missing"});
  }
}

TEST_F(WrongCheckpoint, TensorHasNoPlace) {
  for (const char* name : {"model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up.weight",
                           "model.layers.0.self_attn.q_proj.weight_scale", "extra"}) {
    SCOPED_TRACE(name);
    CheckpointWriter writer;
    writer.add(name, {16}, DType::kF32);
    writer.write(dir_.path());
    expect_wrong({"model.safetensors", name});
    writer.tensor(name).dtype = "I32";
    writer.write(dir_.path());
    expect_wrong({"model.safetensors", name});
  }
}

TEST_F(WrongCheckpoint, QuotesForeignTextInPrintableForm) {
  const std::string hostile = "\x1B[2J\n\xC2\x9B";
  const std::string_view shown = R"(\x1b[2J\x0a\u{9b})";
  for (const char* dtype : {"F32", "I32"}) {
    CheckpointWriter writer;
    writer.add(hostile, {1}, DType::kF32);
    writer.tensor(hostile).dtype = dtype;
    writer.write(dir_.path());
    expect_wrong({shown, "no place"});
  }
  writer_.tensor("model.norm.weight").dtype = hostile;
  writer_.write(dir_.path());
  expect_wrong({"model.norm.weight", shown});
  fs::remove(at("model.safetensors"));
  const fs::path index = at("model.safetensors.index.json");
  for (const json& shard : {json(3), json("../x"), json("../" + hostile), json(hostile)}) {
    SCOPED_TRACE(shard.dump());
    write_file(index, json{{"weight_map", {{hostile, shard}}}}.dump());
    expect_wrong({shown});
  }
}

TEST(Checkpoint, ItsNameIsPrintable) {
  const TempDir dir;
  const fs::path model = dir.path() / "a\x1B[2J\nb\xFF";
  fs::create_directory(model);
  CheckpointWriter().write(model);
  EXPECT_EQ(Checkpoint::open(model).config().name, R"(a\x1b[2J\x0ab\xff)");
}

TEST_F(WrongCheckpoint, TensorHasAnotherShapeOrType) {
  const std::string name = "model.layers.1.mlp.up_proj.weight";
  for (const std::vector<int64_t>& shape :
       {std::vector<int64_t>{16, 20}, {320}, {20, 16, 1}, {1, 20, 16}}) {
    writer_.tensor(name).shape = shape;
    writer_.write(dir_.path());
    expect_wrong({"model.safetensors", name, "[20, 16]"});
  }
  writer_.tensor(name).shape = {20, 16};
  for (const char* dtype : {"I32", "F12"}) {
    writer_.tensor(name).dtype = dtype;
    writer_.write(dir_.path());
    expect_wrong({"model.safetensors", name, dtype});
  }
}

TEST_F(WrongCheckpoint, ConfigContradictsTensors) {
  struct Case {
    const char* key;
    int64_t value;
    const char* tensor;
  };
  for (const Case& wrong : {Case{"vocab_size", 25, "model.embed_tokens.weight"},
                            Case{"hidden_size", 32, "model.embed_tokens.weight"},
                            Case{"intermediate_size", 21, "mlp.gate_proj.weight"},
                            Case{"num_hidden_layers", 3, "model.layers.2.input_layernorm.weight"},
                            Case{"num_hidden_layers", 1, "model.layers.1."},
                            Case{"num_attention_heads", 2, "self_attn.q_proj.weight"},
                            Case{"num_key_value_heads", 4, "self_attn.k_proj.weight"},
                            Case{"head_dim", 8, "self_attn.q_proj.weight"}}) {
    SCOPED_TRACE(wrong.key);
    CheckpointWriter writer;
    writer.config[wrong.key] = wrong.value;
    writer.write(dir_.path());
    expect_wrong({"model.safetensors", wrong.tensor});
  }
}

TEST_F(WrongCheckpoint, HeadIsMissingThoughNotTied) {
  CheckpointOptions options;
  options.tied = true;
  CheckpointWriter writer(options);
  writer.config["tie_word_embeddings"] = false;
  writer.write(dir_.path());
  expect_wrong({"lm_head.weight", "tie_word_embeddings"});
}

TEST_F(WrongCheckpoint, HeadHasAnotherType) {
  writer_.tensor("lm_head.weight").dtype = "I32";
  writer_.write(dir_.path());
  expect_wrong({"lm_head.weight", "I32"});
}

TEST_F(WrongCheckpoint, IndexIsWrong) {
  const fs::path index = at("model.safetensors.index.json");
  writer_.write_sharded(dir_.path(), 2);
  ASSERT_NO_THROW(Checkpoint::open(dir_.path()));
  for (const char* text : {"{", "[]", "{}", "{\"weight_map\":3}", "{\"weight_map\":{}}",
                           "{\"weight_map\":{\"t\":3}}", "{\"weight_map\":{\"t\":null}}"}) {
    SCOPED_TRACE(text);
    write_file(index, text);
    expect_wrong({"model.safetensors.index.json"});
  }
  for (const std::string& name :
       {std::string("../x"), std::string("/etc/passwd"), std::string(".."), std::string(),
        std::string("sub/x.safetensors"), std::string("a\0b", 3), std::string(256, 'x')}) {
    SCOPED_TRACE(name);
    write_file(index, json{{"weight_map", {{"some.tensor", name}}}}.dump());
    expect_wrong({"model.safetensors.index.json", "some.tensor"});
  }
  write_file(index, R"({"weight_map":{"some.tensor":"a","some.tensor":"b"}})");
  expect_wrong({"model.safetensors.index.json", "some.tensor", "twice"});
}

TEST_F(WrongCheckpoint, ShardsAreWrong) {
  const std::string first = CheckpointWriter::shard_name(0, 2);
  const std::string second = CheckpointWriter::shard_name(1, 2);
  writer_.write_sharded(dir_.path(), 2);
  fs::remove(at(second));
  expect_wrong({second});
  // The index places a tensor in a shard that lacks it.
  writer_.write_sharded(dir_.path(), 2);
  json index = {{"weight_map", json::object()}};
  for (const StoredTensor& tensor : writer_.tensors) index["weight_map"][tensor.name] = first;
  write_file(at("model.safetensors.index.json"), index.dump());
  expect_wrong({first, "is not in it"});
  // One tensor in both shards, of a usable type in both or in one only.
  for (const char* dtype : {"F32", "I32"}) {
    SCOPED_TRACE(dtype);
    writer_.write_sharded(dir_.path(), 2);
    std::vector<StoredTensor> tensors;
    for (size_t i = 1; i < writer_.tensors.size(); i += 2) tensors.push_back(writer_.tensors[i]);
    tensors.push_back(writer_.tensors[0]);
    tensors.back().dtype = dtype;
    write_file(at(second), safetensors_bytes(tensors));
    expect_wrong({second, writer_.tensors[0].name, "two files"});
  }
}

TEST_F(WrongCheckpoint, WeightsAreNotFinite) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    CheckpointOptions options;
    options.dtype = dtype;
    CheckpointWriter writer(options);
    std::vector<std::string> names;
    for (const StoredTensor& tensor : writer.tensors) names.push_back(tensor.name);
    for (const std::string& name : names) {
      for (const float value : {nan, infinity, -infinity}) {
        SCOPED_TRACE(fmt::format("{} {} {}", dtype_name(dtype), name, value));
        CheckpointWriter wrong(options);
        StoredTensor& tensor = wrong.tensor(name);
        tensor.values[7] = value;
        tensor.values.back() = value;
        tensor.bytes = encode(tensor.values, dtype);
        wrong.write(dir_.path());
        const Checkpoint checkpoint = Checkpoint::open(dir_.path());
        expect_error([&] { check_weights_finite(checkpoint.weights()); }, {name, "element 7"});
      }
    }
    // The largest finite values pass.
    const float largest = dtype == DType::kF16 ? 65504.0f : 0x1.FEp127f;
    StoredTensor& tensor = writer.tensor("model.norm.weight");
    tensor.values[3] = -largest;
    tensor.bytes = encode(tensor.values, dtype);
    writer.write(dir_.path());
    const Checkpoint checkpoint = Checkpoint::open(dir_.path());
    EXPECT_EQ(decode(checkpoint.weights().final_norm)[3], -largest);
    EXPECT_NO_THROW(check_weights_finite(checkpoint.weights()));
  }
}

}  // namespace
}  // namespace sagelm
