// levels: scalar avx2 avx512 neon
// One token a row; kernels/sample_token.py says what every step means, and that masses are whole numbers: what is summed
// in which order changes nothing.  A row is one work item, or, where it is alone, shared out by blocks of the vocabulary.
#include <algorithm>
#include <cmath>

#include "abi.h"
#include "normal.h"
#include "select.h"
#include "threads.h"
#include "weights.h"

namespace {

constexpr int64_t kLanes = 1024;  // of the draw's order
constexpr uint32_t kTag = 1;
constexpr int64_t kParts = 16;    // shares of a row, at most
constexpr int kTogether = 4;  // vectors
constexpr int64_t kShare = 1 << 14;  // tokens of a share, at least
constexpr float kInfinity = __builtin_inff();

FG_INLINE vf clean(vf y) { return min(max(y, set1(-kInfinity)), set1(kLargest)); }  // NaN to -inf
FG_INLINE float clean_one(float y) { return y != y ? -kInfinity : y < kLargest ? y : kLargest; }

template <class T>
FG_INLINE T at(const void *p, int64_t b, T absent) {
  return p ? static_cast<const T *>(p)[b] : absent;
}

// The integer mass that p of `mass` stands for, at least 1.
FG_INLINE int64_t share(int64_t mass, float p) {
  const uint64_t units = static_cast<uint64_t>((p > 0 ? p : 0.0f) * 4294967296.0f);
  const int64_t part = static_cast<int64_t>(static_cast<unsigned __int128>(mass) * units >> 32);
  return part > 1 ? part : 1;
}

struct Row {
  const fg_sample_token_args *a;
  int64_t b, size, parts;
  float *y, *w;  // size each, and W more
  Selection keys;
  int64_t first = 0;  // where the block begins in which the largest is met first
  float largest = -kInfinity, inverse = 1.0f;
  // What is kept: d <= farthest, weight >= least, |d - centre| <= away.
  float farthest = kLargest, least = 0.0f, centre = 0.0f, away = kInfinity;

  // Calls f(i, lanes) for each vector of the vocabulary; the last may be shorter.  y and w are padded.
  template <class F>
  FG_MEMBER void each(const F &f) const {
    for (int64_t i = 0; i < size; i += W) f(i);
  }

  // f(part, from, to) for each share of the row, whole blocks of kLanes.
  template <class F>
  void shares(const F &f) const {
    const int64_t blocks = (size + kLanes - 1) / kLanes;
    parallel_for(parts, 1, [&](int64_t part) {
      const int64_t to = (part + 1) * blocks / parts * kLanes;
      f(part, part * blocks / parts * kLanes, to < size ? to : size);
      return 0;
    });
  }

  FG_MEMBER vf distance(vf v) const {
    const vf gap = sub(set1(largest), v);
    return select_gt(set1(kInfinity), gap, mul(gap, set1(inverse)), gap);
  }
  FG_MEMBER vf distance(int64_t i) const { return distance(load(y + i)); }

  // The weight where kept, else 0.
  FG_MEMBER vf kept(vf d, vf weight) const {
    const vf none = set1(0.0f), off = sub(d, set1(centre));
    const vf in = select_gt(d, set1(farthest), none, weight);
    return select_gt(max(off, sub(none, off)), set1(away), none, select_gt(set1(least), weight, none, in));
  }
  // The logits as they were given, all of them kept.
  template <class T>
  void read_model(const T *from) {
    if (a->history || a->bias || a->mask || a->pairs) read(from, false);
    inverse = 1.0f, farthest = kLargest, least = 0.0f, centre = 0.0f, away = kInfinity;
  }

