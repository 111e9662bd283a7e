// Resampling by finite impulse responses in polyphase form: no multiplication by an inserted zero is made.
//
// Output o = up q + r of an axis (phase r) meets tap first + up j at input down q + start + j, for j = 0 ... count - 1.
// An input row is kept as `down` streams, every down-th pixel each with zeros around, so that the outputs of one phase
// read each stream at consecutive pixels: everything is a sum of few weighted runs of floats.  A pixel is `pixel`
// floats: 1, or the channels where they are innermost.
#pragma once
#include "abi.h"
#include "moments.h"

namespace {

constexpr int64_t kMostTaps = 1024;  // taps that one output may meet
constexpr int64_t kMostUp = 64;
constexpr int64_t kSlack = 4 * W;    // floats past a run that may be read, and count for nothing

struct Axis {
  int64_t size, out, up, down, before, taps;
};

template <class T>
struct Dtype;
template <>
struct Dtype<float> {
  static constexpr int64_t value = FG_FLOAT32;
};
template <>
struct Dtype<bf16> {
  static constexpr int64_t value = FG_BFLOAT16;
};
template <>
struct Dtype<fp16> {
  static constexpr int64_t value = FG_FLOAT16;
};

FG_INLINE int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
FG_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FG_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// The taps that phase r meets.
struct Phase {
  int64_t first, start, count;
};

FG_INLINE Phase phase_of(const Axis &a, int64_t r) {
  const int64_t base = a.down * r - a.before, start = -floor_div(-base, a.up), first = start * a.up - base;
  return {first, start, first < a.taps ? (a.taps - first + a.up - 1) / a.up : 0};
}

struct Tap {
  const float *p;
  float weight;
};

// The sum of all taps at [i, i + count W), into count vectors.
template <int kCount>
FG_INLINE void sums(const Tap *taps, int n, int64_t i, vf *out) {
  for (int v = 0; v < kCount; ++v) out[v] = set1(0.0f);
  for (int t = 0; t < n; ++t) {
    const vf w = set1(taps[t].weight);
    const float *p = taps[t].p + i;
    for (int v = 0; v < kCount; ++v) out[v] = fma(load(p + v * W), w, out[v]);
  }
}

struct Same {
  inline __attribute__((always_inline)) vf operator()(vf x) const { return x; }
};

// f of the sums of one phase, n elements from its element `at` on.
template <class T, class F = Same>
FG_INLINE void write(const Tap *taps, int count, T *out, int64_t n, const F &f = F(), int64_t at = 0) {
  vf y[8];
  int64_t i = 0;
  for (; i + 8 * W <= n; i += 8 * W) {  // as many sums as two units with a latency of four are busy with
    sums<8>(taps, count, at + i, y);
    for (int v = 0; v < 8; ++v) store(out + i + v * W, f(y[v]));
  }
  for (; i + 2 * W <= n; i += 2 * W) {
    sums<2>(taps, count, at + i, y);
    for (int v = 0; v < 2; ++v) store(out + i + v * W, f(y[v]));
  }
  for (; i < n; i += W) {
    sums<1>(taps, count, at + i, y);
    store_n(out + i, f(y[0]), static_cast<int>(least(n - i, W)));
  }
}

// The same of two phases, element by element in turn; n elements in all.
template <class T, class F = Same>
FG_INLINE void write_two(const Tap *even, int evens, const Tap *odd, int odds, T *out, int64_t n, const F &f = F()) {
  vf a[2], b[2], low, high;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    sums<2>(even, evens, i / 2, a);
    sums<2>(odd, odds, i / 2, b);
    for (int v = 0; v < 2; ++v) {
      interleave(f(a[v]), f(b[v]), low, high);
      store(out + i + 2 * v * W, low);
      store(out + i + (2 * v + 1) * W, high);
    }
  }
  for (; i < n; i += 2 * W) {
    sums<1>(even, evens, i / 2, a);
    sums<1>(odd, odds, i / 2, b);
    interleave(f(a[0]), f(b[0]), low, high);
    store_n(out + i, low, static_cast<int>(least(n - i, W)));
    if (n - i > W) store_n(out + i + W, high, static_cast<int>(least(n - i - W, W)));
  }
}

