#include "backend/cuda/graph_cache.h"

#include <cstdlib>
#include <string_view>
#include <utility>

#include "backend/cuda/check.h"

namespace sagelm::cuda {
namespace {

using RecordedGraph = Owner<cudaGraph_t, cudaGraphDestroy>;

RecordedGraph record(cudaStream_t stream, const std::function<void()>& work) {
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "recording a step");
  cudaGraph_t graph = nullptr;
  try {
    work();
  } catch (...) {
    cudaStreamEndCapture(stream, &graph);
    const RecordedGraph partial(graph);
    throw;
  }
  check(cudaStreamEndCapture(stream, &graph), "recording a step");
  return RecordedGraph(graph);
}

// Set, every launch waits for its kernel, so that an error is seen where it happens; a graph would
// hide it.
bool launches_block() {
  const char* value = std::getenv("CUDA_LAUNCH_BLOCKING");
  return value != nullptr && std::string_view(value) == "1";
}

}  // namespace

void GraphCache::run(const GraphKey& key, const std::function<void()>& work) {
  static const bool blocking = launches_block();
  if (blocking) {
    work();
    return;
  }
  auto found = graphs_.find(key);
  if (found == graphs_.end()) {
    work();  // may clear the cache
    if (graphs_.size() >= kMostGraphs) graphs_.clear();
    graphs_.emplace(key, Graph());
    return;
  }
  if (found->second.get() == nullptr) {
    const RecordedGraph recorded = record(stream_, work);
    cudaGraphExec_t graph = nullptr;
    check(cudaGraphInstantiate(&graph, recorded.get(), 0), "recording a step");
    found->second = Graph(graph);
  }
  count_last();
  check(cudaEventRecord(begin_.get(), stream_), "a step");
  check(cudaGraphLaunch(found->second.get(), stream_), "a step");
  check(cudaEventRecord(end_.get(), stream_), "a step");
  pending_ = true;
}

double GraphCache::seconds() {
  count_last();
  return std::exchange(seconds_, 0);
}

void GraphCache::count_last() {
  if (!pending_) return;
  seconds_ += static_cast<double>(milliseconds(begin_.get(), end_.get())) * 1e-3;
  pending_ = false;
}

}  // namespace sagelm::cuda