  // y, padded with -inf, and its largest.
  template <class T>
  FG_MEMBER void read(const T *from, bool biased) {
    const float *bias = biased && a->bias ? static_cast<const float *>(a->bias) + b * a->bias_row : nullptr;
    find_largest([&](int64_t i) {
      const int n = size - i < W ? static_cast<int>(size - i) : W;
      vf v = clean(n == W ? load(from + i) : load_n(from + i, n));
      if (bias) v = clean(add(v, n == W ? load(bias + i) : load_n(bias + i, n)));
      store(y + i, v);
      if (n == W) return v;
      std::fill(y + i + n, y + i + W, -kInfinity);
      return load(y + i);
    });
  }

  // Penalties of the history; bit 0 of a count says that the token was met, the rest how often past the prompt.
  void penalise() {
    uint32_t *counts = reinterpret_cast<uint32_t *>(keys.keys);
    std::memset(counts, 0, static_cast<size_t>(size) * sizeof(uint32_t));
    const int64_t *ids = static_cast<const int64_t *>(a->history) + b * a->length;
    int64_t end = at<int64_t>(a->history_lengths, b, a->length), start = at<int64_t>(a->prompt_lengths, b, 0);
    end = end < a->length ? end : a->length;
    for (int64_t j = 0; j < end; ++j) {
      if (ids[j] < 0 || ids[j] >= size) continue;
      counts[ids[j]] |= 1;
      counts[ids[j]] += j >= start ? 2 : 0;
    }
    const float repetition = at(a->repetition, b, 1.0f);
    for (int64_t j = 0; j < end; ++j) {
      if (ids[j] < 0 || ids[j] >= size || !counts[ids[j]]) continue;
      float v = y[ids[j]];
      const uint32_t many = counts[ids[j]] >> 1;
      counts[ids[j]] = 0;
      if (a->repetition) v = v < 0 ? v * repetition : v / repetition;
      if (a->frequency && many) v -= static_cast<float>(many) * at(a->frequency, b, 0.0f);
      if (a->presence && many) v -= at(a->presence, b, 0.0f);
      y[ids[j]] = v;
    }
  }

  void forbid() {
    if (a->mask_dtype == FG_BOOL) {
      const uint8_t *mask = static_cast<const uint8_t *>(a->mask) + b * a->mask_row;
      for (int64_t i = 0; i < size; ++i) y[i] = mask[i] ? y[i] : -kInfinity;
      return;
    }
    const uint32_t *mask = static_cast<const uint32_t *>(a->mask) + b * a->mask_row;
    for (int64_t i = 0; i < size; i += 32) {
      const uint32_t word = mask[i / 32];
      if (word == 0xFFFFFFFFu) continue;
      const int64_t n = size - i < 32 ? size - i : 32;
      for (int64_t j = 0; j < n; ++j) y[i + j] = word >> j & 1 ? y[i + j] : -kInfinity;
    }
  }

  // y of the op's text, and its largest.
  template <class T>
  void prepare() {
    const T *logits = static_cast<const T *>(a->logits) + b * a->logits_row;
    if (a->history) {
      read(logits, false);
      penalise();
      read(static_cast<const float *>(y), true);
    } else {
      read(logits, true);
    }
    if (a->mask) forbid();
    const int64_t *ids = static_cast<const int64_t *>(a->bias_ids) + b * a->pairs_row;
    const float *values = static_cast<const float *>(a->bias_values) + b * a->pairs_row;
    for (int64_t j = 0; j < a->pairs; ++j)
      if (ids[j] >= 0 && ids[j] < size && y[ids[j]] != -kInfinity) y[ids[j]] = clean_one(y[ids[j]] + values[j]);
    if (a->mask || a->pairs) find_largest([&](int64_t i) { return load(y + i); });
  }

