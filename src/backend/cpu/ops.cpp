#include "backend/cpu/ops.h"

#include <cstdlib>
#include <string_view>

#include "base/error.h"

namespace sagelm::cpu {
namespace {

const Ops& choose() {
  const char* wanted = std::getenv("SAGELM_CPU_ISA");
  const std::string_view limit = wanted != nullptr ? wanted : "avx512-vnni";
  if (limit != "generic" && limit != "avx2" && limit != "avx512-vnni") {
    fail_usage("SAGELM_CPU_ISA is '{}'; it can be generic, avx2 or avx512-vnni", limit);
  }
#if defined(__x86_64__)
  if (limit == "avx512-vnni" && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    return kOpsAvx512;
  }
  if (limit != "generic" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return kOpsAvx2;
  }
#endif
  return kOpsGeneric;
}

}  // namespace

const Ops& ops() {
  static const Ops& chosen = choose();
  return chosen;
}

}  // namespace sagelm::cpu
