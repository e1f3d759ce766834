// A ragged batch: the next tokens of any number of sequences, each of any length.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace sagelm {

struct SequenceChunk {
  int64_t first_row = 0;  // of the batch's rows
  int64_t q_len = 0;      // new tokens, rows first_row .. first_row + q_len
  int64_t kv_len = 0;     // tokens of the sequence including the new ones
  // Page ids in order: kv_len / kPageTokens of them, rounded up (FP16 cache) or down (quantized).
  std::span<const int32_t> pages;
  int32_t tail = -1;  // of a quantized cache: where the tokens past the full pages are

  int64_t q_start() const { return kv_len - q_len; }  // position of the first new token
};

struct Batch {
  std::vector<int32_t> tokens;  // [rows]
  std::vector<SequenceChunk> sequences;

  int64_t rows() const { return static_cast<int64_t>(tokens.size()); }
};

}  // namespace sagelm
