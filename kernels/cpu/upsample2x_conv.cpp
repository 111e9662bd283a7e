// levels: scalar avx2 avx512 avx512_bf16 amx neon
// Nearest 2x upsampling and a 3x3 convolution as four 2x2 convolutions of the small image, one for each output phase.
//
// A chunk of the image, some rows of a sample or some whole samples, is copied into pixels of packed units with zeros
// around them: row y of the copy is row y - 1 of the chunk, and has one zero pixel before it, which also ends the row
// above.  A tap is then a constant distance between flat pixel numbers, and a product runs over rows without a seam; its
// sum at the zero pixel, one a row, is dropped.  Work is shared by phase and panel of output channels.  Where a channel's
// pixels lie together, in x or in the output, squares of both are turned on the way, the output's from a chunk made aside.
#include "abi.h"
#include "moments.h"
#include "threads.h"
#include "turn.h"
#include "upsample2x_engine.h"

namespace {

constexpr int64_t kChunk = 3 << 20;  // bytes of a chunk's copy, at least one row of a sample

template <class E, class T>
struct Problem {
  using unit = typename E::unit;
  const fg_upsample2x_conv_args *a;
  int64_t units, step, columns;    // units of a sum, of a pixel with what pads it; pixels of a row of the copy
  int64_t samples, rows, block;    // of a chunk; units of a sample's copy
  int64_t panels, panel;           // and units of a panel
  int64_t made_row, made_batch;    // elements of what a chunk makes, pixel after pixel
  bool aside;                      // it is made in memory of its own
  unit *pixels, *packed;           // the chunk; a panel for each thread
  T *made;
  int *busy;                       // which of those are taken

  explicit Problem(const fg_upsample2x_conv_args *args) : a(args) {
    units = rounded((a->inputs + E::PER - 1) / E::PER, E::ALIGN);
    step = rounded(units, 16) | 16;  // an odd number of cache lines: pixels fall in different sets
    columns = a->width + 1;
    const int64_t row = columns * step * 4, fit = kChunk / row < 1 ? 1 : kChunk / row;
    const int64_t parts = (a->height + fit - 1) / fit;
    rows = (a->height + parts - 1) / parts;
    block = ((rows + 2) * columns + 2 + E::MR) * step;
    samples = parts > 1 || kChunk / (block * 4) < 1 ? 1 : kChunk / (block * 4);
    samples = samples < a->batch ? samples : a->batch;
    panels = (a->outputs + E::NR - 1) / E::NR;
    panel = rounded(TAPS * units * E::NR, 16);
    aside = a->out_channel != 1 && a->outputs > 1;
    made_row = aside ? 2 * a->width * a->outputs : a->out_row;
    made_batch = aside ? 2 * rows * made_row : a->out_batch;
  }

  bool reserve() {
    const int64_t threads = fg_threads(), words = samples * block + threads * panel + rounded(threads, 16);
    const size_t turning = aside ? static_cast<size_t>(samples * made_batch) * sizeof(T) : 0;
    char *memory = static_cast<char *>(fg_scratch(static_cast<size_t>(4 * words) + turning));
    if (!memory) return false;
    pixels = reinterpret_cast<unit *>(memory);
    packed = pixels + samples * block;
    busy = reinterpret_cast<int *>(packed + threads * panel);
    made = reinterpret_cast<T *>(memory + 4 * words);
    for (int64_t i = 0; i < threads; ++i) busy[i] = 0;
    return true;
  }

  // Row `y` of the copy of `count` rows from row `first` of sample `b`.
  void copy_row(int64_t b, int64_t first, int64_t count, int64_t y, unit *to) const {
    const int64_t at = first + y - 1, ends = y == count + 1 ? 2 + E::MR : 0;
    const bool inside = at >= 0 && at < a->height;
    if (!inside || E::PER * units > a->inputs) memset(to, 0, static_cast<size_t>((columns + ends) * step) * 4);
    if (!inside) return;
    memset(to, 0, static_cast<size_t>(step) * 4);
    if (ends) memset(to + columns * step, 0, static_cast<size_t>(ends * step) * 4);
    const T *x = static_cast<const T *>(a->x) + b * a->x_batch + at * a->x_row;
    to += step;
    if (a->x_channel == 1) {
      for (int64_t i = 0; i < a->width; ++i) E::pixel(x + i * a->x_column, a->inputs, to + i * step);
      return;
    }
    auto *elements = reinterpret_cast<typename E::element *>(to);
    for (int64_t c = 0; c < a->inputs; c += kSide)
      for (int64_t i = 0; i < a->width; i += kSide)
        turned(least(a->inputs - c), least(a->width - i), elements + i * E::PER * step + c, E::PER * step,
               [&](int64_t j, int64_t v, int n) { return load_n(x + (c + j) * a->x_channel + i + v, n); });
  }

  static int64_t least(int64_t n) { return n < kSide ? n : kSide; }

  // Where sample `s` of the chunk at sample `b` and row `first` is made.
  T *target(int64_t b, int64_t first, int64_t s) const {
    return aside ? made + s * made_batch : static_cast<T *>(a->out) + (b + s) * a->out_batch + 2 * first * a->out_row;
  }

