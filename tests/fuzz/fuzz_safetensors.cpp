// Any bytes as a safetensors file: only sagelm::Error may come out, and every view lies within
// them.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>

#include "base/error.h"
#include "checkpoint/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::span<const std::byte> bytes = std::as_bytes(std::span(data, size));
  try {
    const sagelm::SafetensorsFile file = sagelm::parse_safetensors(bytes, "fuzz.safetensors");
    for (const auto& [name, view] : file.tensors) {
      const auto offset = static_cast<size_t>(view.data - bytes.data());
      const auto elements = static_cast<size_t>(view.num_elements());
      if (offset > size || view.bytes > size - offset ||
          elements * sagelm::dtype_size(view.dtype) != view.bytes) {
        std::abort();
      }
    }
  } catch (const sagelm::Error&) {
  }
  return 0;
}
