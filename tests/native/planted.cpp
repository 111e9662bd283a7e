// Kernels with faults, on the library's own pool: what the sanitizers must report.
#include <cstdint>
#include <sched.h>

#include "../../kernels/cpu/threads.h"

#define FG_PLANTED extern "C" __attribute__((visibility("default")))

struct fg_planted_args {
  int64_t *counter;
  int64_t items, fault;
};

// A race: with a fault every item writes the same word, else its own.
FG_PLANTED int fg_race_scalar(const fg_planted_args *a) {
  int arrived = 0;
  return parallel_for(a->items, 1, [&](int64_t item) {
    if (item < 2) {  // two threads have one of them each; relaxed atomics order nothing else
      __atomic_fetch_add(&arrived, 1, __ATOMIC_RELAXED);
      while (__atomic_load_n(&arrived, __ATOMIC_RELAXED) < 2) sched_yield();
    }
    a->counter[a->fault ? 0 : item] += 1;
    return 0;
  });
}

// With fault 1 it reads the byte behind its memory, with fault 2 the one before; with fault 3 a sum overflows.
FG_PLANTED int fg_stray_scalar(const fg_planted_args *a) {
  const volatile char *bytes = reinterpret_cast<const char *>(a->counter);
  if (a->fault == 1) return bytes[8 * a->items] & 0;
  if (a->fault == 2) return bytes[-1] & 0;
  int big = static_cast<int>(a->items) + (a->fault == 3 ? 0x7fffffff : 0);
  return big == 0;
}
