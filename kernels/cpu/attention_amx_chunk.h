// A chunk of one head's queries on AMX tiles, in place of attention_chunk.h's.
//
// While the weights of one tile of 16 queries are computed, the values of the tile before it and the scores of the one
// after it are multiplied, a tile of products beside every eight vectors of weights.
#pragma once
#include "attention_amx_rows.h"

namespace {

// A chunk's scratch memory, in this order; counted in tiles of 32 queries by the caller, of 16 here.
template <>
struct Layout<AmxEngine> {
  AmxShape x;
  int64_t tiles, q, k, v, s, o, rows, bytes;
  Layout(int64_t pairs, int64_t dim) : x(dim), tiles(2 * pairs) {
    q = 0;
    k = q + tiles * x.deep * TILE;
    v = k + 2 * x.units * x.deep * TILE;
    s = v + x.wide * x.units * TILE;
    o = s + 2 * 2 * x.units * TILE;
    rows = o + tiles * x.wide * TILE;
    bytes = rows + tiles * static_cast<int64_t>(sizeof(Rows));
  }
};

// One chunk at work on one block of keys.
struct AmxBlock {
  const Head &h;
  const Layout<AmxEngine> &at;
  char *memory;
  int64_t first;  // query
  float scale;
  int64_t k0 = 0;
  int n = 0, units = 0;

  char *q(int64_t tile) const { return memory + at.q + tile * at.x.deep * TILE; }
  char *k() const { return memory + at.k; }
  char *v() const { return memory + at.v; }
  char *s(int64_t slot) const { return memory + at.s + slot * 2 * at.x.units * TILE; }
  char *o(int64_t tile) const { return memory + at.o + tile * at.x.wide * TILE; }
  Rows *rows(int64_t tile) const { return reinterpret_cast<Rows *>(memory + at.rows) + tile; }
  int64_t q0(int64_t tile) const { return first + tile * SIDE; }

  // Does to scores what comes before weights, and gives their rate from then on.
  float prepare(int64_t tile, char *scores) const {
    float rate = scale * LOG2E;
    if (h.e.softcap > 0.0f) {
      cap_scores(reinterpret_cast<float *>(scores), units * UNIT * SIDE / TQ, scale, h.e.softcap);
      rate = 1.0f;
    }
    if (h.a->mask) {
      add_mask_to_rows(h, scores, q0(tile), k0, n, rate);
      rate = 1.0f;
    }
    if (rows_limited(h, q0(tile), k0, n) || (h.a->mask && n % UNIT)) close_in_rows(h, scores, units, q0(tile), k0, n);
    return rate;
  }
  void move(int64_t tile, const char *scores, float rate) const {
    move_shifts(scores, units, rate, at.x.wide, rows(tile), o(tile));
  }
  void weigh_all(int64_t tile, char *scores, float rate) const { weigh_rows(scores, units, rate, rows(tile)); }

  void score(int64_t tile, char *scores) const {
    hold(q(tile), TILE, at.x.deep);
    for (int j = 0; j < 2 * units; ++j) score_tile(k(), j, at.x.deep, scores);
    store_last(scores, 2 * units);
    written();
  }
  void gather(int64_t tile, const char *weights) const {
    hold(weights, 2 * TILE, units);
    const bool start = rows(tile)->blocks++ == 0;
    for (int d = 0; d < at.x.wide; ++d)
      value_tile(v() + d * at.x.units * TILE, d, at.x.wide, units, start, o(tile) + d * TILE);
    written();
  }

  // Scores become weights, where they stand, beside gather(before, other) and score(after, other), where there are such
  // tiles.  Returns whether a weight reached 2^LIMIT, or is none.
  template <int DEEP, int UNITS>
  bool beside(int64_t tile, char *scores, float rate, int64_t before, int64_t after, char *other) const {
    Seen seen;
    const AmxShape &x = at.x;
    const int wide = before < 0 ? 0 : x.wide, units = UNITS ? UNITS : this->units;
    const bool start = before >= 0 && rows(before)->blocks++ == 0;
    if (before >= 0) hold(other, 2 * TILE, units);
    int part = 0;
    for (int d = 0; part < PARTS / 2 * units; ++part) {
      for (; d < (part + 1) * wide / (PARTS / 2 * units); ++d)
        value_tile(v() + d * x.units * TILE, d, wide, units, start, o(before) + d * TILE);
      weigh_part(scores, part, rate, rows(tile), seen);
    }
    if (after < at.tiles) hold(q(after), TILE, DEEP);
    for (int j = 0; j < 2 * units; ++j, ++part) {
      if (after < at.tiles) score_tile(k(), j, DEEP, other);
      weigh_part(scores, part, rate, rows(tile), seen);
    }
    if (after < at.tiles) store_last(other, 2 * units);
    return seen.reached();
  }

