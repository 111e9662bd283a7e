// levels: scalar avx2 avx512 avx512_bf16 neon
// Rotary position embedding; see rotate.h.
#include "abi.h"
#include "rotate.h"

extern "C" int FG_EXPORT(rope)(const fg_rope_args *args) {
  return rotate_any<false>(args, nullptr, FG_FLOAT32, 0.0);
}