  // Of what `make` gives for each vector of the vocabulary.
  template <class F>
  FG_MEMBER void find_largest(const F &make) {
    float found[kParts];
    int64_t block[kParts];
    shares([&](int64_t part, int64_t from, int64_t to) {
      found[part] = -kInfinity, block[part] = from;
      for (int64_t i = from; i < to; i += kLanes) {
        const int64_t end = i + kLanes < to ? i + kLanes : to;
        vf most = set1(-kInfinity);
        for (int64_t j = i; j < end; j += W) most = max(most, make(j));
        if (hmax(most) > found[part]) found[part] = hmax(most), block[part] = i;
      }
    });
    largest = -kInfinity;
    for (int64_t part = 0; part < parts; ++part)
      if (found[part] > largest) largest = found[part], first = block[part];
  }

  int64_t first_largest() const { return std::find(y + first, y + size, largest) - y; }

  // The weights of all, and the mass of what is kept.
  int64_t weigh() {
    return weigh([&](int64_t i, int64_t) { return load(y + i); }, [&](int64_t i, vf weight) { store(w + i, weight); });
  }

  // The same of the logits value(i, lanes left); keep(i, weights) stores them, or not.
  template <class F, class K>
  FG_MEMBER int64_t weigh(const F &value, const K &keep) const {
    int64_t mass[kParts], total = 0;
    shares([&](int64_t part, int64_t from, int64_t to) {
      Mass sum;
      int64_t i = from;
      for (; i + kTogether * W <= to; i += kTogether * W) weigh_some<kTogether>(value, keep, i, kTogether * W, &sum);
      for (; i < to; i += W) weigh_some<1>(value, keep, i, to - i, &sum);
      mass[part] = sum.total();
    });
    for (int64_t part = 0; part < parts; ++part) total += mass[part];
    return total;
  }

  // N vectors from `i` on, of which `left` lanes are there.
  template <int N, class F, class K>
  FG_MEMBER void weigh_some(const F &value, const K &keep, int64_t i, int64_t left, Mass *sum) const {
    vf d[N], weight[N];
    for (int v = 0; v < N; ++v) d[v] = weight[v] = distance(value(i + v * W, left - v * W));
    ::weigh(weight);
    const bool all = farthest == kLargest && least == 0 && away == kInfinity;
    for (int v = 0; v < N; ++v) keep(i + v * W, weight[v]), sum->add(all ? weight[v] : kept(d[v], weight[v]));
  }

  int64_t mass_kept() const {
    Mass mass;
    each([&](int64_t i) { mass.add(kept(distance(i), load(w + i))); });
    return mass.total();
  }

  float moment(int64_t mass) const {
    Mass sum;
    each([&](int64_t i) {
      const vf d = distance(i), in = kept(d, load(w + i));
      sum.add(select_gt(in, set1(0.0f), trunc(mul(in, d)), set1(0.0f)));
    });
    return static_cast<float>(sum.total()) / static_cast<float>(mass);
  }

  // The least key up to which the weights of the kept reach `limit`.  Keys are d, or their distance from `middle`.
  float boundary_of_mass(int64_t limit, bool from_middle, float middle) {
    keys.count = 0;
    const vf zero = set1(0.0f), nothing = set1(-1.0f), off = set1(middle);
    each([&](int64_t i) {
      const vf d = distance(i), shift = sub(d, off), in = kept(d, load(w + i));
      const vf key = from_middle ? max(shift, sub(zero, shift)) : d;
      keys.put(select_gt(in, zero, key, nothing), in, nothing, set1(kLargest));
    });
    return keys.boundary(limit);
  }

  // The k-th smallest d.
  float boundary_of_count(int64_t k) {
    keys.count = 0;
    each([&](int64_t i) { keys.put(distance(i), set1(1.0f), set1(-1.0f), set1(kLargest)); });
    return keys.boundary(k);
  }

