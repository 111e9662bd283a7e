// levels: scalar avx2 avx512 avx512_bf16 neon
// One sampler step; kernels/sampler_step.py says what a row means.
//
// The arithmetic goes term by term over chunks that stay in the first-level cache.  The statistics of the rescale are
// taken chunk by chunk and merged in the chunks' order.
#include "abi.h"
#include "moments.h"
#include "normal.h"
#include "threads.h"

namespace {

constexpr int64_t kChunk = 2048;
constexpr int kSlots = 4;
enum Index { P_X, P_OUT, CLIP, X, D, NOISE, INPUT, STEP, STORE_X, STORE_D, HX, HD = HX + kSlots };

// to[i] = f(a[i]) over n elements; f works on vectors.
template <class A, class To, class F>
FG_INLINE void map(const A *a, To *to, int64_t n, const F &f) {
  for (int64_t i = 0; i < n; i += W) {
    int lanes = n - i < W ? static_cast<int>(n - i) : W;
    if (lanes == W)
      store(to + i, f(load(a + i), load(to + i)));
    else
      store_n(to + i, f(load_n(a + i, lanes), load_n(to + i, lanes)), lanes);
  }
}

// to += k * a; a zero coefficient does not read a.
template <class A>
FG_INLINE void add_scaled(float k, const A *a, float *to, int64_t n) {
  if (k == 0.0f) return;
  const vf scale = set1(k);
  map(a, to, n, [&](vf x, vf old) { return fma(scale, x, old); });
}

template <class T>
struct Step {
  const fg_sampler_step_args *a;
  int64_t chunks;
  Moments *partial;  // [batch][chunk][2]: of the conditional and of the guided prediction
  float *factor;     // [batch]

  int64_t first(int64_t chunk) const { return chunk * kChunk; }
  int64_t size(int64_t chunk) const { return a->count - first(chunk) < kChunk ? a->count - first(chunk) : kChunk; }

  // The prediction of a chunk as float32, guided but not rescaled.
  void prediction(int64_t b, int64_t chunk, float *o) const {
    const int64_t at = b * a->count + first(chunk), n = size(chunk);
    const T *u = static_cast<const T *>(a->out) + at;
    map(u, o, n, [](vf x, vf) { return x; });
    if (!a->guided) return;
    const vf g = set1(static_cast<const float *>(a->guidance)[b]);
    map(u + a->batch * a->count, o, n, [&](vf c, vf uncond) { return fma(g, sub(c, uncond), uncond); });
  }

  void statistics(int64_t b, int64_t chunk) const {
    float o[kChunk];
    prediction(b, chunk, o);
    const T *c = static_cast<const T *>(a->out) + (a->batch + b) * a->count + first(chunk);
    Moments *to = partial + (b * chunks + chunk) * 2;
    to[0] = moments_of(c, size(chunk));
    to[1] = moments_of(static_cast<const float *>(o), size(chunk));
  }

  void finish(int64_t b) const {
    const double last = static_cast<double>(size(chunks - 1));
    const Moments *from = partial + b * chunks * 2;
    double cond = merged(from, chunks, 2, static_cast<double>(kChunk), last).m2;
    double guided = merged(from + 1, chunks, 2, static_cast<double>(kChunk), last).m2;
    factor[b] = guided > 0 ? static_cast<float>(a->rescale * __builtin_sqrt(cond / guided) + (1 - a->rescale)) : 1.0f;
  }

  void combine(int64_t b, int64_t chunk, bool rescaled) const {
    const float *row = static_cast<const float *>(a->row);
    const int64_t at = b * a->count + first(chunk), n = size(chunk), slot = a->batch * a->count;
    const float *x = static_cast<const float *>(a->x) + at;
    float *history = static_cast<float *>(a->history) + at;
    float *denoised = static_cast<float *>(a->denoised) + at, *next = static_cast<float *>(a->next) + at;
    float part[kChunk], total[kChunk];
    fill_zero(total, n);
    add_scaled(row[P_X], x, total, n);
    if (row[P_OUT] != 0.0f) {
      prediction(b, chunk, part);
      add_scaled(rescaled ? row[P_OUT] * factor[b] : row[P_OUT], part, total, n);
    }
    const vf low = set1(-row[CLIP]), high = set1(row[CLIP]);
    map(total, denoised, n, [&](vf d, vf) { return min(high, max(low, d)); });
    fill_zero(total, n);
    add_scaled(row[X], x, total, n);
    add_scaled(row[D], denoised, total, n);
    for (int j = 0; j < 2 * kSlots; ++j) add_scaled(row[HX + j], history + j * slot, total, n);
    if (row[NOISE] != 0.0f) {
      const uint64_t seed = static_cast<uint64_t>(static_cast<const int64_t *>(a->seeds)[b]);
      normal_fill({seed, static_cast<uint32_t>(row[STEP]), 0, static_cast<const float *>(a->table)}, first(chunk), n, part);
      add_scaled(row[NOISE], part, total, n);
    }
    std::memcpy(next, total, static_cast<size_t>(n) * sizeof(float));
    if (row[STORE_X] >= 0) std::memcpy(history + static_cast<int>(row[STORE_X]) * slot, x, static_cast<size_t>(n) * 4);
    if (row[STORE_D] >= 0)
      std::memcpy(history + (kSlots + static_cast<int>(row[STORE_D])) * slot, denoised, static_cast<size_t>(n) * 4);
    const vf scale = set1(row[INPUT]);
    for (int64_t copy = 0; copy <= a->guided; ++copy) {
      T *to = static_cast<T *>(a->input) + copy * slot + at;
      for (int64_t i = 0; i < n; i += W) {
        int lanes = n - i < W ? static_cast<int>(n - i) : W;
        store_n(to + i, mul(scale, load_n(total + i, lanes)), lanes);
      }
    }
  }

  static void fill_zero(float *to, int64_t n) { std::memset(to, 0, static_cast<size_t>(n) * sizeof(float)); }
};

template <class T>
int step(const fg_sampler_step_args *a) {
  Step<T> s{a, (a->count + kChunk - 1) / kChunk, nullptr, nullptr};
  const bool rescaled = a->guided && a->rescale != 0;
  const int64_t items = a->batch * s.chunks;
  if (rescaled) {
    const size_t partials = static_cast<size_t>(items) * 2 * sizeof(Moments);
    char *memory = static_cast<char *>(fg_scratch(partials + static_cast<size_t>(a->batch) * sizeof(float)));
    if (!memory) return FG_NO_MEMORY;
    s.partial = reinterpret_cast<Moments *>(memory);
    s.factor = reinterpret_cast<float *>(memory + partials);
    parallel_for(items, 4, [&](int64_t item) { return s.statistics(item / s.chunks, item % s.chunks), 0; });
    for (int64_t b = 0; b < a->batch; ++b) s.finish(b);
  }
  return parallel_for(items, 4, [&](int64_t item) { return s.combine(item / s.chunks, item % s.chunks, rescaled), 0; });
}

}  // namespace

extern "C" int FG_EXPORT(sampler_step)(const fg_sampler_step_args *args) {
  if (!args->batch || !args->count) return FG_OK;
  switch (args->dtype) {
    case FG_FLOAT32:
      return step<float>(args);
    case FG_BFLOAT16:
      return step<bf16>(args);
    case FG_FLOAT16:
      return step<fp16>(args);
    default:
      return FG_BAD_ARGUMENT;
  }
}
