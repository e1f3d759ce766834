#include "checkpoint/safetensors.h"

#include <gtest/gtest.h>

#include <string>

#include "checkpoint/checkpoint_writer.h"
#include "checkpoint/expect_error.h"

namespace sagelm {
namespace {

using nlohmann::json;

SafetensorsFile parse(std::string_view bytes) {
  return parse_safetensors(std::as_bytes(std::span(bytes)), "dir/w.safetensors");
}

json entry(const json& dtype, const json& shape, const json& begin, const json& end) {
  return {{"dtype", dtype}, {"shape", shape}, {"data_offsets", {begin, end}}};
}

void expect_wrong(const json& header, size_t data_bytes,
                  std::initializer_list<std::string_view> mentioned) {
  SCOPED_TRACE(header.dump());
  const std::string bytes = safetensors_bytes(header, std::string(data_bytes, '\0'));
  expect_error([&] { parse(bytes); }, {"dir/w.safetensors"});
  expect_error([&] { parse(bytes); }, mentioned);
}

std::string with_header_length(std::string bytes, uint64_t length) {
  for (size_t i = 0; i < 8; ++i) bytes[i] = static_cast<char>((length >> (8 * i)) & 0xFF);
  return bytes;
}

std::string right_file() {
  return safetensors_bytes(
      {{"first", entry("F32", {2, 2}, 0, 16)}, {"second", entry("BF16", {3}, 16, 22)}},
      std::string(22, '\x11'));
}

TEST(Safetensors, ReadsTensorsOfEveryUsableType) {
  const StoredTensor a{"a", "F32", {2, 1}, {}, encode({1.5f, -2.0f}, DType::kF32)};
  const StoredTensor b{"b", "F16", {3}, {}, encode({0.5f, 0.25f, -1.0f}, DType::kF16)};
  const StoredTensor c{"c", "BF16", {1, 1}, {}, encode({-0.75f}, DType::kBF16)};
  const StoredTensor scalar{"scalar", "F32", {}, {}, encode({4.0f}, DType::kF32)};
  const StoredTensor nothing{"nothing", "F32", {0, 7}, {}, {}};
  const StoredTensor other{"other", "I64", {1}, {}, std::string(8, '\0')};
  const StoredTensor unknown{"unknown", "F4", {3}, {}, std::string(2, '\0')};
  // At the front a byte that shifts all the rest to odd addresses.
  const StoredTensor byte{"byte", "U8", {1}, {}, std::string(1, '\0')};
  const std::string bytes =
      safetensors_bytes(std::vector<StoredTensor>{byte, c, a, b, scalar, nothing, other, unknown});
  const SafetensorsFile file = parse(bytes);
  ASSERT_EQ(file.tensors.size(), 5u);
  EXPECT_EQ(file.tensors.at("a").name, "a");
  EXPECT_EQ(file.tensors.at("a").dtype, DType::kF32);
  EXPECT_EQ(file.tensors.at("a").shape, (std::vector<int64_t>{2, 1}));
  EXPECT_EQ(file.tensors.at("a").bytes, 8u);
  EXPECT_EQ(decode(file.tensors.at("a")), (std::vector<float>{1.5f, -2.0f}));
  EXPECT_EQ(file.tensors.at("b").dtype, DType::kF16);
  EXPECT_EQ(decode(file.tensors.at("b")), (std::vector<float>{0.5f, 0.25f, -1.0f}));
  EXPECT_EQ(file.tensors.at("c").dtype, DType::kBF16);
  EXPECT_EQ(decode(file.tensors.at("c")), std::vector<float>{-0.75f});
  EXPECT_EQ(decode(file.tensors.at("scalar")), std::vector<float>{4.0f});
  EXPECT_EQ(file.tensors.at("nothing").bytes, 0u);
  const std::map<std::string, std::string> others = {
      {"byte", "U8"}, {"other", "I64"}, {"unknown", "F4"}};
  EXPECT_EQ(file.other_types, others);
}

TEST(Safetensors, ReadsAFileWithoutTensors) {
  EXPECT_TRUE(parse(safetensors_bytes(json::object(), {})).tensors.empty());
}

TEST(Safetensors, RejectsEveryTruncation) {
  const std::string bytes = right_file();
  ASSERT_NO_THROW(parse(bytes));
  for (size_t size = 0; size < bytes.size(); ++size) {
    SCOPED_TRACE(size);
    // A copy of just these bytes, for the address sanitizer to see reads past the end.
    const std::string part = bytes.substr(0, size);
    expect_error([&] { parse(part); }, {"dir/w.safetensors"});
  }
}

TEST(Safetensors, RejectsHeaderLengthsThatLie) {
  const std::string bytes = right_file();
  const uint64_t right = bytes.size() - 8 - 22;
  for (const uint64_t length :
       {uint64_t{0}, uint64_t{1}, right - 1, right + 1, uint64_t{bytes.size()} - 8,
        uint64_t{bytes.size()} - 7, uint64_t{100'000'001}, uint64_t{1} << 63, UINT64_MAX - 7,
        UINT64_MAX}) {
    SCOPED_TRACE(length);
    const std::string wrong = with_header_length(bytes, length);
    expect_error([&] { parse(wrong); }, {"dir/w.safetensors", "header"});
  }
}

TEST(Safetensors, RejectsOffsetsThatDoNotFit) {
  expect_wrong({{"t", entry("F32", {4}, 0, 16)}}, 15, {"tensor t", "data_offsets"});
  expect_wrong({{"t", entry("F32", {4}, 16, 32)}}, 16, {"tensor t", "data_offsets"});
  expect_wrong({{"t", entry("F32", {4}, 16, 0)}}, 16, {"tensor t", "data_offsets"});
  expect_wrong({{"t", entry("F32", {4}, UINT64_MAX - 15, UINT64_MAX)}}, 16, {"tensor t"});
  expect_wrong({{"t", entry("F32", {4}, -16, 0)}}, 16, {"tensor t", "data_offsets"});
  expect_wrong({{"t", entry("F32", {4}, 0.0, 16.0)}}, 16, {"tensor t", "data_offsets"});
  expect_wrong({{"t", entry("F32", {4}, "0", "16")}}, 16, {"tensor t", "data_offsets"});
  // Overlap, hole at the front, hole in the middle, bytes left over.
  expect_wrong({{"t", entry("F32", {4}, 0, 16)}, {"u", entry("F32", {4}, 8, 24)}}, 24,
               {"tensor u", "overlap"});
  expect_wrong({{"t", entry("F32", {4}, 0, 16)}, {"u", entry("F32", {4}, 0, 16)}}, 16,
               {"tensor", "overlap"});
  expect_wrong({{"t", entry("F32", {4}, 4, 20)}}, 20, {"tensor t", "hole"});
  expect_wrong({{"t", entry("F32", {1}, 0, 4)}, {"u", entry("F32", {1}, 8, 12)}}, 12,
               {"tensor u", "hole"});
  expect_wrong({{"t", entry("F32", {4}, 0, 16)}}, 17, {"1 bytes follow"});
}

TEST(Safetensors, RejectsShapesThatDoNotFit) {
  expect_wrong({{"t", entry("F32", {5}, 0, 16)}}, 16, {"tensor t", "20 bytes"});
  expect_wrong({{"t", entry("F16", {4}, 0, 16)}}, 16, {"tensor t", "F16"});
  expect_wrong({{"t", entry("I64", {4}, 0, 16)}}, 16, {"tensor t", "I64"});
  expect_wrong({{"t", entry("F32", {-4}, 0, 16)}}, 16, {"tensor t", "shape"});
  expect_wrong({{"t", entry("F32", {4.0}, 0, 16)}}, 16, {"tensor t", "shape"});
  expect_wrong({{"t", entry("F32", 4, 0, 16)}}, 16, {"tensor t", "shape"});
  expect_wrong({{"t", entry("F32", {1, 1, 1, 1, 1, 1, 1, 1, 4}, 0, 16)}}, 16,
               {"tensor t", "shape"});
  expect_wrong({{"t", entry("F32", {UINT64_MAX}, 0, 16)}}, 16, {"tensor t", "shape"});
  // 2^62 elements of 4 bytes are 2^64 bytes, which wraps to 0.
  const int64_t wide = int64_t{1} << 31;
  expect_wrong({{"t", entry("F32", {wide, wide}, 0, 0)}}, 0, {"tensor t", "too large"});
}

TEST(Safetensors, RejectsEntriesThatAreNoTensors) {
  for (const char* key : {"dtype", "shape", "data_offsets"}) {
    json broken = entry("F32", {4}, 0, 16);
    broken.erase(key);
    expect_wrong({{"t", broken}}, 16, {"tensor t", key});
  }
  expect_wrong({{"t", 3}}, 0, {"tensor t"});
  expect_wrong({{"t", json::array()}}, 0, {"tensor t"});
  expect_wrong({{"t", entry(7, {4}, 0, 16)}}, 16, {"tensor t", "dtype"});
  json three = entry("F32", {4}, 0, 16);
  three["data_offsets"].push_back(16);
  expect_wrong({{"t", three}}, 16, {"tensor t", "data_offsets"});
  expect_wrong(json::array({1, 2}), 0, {"header", "not a JSON object"});
}

TEST(Safetensors, QuotesForeignTextInPrintableForm) {
  const std::string name = "t\x1B[2J\n\xC2\x9B";
  const char* shown = R"(tensor t\x1b[2J\x0a\u{9b})";
  expect_wrong({{name, 3}}, 0, {shown});
  expect_wrong({{name, entry("F32", {5}, 0, 16)}}, 16, {shown});
  expect_wrong({{name, entry("F32", {4}, 4, 20)}}, 20, {shown, "hole"});
  const json header = {{std::string(50000, 'x'), 3}};
  const std::string bytes = safetensors_bytes(header, "");
  try {
    parse(bytes);
    ADD_FAILURE() << "no error";
  } catch (const Error& error) {
    EXPECT_LT(std::string_view(error.what()).size(), 300U);
  }
}

TEST(Safetensors, RejectsKeysThatStandTwice) {
  const std::string text =
      "{\"t\":" + entry("F32", {1}, 0, 4).dump() + ",\"t\":" + entry("F32", {1}, 4, 8).dump() + "}";
  std::string bytes = with_header_length(std::string(8, '\0'), text.size());
  bytes += text + std::string(8, '\0');
  expect_error([&] { parse(bytes); }, {"dir/w.safetensors", "\"t\"", "twice"});
}

TEST(Safetensors, RejectsDeepHeaders) {
  std::string text = "{\"t\":";
  for (int i = 0; i < 100000; ++i) text += "{\"a\":";
  const std::string bytes = with_header_length(std::string(8, '\0'), text.size()) + text;
  expect_error([&] { parse(bytes); }, {"dir/w.safetensors", "deep"});
}

}  // namespace
}  // namespace sagelm
