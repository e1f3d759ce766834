#include "checkpoint/safetensors.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "base/error.h"
#include "base/json_bytes.h"

namespace sagelm {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxHeader = 100'000'000;  // the format's own bound

struct Extent {
  uint64_t begin, end;
  std::string name;
};

std::optional<uint64_t> whole(const json& value) {
  if (!value.is_number_integer() ||
      (value.is_number_integer() && !value.is_number_unsigned() && value.get<int64_t>() < 0)) {
    return {};
  }
  return value.get<uint64_t>();
}

// Bytes per element, or 0 for a type this program does not know.
uint64_t element_size(const std::string& dtype) {
  static const std::map<std::string, uint64_t> kSizes = {
      {"F64", 8}, {"I64", 8}, {"U64", 8},  {"F32", 4},     {"I32", 4},
      {"U32", 4}, {"F16", 2}, {"BF16", 2}, {"I16", 2},     {"U16", 2},
      {"I8", 1},  {"U8", 1},  {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
  const auto found = kSizes.find(dtype);
  return found == kSizes.end() ? 0 : found->second;
}

std::optional<DType> usable_type(const std::string& dtype) {
  if (dtype == "F32") return DType::kF32;
  if (dtype == "F16") return DType::kF16;
  if (dtype == "BF16") return DType::kBF16;
  return {};
}

std::vector<int64_t> read_shape(const json& value, const std::string& tensor) {
  if (!value.is_array() || value.size() > 8) fail("{}: its shape is not a list of sizes", tensor);
  std::vector<int64_t> shape;
  for (const json& extent : value) {
    const auto size = whole(extent);
    if (!size || *size > (uint64_t{1} << 48)) fail("{}: its shape holds a bad size", tensor);
    shape.push_back(static_cast<int64_t>(*size));
  }
  return shape;
}

}  // namespace

SafetensorsFile parse_safetensors(std::span<const std::byte> bytes, std::string_view where) {
  if (bytes.size() < 8) {
    fail("{}: only {} bytes, too short for a safetensors file", where, bytes.size());
  }
  const auto* text = reinterpret_cast<const char*>(bytes.data());
  if (std::string_view(text, bytes.size()).starts_with("version https://git-lfs")) {
    fail("{} is a Git LFS pointer, not the weights themselves: fetch them with git lfs pull",
         where);
  }
  uint64_t header_size = 0;
  for (size_t i = 0; i < 8; ++i) {
    header_size |= static_cast<uint64_t>(std::to_integer<uint8_t>(bytes[i])) << (8 * i);
  }
  const uint64_t after_length = bytes.size() - 8;
  if (header_size > kMaxHeader || header_size > after_length) {
    fail("{}: the header claims {} bytes, and the file has {} (truncated, or not safetensors)",
         where, header_size, bytes.size());
  }
  const json header =
      parse_json_object({text + 8, header_size}, fmt::format("{}: safetensors header", where));
  const std::span<const std::byte> data = bytes.subspan(8 + header_size);

  SafetensorsFile file;
  std::vector<Extent> extents;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    const std::string tensor = fmt::format("{}: tensor {}", where, excerpt(name));
    if (!entry.is_object() || !entry.contains("dtype") || !entry.contains("shape") ||
        !entry.contains("data_offsets") || !entry["dtype"].is_string()) {
      fail("{}: its entry lacks dtype, shape or data_offsets", tensor);
    }
    const json& offsets = entry["data_offsets"];
    if (!offsets.is_array() || offsets.size() != 2 || !whole(offsets[0]) || !whole(offsets[1])) {
      fail("{}: data_offsets is not a pair of whole numbers", tensor);
    }
    const uint64_t begin = *whole(offsets[0]);
    const uint64_t end = *whole(offsets[1]);
    if (begin > end || end > data.size()) {
      fail("{}: data_offsets {} to {} are outside the {} bytes of data (is the file truncated?)",
           tensor, begin, end, data.size());
    }
    const auto dtype = entry["dtype"].get<std::string>();
    const uint64_t item = element_size(dtype);
    const std::vector<int64_t> shape = read_shape(entry["shape"], tensor);
    extents.push_back({begin, end, name});
    if (item == 0) {
      file.other_types.emplace(name, dtype);
      continue;
    }
    uint64_t expected = item;
    for (int64_t extent : shape) {
      if (__builtin_mul_overflow(expected, static_cast<uint64_t>(extent), &expected)) {
        fail("{}: its shape is too large", tensor);
      }
    }
    if (expected != end - begin) {
      fail("{}: {} [{}] needs {} bytes, and data_offsets give it {}", tensor, dtype,
           fmt::join(shape, ", "), expected, end - begin);
    }
    if (const auto type = usable_type(dtype)) {
      TensorView view;
      view.name = name;
      view.dtype = *type;
      view.shape = shape;
      view.data = data.data() + begin;
      view.bytes = expected;
      file.tensors.emplace(name, std::move(view));
    } else {
      file.other_types.emplace(name, dtype);
    }
  }
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  uint64_t at = 0;
  for (const Extent& extent : extents) {
    if (extent.begin != at) {
      fail("{}: tensor {} starts at byte {} of the data where {} was expected ({})", where,
           excerpt(extent.name), extent.begin, at, extent.begin < at ? "overlap" : "hole");
    }
    at = extent.end;
  }
  if (at != data.size()) {
    fail("{}: {} bytes follow the last tensor", where, data.size() - at);
  }
  return file;
}

}  // namespace sagelm
