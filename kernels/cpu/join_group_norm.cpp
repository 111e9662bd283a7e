// levels: scalar avx2 avx512 avx512_bf16 neon
// Addition or concatenation, and the group normalization of what it gives; see group_norm.h.
#include "group_norm.h"

extern "C" int FG_EXPORT(join_group_norm)(const fg_join_group_norm_args *args) { return normalize_groups(args); }
