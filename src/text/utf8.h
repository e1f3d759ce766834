// White space as Python sees it; what UTF-8 itself needs is in base/utf8.h.
#pragma once

#include <string_view>

#include "base/utf8.h"

namespace sagelm {

// `text` without white space at both ends, white space being what Python's str.strip() removes.
// Chat templates are defined in terms of that function.
std::string_view strip(std::string_view text);

}  // namespace sagelm
