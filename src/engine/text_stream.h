// Text on its way to the user, held back while it may turn out to be a stop string.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace sagelm {

class TextStream {
 public:
  // stop: not empty strings.
  explicit TextStream(std::span<const std::string> stop) : stop_(stop.begin(), stop.end()) {}

  // Appends text and returns what can be shown of all that is held; once stopped, nothing.
  std::string push(std::string_view text);
  // What is still held when nothing more comes.
  std::string finish();
  // A stop string was found; text before it was shown, it and what follows were dropped.
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stop_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace sagelm
