// Ctrl-C as a flag, for commands that stop what they do instead of dying.
#pragma once

namespace sagelm::cli {

// While one lives, SIGINT sets a flag; the previous handling returns with its end. A second SIGINT
// that nobody took yet does nothing more.
class InterruptGuard {
 public:
  InterruptGuard();
  ~InterruptGuard();
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;
};

bool interrupted();
void clear_interrupt();

}  // namespace sagelm::cli
