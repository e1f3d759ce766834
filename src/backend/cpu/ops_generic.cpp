#define SAGELM_OPS_TABLE kOpsGeneric
#define SAGELM_OPS_ISA "generic"
#include "backend/cpu/ops.inl"
