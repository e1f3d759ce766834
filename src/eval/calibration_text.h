// What the adaptive choice of attention is measured on where the user names no text.
#pragma once

#include <span>
#include <string_view>

namespace sagelm {

// Some hundred words each, in different manners: a story, an encyclopedia, a dialogue, a program.
std::span<const std::string_view> calibration_texts();

}  // namespace sagelm
