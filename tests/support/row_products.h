// What can be asked of the CPU's products.
#pragma once

#include "backend/cpu/amx.h"

namespace sagelm {

// Whether a row's products are the same to the last bit whatever rows are computed beside it. Those
// of AMX tiles are; oneDNN chooses its code, and with it the order of a sum, by the number of rows.
inline bool rows_ignore_each_other() { return cpu::has_amx(); }

}  // namespace sagelm
