#include "checkpoint/checkpoint.h"

#include <cstring>
#include <set>
#include <string_view>

#include "base/error.h"
#include "base/finite.h"
#include "base/json_bytes.h"
#include "checkpoint/config.h"
#include "checkpoint/safetensors.h"

namespace sagelm {
namespace {

namespace fs = std::filesystem;

std::string_view text_of(const MappedFile& file) {
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

// All tensors of a checkpoint by name, each to be taken once.
class TensorTable {
 public:
  void add(SafetensorsFile file, const std::string& where) {
    const auto check_new = [&](const std::string& name) {
      if (has(name)) fail("{}: tensor {} stands in two files", where, excerpt(name));
    };
    for (const auto& [name, view] : file.tensors) check_new(name);
    for (const auto& [name, dtype] : file.other_types) check_new(name);
    tensors_.merge(file.tensors);
    other_types_.merge(file.other_types);
  }

  bool has(const std::string& name) const {
    return tensors_.contains(name) || other_types_.contains(name);
  }

  TensorView take(const std::string& name, const std::vector<int64_t>& shape,
                  const std::string& where) {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) {
      if (const auto other = other_types_.find(name); other != other_types_.end()) {
        fail("{}: tensor {} is {}; F32, F16 and BF16 are supported", where, name,
             excerpt(other->second));
      }
      fail("{}: tensor {} is missing", where, name);
    }
    TensorView view = found->second;
    if (view.shape != shape) {
      fail("{}: tensor {} is [{}], and config.json makes it [{}]", where, name,
           fmt::join(view.shape, ", "), fmt::join(shape, ", "));
    }
    taken_.insert(name);
    return view;
  }

  // What is left must be something that is known to be safe to ignore.
  void check_rest(bool tied, const std::string& where) const {
    const auto check = [&](const std::string& name) {
      if (taken_.contains(name) || name.ends_with(".rotary_emb.inv_freq") ||
          (tied && name == "lm_head.weight")) {
        return;
      }
      fail("{}: tensor {} has no place in the model that config.json describes", where,
           excerpt(name));
    };
    for (const auto& [name, view] : tensors_) check(name);
    for (const auto& [name, dtype] : other_types_) check(name);
  }

 private:
  std::map<std::string, TensorView> tensors_;
  std::map<std::string, std::string> other_types_;
  std::set<std::string> taken_;
};

constexpr size_t kMaxFileName = 255;  // of every usual file system

// File names of the shards that an index names, each checked to be a plain name.
std::map<std::string, std::set<std::string>> read_index(const fs::path& path) {
  const MappedFile file = MappedFile::open(path);
  const std::string where = path.string();
  const nlohmann::json index = parse_json_object(text_of(file), where);
  if (!index.contains("weight_map") || !index["weight_map"].is_object() ||
      index["weight_map"].empty()) {
    fail("{}: it has no weight_map", where);
  }
  std::map<std::string, std::set<std::string>> shards;
  for (const auto& [tensor, shard] : index["weight_map"].items()) {
    if (!shard.is_string()) {
      fail("{}: the file of tensor {} is not a name", where, excerpt(tensor));
    }
    const auto name = shard.get<std::string>();
    if (name.empty() || name.size() > kMaxFileName || name.front() == '.' ||
        name.find('/') != std::string::npos || name.find('\0') != std::string::npos) {
      fail("{}: tensor {} is in \"{}\", which is not the name of a file beside it", where,
           excerpt(tensor), excerpt(name));
    }
    shards[name].insert(tensor);
  }
  return shards;
}

struct Location {
  fs::path directory;
  fs::path single;  // the one weights file; empty when there is an index
  fs::path index;
};

// What may not be looked at is an error, not absent.
bool is_there(const fs::path& path) {
  std::error_code error;
  const bool there = fs::exists(path, error);
  if (error) fail("cannot open {}: {}", path.string(), error.message());
  return there;
}

Location locate(const fs::path& model) {
  const fs::path directory = checkpoint_directory(model);
  if (directory != model) return {directory, model, {}};
  if (is_there(model / "model.safetensors")) return {model, model / "model.safetensors", {}};
  if (is_there(model / "model.safetensors.index.json")) {
    return {model, {}, model / "model.safetensors.index.json"};
  }
  for (const char* other : {"pytorch_model.bin", "pytorch_model.bin.index.json"}) {
    if (is_there(model / other)) {
      fail("{} has its weights in {}, which is not supported: they are needed as safetensors",
           model.string(), other);
    }
  }
  fail("{} holds neither model.safetensors nor model.safetensors.index.json", model.string());
}

std::string model_name(const fs::path& model) {
  const fs::path absolute = fs::weakly_canonical(fs::absolute(model));
  return printable(absolute.filename().string());  // from an archive, it may be foreign too
}

constexpr const char* kHeadName = "lm_head.weight";

// Calls take(name, shape) for every tensor of the model.
template <typename Take>
ModelWeights collect(const ModelConfig& c, const Take& take) {
  ModelWeights weights;
  weights.embedding = take("model.embed_tokens.weight", {c.vocab_size, c.hidden_size});
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const std::string at = fmt::format("model.layers.{}.", i);
    LayerWeights layer;
    layer.input_norm = take(at + "input_layernorm.weight", {c.hidden_size});
    layer.q_proj = take(at + "self_attn.q_proj.weight", {c.q_size(), c.hidden_size});
    layer.k_proj = take(at + "self_attn.k_proj.weight", {c.kv_size(), c.hidden_size});
    layer.v_proj = take(at + "self_attn.v_proj.weight", {c.kv_size(), c.hidden_size});
    layer.o_proj = take(at + "self_attn.o_proj.weight", {c.hidden_size, c.q_size()});
    layer.post_norm = take(at + "post_attention_layernorm.weight", {c.hidden_size});
    layer.gate_proj = take(at + "mlp.gate_proj.weight", {c.intermediate_size, c.hidden_size});
    layer.up_proj = take(at + "mlp.up_proj.weight", {c.intermediate_size, c.hidden_size});
    layer.down_proj = take(at + "mlp.down_proj.weight", {c.hidden_size, c.intermediate_size});
    weights.layers.push_back(std::move(layer));
  }
  weights.final_norm = take("model.norm.weight", {c.hidden_size});
  if (c.tie_word_embeddings) {
    weights.lm_head = weights.embedding;
  } else {
    weights.lm_head = take(kHeadName, {c.vocab_size, c.hidden_size});
  }
  return weights;
}

template <typename Function>
void for_each_tensor(const ModelWeights& weights, const Function& function) {
  function(weights.embedding);
  for (const LayerWeights& layer : weights.layers) {
    for (const TensorView* tensor :
         {&layer.input_norm, &layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.o_proj,
          &layer.post_norm, &layer.gate_proj, &layer.up_proj, &layer.down_proj}) {
      function(*tensor);
    }
  }
  function(weights.final_norm);
  if (weights.lm_head.data != weights.embedding.data) function(weights.lm_head);
}

}  // namespace

