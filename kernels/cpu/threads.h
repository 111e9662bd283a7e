// Work on the one thread pool that the process already has.
//
// The library links no OpenMP: the Python loader hands it GOMP_parallel and the thread count of the runtime that
// PyTorch loaded, so that torch.set_num_threads is obeyed and two pools never fight for the cores.
#pragma once
#include <cstddef>
#include <cstdint>

extern "C" {
// Runs body(context, item) for every item in [0, items), on at most `threads` threads (fewer where the pool is
// smaller); returns the largest code any of them returned.  Items are handed out as threads become free.
int fg_parallel(int64_t items, int64_t threads, int (*body)(void *, int64_t), void *context);

// The number of threads fg_parallel may use when called from here.
int64_t fg_threads();

// Bytes of the last cache, which all threads share.
int64_t fg_cache_bytes();

// Memory of the calling thread, 64-byte aligned, at least `bytes`; null when there is none.  It is kept for the
// thread's next call and its contents are unspecified.  One user at a time: a second call may move it.
void *fg_scratch(size_t bytes);
}

namespace {

// parallel_for(items, grain, f): f(item) -> int for each item; a thread is used per `grain` items at most, so that
// small work stays on the caller.  What f computes for an item must not depend on the thread that runs it.
template <class F>
inline int parallel_for(int64_t items, int64_t grain, const F &f) {
  int64_t threads = grain > 0 ? items / grain : items;
  if (threads <= 1) {
    int worst = 0;
    for (int64_t i = 0; i < items; ++i) {
      int code = f(i);
      worst = code > worst ? code : worst;
    }
    return worst;
  }
  return fg_parallel(
      items, threads, [](void *context, int64_t item) { return (*static_cast<const F *>(context))(item); },
      const_cast<F *>(&f));
}

}  // namespace
