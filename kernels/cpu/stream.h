// Outputs that no cache would keep.
//
// An ordinary store reads the line that it overwrites, and takes the place of something that was cached.  Where what an
// op reads and writes is larger than the last cache, its output goes past the caches, vector by vector as it is made, so
// that memory writes while the next is computed; or from a buffer, where it is made piecemeal.
#pragma once
#include <type_traits>

#include "simd.h"
#include "threads.h"

namespace {

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

#if defined(FG_HAS_AVX512)
FG_INLINE void store_past(float *p, vf x) { _mm512_stream_ps(p, x); }
FG_INLINE void store_past(bf16 *p, vf x) { _mm256_stream_si256(reinterpret_cast<__m256i *>(p), to_bf16(x)); }
FG_INLINE void store_past(fp16 *p, vf x) { _mm256_stream_si256(reinterpret_cast<__m256i *>(p), to_fp16(x)); }
#elif defined(FG_LEVEL_AVX2)
FG_INLINE void store_past(float *p, vf x) { _mm256_stream_ps(p, x); }
FG_INLINE void store_past(bf16 *p, vf x) { _mm_stream_si128(reinterpret_cast<__m128i *>(p), to_bf16(x)); }
FG_INLINE void store_past(fp16 *p, vf x) { _mm_stream_si128(reinterpret_cast<__m128i *>(p), to_fp16(x)); }
#else
template <class T>
FG_INLINE void store_past(T *p, vf x) {
  store(p, x);
}
#endif

// A whole vector to p, past the caches where Past is std::true_type.
template <class Past, class T>
FG_INLINE void leave(T *p, vf x, Past) {
  if constexpr (Past::value)
    store_past(p, x);
  else
    store(p, x);
}

// body(past) makes an output of vectors from `out` on with leave(..., past): only whole lines are worth sending past the
// caches, and only from a vector's own boundary.
template <class T, class F>
FG_INLINE void leaving(const T *out, bool streaming, const F &body) {
  if (kStreams && streaming && !(reinterpret_cast<uintptr_t>(out) % (W * sizeof(T))))
    body(std::true_type());
  else
    body(std::false_type());
}

// Ends a work item: what it streamed is in memory before another thread reads it.
FG_INLINE void streamed() {
#if defined(FG_HAS_AVX512) || defined(FG_LEVEL_AVX2)
  _mm_sfence();
#endif
}

}  // namespace
