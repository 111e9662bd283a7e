// The instruction set that this translation unit is compiled for.
//
// setup.py compiles each kernel once per level it names in its `// levels:` line, with -DFG_LEVEL_<NAME>=1 and the
// matching -m flags.  All code of a kernel has internal linkage (anonymous namespace) except its one FG_EXPORT
// function: an inline function with external linkage would be merged by the linker across levels, and the copy it
// keeps may hold instructions that the CPU lacks.  The build refuses objects that define a weak symbol.
#pragma once

#if defined(FG_LEVEL_SCALAR)
#define FG_LEVEL scalar
#elif defined(FG_LEVEL_AVX2)
#define FG_LEVEL avx2
#elif defined(FG_LEVEL_AVX512)
#define FG_LEVEL avx512
#define FG_HAS_AVX512 1
#elif defined(FG_LEVEL_AVX512_BF16)
#define FG_LEVEL avx512_bf16
#define FG_HAS_AVX512 1
#define FG_HAS_AVX512_BF16 1
#elif defined(FG_LEVEL_AMX)
#define FG_LEVEL amx
#define FG_HAS_AVX512 1
#define FG_HAS_AVX512_BF16 1
#elif defined(FG_LEVEL_NEON)
#define FG_LEVEL neon
#else
#error "compile with -DFG_LEVEL_<NAME>=1"
#endif

#define FG_JOIN2(op, level) fg_##op##_##level
#define FG_JOIN(op, level) FG_JOIN2(op, level)
// int FG_EXPORT(attention)(const fg_attention_args *args) { ... }
#define FG_EXPORT(op) __attribute__((visibility("default"))) FG_JOIN(op, FG_LEVEL)
#define FG_INLINE static inline __attribute__((always_inline))
