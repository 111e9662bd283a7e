// levels: scalar avx2 avx512 avx512_bf16 neon
// Layer normalization of rows; see row_norm.h.
#include "row_norm.h"

extern "C" int FG_EXPORT(layer_norm)(const fg_layer_norm_args *args) { return norm_rows<false>(args); }
