// Expects a sagelm::Error whose sentence names what it is about.
#pragma once

#include <gtest/gtest.h>

#include <initializer_list>
#include <string>
#include <string_view>

#include "base/error.h"

namespace sagelm {

template <typename Function>
void expect_error(const Function& function, std::initializer_list<std::string_view> mentioned) {
  try {
    function();
  } catch (const Error& error) {
    for (const std::string_view text : mentioned) {
      EXPECT_NE(std::string_view(error.what()).find(text), std::string_view::npos)
          << "\"" << error.what() << "\" does not mention \"" << text << "\"";
    }
    return;
  }
  ADD_FAILURE() << "no error, expected one about "
                << (mentioned.size() > 0 ? *mentioned.begin() : std::string_view("anything"));
}

}  // namespace sagelm
