// What an item of attention_few.h does: some queries over one piece of the keys after another, by an engine F.
#pragma once

namespace {

// What an item leaves of a query: its maximum (in units of log 2), its sum, and from PART_HEAD on its weighted values.
constexpr int64_t PART_HEAD = 16;
FG_INLINE int64_t part_size(int64_t dim) { return PART_HEAD + (dim + W - 1) / W * W; }

// What is added to the scores of W keys of which there are n, from a mask.
inline vf mask_of(const fg_attention_args *a, int64_t mask, int n) {
  float added[W];
  for (int j = 0; j < W; ++j) added[j] = j < n ? LOG2E * mask_at(a, mask + j * a->mask_key) : 0.0f;
  return load(added);
}

// The scores s[n] of a query become its weights exp2(score - maximum), rounded and laid out as the products take them;
// the maximum (in units of log 2) and their sum go to `part`.
template <class F>
void weigh_row(const Head &h, int64_t head, int64_t row, int64_t k0, int n, float *s, float *part) {
  const fg_attention_args *a = h.a;
  const int64_t mask = h.batch * a->mask_batch + head * a->mask_head + row * a->mask_row;
  const int64_t shut = first_open(h, row) - k0, last = last_open(h, row) - k0, open = last < n ? last : n;
  const float scale = static_cast<float>(a->scale), cap = h.e.softcap;
  const vf rate = set1(cap > 0.0f ? scale / cap : scale * LOG2E);
  vf highest = set1(-infinity()), sum = set1(0.0f);
  for (int r = 0; r < n; r += W) {
    vf x = mul(load(s + r), rate);
    if (cap > 0.0f) x = capped(x, set1(cap * LOG2E));
    if (a->mask) x = add(x, mask_of(a, mask + (k0 + r) * a->mask_key, n - r));
    store(s + r, x);
    if (r < shut || r + W > open) {
      for (int j = 0; j < W; ++j)
        if (r + j < shut || r + j >= open) s[r + j] = -infinity();
      x = load(s + r);
    }
    highest = max(x, highest);
  }
  for (int r = (n + W - 1) / W * W; r % BLOCK; r += W) store(s + r, set1(-infinity()));
  const float most = hmax(highest), shift = most < LOWEST ? 0.0f : most;  // all closed: any finite one gives exp2(-inf)
  for (int r = 0; r < n; r += BLOCK) sum = F::weigh(s, r, set1(shift), sum);
  part[0] = most;
  part[1] = hsum(sum);
}

// An item: some heads of the keys, whose rows lie side by side where there are more than one, and of the queries over
// each the rows [first, first + rows): query i is row i % queries of head i / queries from the key head's first.
struct Item {
  int heads, rows;
  int64_t first, end;  // of its keys
  Head of[MOST_ROWS];  // the first query head of each

  int64_t head(int m) const { return (first + m) / of[0].a->queries; }
  int64_t row(int m) const { return (first + m) % of[0].a->queries; }
};

// An item's queries, over one piece of the keys after another: query m of head g stands at g * tall + m.
//
// What will be read next is asked for between products: keys, values, the next piece's keys.  It stays inside the item.
template <class F>
struct Pieces {
  using T = typename F::element;
  const Item &item;
  const fg_attention_args *const a = item.of[0].a;
  const int dim = static_cast<int>(a->dim), rows = item.rows, tall = rows < F::ROOM ? F::ROOM : (rows + 1) / 2 * 2;
  const int bytes = item.heads * dim * static_cast<int>(sizeof(T));
  const int lead = fours(item.heads > 1 ? 2 * LEAD : LEAD), pause = PAUSE / bytes / 4 * 4;
  const int page = bytes < HALF ? HALF / bytes : 1;  // keys
  const int most = fours(RUN) < KEYS ? fours(RUN) : KEYS;
  const int64_t all = a->heads / a->kv_heads * a->queries;  // queries of a key head
  alignas(64) float o[MOST_ROWS * WIDE], s[MOST_ROWS * ROW];
  alignas(64) char q[MOST_ROWS * WIDE * 4];
  int64_t k0;
  int n;

  explicit Pieces(const Item &item) : item(item) {
    memset(q, 0, static_cast<size_t>(item.heads) * tall * WIDE * 4);
    for (int g = 0; g < item.heads; ++g)
      for (int m = 0; m < rows; ++m) {
        const T *from = reinterpret_cast<const T *>(item.of[g].q);
        F::take_query(from + item.head(m) * a->q_head + item.row(m) * a->q_row, dim, m, q + g * tall * WIDE * 4);
      }
  }

  // How many keys lie in so many bytes: whole fours.
  int fours(int size) const { return size < 4 * bytes ? 4 : size / bytes / 4 * 4; }
  int64_t k_at(int64_t r) const { return row_at(item.of[0], item.of[0].e.k_block, a->k_row, k0 + r); }
  int64_t v_at(int64_t r) const { return row_at(item.of[0], item.of[0].e.v_block, a->v_row, k0 + r); }
  const T *k(int g) const { return reinterpret_cast<const T *>(item.of[g].k); }
  const T *v(int g) const { return reinterpret_cast<const T *>(item.of[g].v); }

