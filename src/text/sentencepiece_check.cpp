#include "text/sentencepiece_check.h"

#include <cmath>
#include <cstring>
#include <unordered_set>

#include "base/error.h"
#include "base/utf8.h"

namespace sagelm {
namespace {

// One field of a protobuf message: its number and its value (`bytes` for a length-delimited one).
struct WireField {
  uint32_t number = 0;
  uint32_t wire_type = 0;
  uint64_t value = 0;
  std::string_view bytes;
};

constexpr uint32_t kVarint = 0;
constexpr uint32_t kFixed64 = 1;
constexpr uint32_t kLengthDelimited = 2;
constexpr uint32_t kFixed32 = 5;

class WireReader {
 public:
  WireReader(std::string_view bytes, const std::string& where) : rest_(bytes), where_(where) {}

  // False at the end of the message.
  bool next(WireField& field) {
    if (rest_.empty()) return false;
    const uint64_t tag = varint();
    if (tag >> 3 == 0 || tag >> 32 != 0) broken();
    field = {};
    field.number = static_cast<uint32_t>(tag >> 3);
    field.wire_type = static_cast<uint32_t>(tag & 7);
    switch (field.wire_type) {
      case kVarint:
        field.value = varint();
        break;
      case kFixed64:
        field.value = fixed<uint64_t>();
        break;
      case kFixed32:
        field.value = fixed<uint32_t>();
        break;
      case kLengthDelimited:
        field.bytes = take(varint());
        break;
      default:
        broken();
    }
    return true;
  }

  [[noreturn]] void broken() const {
    fail("{} is not a sentencepiece model, or is truncated", where_);
  }

 private:
  std::string_view take(uint64_t count) {
    if (count > rest_.size()) broken();
    const std::string_view taken = rest_.substr(0, count);
    rest_.remove_prefix(count);
    return taken;
  }

  uint64_t varint() {
    uint64_t value = 0;
    for (uint32_t shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<uint8_t>(take(1)[0]);
      value |= static_cast<uint64_t>(byte & 0x7FU) << shift;
      if (byte < 0x80) return value;
    }
    broken();
  }

  template <typename T>
  T fixed() {
    T value;
    std::memcpy(&value, take(sizeof(T)).data(), sizeof(T));
    return value;
  }

