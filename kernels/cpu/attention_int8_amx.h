// A span of attention_int8 on AMX tiles: sixteens of queries over all keys of their head, a block of NB at a time.
//
// Keys and channels are rows of tiles, queries columns, so that all that differs between queries is a lane's own.  A
// vector holds the scores of two keys, 16 bits for each query; two such become words of four weights, what the second
// product reads.  The channel of ones makes the weights' sum.
//
// Vectors and tiles are different units: while a turn's scores become weights, those of the turns behind it are
// multiplied and narrowed, and the weights of the turn before it are multiplied with the values.
#pragma once
#include "attention_int8_amx_queries.h"
#include "tiles.h"

namespace {

constexpr int WORDS = SIDE * SIDE;   // of a tile
constexpr int64_t SPAN = 16 * SIDE;  // queries that share a look at the keys

// A turn: 16 queries and a block of keys, and how the scores become weights.
struct alignas(64) Stage {
  int16_t top[2 * SIDE], factor[2 * SIDE], most[2 * SIDE], twice[2 * SIDE];  // of both keys of a vector
  float grow[SIDE], add[SIDE];  // what the sums so far and the block count for
  bool grows, far;              // not all of grow is 1; of some query a score's unit is a step or more
  int keys;                     // 0: there is no such turn
  float k_scale;
  const uint8_t *k;
  const int8_t *v;
  Queries *of;
};

// The work of one item.
struct alignas(64) Span {
  const Sides &sides;
  const Sizes &s;
  const int shift;
  const float factor;
  const int64_t tiles;
  Queries queries[SPAN / SIDE];
  Stage stages[4];
  int16_t narrow[2][NB / 2][2 * SIDE];  // scores: (two keys, a query of both)
  int32_t half[WORDS];                  // of the shift's unit
  int32_t scores[WORDS];
  int32_t weights[NB / 4][SIDE];
  int32_t made[2][WORDS];

  Span(const Sides &sides, const Sizes &s, int shift, float factor, int64_t tiles)
      : sides(sides), s(s), shift(shift), factor(factor), tiles(tiles) {
    for (int32_t &x : half) x = half_unit(s);
    for (Stage &x : stages) x.keys = 0;
  }

  Stage &stage(int64_t i) { return stages[i & 3]; }

