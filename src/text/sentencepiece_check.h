// Looks over the bytes of a tokenizer.model before sentencepiece sees them.
//
// sentencepiece 0.1.97 reports most faults of a model as a status, but it trusts two things it
// should not: the precompiled character map (a Darts double array whose offsets it follows without
// bounds) and the piece scores (NaN breaks the search's ordering). This check walks the protobuf
// wire format (sentencepiece_model.proto: ModelProto) itself and refuses those, and gives clear
// sentences for the faults that sentencepiece would log to standard error.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace sagelm {

enum class PieceKind : uint8_t {  // the values of ModelProto.SentencePiece.Type
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUserDefined = 4,
  kUnused = 5,
  kByte = 6,
};

struct SentencepiecePiece {
  std::string text;
  PieceKind kind = PieceKind::kNormal;
};

struct SentencepieceModelInfo {
  std::vector<SentencepiecePiece> pieces;      // by id
  bool add_dummy_prefix = true;                // a blank is put in front of a text
  bool remove_extra_whitespaces = true;        // blanks at the ends and double blanks are dropped
  std::string unk_surface = " \xE2\x81\x87 ";  // how sentencepiece prints the unknown piece
};

// Throws Error, naming `where`, when the bytes are not a model that is safe to load.
SentencepieceModelInfo check_sentencepiece_model(std::string_view bytes, const std::string& where);

}  // namespace sagelm
