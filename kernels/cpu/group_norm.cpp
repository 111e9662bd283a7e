// levels: scalar avx2 avx512 avx512_bf16 neon
// Group normalization of one tensor; see group_norm.h.
#include "group_norm.h"

extern "C" int FG_EXPORT(group_norm)(const fg_group_norm_args *args) { return normalize_groups(args); }