  void begin_turn(int64_t tile, int64_t block, Stage *to) {
    const int64_t left = s.keys - block * NB;
    to->keys = left <= 0 ? 0 : left < NB ? static_cast<int>(left) : NB;
    if (!to->keys) return;
    to->k = sides.k + block * NB * s.words * 4;
    to->v = sides.v + block * NB * s.wide;
    to->k_scale = sides.k_scale[block];
    to->of = queries + tile;
  }
};

// Sums of one tile of keys in tile 0 or 3, for the queries held: tiles 4 and 7, or where DEEP is 0, too many to hold.
#define FG_SCORES(sum)                                     \
  {                                                        \
    if (begin)                                             \
      _tile_loadd(sum, begin, SIDE * 4);                   \
    else                                                   \
      _tile_zero(sum);                                     \
    _tile_loadd(2, k, words * 4);                          \
    if (DEEP) {                                            \
      _tile_dpbssd(sum, 2, 4);                             \
      if (DEEP == 2) {                                     \
        _tile_loadd(2, k + 64, words * 4);                 \
        _tile_dpbssd(sum, 2, 7);                           \
      }                                                    \
    } else {                                               \
      for (int64_t w = 0; w < words; w += 16, k += 64) {   \
        if (w) _tile_loadd(2, k, words * 4);               \
        _tile_loadd(4, q + w * SIDE, SIDE * 4);            \
        _tile_dpbssd(sum, 2, 4);                           \
      }                                                    \
    }                                                      \
  }
template <int DEEP>
FG_INLINE void score_tile(const uint8_t *k, const int32_t *q, int64_t words, const int32_t *begin, bool odd) {
  if (odd) FG_SCORES(3) else FG_SCORES(0)
}
#undef FG_SCORES

FG_INLINE void store_scores(bool odd, int32_t *to) {
  if (odd)
    _tile_stored(3, to, SIDE * 4);
  else
    _tile_stored(0, to, SIDE * 4);
}

// A tile of 16 channels by the weights held, tiles 5 and 6, in tile 1.
FG_INLINE void value_tile(const int8_t *v, bool both) {
  _tile_zero(1);
  _tile_loadd(2, v, NB);
  _tile_dpbsud(1, 2, 5);
  if (both) {
    _tile_loadd(2, v + 64, NB);
    _tile_dpbsud(1, 2, 6);
  }
}

// Bits [first, first + 16) of each 32, at both halves.
FG_INLINE __m512i bits_at(int first) {
  const int64_t low = first | (first + 8) << 8;
  return _mm512_set1_epi64((low | low << 16) * 0x100000001ll + 0x2020202000000000ll);
}

// The shifted scores of 16 keys and their highest.
FG_INLINE void narrow(const int32_t *from, int shift, int16_t (*to)[2 * SIDE], __m512i (&top)[2]) {
  const __m512i bits = bits_at(shift);
  auto two = [&](int key) __attribute__((always_inline)) {
    const __m512i near = _mm512_load_si512(from + key * SIDE), next = _mm512_load_si512(from + (key + 2) * SIDE);
    const __m512i low = _mm512_multishift_epi64_epi8(bits, near);
    return _mm512_mask_multishift_epi64_epi8(low, 0xccccccccccccccccull, bits, next);
  };
#pragma GCC unroll 4
  for (int key = 0; key < SIDE; key += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512i found = two(key + j);
      _mm512_store_si512(to[key / 2 + j], found);
      top[j] = _mm512_max_epi16(top[j], found);
    }
}

// The weights of eight keys as words of four.
template <bool FAR>
FG_INLINE void weigh_eight(const Stage &at, const int16_t (*from)[2 * SIDE], int32_t (*to)[SIDE]) {
  const __m512i table = _mm512_slli_epi16(_mm512_load_si512(kFalling), 2);
  const __m512i top = _mm512_load_si512(at.top), factor = _mm512_load_si512(at.factor);
  const __m512i high = _mm512_set1_epi64(0x3838282818180808);  // a word's upper byte
  // 32 weights, in the high bytes; below them is what rounding leaves.
  auto weigh = [&](const int16_t *scores) __attribute__((always_inline)) {
    __m512i far = _mm512_subs_epi16(top, _mm512_load_si512(scores));
    if (FAR) far = _mm512_sllv_epi16(_mm512_min_epi16(far, _mm512_load_si512(at.most)), _mm512_load_si512(at.twice));
    const __m512i steps = _mm512_mulhrs_epi16(far, factor);
    const __m512i fraction = _mm512_permutexvar_epi16(steps, table);  // by its low five bits
    return _mm512_add_epi16(_mm512_srlv_epi16(fraction, _mm512_srli_epi16(steps, 5)), _mm512_set1_epi16(128));
  };
#pragma GCC unroll 2
  for (int m = 0; m < 2; ++m) {
    const __m512i even = weigh(from[2 * m]), odd = weigh(from[2 * m + 1]);
    _mm512_store_si512(to[m], _mm512_mask_multishift_epi64_epi8(odd, 0x5555555555555555ull, high, even));
  }
}

// Octaves that a block's highest score may lie above what a query's sums are relative to before they are made anew:
// float32 has the room, and they need no look at them otherwise.
constexpr float REACH = 60.0f;

// How the scores become weights, for their highest and a scale of their keys.
inline void rates(const __m512i (&tops)[2], float factor, Stage *to) {
  Queries &t = *to->of;
  const __m512i two = _mm512_max_epi16(tops[0], tops[1]);
  const __m512i top = _mm512_max_epi16(two, _mm512_rol_epi32(two, 16));
  _mm512_store_si512(to->top, top);
  const vf rate = min(mul(mul(load(t.by), set1(to->k_scale)), set1(factor)), set1(0x1p64f));
  const vf steps = mul(rate, set1(FINE));
  const vf exponent = min(max(add(_mm512_getexp_ps(steps), set1(1.0f)), set1(0.0f)), set1(15.0f));
  const vf whole = min(_mm512_scalef_ps(steps, sub(set1(15.0f), exponent)), set1(32767.0f));
  const __m512i f = _mm512_cvtps_epi32(whole), e = _mm512_cvtps_epi32(exponent);
  auto both = [](__m512i x) { return _mm512_or_si512(x, _mm512_slli_epi32(x, 16)); };
  to->far = _mm512_test_epi32_mask(e, e) != 0;
  _mm512_store_si512(to->factor, both(f));
  _mm512_store_si512(to->twice, both(e));
  _mm512_store_si512(to->most, _mm512_srlv_epi16(_mm512_set1_epi16(32767), both(e)));
  const vf here = mul(_mm512_cvtepi32_ps(_mm512_srai_epi32(top, 16)), rate), old = load(t.maximum);
  const __mmask16 moves = _mm512_cmp_ps_mask(here, add(old, set1(REACH)), _CMP_GT_OQ);
  const vf now = _mm512_mask_mov_ps(old, moves, here);
  store(to->add, exp2_falling<5>(sub(here, now)));
  to->grows = moves != 0;
  if (!moves) return;
  store(t.maximum, now);
  store(to->grow, _mm512_mask_mov_ps(set1(1.0f), moves, exp2_falling<5>(sub(old, now))));
}

// o = o grow + add made, up to 16 channels.
FG_INLINE void gather(const int32_t *made, const Stage &at, int64_t rows, float *o) {
  const vf more = load(at.add);
  auto put = [&](int64_t r) __attribute__((always_inline)) {
    store(o + r * SIDE, fma(_mm512_cvtepi32_ps(_mm512_load_si512(made + r * SIDE)), more, load(o + r * SIDE)));
  };
  if (at.grows) {
    const vf grow = load(at.grow);
    for (int64_t r = 0; r < rows; ++r) store(o + r * SIDE, mul(load(o + r * SIDE), grow));
  }
  if (rows < SIDE) {
    for (int64_t r = 0; r < rows; ++r) put(r);
    return;
  }
#pragma GCC unroll 16
  for (int r = 0; r < SIDE; ++r) put(r);
}

constexpr int PARTS = NB / SIDE;  // of a turn

template <int DEEP>
FG_INLINE void score_part(const Span &x, const Stage &of, int part) {
  const int32_t *q = of.of->q[0];
  if (DEEP && !part) {
    _tile_loadd(4, q, SIDE * 4);
    if (DEEP == 2) _tile_loadd(7, q + WORDS, SIDE * 4);
  }
  score_tile<DEEP>(of.k + part * SIDE * x.s.words * 4, q, x.s.words, has_room(x.s) ? nullptr : x.half, part & 1);
}

// Reads what a tile of scores left; keys that are not there are lowest.
FG_INLINE void take_scores(Span &x, Stage *of, int part, int slot, __m512i (&top)[2]) {
  const int left = of->keys - part * SIDE;
  for (int r = left; r < SIDE; ++r) _mm512_store_si512(x.scores + r * SIDE, _mm512_set1_epi32(-(32768 << x.shift)));
  if (!part) top[0] = top[1] = _mm512_set1_epi16(-32768);
  narrow(x.scores, x.shift, x.narrow[slot] + part * SIDE / 2, top);
  if (left <= SIDE || part == PARTS - 1) rates(top, x.factor, of);
}

FG_INLINE void weigh_half(Span &x, const Stage &at, int part, int half, int slot) {
  const int16_t(*from)[2 * SIDE] = x.narrow[slot] + part * SIDE / 2 + 4 * half;
  int32_t(*to)[SIDE] = x.weights + part * 4 + half * 2;
  at.far ? weigh_eight<true>(at, from, to) : weigh_eight<false>(at, from, to);
}

// The values of a turn: tiles of channels begun, stored, and gathered into its sums.
struct Values {
  Span &x;
  const Stage &of;
  const int64_t tiles;
  int64_t begun = 0, stored = 0, gathered = 0;

