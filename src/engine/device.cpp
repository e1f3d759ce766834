#include "engine/device.h"

#include <algorithm>
#include <cctype>

#include "backend/cpu/cpu_backend.h"
#ifdef SAGELM_WITH_CUDA
#include "backend/cuda/cuda_backend.h"
#endif
#include "base/error.h"

namespace sagelm {
namespace {

bool is_cuda_name(std::string_view name) {
  if (!name.starts_with("cuda")) return false;
  name.remove_prefix(4);
  if (name.empty()) return true;
  if (name.size() < 2 || name.size() > 4 || name[0] != ':') return false;
  return std::all_of(name.begin() + 1, name.end(),
                     [](unsigned char c) { return std::isdigit(c) != 0; });
}

#ifdef SAGELM_WITH_CUDA
bool has_cuda() { return cuda_problem(0).empty(); }

std::unique_ptr<Backend> make_gpu_backend(std::string_view name) {
  constexpr size_t kPrefix = std::string_view("cuda:").size();
  int device = 0;
  for (const char digit : name.substr(std::min(kPrefix, name.size()))) {
    device = 10 * device + (digit - '0');
  }
  return make_cuda_backend(device);
}
#else
bool has_cuda() { return false; }

std::unique_ptr<Backend> make_gpu_backend(std::string_view name) {
  fail("device {} cannot be used: this build has no CUDA support (use --device cpu)", name);
}
#endif

}  // namespace

std::unique_ptr<Backend> make_backend(std::string_view name, int threads) {
  if (threads < 0 || threads > 1024) fail_usage("threads must be from 1 to 1024, not {}", threads);
  if (name == "auto") name = has_cuda() ? "cuda" : "cpu";
  if (name == "cpu") return make_cpu_backend(threads);
  if (is_cuda_name(name)) return make_gpu_backend(name);
  fail_usage("unknown device '{}': use auto, cpu, cuda or cuda:N", name);
}

}  // namespace sagelm
