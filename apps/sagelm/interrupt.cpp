#include "interrupt.h"

#include <csignal>

namespace sagelm::cli {
namespace {

volatile std::sig_atomic_t g_interrupted = 0;
struct sigaction g_previous;
stack_t g_previous_stack;
alignas(16) char g_stack[64 * 1024];  // signals save all registers there: 11 KiB with AMX

void on_sigint(int /*signal*/) { g_interrupted = 1; }

}  // namespace

InterruptGuard::InterruptGuard() {
  g_interrupted = 0;
  // On a stack of its own: on CPUs without AVX-512 products of oneDNN 2.6 do not survive a handler
  // on the one that they run on. What is overwritten there lets them corrupt the heap.
  sigaltstack(nullptr, &g_previous_stack);
  if ((g_previous_stack.ss_flags & SS_DISABLE) != 0) {
    stack_t stack = {};
    stack.ss_sp = g_stack;
    stack.ss_size = sizeof g_stack;
    sigaltstack(&stack, nullptr);
  }
  struct sigaction action {};
  action.sa_handler = on_sigint;
  action.sa_flags = SA_ONSTACK;  // no SA_RESTART: a read that waits for input returns
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, &g_previous);
}

InterruptGuard::~InterruptGuard() {
  sigaction(SIGINT, &g_previous, nullptr);
  if ((g_previous_stack.ss_flags & SS_DISABLE) != 0) sigaltstack(&g_previous_stack, nullptr);
}

bool interrupted() { return g_interrupted != 0; }

void clear_interrupt() { g_interrupted = 0; }

}  // namespace sagelm::cli
