#include "backend/cuda/token_drawing.h"

#include <algorithm>

#include "backend/cuda/check.h"
#include "kernels/ops/draw.h"

namespace sagelm::cuda {

TokenDrawing::TokenDrawing(cudaStream_t stream)
    : stream_(stream),
      drawn_(static_cast<size_t>(memory_bytes()), "tokens"),
      on_host_(static_cast<size_t>(memory_bytes())) {
  for (Event& event : ended_) event = make_event();
}

void TokenDrawing::draw(Matrix logits, const StepInputs& step) {
  check(kernels::draw_tokens(static_cast<const float*>(logits.data), logits.cols, step.draws,
                             step.num_draws, step.integers, drawn_.get<int32_t>(),
                             on_host_.get<int32_t>(), stream_),
        "drawing tokens");
}

int32_t TokenDrawing::drawn_name() {
  const int32_t name = next_name();
  ++step_;
  check(cudaEventRecord(ended_[static_cast<size_t>(step_ % kNamedSteps)].get(), stream_),
        "drawing tokens");
  return name;
}

void TokenDrawing::read_drawn(int32_t name, std::span<int32_t> tokens) const {
  const auto place = static_cast<size_t>(name_place(name));
  check_work(cudaEventSynchronize(ended_[place / kMostDraws].get()), "drawing tokens");
  std::copy_n(on_host_.get<int32_t>() + place, tokens.size(), tokens.begin());
}

}  // namespace sagelm::cuda
