// Hugging Face config.json of a Llama model, in the spellings of transformers 4 and 5.
#pragma once

#include <string_view>

#include "base/model_spec.h"

namespace sagelm {

// Everything but name and dtype, which the caller knows. Throws Error naming `where`, the field and
// its value for anything missing, contradictory, absurd or not supported.
ModelConfig parse_config(std::string_view json, std::string_view where);

// Of a generation_config.json the ids that end a text, which count more than config.json's, as they
// do in transformers; what it says on sampling is for the user to choose. Throws Error naming
// `where`.
void read_generation_config(std::string_view json, std::string_view where, ModelConfig& model);

}  // namespace sagelm
