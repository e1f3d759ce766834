#include "checkpoint/checkpoint_writer.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <stdexcept>

#include "base/error.h"

namespace sagelm {

namespace fs = std::filesystem;
using nlohmann::json;

TempDir::TempDir() {
  std::string pattern = (fs::temp_directory_path() / "sagelm-test-XXXXXX").string();
  if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("cannot make " + pattern);
  path_ = pattern;
}

TempDir::~TempDir() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

std::string encode(const std::vector<float>& values, DType dtype) {
  std::string bytes(values.size() * dtype_size(dtype), '\0');
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::kF32) {
      std::memcpy(&bytes[4 * i], &values[i], 4);
    } else {
      const uint16_t word =
          dtype == DType::kF16 ? float_to_half(values[i]) : float_to_bfloat16(values[i]);
      std::memcpy(&bytes[2 * i], &word, 2);
    }
  }
  return bytes;
}

std::vector<float> decode(const TensorView& view) {
  std::vector<float> values(static_cast<size_t>(view.num_elements()));
  for (size_t i = 0; i < values.size(); ++i) {
    if (view.dtype == DType::kF32) {
      std::memcpy(&values[i], view.data + 4 * i, 4);
    } else {
      uint16_t word = 0;
      std::memcpy(&word, view.data + 2 * i, 2);
      values[i] = view.dtype == DType::kF16 ? half_to_float(word) : bfloat16_to_float(word);
    }
  }
  return values;
}

std::string safetensors_bytes(const json& header, std::string_view data) {
  const std::string text = header.dump();
  std::string bytes;
  for (int shift = 0; shift < 64; shift += 8) {
    bytes.push_back(static_cast<char>((uint64_t{text.size()} >> shift) & 0xFF));
  }
  return bytes.append(text).append(data);
}

std::string safetensors_bytes(const std::vector<StoredTensor>& tensors) {
  json header = {{"__metadata__", {{"format", "pt"}}}};
  std::string data;
  for (const StoredTensor& tensor : tensors) {
    const size_t begin = data.size();
    data += tensor.bytes;
    header[tensor.name] = {
        {"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {begin, data.size()}}};
  }
  return safetensors_bytes(header, data);
}

void write_file(const fs::path& path, std::string_view bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file.flush()) throw std::runtime_error("cannot write " + path.string());
}

CheckpointWriter::CheckpointWriter(const CheckpointOptions& o) : random_(o.seed) {
  config = {{"architectures", {"LlamaForCausalLM"}},
            {"model_type", "llama"},
            {"vocab_size", o.vocab_size},
            {"hidden_size", o.hidden_size},
            {"intermediate_size", o.intermediate_size},
            {"num_hidden_layers", o.num_layers},
            {"num_attention_heads", o.num_heads},
            {"num_key_value_heads", o.num_kv_heads},
            {"max_position_embeddings", 128},
            {"rms_norm_eps", 1e-5},
            {"hidden_act", "silu"},
            {"attention_bias", false},
            {"mlp_bias", false},
            {"tie_word_embeddings", o.tied},
            {"bos_token_id", 1},
            {"eos_token_id", 2}};
  const char* type = o.dtype == DType::kF32 ? "float32" : "bfloat16";
  if (o.dtype == DType::kF16) type = "float16";
  if (o.old_spelling) {
    config["rope_theta"] = 50000.0;
    config["rope_scaling"] = nullptr;
    config["torch_dtype"] = type;
  } else {
    config["rope_parameters"] = {{"rope_theta", 50000.0}, {"rope_type", "default"}};
    config["dtype"] = type;
  }
  if (!o.old_spelling || o.head_dim * o.num_heads != o.hidden_size) {
    config["head_dim"] = o.head_dim;
  }

  const int64_t q_size = o.num_heads * o.head_dim;
  const int64_t kv_size = o.num_kv_heads * o.head_dim;
  add("model.embed_tokens.weight", {o.vocab_size, o.hidden_size}, o.dtype);
  for (int64_t i = 0; i < o.num_layers; ++i) {
    const std::string at = fmt::format("model.layers.{}.", i);
    add(at + "input_layernorm.weight", {o.hidden_size}, o.dtype);
    add(at + "self_attn.q_proj.weight", {q_size, o.hidden_size}, o.dtype);
    add(at + "self_attn.k_proj.weight", {kv_size, o.hidden_size}, o.dtype);
    add(at + "self_attn.v_proj.weight", {kv_size, o.hidden_size}, o.dtype);
    add(at + "self_attn.o_proj.weight", {o.hidden_size, q_size}, o.dtype);
    add(at + "post_attention_layernorm.weight", {o.hidden_size}, o.dtype);
    add(at + "mlp.gate_proj.weight", {o.intermediate_size, o.hidden_size}, o.dtype);
    add(at + "mlp.up_proj.weight", {o.intermediate_size, o.hidden_size}, o.dtype);
    add(at + "mlp.down_proj.weight", {o.hidden_size, o.intermediate_size}, o.dtype);
  }
  add("model.norm.weight", {o.hidden_size}, o.dtype);
  if (!o.tied) add("lm_head.weight", {o.vocab_size, o.hidden_size}, o.dtype);
}

StoredTensor& CheckpointWriter::tensor(std::string_view name) {
  for (StoredTensor& tensor : tensors) {
    if (tensor.name == name) return tensor;
  }
  throw std::out_of_range("no tensor " + std::string(name));
}

void CheckpointWriter::remove(std::string_view name) {
  std::erase_if(tensors, [&](const StoredTensor& tensor) { return tensor.name == name; });
}

void CheckpointWriter::add(const std::string& name, const std::vector<int64_t>& shape,
                           DType dtype) {
  StoredTensor tensor{name, std::string(dtype_name(dtype)), shape, {}, {}};
  int64_t count = 1;
  for (const int64_t extent : shape) count *= extent;
  for (int64_t i = 0; i < count; ++i) {
    random_ = random_ * 1664525u + 1013904223u;
    tensor.values.push_back(static_cast<float>(static_cast<int>((random_ >> 16) % 129) - 64) / 64);
  }
  tensor.bytes = encode(tensor.values, dtype);
  tensors.push_back(std::move(tensor));
}

void CheckpointWriter::write(const fs::path& directory) const {
  write_file(directory / "config.json", config.dump());
  write_file(directory / "model.safetensors", safetensors_bytes(tensors));
}

std::string CheckpointWriter::shard_name(size_t shard, size_t shards) {
  return fmt::format("model-{:05}-of-{:05}.safetensors", shard + 1, shards);
}

void CheckpointWriter::write_sharded(const fs::path& directory, size_t shards) const {
  write_file(directory / "config.json", config.dump());
  json index = {{"metadata", {{"total_size", 0}}}, {"weight_map", json::object()}};
  std::vector<std::vector<StoredTensor>> dealt(shards);
  for (size_t i = 0; i < tensors.size(); ++i) {
    dealt[i % shards].push_back(tensors[i]);
    index["weight_map"][tensors[i].name] = shard_name(i % shards, shards);
  }
  for (size_t i = 0; i < shards; ++i) {
    write_file(directory / shard_name(i, shards), safetensors_bytes(dealt[i]));
  }
  write_file(directory / "model.safetensors.index.json", index.dump());
}

}  // namespace sagelm
