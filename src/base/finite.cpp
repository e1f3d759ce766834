#include "base/finite.h"

#include <algorithm>
#include <cstring>

namespace sagelm {
namespace {

// A value is finite unless all bits of its exponent are set.
template <typename Word>
int64_t find(const std::byte* data, int64_t count, Word exponent) {
  constexpr int64_t kBlock = 4096;
  const auto bad = [&](int64_t i) {
    Word word;
    std::memcpy(&word, data + static_cast<size_t>(i) * sizeof(Word), sizeof(Word));
    return (word & exponent) == exponent;
  };
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, count);
    Word any = 0;  // without a way out of the loop, so that it is vectorized
    for (int64_t i = begin; i < end; ++i) any |= static_cast<Word>(bad(i));
    if (any == 0) continue;
    for (int64_t i = begin; i < end; ++i) {
      if (bad(i)) return i;
    }
  }
  return -1;
}

}  // namespace

int64_t first_non_finite(const std::byte* data, DType type, int64_t count) {
  switch (type) {
    case DType::kF32:
      return find<uint32_t>(data, count, 0x7F800000u);
    case DType::kF16:
      return find<uint16_t>(data, count, 0x7C00u);
    case DType::kBF16:
      return find<uint16_t>(data, count, 0x7F80u);
  }
  return -1;
}

}  // namespace sagelm
