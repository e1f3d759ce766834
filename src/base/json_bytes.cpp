#include "base/json_bytes.h"

#include <set>
#include <string>
#include <vector>

#include "base/error.h"

namespace sagelm {

nlohmann::json parse_json_object(std::string_view text, std::string_view where) {
  using nlohmann::json;
  constexpr int kMaxDepth = 64;
  std::vector<std::set<std::string>> keys;
  const auto check = [&](int depth, json::parse_event_t event, json& parsed) {
    if (depth > kMaxDepth) fail("{}: JSON nests more than {} deep", where, kMaxDepth);
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key &&
        !keys.back().insert(parsed.get_ref<const std::string&>()).second) {
      fail("{}: key \"{}\" stands twice", where, excerpt(parsed.get_ref<const std::string&>()));
    }
    return true;
  };
  try {
    json parsed = json::parse(text.begin(), text.end(), check);
    if (!parsed.is_object()) fail("{}: not a JSON object", where);
    return parsed;
  } catch (const json::exception& error) {
    std::string_view reason = error.what();  // "[json.exception.NAME.NUMBER] what is wrong"
    if (const size_t tag = reason.find("] ");
        reason.starts_with('[') && tag != std::string_view::npos) {
      reason.remove_prefix(tag + 2);
    }
    fail("{}: not valid JSON ({})", where, excerpt(reason, 300));
  }
}

}  // namespace sagelm
