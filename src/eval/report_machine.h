// The machine a result was measured on, for reports.
#pragma once

#include <string>
#include <string_view>

namespace sagelm {

// "Intel(R) Xeon(R) Processor, 2 CPUs, 23.4 GiB, Debian GNU/Linux 12 (bookworm), x86_64": what
// Linux says of itself, CPUs being those this process may use. What it does not say is left out.
// GPUs are not in it; ModelInfo::device names the one that ran.
std::string describe_machine();

// The processor's name in the text of /proc/cpuinfo; empty where it has none (as on ARM).
std::string processor_name(std::string_view cpuinfo);
// The system's name in the text of /etc/os-release, quotes taken off; empty where it has none.
std::string system_name(std::string_view os_release);

}  // namespace sagelm
