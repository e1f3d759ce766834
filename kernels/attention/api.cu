// The C interface: checks what a caller may get wrong, then picks the kernel.
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "kernels/attention/fp16_sm90.h"
#include "kernels/attention/mma_attention.h"
#include "kernels/attention/mma_decode.h"
#include "kernels/attention/problem.cuh"
#include "kernels/attention/sage2_sm90.h"
#include "sagelm/attention.h"

namespace sagelm::kernels {
namespace {

thread_local char last_error[512] = "";

[[gnu::format(printf, 2, 3)]] sagelm_attention_status refuse(sagelm_attention_status status,
                                                             const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

sagelm_attention_status check_tensor(const char* name, const sagelm_attention_tensor& x) {
  if (x.data == nullptr) return refuse(SAGELM_ATTENTION_INVALID, "%s has no data", name);
  if (reinterpret_cast<uintptr_t>(x.data) % 16 != 0 || x.batch_stride % 8 != 0 ||
      x.token_stride % 8 != 0 || x.head_stride % 8 != 0) {
    return refuse(
        SAGELM_ATTENTION_INVALID,
        "the rows of %s do not all start on 16-byte boundaries (strides must be multiples "
        "of 8 elements)",
        name);
  }
  return SAGELM_ATTENTION_OK;
}

Tensor to_tensor(const sagelm_attention_tensor& x) {
  return {x.data, x.batch_stride, x.token_stride, x.head_stride};
}

// Everything but the pointers.
sagelm_attention_status make_problem(const sagelm_attention_args* args, Problem& problem) {
  constexpr auto kInvalid = SAGELM_ATTENTION_INVALID;
  if (args == nullptr) return refuse(kInvalid, "args is null");
  const sagelm_attention_args& a = *args;
  if (a.struct_size != sizeof(sagelm_attention_args)) {
    return refuse(kInvalid,
                  "struct_size is %zu, this library's sagelm_attention_args has %zu bytes",
                  a.struct_size, sizeof(sagelm_attention_args));
  }
  if (a.variant < SAGELM_ATTENTION_FP16 || a.variant > SAGELM_ATTENTION_SAGE2_4B) {
    return refuse(kInvalid, "unknown variant %d", static_cast<int>(a.variant));
  }
  if (a.dtype != SAGELM_ATTENTION_F16 && a.dtype != SAGELM_ATTENTION_BF16) {
    return refuse(kInvalid, "unknown dtype %d", static_cast<int>(a.dtype));
  }
  if (a.kernel < SAGELM_ATTENTION_KERNEL_AUTO || a.kernel > SAGELM_ATTENTION_KERNEL_WGMMA) {
    return refuse(kInvalid, "unknown kernel %d", static_cast<int>(a.kernel));
  }
  if (a.batch < 0 || a.max_q_len < 0 || a.max_kv_len < 0 || a.batch > 65535) {
    return refuse(kInvalid,
                  "batch %d, max_q_len %d, max_kv_len %d: none may be negative, nor the "
                  "batch above 65535",
                  a.batch, a.max_q_len, a.max_kv_len);
  }
  if (a.num_kv_heads < 1 || a.num_heads < 1 || a.num_heads % a.num_kv_heads != 0) {
    return refuse(kInvalid, "%d heads are not a multiple of %d KV heads", a.num_heads,
                  a.num_kv_heads);
  }
  if (a.num_heads > 16384) return refuse(kInvalid, "%d heads, 16384 at most", a.num_heads);
  if (a.head_dim < 8 || a.head_dim > 256 || a.head_dim % 8 != 0) {
    return refuse(kInvalid, "head_dim %d is not a multiple of 8 from 8 to 256", a.head_dim);
  }
  if (!(std::isfinite(a.softmax_scale) && a.softmax_scale >= 0)) {
    return refuse(kInvalid, "softmax_scale %g is not a positive number", a.softmax_scale);
  }
  const bool own_lengths =
      a.cu_q_lens != nullptr || a.cu_kv_lens != nullptr || a.kv_lens != nullptr;
  if (a.causal != 0 && !own_lengths && a.max_q_len > a.max_kv_len) {
    return refuse(kInvalid,
                  "a causal call with %d queries and only %d keys: the mask is aligned to "
                  "the last key, so the first queries would see none",
                  a.max_q_len, a.max_kv_len);
  }
  if (a.page_table != nullptr) {
    if (a.kv_lens == nullptr || a.cu_kv_lens != nullptr) {
      return refuse(kInvalid, "a page table needs kv_lens and excludes cu_kv_lens");
    }
    if (a.page_tokens < 16 || a.page_tokens % 16 != 0) {
      return refuse(kInvalid, "page_tokens %d is not a multiple of 16", a.page_tokens);
    }
    if (int64_t{a.page_table_stride} * a.page_tokens < a.max_kv_len) {
      return refuse(kInvalid, "page tables of %d pages of %d tokens cannot hold max_kv_len %d",
                    a.page_table_stride, a.page_tokens, a.max_kv_len);
    }
  } else if (a.kv_lens != nullptr && a.cu_kv_lens != nullptr) {
    return refuse(kInvalid, "kv_lens and cu_kv_lens are both given");
  }
  problem = Problem{};
  problem.q = to_tensor(a.q);
  problem.k = to_tensor(a.k);
  problem.v = to_tensor(a.v);
  problem.out = to_tensor(a.out);
  problem.lse = a.lse;
  problem.cu_q_lens = a.cu_q_lens;
  problem.cu_kv_lens = a.cu_kv_lens;
  problem.kv_lens = a.kv_lens;
  problem.page_table = a.page_table;
  problem.page_table_stride = a.page_table_stride;
  problem.page_tokens = a.page_tokens;
  problem.batch = a.batch;
  problem.num_heads = a.num_heads;
  problem.num_kv_heads = a.num_kv_heads;
  problem.head_dim = a.head_dim;
  problem.max_q_len = a.max_q_len;
  problem.max_kv_len = a.max_kv_len;
  problem.softmax_scale =
      a.softmax_scale > 0 ? a.softmax_scale : 1.0f / std::sqrt(static_cast<float>(a.head_dim));
  problem.causal = a.causal != 0;
  problem.smooth_k = a.no_smooth_k == 0;
  problem.bf16 = a.dtype == SAGELM_ATTENTION_BF16;
  return SAGELM_ATTENTION_OK;
}

struct Choice {
  sagelm_attention_kernel kernel;
  int capability;
};

const char* wgmma_attention_refusal(sagelm_attention_variant variant, const Problem& problem,
                                    int capability) {
  if (capability != 90) return "the device is not sm_90";
  if (variant == SAGELM_ATTENTION_SAGE1) return "sage1 has none";
  if (variant == SAGELM_ATTENTION_SAGE2_4B) return "sage2-4b has none";
  return variant == SAGELM_ATTENTION_SAGE2 ? sage2_sm90_refusal(problem)
                                           : fp16_sm90_refusal(problem);
}

sagelm_attention_status choose(const sagelm_attention_args& a, const Problem& problem,
                               Choice& choice) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  if (error != cudaSuccess) {
    return refuse(SAGELM_ATTENTION_CUDA_ERROR, "no CUDA device: %s", cudaGetErrorString(error));
  }
  choice.capability = 10 * major + minor;
  // The limits of the MMA kernels hold for all.
  if (const char* why = mma_attention_refusal(a.variant, problem, choice.capability)) {
    return refuse(SAGELM_ATTENTION_UNSUPPORTED, "%s", why);
  }
  const char* wgmma_refusal = wgmma_attention_refusal(a.variant, problem, choice.capability);
  if (a.kernel == SAGELM_ATTENTION_KERNEL_WGMMA && wgmma_refusal != nullptr) {
    return refuse(SAGELM_ATTENTION_UNSUPPORTED, "the warp-group kernel cannot run: %s",
                  wgmma_refusal);
  }
  choice.kernel = a.kernel;
  if (a.kernel == SAGELM_ATTENTION_KERNEL_AUTO) {
    // Decode in FP16 is a matter of bandwidth, and the kernel that splits sequences has more of it.
    const bool decode = a.variant == SAGELM_ATTENTION_FP16 && mma_decode_takes(problem);
    choice.kernel = wgmma_refusal == nullptr && !decode ? SAGELM_ATTENTION_KERNEL_WGMMA
                                                        : SAGELM_ATTENTION_KERNEL_MMA;
  }
  return SAGELM_ATTENTION_OK;
}

size_t workspace_bytes(const sagelm_attention_args& a, const Problem& problem,
                       const Choice& choice) {
  if (choice.kernel == SAGELM_ATTENTION_KERNEL_MMA) {
    return mma_attention_workspace_bytes(a.variant, problem);
  }
  return a.variant == SAGELM_ATTENTION_SAGE2 ? sage2_sm90_workspace_bytes(problem) : 0;
}

sagelm_attention_status prepare(const sagelm_attention_args* args, Problem& problem,
                                Choice& choice) {
  const sagelm_attention_status status = make_problem(args, problem);
  return status != SAGELM_ATTENTION_OK ? status : choose(*args, problem, choice);
}

sagelm_attention_status run(const sagelm_attention_args* args) {
  Problem problem;
  Choice choice;
  if (const auto status = prepare(args, problem, choice); status != SAGELM_ATTENTION_OK) {
    return status;
  }
  if (problem.batch == 0 || problem.max_q_len == 0) return SAGELM_ATTENTION_OK;
  const struct {
    const char* name;
    const sagelm_attention_tensor& tensor;
  } tensors[] = {{"q", args->q}, {"k", args->k}, {"v", args->v}, {"out", args->out}};
  for (const auto& [name, tensor] : tensors) {
    if (problem.max_kv_len == 0 && (*name == 'k' || *name == 'v')) continue;
    if (const auto status = check_tensor(name, tensor); status != SAGELM_ATTENTION_OK) {
      return status;
    }
  }
  const size_t needed = workspace_bytes(*args, problem, choice);
  if (needed > args->workspace_bytes || (needed > 0 && args->workspace == nullptr)) {
    return refuse(SAGELM_ATTENTION_INVALID, "%zu bytes of workspace are needed, %zu were given",
                  needed, args->workspace_bytes);
  }
  if (reinterpret_cast<uintptr_t>(args->workspace) % 256 != 0) {
    return refuse(SAGELM_ATTENTION_INVALID, "the workspace is not 256-byte aligned");
  }
  const auto stream = static_cast<cudaStream_t>(args->stream);
  const auto launch = [&] {
    if (choice.kernel == SAGELM_ATTENTION_KERNEL_MMA) {
      return mma_attention(args->variant, problem, args->workspace, stream);
    }
    return args->variant == SAGELM_ATTENTION_SAGE2 ? sage2_sm90(problem, args->workspace, stream)
                                                   : fp16_sm90(problem, stream);
  };
  const cudaError_t error = launch();
  if (error != cudaSuccess) {
    return refuse(SAGELM_ATTENTION_CUDA_ERROR, "launching %s failed: %s",
                  sagelm_attention_kernel_name(args), cudaGetErrorString(error));
  }
  return SAGELM_ATTENTION_OK;
}

}  // namespace
}  // namespace sagelm::kernels

