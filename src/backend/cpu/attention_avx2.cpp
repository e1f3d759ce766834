// The kernels for AVX2; compile with -mavx2 -mfma -mf16c.
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "backend/cpu/attention_kernel.inl"

namespace sagelm::cpu {

const KernelTable* attention_kernels_avx2() {
  static constexpr KernelTable kTable = {"avx2", kPacksBytes, prepare_kv, attend, write_page};
  return &kTable;
}

}  // namespace sagelm::cpu
#else
#include "backend/cpu/attention_kernels.h"

namespace sagelm::cpu {

const KernelTable* attention_kernels_avx2() { return nullptr; }

}  // namespace sagelm::cpu
#endif
