// levels: scalar avx2 avx512 avx512_bf16 neon
// RMS norm over the head dimension, then rotary position embedding; see rotate.h.
#include "abi.h"
#include "rotate.h"

extern "C" int FG_EXPORT(qk_norm_rope)(const fg_qk_norm_rope_args *args) {
  return rotate_any<true>(args, args->weight, args->weight_dtype, args->eps);
}
