// Runs recorded calls of a kernel library outside of Python: under an emulator, or under a sanitizer.
//
//   runner LIBRARY RECORDS THREADS
//
// RECORDS is a file that tests/native/record.py wrote: int64 words, native order.
//   count, then each record: symbol (8 words of zero-padded text), words of the struct, number of regions, number of
//   pointers; the struct; each region's (bytes, address modulo 64); each pointer's (word of the struct, region, bytes
//   into it); each region's bytes, padded to whole words.
// Each region is copied to memory of its own at the same alignment, whose bytes before and behind may not be touched
// under AddressSanitizer; the pointers are set and the symbol is called.  Then the regions' bytes in the file are
// replaced by what the kernel left, and the first word of the symbol by its status.
// It prints how many times a kernel used more than one thread.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, size) ((void)(at), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(at, size) ((void)(at), (void)(size))
#endif
#include <thread>
#include <vector>

namespace {

int threads = 1, shared_calls = 0;

// GOMP_parallel's and omp_get_max_threads' place: threads that a sanitizer understands.  All of them begin together, or
// the first would have done small work before the second is there; relaxed atomics order nothing else between them.
void parallel(void (*body)(void *), void *data, unsigned count, unsigned) {
  ++shared_calls;
  unsigned ready = 0;
  auto begin = [&] {
    __atomic_fetch_add(&ready, 1, __ATOMIC_RELAXED);
    while (__atomic_load_n(&ready, __ATOMIC_RELAXED) < count) std::this_thread::yield();
    body(data);
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < count; ++i) others.emplace_back(begin);
  begin();
  for (std::thread &other : others) other.join();
}
int thread_count() { return threads; }

[[noreturn]] void fail(const char *what, const char *detail) {
  std::fprintf(stderr, "runner: %s: %s\n", what, detail ? detail : "");
  std::exit(2);
}

std::vector<int64_t> read_words(const char *path) {
  std::FILE *file = std::fopen(path, "rb");
  if (!file) fail("cannot open", path);
  std::fseek(file, 0, SEEK_END);
  std::vector<int64_t> words(static_cast<size_t>(std::ftell(file)) / 8);
  std::rewind(file);
  if (std::fread(words.data(), 8, words.size(), file) != words.size()) fail("cannot read", path);
  std::fclose(file);
  return words;
}

// One record from `at` on; returns where the next one starts.
int64_t *run(void *library, int64_t *at) {
  char symbol[65] = {};
  std::memcpy(symbol, at, 64);
  const int64_t words = at[8], regions = at[9], pointers = at[10];
  int64_t *values = at + 11, *region = values + words, *pointer = region + 2 * regions, *bytes = pointer + 3 * pointers;
  auto function = reinterpret_cast<int (*)(const void *)>(dlsym(library, symbol));
  if (!function) fail("the library has no", symbol);

  std::vector<char *> memory, start;
  int64_t *from = bytes;
  for (int64_t i = 0; i < regions; ++i) {
    const size_t size = static_cast<size_t>(region[2 * i]), offset = static_cast<size_t>(region[2 * i + 1]);
    const size_t whole = (size + offset + 63) / 64 * 64 + 128;
    memory.push_back(static_cast<char *>(std::aligned_alloc(64, whole)));
    if (!memory.back()) fail("no memory for", symbol);
    start.push_back(memory.back() + 64 + offset);
    ASAN_POISON_MEMORY_REGION(memory.back(), whole);
    ASAN_UNPOISON_MEMORY_REGION(start.back(), size);
    std::memcpy(start.back(), from, size);
    from += (size + 7) / 8;
  }
  for (int64_t i = 0; i < pointers; ++i)
    values[pointer[3 * i]] = reinterpret_cast<int64_t>(start[static_cast<size_t>(pointer[3 * i + 1])] + pointer[3 * i + 2]);
  at[0] = function(values);
  from = bytes;
  for (int64_t i = 0; i < regions; ++i) {
    const size_t size = static_cast<size_t>(region[2 * i]);
    std::memcpy(from, start[static_cast<size_t>(i)], size);
    from += (size + 7) / 8;
    std::free(memory[static_cast<size_t>(i)]);
  }
  return from;
}

}  // namespace

int main(int count, char **args) {
  if (count != 4) fail("usage", "runner LIBRARY RECORDS THREADS");
  threads = std::atoi(args[3]);
  void *library = dlopen(args[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) fail("cannot open", dlerror());
  using set_pool_t = void (*)(decltype(&parallel), decltype(&thread_count));
  auto set_pool = reinterpret_cast<set_pool_t>(dlsym(library, "fg_set_pool"));
  if (!set_pool) fail("the library has no", "fg_set_pool");
  set_pool(parallel, thread_count);
  if (auto levels = reinterpret_cast<int64_t (*)()>(dlsym(library, "fg_cpu_levels"))) levels();  // asks for AMX
  std::vector<int64_t> words = read_words(args[2]);
  int64_t *at = words.data() + 1;
  for (int64_t i = 0; i < words[0]; ++i) at = run(library, at);
  std::FILE *file = std::fopen(args[2], "wb");
  if (!file || std::fwrite(words.data(), 8, words.size(), file) != words.size() || std::fclose(file))
    fail("cannot write", args[2]);
  std::printf("%d\n", shared_calls);
  return 0;
}
