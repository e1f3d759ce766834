// Writes small Hugging Face checkpoints with random weights, right ones and, after edits, wrong
// ones.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.h"
#include "base/tensor_view.h"

namespace sagelm {

// A fresh directory, removed with everything in it at the end of its life.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

struct CheckpointOptions {
  int64_t vocab_size = 24;
  int64_t hidden_size = 16;
  int64_t intermediate_size = 20;
  int64_t num_layers = 2;
  int64_t num_heads = 4;
  int64_t num_kv_heads = 2;
  int64_t head_dim = 4;
  DType dtype = DType::kF32;
  bool tied = false;
  bool old_spelling = false;  // transformers 4: rope_theta and torch_dtype at the top level
  uint32_t seed = 1;
};

struct StoredTensor {
  std::string name;
  std::string dtype;  // as safetensors spells it
  std::vector<int64_t> shape;
  std::vector<float> values;  // multiples of 1/64 in [-1, 1]: exact in F32, F16 and BF16
  std::string bytes;          // what is stored
};

// All values of a view as floats.
std::vector<float> decode(const TensorView& view);

std::string encode(const std::vector<float>& values, DType dtype);

// Little-endian length, header, data.
std::string safetensors_bytes(const nlohmann::json& header, std::string_view data);
std::string safetensors_bytes(const std::vector<StoredTensor>& tensors);

void write_file(const std::filesystem::path& path, std::string_view bytes);

// Edit its members between construction and writing to make a checkpoint wrong.
struct CheckpointWriter {
  explicit CheckpointWriter(const CheckpointOptions& options = {});

  StoredTensor& tensor(std::string_view name);  // throws std::out_of_range
  void remove(std::string_view name);
  void add(const std::string& name, const std::vector<int64_t>& shape, DType dtype);

  // config.json and model.safetensors.
  void write(const std::filesystem::path& directory) const;
  // config.json, model.safetensors.index.json and the shards, tensors dealt out in turn.
  void write_sharded(const std::filesystem::path& directory, size_t shards) const;
  static std::string shard_name(size_t shard, size_t shards);

  nlohmann::json config;
  std::vector<StoredTensor> tensors;

 private:
  uint32_t random_;
};

}  // namespace sagelm
