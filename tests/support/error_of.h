// What a call throws.
#pragma once

#include <functional>
#include <string>

#include "base/error.h"

namespace sagelm {

inline std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace sagelm
