// Tokens drawn on the GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <span>

#include "backend/backend.h"
#include "backend/cuda/memory.h"
#include "backend/cuda/step_inputs.h"
#include "backend/token_draw.h"

namespace sagelm::cuda {

// Functions of the same names and meanings as Backend's.
class TokenDrawing {
 public:
  explicit TokenDrawing(cudaStream_t stream);

  // The name that the next step's first draw gets.
  int32_t next_name() const { return token_name(step_ + 1, 0); }
  void draw(Matrix logits, const StepInputs& step);
  int32_t drawn_name();
  void read_drawn(int32_t name, std::span<int32_t> tokens) const;
  // On the device, by place.
  const int32_t* drawn() const { return drawn_.get<int32_t>(); }

  static constexpr int64_t memory_bytes() { return kNamePlaces * int64_t{sizeof(int32_t)}; }

 private:
  cudaStream_t stream_;
  DeviceBuffer drawn_;
  PinnedBuffer on_host_;                  // the same
  std::array<Event, kNamedSteps> ended_;  // of the steps whose names are good
  int64_t step_ = 0;                      // counts those that draw
};

}  // namespace sagelm::cuda
