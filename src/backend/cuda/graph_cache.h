// Steps of decoding as CUDA graphs: some 300 launches become one.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <tuple>

#include "backend/cuda/memory.h"

namespace sagelm::cuda {

// What the kernels of a step are launched with, besides what lies in device memory.
using GraphKey = std::tuple<int32_t,      // sequences
                            int32_t,      // max_kv_len
                            int32_t,      // page_table_stride
                            const void*,  // the step's integers
                            const void*,  // keys and values
                            std::string,  // attention of each layer
                            int32_t,      // max_closed_pages
                            bool,         // closes_first_page
                            int32_t>;     // num_draws

// Whether every launch waits for its kernel, so that an error is seen where it happens: a graph, or
// a step enqueued behind it, would hide it.
bool launches_block();

class GraphCache {
 public:
  explicit GraphCache(cudaStream_t stream) : stream_(stream) {}

  // Enqueues work: the first time by calling it, so that whatever it allocates or chooses once is
  // done; the second time recorded; then as recorded.
  void run(const GraphKey& key, const std::function<void()>& work);
  // Forgets all graphs: memory that they use has moved.
  void clear() { graphs_.clear(); }
  // That the GPU spent in graphs since the last call; waits for the last of them.
  double seconds();

 private:
  using Graph = Owner<cudaGraphExec_t, cudaGraphExecDestroy>;
  static constexpr size_t kMostGraphs = 64;

  // A launch, and whether its time was not counted yet.
  struct Launch {
    Event begin = make_timing_event();
    Event end = make_timing_event();
    bool pending = false;
  };
  void count(Launch& launch);

  cudaStream_t stream_;
  std::map<GraphKey, Graph> graphs_;  // an empty one: called once
  std::array<Launch, 2> launches_;    // the last ones: one may run while the next is enqueued
  double seconds_ = 0;
};

}  // namespace sagelm::cuda
