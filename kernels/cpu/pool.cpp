// levels: base
// The shared thread pool, each thread's scratch memory, what the CPU can do, and the list runner.
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <pthread.h>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "abi.h"
#include "threads.h"

#define FG_API extern "C" __attribute__((visibility("default")))

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool KEEP_SCRATCH = false;  // just what was asked for, anew each time: a step beyond it is seen
constexpr size_t SCRATCH_UNIT = 64;
#else
constexpr bool KEEP_SCRATCH = true;
constexpr size_t SCRATCH_UNIT = 4096;
#endif

using gomp_parallel_t = void (*)(void (*)(void *), void *, unsigned, unsigned);
using max_threads_t = int (*)();

gomp_parallel_t gomp_parallel = nullptr;
max_threads_t max_threads = nullptr;

struct Work {
  int64_t items;
  int64_t next;
  int worst;
  int (*body)(void *, int64_t);
  void *context;
};

void drain(void *pointer) {
  Work *work = static_cast<Work *>(pointer);
  int worst = 0;
  for (;;) {
    int64_t item = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    if (item >= work->items) break;
    int code = work->body(work->context, item);
    worst = code > worst ? code : worst;
  }
  if (worst) __atomic_store_n(&work->worst, worst, __ATOMIC_RELAXED);
}

struct Scratch {
  void *memory;
  size_t bytes;
};

pthread_key_t scratch_key;
pthread_once_t scratch_once = PTHREAD_ONCE_INIT;

void free_scratch(void *pointer) {
  Scratch *scratch = static_cast<Scratch *>(pointer);
  std::free(scratch->memory);
  std::free(scratch);
}

int64_t cache_bytes = 0;

// Of the first core's outermost cache, as Linux tells it; 32 MiB where it tells nothing.
int64_t find_cache_bytes() {
  int64_t found = int64_t{32} << 20;
  std::FILE *file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r");
  if (!file) return found;
  long long kib = 0;
  if (std::fscanf(file, "%lldK", &kib) == 1 && kib > 0) found = kib << 10;
  std::fclose(file);
  return found;
}

void make_scratch_key() { pthread_key_create(&scratch_key, free_scratch); }

}  // namespace

extern "C" int64_t fg_threads() {
  int64_t n = max_threads && gomp_parallel ? max_threads() : 1;
  return n < 1 ? 1 : n;
}

extern "C" int64_t fg_cache_bytes() {
  int64_t known = __atomic_load_n(&cache_bytes, __ATOMIC_RELAXED);
  if (!known) __atomic_store_n(&cache_bytes, known = find_cache_bytes(), __ATOMIC_RELAXED);
  return known;
}

extern "C" int fg_parallel(int64_t items, int64_t threads, int (*body)(void *, int64_t), void *context) {
  Work work{items, 0, 0, body, context};
  int64_t n = fg_threads();
  n = threads < n ? threads : n;
  n = items < n ? items : n;
  if (n <= 1)
    drain(&work);
  else
    gomp_parallel(drain, &work, static_cast<unsigned>(n), 0);
  return work.worst;
}

extern "C" void *fg_scratch(size_t bytes) {
  pthread_once(&scratch_once, make_scratch_key);
  Scratch *scratch = static_cast<Scratch *>(pthread_getspecific(scratch_key));
  if (!scratch) {
    scratch = static_cast<Scratch *>(std::calloc(1, sizeof(Scratch)));
    if (!scratch || pthread_setspecific(scratch_key, scratch)) return std::free(scratch), nullptr;
  }
  if (!KEEP_SCRATCH || scratch->bytes < bytes) {
    std::free(scratch->memory);
    size_t rounded = (bytes + SCRATCH_UNIT - 1) / SCRATCH_UNIT * SCRATCH_UNIT;
    scratch->memory = std::aligned_alloc(64, rounded);
    scratch->bytes = scratch->memory ? rounded : 0;
  }
  return scratch->memory;
}

// The runtime that kernels share from now on; nulls mean: run on the calling thread alone.
FG_API void fg_set_pool(gomp_parallel_t parallel, max_threads_t count) {
  gomp_parallel = parallel;
  max_threads = count;
}

// What fg_cache_bytes() says from now on, for tests; 0: what the machine has.
FG_API void fg_set_cache(int64_t bytes) { __atomic_store_n(&cache_bytes, bytes, __ATOMIC_RELAXED); }

// The file that holds the pool's code, or "" where there is no pool.
FG_API const char *fg_pool() {
  Dl_info info;
  if (!gomp_parallel || !dladdr(reinterpret_cast<void *>(gomp_parallel), &info)) return "";
  return info.dli_fname;
}

FG_API int64_t fg_thread_count() { return fg_threads(); }

FG_API int fg_run(const fg_call *calls, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (int code = calls[i].function(calls[i].args)) return code;
  return FG_OK;
}

// sizeof the argument struct of each op, so that a library built from another abi.h is refused, not called.
FG_API int64_t fg_sizeof(const char *op) {
  struct Row {
    const char *op;
    int64_t size;
  };
  static const Row rows[] = {
#define FG_ROW(op) {#op, sizeof(fg_##op##_args)},
      FG_OPS(FG_ROW)
#undef FG_ROW
  };
  for (const Row &row : rows) {
    const char *a = row.op, *b = op;
    while (*a && *a == *b) ++a, ++b;
    if (*a == *b) return row.size;
  }
  return 0;
}

// Bit i set: level i of `scalar avx2 avx512 avx512_bf16 amx neon` runs on this CPU under this operating system.
FG_API int64_t fg_cpu_levels() {
  int64_t bits = 1;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return bits;
  bits |= 2;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl"))
    return bits;
  bits |= 4;
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) return bits;
  bits |= 8;
#if defined(__linux__)
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  bool amx = (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1) && __builtin_cpu_supports("avx512vbmi");
  // Linux grants a process the 8 KiB tile state only when asked (ARCH_REQ_XCOMP_PERM for XTILEDATA).
  if (amx && syscall(SYS_arch_prctl, 0x1023, 18) == 0) bits |= 16;
#endif
#elif defined(__aarch64__)
  bits |= 32;
#endif
  return bits;
}