// The same of four phases.
template <class T, class F = Same>
FG_INLINE void write_four(const Tap (&taps)[4][kMostTaps], const int (&counts)[4], T *out, int64_t n, const F &f = F()) {
  vf y[4], even[2], odd[2], four[4];
  for (int64_t i = 0; i < n; i += 4 * W) {
    for (int r = 0; r < 4; ++r) sums<1>(taps[r], counts[r], i / 4, y + r);
    interleave(f(y[0]), f(y[2]), even[0], even[1]);
    interleave(f(y[1]), f(y[3]), odd[0], odd[1]);
    for (int v = 0; v < 2; ++v) interleave(even[v], odd[v], four[2 * v], four[2 * v + 1]);
    for (int v = 0; v < 4 && i + v * W < n; ++v)
      store_n(out + i + v * W, four[v], static_cast<int>(least(n - i - v * W, W)));
  }
}

// Filter weights as they are multiplied, with the gain: g[ky * taps_x + kx], or gx then gy for a separable filter.
struct Filter {
  const float *x, *y;
  bool separable;
};

// Whether the two-dimensional filter `g` is a product of two, each tap to within its own rounding; they then take its
// place, that along x first.
inline bool factored(float *g, int64_t taps_y, int64_t taps_x) {
  int64_t top = 0;
  for (int64_t k = 0; k < taps_y * taps_x; ++k) top = __builtin_fabsf(g[k]) > __builtin_fabsf(g[top]) ? k : top;
  if (g[top] == 0) return false;
  float x[kMostTaps], y[kMostTaps];
  for (int64_t kx = 0; kx < taps_x; ++kx) x[kx] = g[top / taps_x * taps_x + kx];
  for (int64_t ky = 0; ky < taps_y; ++ky) y[ky] = g[ky * taps_x + top % taps_x] / g[top];
  for (int64_t ky = 0; ky < taps_y; ++ky) {
    for (int64_t kx = 0; kx < taps_x; ++kx) {
      const double tap = static_cast<double>(g[ky * taps_x + kx]), product = static_cast<double>(x[kx]) * static_cast<double>(y[ky]);
      if (!(__builtin_fabs(product - tap) <= 0x1p-23 * __builtin_fabs(tap))) return false;
    }
  }
  for (int64_t kx = 0; kx < taps_x; ++kx) g[kx] = x[kx];
  for (int64_t ky = 0; ky < taps_y; ++ky) g[taps_x + ky] = y[ky];
  return true;
}

// Whether along x, then along y, fewer products are made for an output than over both at once.
FG_INLINE bool fewer_apart(int64_t taps_y, int64_t taps_x, int64_t up, int64_t down) {
  const int64_t y = (taps_y + up - 1) / up, x = (taps_x + up - 1) / up;
  return up * x * y > down * x + up * (y + 1);
}

// `to` has room for 2 kMostTaps.
FG_INLINE Filter read_filter(const void *f, int64_t dtype, bool separable, int64_t step_y, int64_t step_x, int64_t taps_y,
                             int64_t taps_x, bool flip, float gain, bool apart, float *to) {
  if (!f) {  // one tap
    to[0] = gain;
    return {to, to, false};
  }
  if (separable) {
    for (int64_t k = 0; k < taps_x; ++k) {
      float g = parameter(f, dtype, (flip ? k : taps_x - 1 - k) * step_x, 0.0f);
      to[k] = g;
      to[taps_x + k] = g * gain;
    }
    return {to, to + taps_x, true};
  }
  for (int64_t ky = 0; ky < taps_y; ++ky) {
    for (int64_t kx = 0; kx < taps_x; ++kx) {
      int64_t at = flip ? ky * step_y + kx * step_x : (taps_y - 1 - ky) * step_y + (taps_x - 1 - kx) * step_x;
      to[ky * taps_x + kx] = parameter(f, dtype, at, 0.0f) * gain;
    }
  }
  if (apart && factored(to, taps_y, taps_x)) return {to, to + taps_x, true};
  return {to, to, false};
}

template <class T>
FG_INLINE void fill_pixel(const T *x, const float *bias, int64_t channels, float *to) {
  int64_t c = 0;
  for (; c + W <= channels; c += W) store(to + c, bias ? add(load(x + c), load(bias + c)) : load(x + c));
  if (c == channels) return;
  const int n = static_cast<int>(channels - c);
  store_n(to + c, bias ? add(load_n(x + c, n), load_n(bias + c, n)) : load_n(x + c, n), n);
}

