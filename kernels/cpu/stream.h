// Outputs that no cache would keep.
//
// An ordinary store reads the line that it overwrites, and takes the place of something that was cached.  Where what an
// op reads and writes is larger than the last cache, its output is made in a buffer that stays in the first-level cache,
// and leaves that by stores that go past the caches.
#pragma once
#include "simd.h"
#include "threads.h"

namespace {

constexpr int64_t kBuffer = 1 << 13;  // bytes of output made at a time

#if defined(FG_HAS_AVX512) || defined(FG_LEVEL_AVX2)
constexpr bool kStreams = true;
#else
constexpr bool kStreams = false;
#endif

// Whether an op that reads and writes so many bytes is to write past the caches.
FG_INLINE bool streams(int64_t bytes) { return kStreams && bytes > fg_cache_bytes(); }

// Copies n elements past the caches.
template <class T>
FG_INLINE void stream(const T *from, T *to, int64_t n) {
  const char *source = reinterpret_cast<const char *>(from);
  char *target = reinterpret_cast<char *>(to);
  const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
  int64_t i = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(target) & 63);  // only whole lines can go past
  i = i < bytes ? i : bytes;
  std::memcpy(target, source, static_cast<size_t>(i));
#if defined(FG_HAS_AVX512)
  for (; i + 64 <= bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i *>(target + i), _mm512_loadu_si512(source + i));
#elif defined(FG_LEVEL_AVX2)
  for (; i + 32 <= bytes; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i *>(target + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i *>(source + i)));
#endif
  std::memcpy(target + i, source + i, static_cast<size_t>(bytes - i));
}

// Makes `out` of n elements: body(i, m, to) writes elements [i, i + m) to `to`.
template <class T, class F>
FG_INLINE void pieces(T *out, int64_t n, bool streaming, const F &body) {
  alignas(64) T buffer[kBuffer / sizeof(T)];
  const int64_t most = streaming ? kBuffer / static_cast<int64_t>(sizeof(T)) : n;
  for (int64_t i = 0; i < n; i += most) {
    const int64_t m = n - i < most ? n - i : most;
    body(i, m, streaming ? buffer : out + i);
    if (streaming) stream(buffer, out + i, m);
  }
}

// Ends a work item: what it streamed is in memory before another thread reads it.
FG_INLINE void streamed() {
#if defined(FG_HAS_AVX512) || defined(FG_LEVEL_AVX2)
  _mm_sfence();
#endif
}

}  // namespace
