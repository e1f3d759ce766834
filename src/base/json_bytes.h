// JSON from foreign bytes: bounded depth, no duplicate keys, errors as sentences.
#pragma once

#include <nlohmann/json.hpp>
#include <string_view>

namespace sagelm {

// Throws Error naming `where` if the text is not one JSON object, nests more than 64 deep or names
// a key twice in one object.
nlohmann::json parse_json_object(std::string_view text, std::string_view where);

}  // namespace sagelm
