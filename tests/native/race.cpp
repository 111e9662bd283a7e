// A kernel with a race, on the library's own pool: what ThreadSanitizer must report.
#include <cstdint>
#include <sched.h>

#include "../../kernels/cpu/threads.h"

struct fg_race_args {
  int64_t *counter;
  int64_t items, shared;  // shared: every item writes the same word, else its own
};

extern "C" __attribute__((visibility("default"))) int fg_race_scalar(const fg_race_args *a) {
  int arrived = 0;
  return parallel_for(a->items, 1, [&](int64_t item) {
    if (item < 2) {  // two threads have one of them each; relaxed atomics order nothing else
      __atomic_fetch_add(&arrived, 1, __ATOMIC_RELAXED);
      while (__atomic_load_n(&arrived, __ATOMIC_RELAXED) < 2) sched_yield();
    }
    a->counter[a->shared ? 0 : item] += 1;
    return 0;
  });
}
