// Any bytes as a config.json: only sagelm::Error may come out, and what is accepted is sound.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "checkpoint/config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    const sagelm::ModelConfig model = sagelm::parse_config(text, "config.json");
    if (model.head_dim < 2 || model.num_kv_heads < 1 || model.num_heads % model.num_kv_heads != 0 ||
        model.q_size() < model.kv_size() || model.vocab_size < 1 || model.num_layers < 1 ||
        model.bos_token_id >= model.vocab_size) {
      std::abort();
    }
  } catch (const sagelm::Error&) {
  }
  return 0;
}
