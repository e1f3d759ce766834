// The functions of cublasLt.h that we call, each of which forwards to the library's. The file's
// name and the directory of the build's own copy come from CMake.
#include "backend/cuda/cublas_lt.h"

#include <cublasLt.h>
#include <dlfcn.h>

#include "base/error.h"

namespace sagelm::cuda {
namespace {

struct Library {
  void* handle = nullptr;
  std::string problem;
};

const Library& library() {
  static const Library loaded = [] {
    Library result;
    // As the system finds libraries (LD_LIBRARY_PATH, ld.so.conf), then where the build found it.
    for (const char* name : {SAGELM_CUBLASLT, SAGELM_CUDA_LIBRARIES "/" SAGELM_CUBLASLT}) {
      result.handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
      if (result.handle != nullptr) return result;
    }
    result.problem = fmt::format(
        "{} of the CUDA toolkit cannot be loaded (is its directory in "
        "LD_LIBRARY_PATH?)",
        SAGELM_CUBLASLT);
    return result;
  }();
  return loaded;
}

void* find(const char* name) {
  if (library().handle == nullptr) fail("{}", library().problem);
  void* symbol = dlsym(library().handle, name);
  if (symbol == nullptr) fail("{} has no function {}", SAGELM_CUBLASLT, name);
  return symbol;
}

// Calls the library's function of that name, whose type is that of `function`, our own.
template <auto function, typename... Arguments>
auto forward(const char* name, Arguments... arguments) {
  static const auto target = reinterpret_cast<decltype(function)>(find(name));
  return target(arguments...);
}

}  // namespace

std::string cublas_lt_problem() { return library().problem; }

}  // namespace sagelm::cuda

using sagelm::cuda::forward;

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  return forward<cublasLtCreate>("cublasLtCreate", handle);
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  return forward<cublasLtDestroy>("cublasLtDestroy", handle);
}

const char* cublasLtGetStatusString(cublasStatus_t status) {
  return forward<cublasLtGetStatusString>("cublasLtGetStatusString", status);
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation,
                              const void* alpha, const void* a, cublasLtMatrixLayout_t a_layout,
                              const void* b, cublasLtMatrixLayout_t b_layout, const void* beta,
                              const void* c, cublasLtMatrixLayout_t c_layout, void* d,
                              cublasLtMatrixLayout_t d_layout,
                              const cublasLtMatmulAlgo_t* algorithm, void* workspace,
                              size_t workspace_bytes, cudaStream_t stream) {
  return forward<cublasLtMatmul>("cublasLtMatmul", handle, operation, alpha, a, a_layout, b,
                                 b_layout, beta, c, c_layout, d, d_layout, algorithm, workspace,
                                 workspace_bytes, stream);
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation,
                                       cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                       cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                       const cublasLtMatmulAlgo_t* algorithm,
                                       cublasLtMatmulHeuristicResult_t* result) {
  return forward<cublasLtMatmulAlgoCheck>("cublasLtMatmulAlgoCheck", handle, operation, a, b, c, d,
                                          algorithm, result);
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle,
                                              cublasLtMatmulDesc_t operation,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t* results,
                                              int* found) {
  return forward<cublasLtMatmulAlgoGetHeuristic>("cublasLtMatmulAlgoGetHeuristic", handle,
                                                 operation, a, b, c, d, preference, wanted, results,
                                                 found);
}

cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t operation, size_t size,
                                               cublasComputeType_t compute, cudaDataType_t scale) {
  return forward<cublasLtMatmulDescInit_internal>("cublasLtMatmulDescInit_internal", operation,
                                                  size, compute, scale);
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t operation,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t size) {
  return forward<cublasLtMatmulDescSetAttribute>("cublasLtMatmulDescSetAttribute", operation,
                                                 attribute, value, size);
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  return forward<cublasLtMatmulPreferenceCreate>("cublasLtMatmulPreferenceCreate", preference);
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  return forward<cublasLtMatmulPreferenceDestroy>("cublasLtMatmulPreferenceDestroy", preference);
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void* value, size_t size) {
  return forward<cublasLtMatmulPreferenceSetAttribute>("cublasLtMatmulPreferenceSetAttribute",
                                                       preference, attribute, value, size);
}

cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t layout, size_t size,
                                                 cudaDataType type, uint64_t rows, uint64_t columns,
                                                 int64_t leading) {
  return forward<cublasLtMatrixLayoutInit_internal>("cublasLtMatrixLayoutInit_internal", layout,
                                                    size, type, rows, columns, leading);
}
