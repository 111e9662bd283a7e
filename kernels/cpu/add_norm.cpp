// levels: scalar avx2 avx512 avx512_bf16 neon
// Residual addition and the norm of the sum; see row_norm.h.
#include "row_norm.h"

extern "C" int FG_EXPORT(add_norm)(const fg_add_norm_args *args) {
  return args->rms ? norm_rows<true>(args) : norm_rows<false>(args);
}