// Pixels [from, from + count) of a row of `size` into `down` streams of `pitch` floats, zeros where there are none;
// `bias` (of one pixel, or null) is added to those there are.
template <class T>
FG_INLINE void fill(const T *row, int64_t size, int64_t from, int64_t count, int64_t down, int64_t pixel, int64_t pitch,
                    const float *bias, float *streams) {
  const int64_t a = least(count, most(0, -from)), b = most(a, least(count, size - from));  // the pixels there are
  if (pixel == 1 && down <= 2) {
    const vf added = set1(bias ? *bias : 0.0f);
    const T *x = b > a ? row + from : nullptr;  // an empty image may have no memory
    int64_t i = 0;
    if (down == 1) {
      for (; i < a; ++i) streams[i] = 0.0f;
      for (; i + W <= b; i += W) store(streams + i, add(load(x + i), added));
      if (i < b) store_n(streams + i, add(load_n(x + i, static_cast<int>(b - i)), added), static_cast<int>(b - i));
      for (i = b; i < count; ++i) streams[i] = 0.0f;
      return;
    }
    vf even, odd;
    for (; i < a || (i & 1); ++i) {
      float lanes[W];
      store(lanes, add(set1(0.0f), added));
      streams[(i & 1) * pitch + i / 2] = i >= a && i < b ? parameter(x, Dtype<T>::value, i, 0.0f) + lanes[0] : 0.0f;
    }
    for (; i + 2 * W <= b; i += 2 * W) {
      deinterleave(add(load(x + i), added), add(load(x + i + W), added), even, odd);
      store(streams + i / 2, even);
      store(streams + pitch + i / 2, odd);
    }
    const int left = static_cast<int>(most(b - i, 0));  // fewer than 2 W
    const vf low = add(load_n(x + i, left < W ? left : W), added), high = add(load_n(x + i + W, left > W ? left - W : 0), added);
    deinterleave(low, high, even, odd);
    store_n(streams + i / 2, even, (left + 1) / 2);
    store_n(streams + pitch + i / 2, odd, left / 2);
    for (int64_t e = (i + left + 1) / 2; e < (count + 1) / 2; ++e) streams[e] = 0.0f;
    for (int64_t e = (i + left) / 2; e < count / 2; ++e) streams[pitch + e] = 0.0f;
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    float *to = streams + i % down * pitch + i / down * pixel;
    if (i >= a && i < b)
      fill_pixel(row + (from + i) * pixel, bias, pixel, to);
    else
      for (int64_t c = 0; c < pixel; ++c) to[c] = 0.0f;
  }
}

// One resampling of one window of columns, a row of outputs at a time and downwards.
class Stage {
 public:
  // Outputs [up q0, up q1) of a row; returns the floats of scratch it takes.
  int64_t plan(const Axis &x, const Axis &y, const Filter &f, int64_t pixel, int64_t q0, int64_t q1) {
    x_ = x, y_ = y, filter_ = f, pixel_ = pixel, n_ = (q1 - q0) * pixel, next_ = INT64_MIN;
    int64_t low = INT64_MAX, high = INT64_MIN;
    Phase phases[kMostUp];
    for (int64_t r = 0; r < y.up; ++r) down_[r] = phase_of(y, r);
    for (int64_t r = 0; r < x.up; ++r) {
      phases[r] = phase_of(x, r);
      low = least(low, phases[r].start);
      high = most(high, phases[r].start + phases[r].count);
    }
    low_ = floor_div(low, x.down) * x.down;
    from_ = low_ + x.down * q0;
    const int64_t wide = q1 - q0 + (high - low_) / x.down + 1;  // pixels of a stream
    count_ = wide * x.down;
    pitch_ = wide * pixel + kSlack;
    for (slots_ = 1; slots_ < (y.taps + y.up - 1) / y.up; slots_ *= 2) continue;  // then a slot is a mask away
    across_ = n_ + kSlack;
    slot_ = f.separable ? x.up * across_ : x.down * pitch_;
    int64_t n = 0;
    for (int64_t r = 0; r < x.up; ++r) {
      begin_[r] = n;
      for (int64_t j = 0; j < phases[r].count; ++j) {
        const int64_t m = phases[r].start - low_ + j;
        met_[n++] = {m % x.down * pitch_ + m / x.down * pixel, phases[r].first + j * x.up};
      }
      begin_[r + 1] = n;
    }
    return slots_ * slot_ + x.down * pitch_;
  }
  void use(float *memory) {
    ring_ = memory;
    streams_ = memory + slots_ * slot_;
  }
  int64_t from() const { return from_; }    // the first pixel of a row that is read
  int64_t count() const { return count_; }  // how many are
  int64_t width() const { return n_; }      // floats of a phase of a row
  int64_t pitch() const { return pitch_; }

