// levels: scalar avx2 avx512 avx512_bf16 neon
// RMS normalization of rows; see row_norm.h.
#include "row_norm.h"

extern "C" int FG_EXPORT(rms_norm)(const fg_rms_norm_args *args) { return norm_rows<true>(args); }