  int64_t open_from(int64_t tile) const {
    while (tile < at.tiles && (q0(tile) >= h.a->queries || rows_closed(h, q0(tile), k0, n))) ++tile;
    return tile;
  }

  template <int DEEP, int UNITS>  // 0 units: as many as there are
  void narrow() const {
    int64_t tile = open_from(0), before = -1;
    if (tile == at.tiles) return;
    int slot = 0;
    score(tile, s(slot));
    for (; tile < at.tiles; slot ^= 1) {
      const int64_t after = open_from(tile + 1);
      float rate = prepare(tile, s(slot));
      if (!rows(tile)->ready) move(tile, s(slot), rate);
      if (beside<DEEP, UNITS>(tile, s(slot), rate, before, after, s(slot ^ 1))) {
        score(tile, s(slot));
        rate = prepare(tile, s(slot));
        move(tile, s(slot), rate);
        weigh_all(tile, s(slot), rate);
      }
      before = tile, tile = after;
    }
    gather(before, s(slot ^ 1));
  }

  // Heads whose queries do not fit the registers: two tiles at a time, one thing after another.
  void broad() const {
    const AmxShape &x = at.x;
    const Steps scores{x.deep, 1, x.deep, x.deep, 2 * x.units}, values{2 * x.units, 2, x.units, units, x.wide};
    for (int64_t tile = 0; tile < at.tiles; tile += 2) {
      if (q0(tile) >= h.a->queries) break;
      if (rows_closed(h, q0(tile), k0, n) && rows_closed(h, q0(tile + 1), k0, n)) continue;
      written();
      for (int j = 0; j < 2 * units; j += 2)
        square<true>(q(tile), k() + j * x.deep * TILE, scores, true, s(0) + j * TILE);
      written();
      for (int i = 0; i < 2; ++i) {
        const float rate = prepare(tile + i, s(i));
        move(tile + i, s(i), rate);
        weigh_all(tile + i, s(i), rate);
      }
      const bool start = rows(tile)->blocks++ == 0;
      rows(tile + 1)->blocks++;
      int d = 0;
      for (; d + 2 <= x.wide; d += 2) square<true>(s(0), v() + d * x.units * TILE, values, start, o(tile) + d * TILE);
      if (d < x.wide) square<false>(s(0), v() + d * x.units * TILE, values, start, o(tile) + d * TILE);
      written();
    }
  }

  template <int DEEP, int UNITS>
  void narrow_or_part() const {
    units == UNITS ? narrow<DEEP, UNITS>() : narrow<DEEP, 0>();
  }
  void run() const {
    switch (at.x.deep) {
      case 1: return narrow_or_part<1, 3>();
      case 2: return narrow_or_part<2, 3>();
      case 3: return narrow_or_part<3, 2>();
      case 4: return narrow_or_part<4, 4>();
      default: return broad();
    }
  }
};

template <>
int chunk<AmxEngine, bf16>(const Head &h, int64_t first, int64_t last, const Layout<AmxEngine> &at) {
  const fg_attention_args *a = h.a;
  char *memory = static_cast<char *>(fg_scratch(static_cast<size_t>(at.bytes)));
  if (!memory) return FG_NO_MEMORY;
  const float scale = static_cast<float>(a->scale), sign = scale < 0 ? -1.0f : scale > 0 ? 1.0f : 0.0f;
  const bf16 *q = reinterpret_cast<const bf16 *>(h.q), *k = reinterpret_cast<const bf16 *>(h.k),
             *v = reinterpret_cast<const bf16 *>(h.v);
  AmxBlock b{h, at, memory, first, scale < 0 ? -scale : scale > 0 ? scale : 1.0f};
  load_tiles(whole_tiles());
  for (int64_t tile = 0; tile < at.tiles; ++tile) {
    const int64_t left = last - b.q0(tile);
    pack_queries(q + b.q0(tile) * a->q_row, a->q_row, left < 0 ? 0 : left < SIDE ? left : SIDE, at.x, sign, b.q(tile));
    reset(b.rows(tile));
  }
  const int64_t end = last_open(h, last - 1);
  const int keys = at.x.keys();
  for (b.k0 = first_open(h, first) / keys * keys; b.k0 < end; b.k0 += keys) {
    b.n = static_cast<int>(end - b.k0 < keys ? end - b.k0 : keys), b.units = (b.n + UNIT - 1) / UNIT;
    pack_keys(k + b.k0 * a->k_row, a->k_row, b.n, at.x, b.k());
    pack_values(v + b.k0 * a->v_row, a->v_row, b.n, at.x, b.v());
    b.run();
  }
  _tile_release();
  for (int64_t tile = 0; b.q0(tile) < last; ++tile) {
    if (!b.rows(tile)->blocks) memset(b.o(tile), 0, static_cast<size_t>(at.x.wide) * TILE);
    write_rows(h, b.o(tile), b.rows(tile), at.x, b.q0(tile));
  }
  return FG_OK;
}

}  // namespace
