// Draws tokens by logits on the CPU.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/token_draw.h"

namespace sagelm::cpu {

class TokenDrawer {
 public:
  // logits: finite, or minus infinity for tokens that are never drawn; not empty. draw.penalized
  // holds tokens, no names.
  int32_t draw(std::span<const float> logits, const TokenDraw& draw);

 private:
  struct Sums {
    uint64_t mass = 0;
    uint64_t count = 0;
  };
  struct Found {
    uint64_t key = 0;   // distance, then id
    uint64_t mass = 0;  // through it
  };

  void adjust(const TokenDraw& draw);
  void sum_parts(float largest, float octaves);
  Found find(uint64_t target, uint64_t Sums::*value);
  uint64_t mass_through(uint64_t last) const;

  std::vector<float> logits_;
  std::vector<int32_t> distances_, weights_;  // of all tokens
  int part_shift_ = 0;
  std::vector<Sums> parts_;  // of the order: tokens of the same distance >> part_shift_
  Sums total_;
  std::vector<uint64_t> keys_;
  std::vector<int32_t> seen_;
};

}  // namespace sagelm::cpu
