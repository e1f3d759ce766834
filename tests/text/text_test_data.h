// Where the tests of src/text find tokenizers, and texts that have tripped tokenizers before.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

namespace sagelm::testing {

inline std::filesystem::path source_dir() { return SAGELM_SOURCE_DIR; }
inline std::filesystem::path demo_dir() { return source_dir() / "models" / "demo"; }

inline std::filesystem::path shared_dir() {
  const char* shared = std::getenv("SAGELM_SHARED");
  return shared != nullptr ? std::filesystem::path(shared) : source_dir() / ".." / "shared";
}

// The demo model's directory, and those of the shared tokenizers that are there.
inline std::vector<std::filesystem::path> tokenizer_dirs() {
  std::vector<std::filesystem::path> dirs = {demo_dir()};
  const auto llama2 = shared_dir() / "tokenizers" / "llama2";
  if (std::filesystem::exists(llama2)) dirs.push_back(llama2);
  return dirs;
}

inline std::string read_all(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

inline std::vector<std::string> edge_texts() {
  return {
      "",
      " ",
      "   ",
      "a",
      " a",
      "  a  b   ",
      "trailing ",
      "\n",
      "\n\n a\n",
      "one\r\ntwo\r\n",
      "\ttab\t",
      "</s>",
      "<s>[INST] hello [/INST] </s><s>",
      "<unk>",
      "<0x41>",
      "<0xE2><0x96>",
      "<|im_start|>user",
      "\xE2\x96\x81 the blank symbol \xE2\x96\x81",
      "na\xC3\xAFve caf\xC3\xA9",
      "\xF0\x9F\x98\x80\xF0\x9F\x91\xA9\xE2\x80\x8D\xF0\x9F\x91\xA9\xE2\x80\x8D\xF0\x9F\x91\xA7",
      "\xE4\xB8\xAD\xE6\x96\x87\xE5\xAD\x97 \xE0\xA4\xB9\xE0\xA4\xBF",
      "e\xCC\x81 combining, \xEF\xBC\xA1 full width, \xEF\xAC\x81 ligature",
      "\xEF\xBB\xBF byte order mark",
      "a\xC2\xA0non-breaking\xE2\x80\x8B zero",
      "\xEF\xBF\xBD replacement",
      "\xF4\x8F\xBF\xBF last",
      std::string("nul\0inside", 10),
      "1234567890 3.14159 1,000,000",
      std::string(3000, 'x')};
}

inline std::string random_utf8(std::mt19937& random, size_t characters) {
  std::string text;
  const auto continuation = [](uint32_t bits) { return static_cast<char>(0x80U | (bits & 0x3FU)); };
  for (size_t i = 0; i < characters; ++i) {
    const uint32_t pick = random() % 8;
    uint32_t c = pick < 4   ? 0x20 + random() % 0x5F
                 : pick < 5 ? random() % 0x80
                 : pick < 6 ? 0x80 + random() % 0x780
                 : pick < 7 ? 0x800 + random() % 0xF800
                            : 0x10000 + random() % 0x100000;
    if (c >= 0xD800 && c < 0xE000) c = ' ';
    if (c < 0x80) {
      text += static_cast<char>(c);
    } else if (c < 0x800) {
      text += static_cast<char>(0xC0U | c >> 6);
      text += continuation(c);
    } else if (c < 0x10000) {
      text += static_cast<char>(0xE0U | c >> 12);
      text += continuation(c >> 6);
      text += continuation(c);
    } else {
      text += static_cast<char>(0xF0U | c >> 18);
      text += continuation(c >> 12);
      text += continuation(c >> 6);
      text += continuation(c);
    }
  }
  return text;
}

}  // namespace sagelm::testing
