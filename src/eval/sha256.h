// SHA-256 as FIPS 180-4 defines it (section 6.2): names the data file that a result came from.
#pragma once

#include <string>
#include <string_view>

namespace sagelm {

// The digest of bytes as 64 lower-case hexadecimal digits.
std::string sha256_hex(std::string_view bytes);

}  // namespace sagelm
