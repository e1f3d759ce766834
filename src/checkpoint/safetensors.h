// The safetensors format (github.com/huggingface/safetensors, README "Format"): 8 bytes of header
// length, little-endian; a JSON header {name: {dtype, shape, data_offsets}}; the data.
#pragma once

#include <cstddef>
#include <map>
#include <span>
#include <string>
#include <string_view>

#include "base/tensor_view.h"

namespace sagelm {

struct SafetensorsFile {
  std::map<std::string, TensorView> tensors;       // F32, F16 and BF16; views into the bytes
  std::map<std::string, std::string> other_types;  // name to dtype of tensors that can't be used
};

// The views point into `bytes`; data may start at any address, aligned or not. Throws Error naming
// `where` and the tensor for a header that does not describe these bytes exactly: lengths, offsets
// and shapes that disagree, overlap, leave holes or run past the end.
SafetensorsFile parse_safetensors(std::span<const std::byte> bytes, std::string_view where);

}  // namespace sagelm