  // Row `y` of sample `b + s`, made aside, to its place in row `2 first + y` of the output.
  void turn_row(int64_t b, int64_t first, int64_t s, int64_t y) const {
    const T *from = made + s * made_batch + y * made_row;
    T *out = static_cast<T *>(a->out) + (b + s) * a->out_batch + (2 * first + y) * a->out_row;
    for (int64_t c = 0; c < a->outputs; c += kSide)
      for (int64_t i = 0; i < 2 * a->width; i += kSide)
        turned(least(2 * a->width - i), least(a->outputs - c), out + c * a->out_channel + i, a->out_channel,
               [&](int64_t j, int64_t v, int n) { return load_n(from + (i + j) * a->outputs + c + v, n); });
  }

  unit *take_panel(int64_t *slot) const {
    for (int64_t i = 0;; ++i)
      if (!__atomic_exchange_n(&busy[i], 1, __ATOMIC_ACQUIRE)) return *slot = i, packed + i * panel;
  }

  // One phase and panel of all samples of a chunk.
  void multiply(int64_t item, int64_t b, int64_t first, int64_t count) const {
    const int64_t phase = item % 4, p = phase / 2, q = phase % 2, n0 = item / 4 * E::NR;
    const int some = static_cast<int>(a->outputs - n0 < E::NR ? a->outputs - n0 : E::NR);
    int64_t slot, tap[TAPS];
    unit *filters = take_panel(&slot);
    const T *f = static_cast<const T *>(a->filters) + phase * TAPS * a->inputs * a->outputs;
    if (E::PER * units > a->inputs) memset(filters, 0, static_cast<size_t>(panel) * 4);
    for (int t = 0; t < TAPS; ++t) {
      E::filters(f + t * a->inputs * a->outputs, a->inputs, a->outputs, n0, some, filters + t * units * E::NR);
      tap[t] = ((t / 2 + p) * columns + t % 2 + q) * step;
    }
    float offset[E::NR], sums[E::MR * E::NR];
    for (int n = 0; n < E::NR; ++n) offset[n] = n < some ? parameter(a->bias, a->bias_dtype, n0 + n, 0.0f) : 0.0f;
    E::begin();
    const int64_t ahead = samples < a->batch - b ? samples : a->batch - b;
    for (int64_t s = 0; s < ahead; ++s)
      for (int64_t m = 0; m < count * columns; m += E::MR) {
        E::tile(pixels + s * block + m * step, tap, step, units, filters, some, sums);
        const int64_t column = aside ? a->outputs : a->out_column;
        write(sums, offset, some, m, count, column, target(b, first, s) + p * made_row + q * column + n0);
      }
    E::end();
    __atomic_store_n(&busy[slot], 0, __ATOMIC_RELEASE);
  }

  // MR sums from flat pixel `m` on; `out` is the phase's first pixel of the chunk, pixels are `column` elements apart.
  void write(const float *sums, const float *offset, int some, int64_t m, int64_t count, int64_t column, T *out) const {
    for (int i = 0; i < E::MR; ++i) {
      const int64_t y = (m + i) / columns, x = (m + i) % columns;
      if (y >= count) return;
      if (x == a->width) continue;
      T *to = out + 2 * y * made_row + 2 * x * column;
      for (int n = 0; n < some; n += W) {
        const int part = some - n < W ? some - n : W;
        store_n(to + n, add(load_n(sums + i * E::NR + n, part), load_n(offset + n, part)), part);
      }
    }
  }
};

template <class E, class T>
int convolve(const fg_upsample2x_conv_args *a) {
  Problem<E, T> problem(a);
  if (!problem.reserve()) return FG_NO_MEMORY;
  for (int64_t b = 0; b < a->batch; b += problem.samples)
    for (int64_t first = 0; first < a->height; first += problem.rows) {
      const int64_t count = a->height - first < problem.rows ? a->height - first : problem.rows;
      const int64_t samples = a->batch - b < problem.samples ? a->batch - b : problem.samples;
      parallel_for(samples * (count + 2), 2, [&](int64_t item) {
        const int64_t s = item / (count + 2), y = item % (count + 2);
        const int64_t start = s * problem.block + y * problem.columns * problem.step;
        problem.copy_row(b + s, first, count, y, problem.pixels + start);
        return 0;
      });
      parallel_for(4 * problem.panels, 1, [&](int64_t item) { return problem.multiply(item, b, first, count), 0; });
      if (problem.aside)
        parallel_for(samples * 2 * count, 2, [&](int64_t item) {
          return problem.turn_row(b, first, item / (2 * count), item % (2 * count)), 0;
        });
    }
  return FG_OK;
}

}  // namespace

extern "C" int FG_EXPORT(upsample2x_conv)(const fg_upsample2x_conv_args *args) {
  if (!args->batch || !args->outputs || !args->height || !args->width) return FG_OK;
  switch (args->dtype) {
    case FG_FLOAT32:
      return convolve<FloatEngine, float>(args);
    case FG_BFLOAT16:
#if defined(FG_HAS_AVX512_BF16)
      return convolve<Bf16Engine, bf16>(args);
#else
      return convolve<FloatEngine, bf16>(args);
#endif
    case FG_FLOAT16:
      return convolve<FloatEngine, fp16>(args);
    default:
      return FG_BAD_ARGUMENT;
  }
}
