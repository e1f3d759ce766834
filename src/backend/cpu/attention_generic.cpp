// The kernels for any CPU; compiled without target flags.
#include "backend/cpu/attention_kernel.inl"

namespace sagelm::cpu {

const KernelTable* attention_kernels_generic() {
  static constexpr KernelTable kTable = {"generic", kPacksBytes, prepare_kv, attend, write_page};
  return &kTable;
}

}  // namespace sagelm::cpu