  void truncate() {
    const int64_t k = at<int64_t>(a->top_k, b, 0);
    if (k > 0 && k < size) farthest = boundary_of_count(k);
    int64_t mass = weigh();
    const float p = at(a->top_p, b, 1.0f), m = at(a->min_p, b, 0.0f), typical = at(a->typical_p, b, 1.0f);
    if (p < 1) farthest = boundary_of_mass(share(mass, p), false, 0.0f);
    if (m > 0) least = static_cast<float>(static_cast<int64_t>((m < 1 ? m : 1.0f) * kWhole));
    if (typical < 1) {
      mass = mass_kept();
      const float middle = moment(mass), radius = boundary_of_mass(share(mass, typical), true, middle);
      centre = middle;
      away = radius;
    }
  }

  // The token drawn; `mass`: what is kept in all.
  int64_t draw(int64_t *mass) const {
    double lanes[kLanes] = {};  // at most 2^12 weights of 2^40 each: whole numbers below 2^53
    for (int64_t i = 0; i < size; i += kLanes) {
      float part[kLanes];
      const int64_t n = size - i < kLanes ? size - i : kLanes;
      for (int64_t j = 0; j < n; j += W) store(part + j, kept(distance(i + j), load(w + i + j)));
      for (int64_t j = 0; j < n; ++j) lanes[j] += static_cast<double>(part[j]);
    }
    *mass = 0;
    for (double lane : lanes) *mass += static_cast<int64_t>(lane);
    const uint64_t request = static_cast<uint64_t>(at<int64_t>(a->requests, b, 0));
    uint32_t c[4] = {static_cast<uint32_t>(static_cast<const int64_t *>(a->positions)[b]), static_cast<uint32_t>(request),
                     static_cast<uint32_t>(request >> 32), kTag};
    philox_block(static_cast<uint64_t>(static_cast<const int64_t *>(a->seeds)[b]), c);
    const uint64_t random = static_cast<uint64_t>(c[0]) << 32 | c[1];
    int64_t goal = static_cast<int64_t>(static_cast<unsigned __int128>(random) * static_cast<uint64_t>(*mass) >> 64);
    int64_t i = 0;
    for (; goal >= static_cast<int64_t>(lanes[i]); ++i) goal -= static_cast<int64_t>(lanes[i]);
    for (;; i += kLanes) {
      const int64_t weight = static_cast<int64_t>(keeps(i) ? w[i] : 0.0f);
      if (goal < weight) return i;
      goal -= weight;
    }
  }

  float one_distance(int64_t i) const { return largest - y[i] < kInfinity ? (largest - y[i]) * inverse : kInfinity; }
  bool keeps(int64_t i) const {
    const float d = one_distance(i);
    return d <= farthest && w[i] >= least && __builtin_fabsf(d - centre) <= away;
  }

