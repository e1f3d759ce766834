// One way to launch the kernels of a step, each of which may begin while the one before it ends.
#pragma once

#include <cuda_runtime.h>

#include <utility>

namespace sagelm::kernels {

// For kernels launched by launch(), which may start while the kernel before them on
// the stream is ending. Every one calls wait_for_previous_kernel() before it touches anything that
// others write, and allow_next_kernel() as early as it likes: the next one waits in turn.
__device__ inline void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Whether the current device can start a kernel before the one in front of it has ended.
inline bool overlaps_kernels() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 9;
}

// Launches kernel so that on Hopper and later it may start while the kernel before it on the stream
// is ending: it has to call wait_for_previous_kernel() before it touches what others write.
// Blocks come in clusters of so many.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), dim3 grid, unsigned cluster,
                            unsigned threads, size_t shared_bytes, cudaStream_t stream,
                            Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (overlaps_kernels()) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {cluster, 1, 1};
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// Likewise, each block on its own.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_with_memory(void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                               size_t shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
  return launch_clusters(kernel, grid, 1, threads, shared_bytes, stream,
                         std::forward<Arguments>(arguments)...);
}

// Likewise, without dynamic shared memory.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, cudaStream_t stream,
                   Arguments&&... arguments) {
  return launch_with_memory(kernel, grid, threads, 0, stream,
                            std::forward<Arguments>(arguments)...);
}

}  // namespace sagelm::kernels