  // The taps of phase r of output row o: `load_row(row, streams)` is called for each input row not met before.
  template <class Load>
  void row(int64_t o, Load load_row) {
    const int64_t q = static_cast<uint32_t>(o) / static_cast<uint32_t>(y_.up);
    const Phase &p = down_[o - q * y_.up];
    top_ = p.first, rows_ = p.count, start_ = q * y_.down + p.start;
    for (int64_t i = most(next_, most(start_, 0)); i < least(start_ + rows_, y_.size); ++i) {
      float *slot = ring_ + (i & (slots_ - 1)) * slot_;
      if (!filter_.separable) {
        load_row(i, slot);
      } else {
        load_row(i, streams_);
        Tap taps[kMostTaps];
        for (int64_t r = 0; r < x_.up; ++r) {
          int n = along(r, streams_, filter_.x, taps, 0);
          write(taps, n, slot + r * across_, n_);
        }
      }
    }
    next_ = most(next_, start_ + rows_);
  }
  int taps(int64_t r, Tap *to) const {
    int n = 0;
    for (int64_t j = 0; j < rows_; ++j) {
      const int64_t i = start_ + j, k = top_ + j * y_.up;
      if (i < 0 || i >= y_.size) continue;
      const float *slot = ring_ + (i & (slots_ - 1)) * slot_;
      if (filter_.separable) {
        to[n++] = {slot + r * across_, filter_.y[k]};
      } else {
        n = along(r, slot, filter_.x + k * x_.taps, to, n);
      }
    }
    return n;
  }

 private:
  int along(int64_t r, const float *streams, const float *weights, Tap *to, int n) const {
    for (int64_t i = begin_[r]; i < begin_[r + 1]; ++i) to[n++] = {streams + met_[i].offset, weights[met_[i].tap]};
    return n;
  }
  struct Met {
    int64_t offset, tap;  // from the streams; of the filter along x
  };
  Axis x_, y_;
  Filter filter_;
  Phase down_[kMostUp];
  Met met_[kMostTaps];
  int64_t begin_[kMostUp + 1];  // phase r along x: met_[begin_[r]] to met_[begin_[r + 1]]
  int64_t pixel_, n_, next_, low_, from_, count_, pitch_, slots_, across_, slot_, top_, rows_, start_;
  float *ring_, *streams_;
};

// f of the outputs of all phases of a row, one pixel after the other: `n` pixels.  `spare` holds one phase.
template <class T, class F = Same>
FG_INLINE void emit(const Stage &stage, int64_t up, int64_t pixel, int64_t n, float *spare, T *out, const F &f = F()) {
  Tap taps[4][kMostTaps], (&a)[kMostTaps] = taps[0];
  int counts[4];
  if (up == 1) return write(a, stage.taps(0, a), out, n * pixel, f);
  if (pixel == 1 && (up == 2 || up == 4)) {
    for (int64_t r = 0; r < up; ++r) counts[r] = stage.taps(r, taps[r]);
    return up == 2 ? write_two(a, counts[0], taps[1], counts[1], out, n, f) : write_four(taps, counts, out, n, f);
  }
  for (int64_t r = 0; r < up; ++r) {
    const int count = stage.taps(r, a);
    if (pixel >= 2 * W) {
      for (int64_t q = 0; q * up + r < n; ++q) write(a, count, out + (q * up + r) * pixel, pixel, f, q * pixel);
      continue;
    }
    write(a, count, spare, (n - r + up - 1) / up * pixel, f);
    for (int64_t q = 0; q * up + r < n; ++q) {
      for (int64_t c = 0; c < pixel; c += W) {
        int rest = static_cast<int>(least(pixel - c, W));
        store_n(out + (q * up + r) * pixel + c, load_n(spare + q * pixel + c, rest), rest);
      }
    }
  }
}

}  // namespace