fs::path checkpoint_directory(const fs::path& model) {
  if (!is_there(model)) fail("{} does not exist", model.string());
  if (fs::is_directory(model)) return model;
  if (model.extension() != ".safetensors") {
    fail("{} is neither a model directory nor a .safetensors file", model.string());
  }
  const fs::path parent = model.parent_path();
  return parent.empty() ? fs::path(".") : parent;
}

Checkpoint Checkpoint::open(const std::filesystem::path& model) {
  const Location location = locate(model);
  Checkpoint checkpoint;
  checkpoint.directory_ = location.directory;
  const fs::path config_path = location.directory / "config.json";
  const MappedFile config_file = MappedFile::open(config_path);
  checkpoint.config_ = parse_config(text_of(config_file), config_path.string());
  checkpoint.config_.name = model_name(model);
  const fs::path generation_path = location.directory / "generation_config.json";
  if (is_there(generation_path)) {
    const MappedFile file = MappedFile::open(generation_path);
    read_generation_config(text_of(file), generation_path.string(), checkpoint.config_);
  }

  TensorTable table;
  const auto add_file = [&](const fs::path& path, const std::set<std::string>* expected) {
    checkpoint.files_.push_back(MappedFile::open(path));
    SafetensorsFile file = parse_safetensors(checkpoint.files_.back().bytes(), path.string());
    if (expected != nullptr) {
      for (const std::string& name : *expected) {
        if (!file.tensors.contains(name) && !file.other_types.contains(name)) {
          fail("{}: tensor {} is not in it, though the index says so", path.string(),
               excerpt(name));
        }
      }
    }
    table.add(std::move(file), path.string());
  };
  std::string where;
  if (location.index.empty()) {
    where = location.single.string();
    add_file(location.single, nullptr);
  } else {
    where = location.directory.string();
    for (const auto& [name, tensors] : read_index(location.index)) {
      add_file(location.directory / name, &tensors);
    }
  }
  checkpoint.weights_ =
      collect(checkpoint.config_, [&](const std::string& name, const std::vector<int64_t>& shape) {
        if (name == kHeadName && !table.has(name)) {
          fail("{}: tensor {} is missing, and config.json does not set tie_word_embeddings", where,
               name);
        }
        return table.take(name, shape, where);
      });
  table.check_rest(checkpoint.config_.tie_word_embeddings, where);
  checkpoint.config_.dtype = checkpoint.weights_.embedding.dtype;
  checkpoint.count_tensors();
  return checkpoint;
}

Checkpoint Checkpoint::random(std::string_view architecture) {
  constexpr uint64_t kSeed = 1;
  Checkpoint checkpoint;
  checkpoint.config_ = architecture_config(architecture);
  RandomTensors& tensors = checkpoint.made_up_.emplace(checkpoint.config_, kSeed);
  checkpoint.weights_ =
      collect(checkpoint.config_, [&](const std::string& name, const std::vector<int64_t>& shape) {
        return tensors.take(name, shape);
      });
  checkpoint.count_tensors();
  return checkpoint;
}

void Checkpoint::count_tensors() {
  for_each_tensor(weights_, [this](const TensorView& tensor) {
    num_parameters_ += tensor.num_elements();
    bytes_ += static_cast<int64_t>(tensor.bytes);
  });
}

void check_weights_finite(const ModelWeights& weights) {
  static constexpr int64_t kPart = int64_t{1} << 18;
  for_each_tensor(weights, [](const TensorView& tensor) {
    const int64_t count = tensor.num_elements();
    int64_t first = count;
#pragma omp parallel for reduction(min : first)
    for (int64_t begin = 0; begin < count; begin += kPart) {
      const std::byte* part = tensor.data + static_cast<size_t>(begin) * dtype_size(tensor.dtype);
      const int64_t bad = first_non_finite(part, tensor.dtype, std::min(kPart, count - begin));
      if (bad >= 0) first = std::min(first, begin + bad);
    }
    if (first < count) fail("tensor {} holds NaN or Inf at element {}", tensor.name, first);
  });
}

}  // namespace sagelm
