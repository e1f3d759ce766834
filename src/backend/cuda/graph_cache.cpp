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

}  // namespace

bool launches_block() {
  const char* value = std::getenv("CUDA_LAUNCH_BLOCKING");
  return value != nullptr && std::string_view(value) == "1";
}

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
  std::swap(launches_[0], launches_[1]);
  Launch& launch = launches_[0];
  count(launch);
  check(cudaEventRecord(launch.begin.get(), stream_), "a step");
  check(cudaGraphLaunch(found->second.get(), stream_), "a step");
  check(cudaEventRecord(launch.end.get(), stream_), "a step");
  launch.pending = true;
}

double GraphCache::seconds() {
  for (Launch& launch : launches_) count(launch);
  return std::exchange(seconds_, 0);
}

void GraphCache::count(Launch& launch) {
  if (!launch.pending) return;
  seconds_ += static_cast<double>(milliseconds(launch.begin.get(), launch.end.get())) * 1e-3;
  launch.pending = false;
}

}  // namespace sagelm::cuda
