#define SAGELM_OPS_TABLE kOpsAvx512
#define SAGELM_OPS_ISA "avx512-vnni"
#include "backend/cpu/ops.inl"
