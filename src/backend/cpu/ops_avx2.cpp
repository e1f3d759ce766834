#define SAGELM_OPS_TABLE kOpsAvx2
#define SAGELM_OPS_ISA "avx2"
#include "backend/cpu/ops.inl"