extern "C" {

using namespace sagelm::kernels;

sagelm_attention_status sagelm_attention_workspace_bytes(const sagelm_attention_args* args,
                                                         size_t* bytes) {
  if (bytes == nullptr) return refuse(SAGELM_ATTENTION_INVALID, "bytes is null");
  Problem problem;
  Choice choice;
  const sagelm_attention_status status = prepare(args, problem, choice);
  if (status == SAGELM_ATTENTION_OK) *bytes = workspace_bytes(*args, problem, choice);
  return status;
}

sagelm_attention_status sagelm_attention(const sagelm_attention_args* args) { return run(args); }

const char* sagelm_attention_last_error(void) { return last_error; }

const char* sagelm_attention_kernel_name(const sagelm_attention_args* args) {
  static constexpr const char* kMmaNames[] = {"fp16-mma", "sage1-mma", "sage2-mma", "sage2-4b-mma"};
  Problem problem;
  Choice choice;
  if (prepare(args, problem, choice) != SAGELM_ATTENTION_OK) return nullptr;
  if (choice.kernel == SAGELM_ATTENTION_KERNEL_MMA) return kMmaNames[args->variant];
  return args->variant == SAGELM_ATTENTION_SAGE2 ? "sage2-wgmma-sm90a" : "fp16-wgmma-sm90a";
}

}  // extern "C"