  std::string_view rest_;
  const std::string& where_;
};

SentencepiecePiece read_piece(std::string_view bytes, size_t id, const std::string& where) {
  SentencepiecePiece piece;
  WireReader reader(bytes, where);
  WireField field;
  while (reader.next(field)) {
    if (field.number == 1 && field.wire_type == kLengthDelimited) {
      piece.text = std::string(field.bytes);
    } else if (field.number == 2 && field.wire_type == kFixed32) {
      const auto bits = static_cast<uint32_t>(field.value);
      float score = 0;
      std::memcpy(&score, &bits, sizeof(score));
      // The bound keeps sums of scores over a long text finite.
      if (!(std::fabs(score) <= 1e9F)) {
        fail("{}: the score of piece {} is NaN or beyond reason", where, id);
      }
    } else if (field.number == 3 && field.wire_type == kVarint) {
      if (field.value < 1 || field.value > 6) {
        fail("{}: piece {} has the unknown type {}", where, id, field.value);
      }
      piece.kind = static_cast<PieceKind>(field.value);
    } else if (field.number <= 3) {
      reader.broken();
    }
  }
  if (piece.text.empty()) fail("{}: piece {} is empty", where, id);
  // sentencepiece builds its trie from C strings: a NUL inside would end the process.
  if (piece.text.find('\0') != std::string::npos) {
    fail("{}: piece {} holds a NUL byte", where, id);
  }
  if (!is_valid_utf8(piece.text)) fail("{}: piece {} is not UTF-8", where, id);
  return piece;
}

// The character map is a little-endian size, a Darts double array of that many bytes and the
// replacement strings, each ended by NUL. Following any key from any unit must stay inside.
void check_character_map(std::string_view map, const std::string& where) {
  if (map.empty()) return;
  uint32_t trie_bytes = 0;
  const auto bad = [&where] { fail("{}: its character map is damaged", where); };
  if (map.size() <= sizeof(trie_bytes)) bad();
  std::memcpy(&trie_bytes, map.data(), sizeof(trie_bytes));
  map.remove_prefix(sizeof(trie_bytes));
  if (trie_bytes >= map.size() || trie_bytes < 1024 || trie_bytes % 1024 != 0) bad();
  const std::string_view replacements = map.substr(trie_bytes);
  if (replacements.back() != '\0') bad();

  std::vector<uint32_t> units(trie_bytes / sizeof(uint32_t));
  std::memcpy(units.data(), map.data(), trie_bytes);
  constexpr uint32_t kValueBit = 0x80000000U;
  constexpr uint32_t kHasLeafBit = 0x100U;
  for (size_t i = 0; i < units.size(); ++i) {
    const uint32_t unit = units[i];
    if ((unit & kValueBit) != 0) continue;  // holds a value, is never descended into
    const size_t offset = static_cast<size_t>(unit >> 10) << ((unit & 0x200U) >> 6);
    const size_t child = i ^ offset;
    if ((child | 0xFF) >= units.size()) bad();
    if ((unit & kHasLeafBit) != 0 && (units[child] & ~kValueBit) >= replacements.size()) bad();
  }
}

void read_normalizer(std::string_view bytes, const std::string& where,
                     SentencepieceModelInfo& info) {
  WireReader reader(bytes, where);
  WireField field;
  while (reader.next(field)) {
    if (field.number == 2) check_character_map(field.bytes, where);
    if (field.number == 3 && field.wire_type == kVarint) info.add_dummy_prefix = field.value != 0;
    if (field.number == 4 && field.wire_type == kVarint) {
      info.remove_extra_whitespaces = field.value != 0;
    }
  }
}

void read_trainer(std::string_view bytes, const std::string& where, SentencepieceModelInfo& info) {
  WireReader reader(bytes, where);
  WireField field;
  while (reader.next(field)) {
    if (field.number == 44 && field.wire_type == kLengthDelimited) {
      if (!is_valid_utf8(field.bytes)) fail("{}: its unk_surface is not UTF-8", where);
      info.unk_surface = std::string(field.bytes);
    }
  }
}

}  // namespace

SentencepieceModelInfo check_sentencepiece_model(std::string_view bytes, const std::string& where) {
  if (bytes.empty()) fail("{} is empty", where);
  SentencepieceModelInfo info;
  SentencepieceModelInfo denormalizer;
  WireReader reader(bytes, where);
  WireField field;
  while (reader.next(field)) {
    if (field.number >= 1 && field.number <= 5 && field.wire_type != kLengthDelimited) {
      reader.broken();
    }
    if (field.number == 1) {
      info.pieces.push_back(read_piece(field.bytes, info.pieces.size(), where));
    } else if (field.number == 2) {
      read_trainer(field.bytes, where, info);
    } else if (field.number == 3) {
      read_normalizer(field.bytes, where, info);
    } else if (field.number == 5) {
      read_normalizer(field.bytes, where, denormalizer);
    }
  }
  if (info.pieces.empty()) reader.broken();

  size_t unknown_pieces = 0;
  std::unordered_set<std::string_view> seen;
  for (const SentencepiecePiece& piece : info.pieces) {
    if (piece.kind == PieceKind::kUnknown) ++unknown_pieces;
    if (!seen.insert(piece.text).second) {
      fail("{}: the piece '{}' is there twice", where, excerpt(piece.text));
    }
  }
  if (unknown_pieces != 1) {
    fail("{} has {} unknown pieces (<unk>) where there must be one", where, unknown_pieces);
  }
  return info;
}

}  // namespace sagelm
