// Errors that reach the user: one sentence that says what is wrong and where.
#pragma once

#include <spdlog/fmt/fmt.h>

#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "base/utf8.h"

namespace sagelm {

// Something failed while doing what was asked (bad file, no memory, NaN): exit status 1. Whatever
// foreign text the sentence quotes, what() is printable.
class Error : public std::runtime_error {
 public:
  explicit Error(std::string_view message) : std::runtime_error(printable(message)) {}
};

// What was asked cannot be meant (unknown flag value, contradicting options): exit status 2.
class UsageError : public Error {
 public:
  using Error::Error;
};

template <typename... Args>
[[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(fmt::format(format, std::forward<Args>(args)...));
}

template <typename... Args>
[[noreturn]] void fail_usage(fmt::format_string<Args...> format, Args&&... args) {
  throw UsageError(fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace sagelm
