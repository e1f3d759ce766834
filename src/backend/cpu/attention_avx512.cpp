// The kernels for AVX-512 with VNNI; compile with -mavx512f -mavx512bw -mavx512vl -mavx512dq
// -mavx512vnni -mavx2 -mfma -mf16c.
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#include "backend/cpu/attention_kernel.inl"

namespace sagelm::cpu {

const KernelTable* attention_kernels_avx512() {
  static constexpr KernelTable kTable = {"avx512-vnni", kPacksBytes, prepare_kv, attend,
                                         write_page};
  return &kTable;
}

}  // namespace sagelm::cpu
#else
#include "backend/cpu/attention_kernels.h"

namespace sagelm::cpu {

const KernelTable* attention_kernels_avx512() { return nullptr; }

}  // namespace sagelm::cpu
#endif
