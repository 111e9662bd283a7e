// levels: scalar
// New rows of the key-value cache, copied where each sequence's next ones belong; bytes are moved, not numbers.
#include <cstring>

#include "abi.h"
#include "level.h"
#include "threads.h"

namespace {

struct Tensor {  // strides in bytes
  char *at;
  int64_t batch, head, row, dim;
};

void copy_row(const Tensor &from, const Tensor &to, int64_t heads, int64_t dim, int64_t size) {
  for (int64_t h = 0; h < heads; ++h) {
    const char *source = from.at + h * from.head;
    char *target = to.at + h * to.head;
    if (from.dim == size && to.dim == size)
      memcpy(target, source, static_cast<size_t>(dim * size));
    else
      for (int64_t d = 0; d < dim; ++d) memcpy(target + d * to.dim, source + d * from.dim, static_cast<size_t>(size));
  }
}

int64_t position_of(const fg_kv_append_args *a, int64_t batch) {
  int64_t at = batch * a->positions_stride;
  return a->positions_dtype == FG_INT32 ? static_cast<const int32_t *>(a->positions)[at]
                                        : static_cast<const int64_t *>(a->positions)[at];
}

}  // namespace

extern "C" int FG_EXPORT(kv_append)(const fg_kv_append_args *a) {
  const int64_t s = a->size;
  const Tensor from[2] = {{static_cast<char *>(const_cast<void *>(a->k)), a->k_batch * s, a->k_head * s, a->k_row * s, a->k_dim * s},
                          {static_cast<char *>(const_cast<void *>(a->v)), a->v_batch * s, a->v_head * s, a->v_row * s, a->v_dim * s}};
  const Tensor to[2] = {{static_cast<char *>(a->k_cache), a->k_cache_block * s, a->k_cache_head * s, a->k_cache_row * s, a->k_cache_dim * s},
                        {static_cast<char *>(a->v_cache), a->v_cache_block * s, a->v_cache_head * s, a->v_cache_row * s, a->v_cache_dim * s}};
  int64_t bytes = a->heads * a->dim * s;
  return parallel_for(2 * a->batch * a->rows, 1 + 65536 / (bytes + 1), [&](int64_t item) -> int {
    int64_t i = item / 2 % a->rows, batch = item / 2 / a->rows, place = position_of(a, batch) + i, block = batch;
    if (place < 0 || place >= a->most) return FG_OK;
    if (a->table) {
      block = static_cast<const int32_t *>(a->table)[batch * a->table_batch + place / a->block * a->table_block];
      if (block < 0 || block >= a->blocks) return FG_OK;
      place %= a->block;
    }
    Tensor source = from[item % 2], target = to[item % 2];
    source.at += batch * source.batch + i * source.row;
    target.at += block * target.batch + place * target.row;
    copy_row(source, target, a->heads, a->dim, s);
    return FG_OK;
  });
}
