// Steps of decoding as CUDA graphs: some 300 launches become one.
#pragma once

#include <cuda_runtime_api.h>

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
                            bool>;        // closes_first_page

class GraphCache {
 public:
  explicit GraphCache(cudaStream_t stream)
      : stream_(stream), begin_(make_timing_event()), end_(make_timing_event()) {}

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

  void count_last();

  cudaStream_t stream_;
  std::map<GraphKey, Graph> graphs_;  // an empty one: called once
  // Around the last launch, if it was not counted yet.
  Event begin_, end_;
  bool pending_ = false;
  double seconds_ = 0;
};

}  // namespace sagelm::cuda