  inline __attribute__((always_inline)) void put() {
    if (stored == begun) return;
    _tile_stored(1, x.made[stored & 1], SIDE * 4);
    ++stored;
  }
  inline __attribute__((always_inline)) void take() {
    written();
    for (; gathered < stored; ++gathered)
      gather(x.made[gathered & 1], of, x.s.dim + 1 - gathered * SIDE, of.of->o[gathered * SIDE]);
    written();
  }
  inline __attribute__((always_inline)) void begin(int64_t until) {
    put();
    while (begun < until) {
      value_tile(of.v + begun * SIDE * NB, of.keys > 64);
      if (++begun < until) take(), put();
    }
  }
};

// Beside part p of turn i's weights stand the scores of half a turn later and the values of the turn before.  What a
// product leaves in its tile is stored a part later and read in the part after that: stores that wait for a product
// fill the queue that all others go through.
template <int DEEP>
void turn(Span &x, int64_t i, __m512i (&tops)[2]) {
  constexpr int AHEAD = PARTS / 2;
  const Stage &now = x.stage(i);
  Values values{x, x.stage(i - 1), x.stage(i - 1).keys ? x.s.wide / SIDE : 0};
  __m512i top[2] = {tops[0], tops[1]};
  written();
  _tile_loadd(5, x.weights, SIDE * 4);
  _tile_loadd(6, x.weights + SIDE, SIDE * 4);
  auto stage = [&](int ahead) -> Stage & { return x.stage(i + 1 + ahead / PARTS); };
  auto there = [&](int ahead) { return ahead % PARTS * SIDE < stage(ahead).keys; };
#pragma GCC unroll 2
  for (int part = 0; part < PARTS; ++part) {
    const int taken = part + AHEAD - 2, stored = taken + 1, begun = stored + 1;  // of scores
    if (part * SIDE < now.keys) weigh_half(x, now, part, 0, i & 1);
    if (there(taken)) take_scores(x, &stage(taken), taken % PARTS, (i + 1 + taken / PARTS) & 1, top);
    values.take();
    if (there(begun)) score_part<DEEP>(x, stage(begun), begun % PARTS);
    values.begin(values.tiles * (part < PARTS - 2 ? part + 1 : PARTS - 2) / (PARTS - 2));
    if (part * SIDE < now.keys) weigh_half(x, now, part, 1, i & 1);
    if (there(stored)) store_scores(stored & 1, x.scores);
    written();
  }
  tops[0] = top[0], tops[1] = top[1];
}

template <int DEEP>
void turns(Span &x) {
  __m512i top[2];
  int64_t tile = 0, block = 0;
  const int64_t n = x.tiles * x.s.blocks;
  for (int64_t i = -2; i <= n; ++i) {
    x.begin_turn(tile, block, &x.stage(i + 2));
    if (++tile == x.tiles) tile = 0, ++block;
    turn<DEEP>(x, i, top);
  }
}

// SPAN queries of a head from q0 on.
template <class T>
void tile(const Head &h, const Sides &sides, const Sizes &s, int shift, float factor, int64_t q0) {
  const int64_t left = h.a->queries - q0, queries = left < SPAN ? left : SPAN, tiles = (queries + SIDE - 1) / SIDE;
  Span x(sides, s, shift, factor, tiles);
  auto rows = [&](int64_t i) { return queries - i * SIDE < SIDE ? queries - i * SIDE : SIDE; };
  const T *q = reinterpret_cast<const T *>(h.q) + q0 * h.a->q_row;
  T *out = reinterpret_cast<T *>(h.out) + q0 * h.a->out_row;
  for (int64_t i = 0; i < tiles; ++i) start(q + i * SIDE * h.a->q_row, h.a->q_row, rows(i), s, &x.queries[i]);
  load_tiles(whole_tiles());
  s.words == 16 ? turns<1>(x) : s.words == 32 ? turns<2>(x) : turns<0>(x);
  _tile_release();
  for (int64_t i = 0; i < tiles; ++i)
    finish(x.queries[i], sides, s, rows(i), out + i * SIDE * h.a->out_row, h.a->out_row);
}

}  // namespace
