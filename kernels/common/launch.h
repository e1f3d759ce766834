// Helpers of launch functions (host side).
#pragma once

#include <cstddef>
#include <cstdint>

namespace sagelm::kernels {

// Hands out 256-byte aligned parts of a call's workspace; with a null workspace it only counts.
class WorkspaceLayout {
 public:
  explicit WorkspaceLayout(void* workspace) : base_(static_cast<char*>(workspace)) {}

  // Points `part` at room for `count` elements; null if there is no workspace.
  template <typename T>
  void place(T*& part, size_t count) {
    part = base_ != nullptr ? reinterpret_cast<T*>(base_ + bytes_) : nullptr;
    bytes_ += (count * sizeof(T) + 255) / 256 * 256;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* base_;
  size_t bytes_ = 0;
};

}  // namespace sagelm::kernels
