// AMX tiles: how they are set up.  Eight of them, 16 rows of 64 bytes at most.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// All eight whole; the caller may narrow some.
inline TileConfig whole_tiles() {
  TileConfig config = {};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
  return config;
}

// GCC's tile loads do not say that they read memory: what was written for them must not be put off.
inline __attribute__((always_inline)) void written() { __asm__ volatile("" ::: "memory"); }

// GCC takes ldtilecfg to read eight bytes of its operand and may drop what was written to the others.
inline void load_tiles(const TileConfig &config) {
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

}  // namespace