  // The `count` likeliest of those kept, by falling y and rising id.
  int64_t likeliest(int64_t count, int64_t *ids) const {
    int64_t n = 0;
    for (int64_t i = 0; i < size; i += W) {
      if (n == count && !(hmax(load(y + i)) > y[ids[n - 1]])) continue;
      for (int64_t j = i; j < i + W && j < size; ++j) {
        if (!keeps(j) || (n == count && !(y[j] > y[ids[n - 1]]))) continue;
        int64_t place = n < count ? n++ : n - 1;
        for (; place > 0 && y[ids[place - 1]] < y[j]; --place) ids[place] = ids[place - 1];
        ids[place] = j;
      }
    }
    return n;
  }
};

// The logarithm of the mass over 2^40.
double log_mass(int64_t mass) { return std::log(static_cast<double>(mass) / static_cast<double>(kWhole)); }

// The likeliest token of logits as they are: nothing is stored but what is asked for.
template <class T>
void sample_largest(Row &row) {
  const fg_sample_token_args *a = row.a;
  const T *logits = static_cast<const T *>(a->logits) + row.b * a->logits_row;
  const auto value = [&](int64_t i, int64_t left) {
    if (left >= W) return clean(load(logits + i));
    float lanes[W];
    store(lanes, clean(load_n(logits + i, static_cast<int>(left))));
    std::fill(lanes + left, lanes + W, -kInfinity);
    return load(lanes);
  };
  row.find_largest([&](int64_t i) { return value(i, row.size - i); });
  const bool none = row.largest == -kInfinity;
  int64_t i = none ? -1 : row.first;
  for (int64_t lane = W; !none && lane == W; i += lane) {
    float lanes[W];
    store(lanes, value(i, row.size - i));
    for (lane = 0; lane < W && lanes[lane] != row.largest;) ++lane;
  }
  static_cast<int64_t *>(a->token)[row.b] = i;
  const double norm = !none && a->model ? log_mass(row.weigh(value, [](int64_t, vf) {})) : 0;
  static_cast<float *>(a->logprob)[row.b] = none ? -kInfinity : static_cast<float>(-norm);
}

template <class T>
void sample(Row &row) {
  const fg_sample_token_args *a = row.a;
  const int64_t b = row.b;
  int64_t *token = static_cast<int64_t *>(a->token) + b, *ids = static_cast<int64_t *>(a->top_tokens) + b * a->top;
  float *logprob = static_cast<float *>(a->logprob) + b, *logprobs = static_cast<float *>(a->top_logprobs) + b * a->top;
  const float heat = at(a->temperature, b, 1.0f), inverse = 1.0f / heat;
  const bool cold = !(heat > 0) || inverse == kInfinity;
  if (cold && !a->history && !a->bias && !a->mask && !a->pairs && !a->top) return sample_largest<T>(row);
  row.prepare<T>();
  const bool none = row.largest == -kInfinity, greedy = none || cold;
  double norm = 0;
  if (none) {
    *token = -1;
  } else if (greedy) {
    *token = row.first_largest();
  } else {
    int64_t mass;
    row.inverse = inverse;
    row.truncate();
    *token = row.draw(&mass);
    norm = log_mass(mass);
  }
  if (a->model) {
    row.read_model(static_cast<const T *>(a->logits) + b * a->logits_row);
    norm = row.largest > -kInfinity ? log_mass(row.weigh()) : 0;
  }
  *logprob = none ? -kInfinity : static_cast<float>(-static_cast<double>(row.one_distance(*token)) - norm);
  int64_t found = 0;
  if (a->top && greedy && !a->model)
    found = none ? 0 : (ids[0] = *token, 1);
  else if (a->top && row.largest > -kInfinity)
    found = row.likeliest(a->top, ids);
  for (int64_t j = 0; j < a->top; ++j) {
    logprobs[j] = j < found ? static_cast<float>(-static_cast<double>(row.one_distance(ids[j])) - norm) : -kInfinity;
    if (j >= found) ids[j] = -1;
  }
}

template <class T>
int rows(const fg_sample_token_args *a) {
  const int64_t room = (a->vocabulary + 3 * W + 15) / 16 * 16, threads = fg_threads();
  int64_t parts = 2 * a->batch > threads && a->batch > 1 ? 1 : a->vocabulary / kShare;
  parts = std::min(std::max<int64_t>(parts, 1), std::min(threads, kParts));
  return parallel_for(a->batch, parts > 1 ? a->batch : 1, [&](int64_t b) {
    float *memory = static_cast<float *>(fg_scratch(static_cast<size_t>(4 * room) * sizeof(float)));
    if (!memory) return static_cast<int>(FG_NO_MEMORY);
    Row row{a, b, a->vocabulary, parts, memory, memory + room, {memory + 2 * room, memory + 3 * room}};
    sample<T>(row);
    return static_cast<int>(FG_OK);
  });
}

}  // namespace

extern "C" int FG_EXPORT(sample_token)(const fg_sample_token_args *args) {
  switch (args->dtype) {
    case FG_FLOAT32:
      return rows<float>(args);
    case FG_BFLOAT16:
      return rows<bf16>(args);
    case FG_FLOAT16:
      return rows<fp16>(args);
    default:
      return FG_BAD_ARGUMENT;
  }
}
