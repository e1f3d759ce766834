#include "eval/model_hash.h"

#include <algorithm>
#include <cstddef>
#include <string_view>
#include <system_error>
#include <vector>

#include "base/error.h"
#include "base/mmap.h"
#include "eval/sha256.h"

namespace sagelm {
namespace {

namespace fs = std::filesystem;

constexpr size_t kSampleBytes = size_t{1} << 16;
constexpr size_t kSamples = 256;

// Name, size and contents of a file, as text to be hashed again.
std::string describe_file(const fs::path& path) {
  const MappedFile file = MappedFile::open(path);
  const std::string_view bytes(reinterpret_cast<const char*>(file.bytes().data()),
                               file.bytes().size());
  std::string text = fmt::format("{} {}\n", path.filename().string(), bytes.size());
  if (bytes.size() <= kSamples * kSampleBytes) return text + sha256_hex(bytes) + '\n';
  const size_t last = bytes.size() - kSampleBytes;
  for (size_t i = 0; i < kSamples; ++i) {
    // The first sample holds the tensors' names and shapes, the last ends with the file.
    const size_t begin = last / (kSamples - 1) * i + last % (kSamples - 1) * i / (kSamples - 1);
    text += sha256_hex(bytes.substr(begin, kSampleBytes)) + '\n';
  }
  return text;
}

}  // namespace

std::string model_hash(const fs::path& model) {
  std::vector<fs::path> weights;
  fs::path directory = model;
  std::error_code error;
  if (fs::is_directory(model, error)) {
    for (const fs::directory_entry& entry : fs::directory_iterator(model, error)) {
      if (entry.path().extension() == ".safetensors") weights.push_back(entry.path());
    }
    if (error) fail("cannot read the directory {}: {}", model.string(), error.message());
    std::sort(weights.begin(), weights.end());
  } else {
    weights.push_back(model);
    directory = model.parent_path();
  }
  std::string text;
  for (const char* name :
       {"config.json", "tokenizer.model", "tokenizer_config.json", "added_tokens.json"}) {
    if (fs::exists(directory / name, error)) text += describe_file(directory / name);
  }
  for (const fs::path& path : weights) text += describe_file(path);
  return sha256_hex(text);
}

}  // namespace sagelm