  // From the row at `at` of the first head on, that of all heads.
  Ahead rows_from(const T *first, const T *last, int64_t at, int64_t stride, int groups) const {
    const int64_t size = sizeof(T);
    return {reinterpret_cast<const char *>(first + at), stride * size, (last - first + dim) * size, groups};
  }
  Ahead keys_from(int64_t r, int groups) const {
    return rows_from(k(0), k(item.heads - 1), k_at(r), a->k_row, groups);
  }
  Ahead values_from(int64_t r, int groups) const {
    return rows_from(v(0), v(item.heads - 1), v_at(r), a->v_row, groups);
  }

  // What is `by` keys behind key r, or, `second`, behind value r, as the piece is gone through.
  Ahead behind(bool second, int r, int by, int groups) const {
    const int at = r + by;
    if (!second) return at < n ? keys_from(at, groups) : values_from(at - n < n ? at - n : n - 1, groups);
    if (at < n) return values_from(at, groups);
    return k0 + at < item.end ? keys_from(at, groups) : values_from(n - 1, groups);
  }
  // Of the pages that are met in a while a line each.
  void touch(bool second, int r, int count) const {
    for (int i = 0; i < count; i += page) __builtin_prefetch(behind(second, r + i, 2 * lead, 1).at);
  }

  void scores() {
    for (int r = 0, count; r < n; r += count) {
      count = run_of(item.of[0], k0 + r, n - r < most ? n - r : most);
      touch(false, r, count);
      Ahead ahead = behind(false, r, lead, F::groups(rows));
      const int64_t here = k_at(r);
      for (int g = 0; g < item.heads; ++g)
        F::scores(q + g * tall * WIDE * 4, rows, k(g) + here, ahead, a->k_row, count, dim, s + g * tall * ROW + r);
    }
  }

  // Weights and what stands before them in a part; meanwhile the values that come next are on their way.
  void weights(float *parts, int64_t apart) {
    const int lines = (bytes + 63) / 64 * (lead + pause < n ? pause : n > lead ? n - lead : 0);
    const int queries = item.heads * rows;
    Ahead ahead = values_from(lead < n ? lead : 0, 1);
    for (int i = 0; i < queries; ++i) {
      for (int line = lines * i / queries; line < lines * (i + 1) / queries; ++line) ahead.line();
      const int g = i / rows, m = i % rows;
      float *own = s + (g * tall + m) * ROW;
      weigh_row<F>(item.of[g], item.of[g].head + item.head(m), item.row(m), k0, n, own, parts + (g * all + m) * apart);
    }
  }

  void values() {
    if constexpr (F::TILES) return tiled_values();
    else vector_values();
  }

  void vector_values() {
    const int wide = rows <= 4 ? 2 : 4;
    memset(o, 0, static_cast<size_t>(item.heads) * tall * WIDE * 4);
    for (int r = 0, count; r < n; r += count) {
      count = F::whole_run(run_of(item.of[0], k0 + r, n - r < most ? n - r : most), n - r);
      touch(true, r, count);
      Ahead ahead = behind(true, r, lead + pause, groups_of(wide, rows));
      const int64_t here = v_at(r), step = count > 1 ? v_at(r + 1) - here : 0;
      for (int g = 0; g < item.heads; ++g)
        in_groups(wide, rows, [&](auto M, int m) {
          const int i = g * tall + m;
          F::template blends<M.value>(s + i * ROW, r, v(g) + here, ahead, step, count, dim, o + i * WIDE);
        });
    }
  }

  // Values of 32 keys in pairs, zeros past the end, times the weights of all queries over their head.
  void tiled_values() {
    static const T none[FEW_DIM] = {};
    alignas(64) char pairs[FEW_DIM * 64];
    memset(o, 0, static_cast<size_t>(item.heads) * tall * WIDE * 4);
    for (int r = 0; r < n; r += F::ALIGN) {
      const int count = n - r < F::ALIGN ? n - r : F::ALIGN;
      touch(true, r, count);
      Ahead ahead = behind(true, r, lead + pause, 1);
      const T *row[F::ALIGN];
      for (int i = 0, run; i < count; i += run) {
        run = run_of(item.of[0], k0 + r + i, count - i);
        for (int j = 0; j < run; ++j) row[i + j] = v(0) + v_at(r + i) + j * a->v_row;
      }
      for (int g = 0; g < item.heads; ++g) {
        const int64_t apart = v(g) - v(0);
        for (int i = 0; i < F::ALIGN; i += 2)
          F::interleave(i < count ? row[i] + apart : none, i + 1 < count ? row[i + 1] + apart : none, ahead, dim,
                        pairs + i / 2 * 64);
        F::add_values(s + g * tall * ROW + r / 2, rows, pairs, dim, o + g * tall * WIDE);
      }
    }
  }

  // The n keys from k0 on.  Each query leaves a part, `apart` floats from the next one's; a key head's stand together.
  void run(int64_t begin, int count, float *parts, int64_t apart) {
    k0 = begin, n = count;
    F::begin_scores();
    scores();
    weights(parts, apart);
    F::begin_values(rows);
    values();
    F::end();
    for (int g = 0; g < item.heads; ++g)
      for (int m = 0; m < rows; ++m)
        F::give(o + g * tall * WIDE, m, rows, dim, parts + (g * all + m) * apart + PART_HEAD);
  }
};

}  // namespace
