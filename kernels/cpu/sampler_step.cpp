// levels: scalar avx2 avx512 avx512_bf16 neon
// One sampler step; kernels/sampler_step.py says what a row means.
//
// The arithmetic goes term by term over chunks that stay in the first-level cache.  The statistics of the rescale are
// taken chunk by chunk and merged in the chunks' order.
#include "abi.h"
#include "moments.h"
#include "normal.h"
#include "select.h"
#include "threads.h"

namespace {

constexpr int64_t kChunk = 2048;
constexpr int kSlots = 4;
enum Index { P_X, P_OUT, CLIP, X, D, NOISE, INPUT, STEP, STORE_X, STORE_D, HX, HD = HX + kSlots, KNOWN = HD + kSlots, KNOWN_NOISE, KNOWN_STEP };

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

  // The denoised prediction of a chunk, not clamped.
  void predict(int64_t b, int64_t chunk, bool rescaled) const {
    const float *row = static_cast<const float *>(a->row);
    const int64_t at = b * a->count + first(chunk), n = size(chunk);
    float part[kChunk], *to = static_cast<float *>(a->denoised) + at;
    fill_zero(to, n);
    add_scaled(row[P_X], static_cast<const float *>(a->x) + at, to, n);
    if (row[P_OUT] == 0.0f) return;
    prediction(b, chunk, part);
    add_scaled(rescaled ? row[P_OUT] * factor[b] : row[P_OUT], part, to, n);
  }

  // Dynamic thresholding of a whole sample.
  int threshold(int64_t b) const {
    const int64_t room = (a->count + 2 * W + 15) / 16 * 16;
    float *memory = static_cast<float *>(fg_scratch(static_cast<size_t>(2 * room) * sizeof(float)));
    if (!memory) return FG_NO_MEMORY;
    float *d = static_cast<float *>(a->denoised) + b * a->count;
    const float low = quantile({memory, memory + room}, d, a->rank), high = quantile({memory, memory + room}, d, a->rank + 1);
    const float limit = static_cast<float>(low + a->part * (static_cast<double>(high) - low));
    const vf s = set1(limit > 1.0f ? limit : 1.0f), negative = sub(set1(0.0f), s);
    map(d, d, a->count, [&](vf x, vf) { return div(min(s, max(negative, x)), s); });
    return FG_OK;
  }

  // The value of rank `rank` (from 0, at most the last) among |d|.
  float quantile(Selection keys, const float *d, int64_t rank) const {
    for (int64_t i = 0; i < a->count; i += W) {
      const int n = a->count - i < W ? static_cast<int>(a->count - i) : W;
      const vf x = load_n(d + i, n), size = min(max(x, sub(set1(0.0f), x)), set1(kLargest));
      float lanes[W];  // past the end: a key below all that are taken
      store(lanes, size);
      for (int k = n; k < W; ++k) lanes[k] = -1.0f;
      keys.put(load(lanes), set1(1.0f), set1(-1.0f), set1(kLargest));
    }
    return keys.boundary(rank < a->count ? rank + 1 : a->count);
  }

  void combine(int64_t b, int64_t chunk) const {
    const float *row = static_cast<const float *>(a->row);
    const int64_t at = b * a->count + first(chunk), n = size(chunk), slot = a->batch * a->count;
    const float *x = static_cast<const float *>(a->x) + at;
    float *history = static_cast<float *>(a->history) + at;
    float *denoised = static_cast<float *>(a->denoised) + at, *next = static_cast<float *>(a->next) + at;
    float part[kChunk], total[kChunk];
    const vf low = set1(-row[CLIP]), high = set1(row[CLIP]);
    map(denoised, denoised, n, [&](vf d, vf) { return min(high, max(low, d)); });
    fill_zero(total, n);
    add_scaled(row[X], x, total, n);
    add_scaled(row[D], denoised, total, n);
    for (int j = 0; j < 2 * kSlots; ++j) add_scaled(row[HX + j], history + j * slot, total, n);
    add_noise(b, chunk, row[NOISE], row[STEP], total, part);
    if (a->mask) {
      float known[kChunk];
      fill_zero(known, n);
      add_scaled(row[KNOWN], static_cast<const float *>(a->known) + at, known, n);
      add_noise(b, chunk, row[KNOWN_NOISE], row[KNOWN_STEP], known, part);
      const float *mask = static_cast<const float *>(a->mask) + at;
      for (int64_t i = 0; i < n; ++i) total[i] = mask[i] * total[i] + (1.0f - mask[i]) * known[i];
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

  void add_noise(int64_t b, int64_t chunk, float strength, float step, float *to, float *part) const {
    if (strength == 0.0f) return;
    const uint64_t seed = static_cast<uint64_t>(static_cast<const int64_t *>(a->seeds)[b]);
    const NormalStream stream{seed, static_cast<uint32_t>(step), 0, static_cast<const float *>(a->table)};
    normal_fill(stream, first(chunk), size(chunk), part);
    add_scaled(strength, static_cast<const float *>(part), to, size(chunk));
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
  if (!a->thresholded)
    return parallel_for(items, 4, [&](int64_t item) {
      s.predict(item / s.chunks, item % s.chunks, rescaled);
      return s.combine(item / s.chunks, item % s.chunks), 0;
    });
  parallel_for(items, 4, [&](int64_t item) { return s.predict(item / s.chunks, item % s.chunks, rescaled), 0; });
  if (int code = parallel_for(a->batch, 1, [&](int64_t b) { return s.threshold(b); })) return code;
  return parallel_for(items, 4, [&](int64_t item) { return s.combine(item / s.chunks, item % s.chunks), 0; });
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
