// levels: scalar avx2 avx512 neon
// Normal noise of each sample, in chunks that any thread may make: every number stands for itself.
#include "abi.h"
#include "normal.h"
#include "threads.h"

namespace {

constexpr int64_t kChunk = 4096;

int noise(const fg_noise_normal_args *a) {
  const int64_t chunks = (a->count + kChunk - 1) / kChunk;
  const int64_t *seeds = static_cast<const int64_t *>(a->seeds);
  return parallel_for(a->batch * chunks, 2, [&](int64_t item) {
    int64_t b = item / chunks, first = item % chunks * kChunk;
    NormalStream stream{static_cast<uint64_t>(seeds[b * a->seeds_stride]), static_cast<uint32_t>(a->step),
                        static_cast<uint32_t>(a->sample), static_cast<const float *>(a->table)};
    int64_t count = a->count - first < kChunk ? a->count - first : kChunk;
    normal_fill(stream, first, count, static_cast<float *>(a->out) + b * a->count + first);
    return 0;
  });
}

}  // namespace

extern "C" int FG_EXPORT(noise_normal)(const fg_noise_normal_args *args) { return args->count ? noise(args) : FG_OK; }
