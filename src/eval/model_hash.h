// A name for a model's contents: tells whether two results came from the same checkpoint.
#pragma once

#include <filesystem>
#include <string>

namespace sagelm {

// 64 lower-case hexadecimal digits over the checkpoint's configuration, tokenizer and weights,
// those files that are there. Of a weights file larger than 16 MiB its size and evenly spread
// samples of 16 MiB count, so that it takes no time that anybody notices. model as LoadOptions has
// it. Throws Error if a file cannot be read.
std::string model_hash(const std::filesystem::path& model);

}  // namespace sagelm
