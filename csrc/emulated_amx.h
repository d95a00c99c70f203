// Plain C++ twins of the instructions that the amx level needs and other CPUs lack: tests alone, built with
// -DMOESTRO_EMULATE_AMX=ON. Each follows its operation in Intel's Software Developer's Manual, and what the manual
// refuses ends the process with a message. So does what the kernels must not do besides: to configure tiles while some
// are, and to end a thread that has some.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define MOESTRO_TILES

namespace {
namespace emulated {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;  // of palette 1

[[noreturn]] inline void refuse(const char* instruction, int tile, const char* why) {
  fprintf(stderr, "emulated AMX: %s, tile %d: %s\n", instruction, tile, why);
  abort();
}

struct Tile {
  int rows = 0, row_bytes = 0;  // none where it is not configured
  alignas(64) uint8_t at[kRows][kRowBytes] = {};
};

// A thread's tiles and what LDTILECFG says of them.
struct State {
  bool configured = false;
  Tile tiles[kTiles];

  ~State() {
    if (configured) refuse("the end of a thread", 0, "its tiles are still configured");
  }
  Tile& use(const char* instruction, int tile) {
    if (!configured) refuse(instruction, tile, "no tiles are configured");
    if (tiles[tile].rows == 0) refuse(instruction, tile, "it has no rows in the configuration");
    return tiles[tile];
  }
};
thread_local State state;

inline void load_config(const void* memory) {
  uint8_t config[64];
  memcpy(config, memory, sizeof config);
  const char* name = "LDTILECFG";
  if (config[0] != 1) refuse(name, 0, "the palette is not 1");
  if (config[1] != 0) refuse(name, 0, "the first row is not 0, as only after a fault");
  if (state.configured) refuse(name, 0, "tiles are configured already");
  for (int i = 2; i < 16; ++i)
    if (config[i] != 0) refuse(name, 0, "a reserved byte is not 0");
  for (int t = 0; t < 16; ++t) {
    uint16_t row_bytes;
    memcpy(&row_bytes, config + 16 + 2 * t, 2);
    const int rows = config[48 + t];
    if (t >= kTiles && (rows != 0 || row_bytes != 0)) refuse(name, t, "there are 8 tiles");
    if (t >= kTiles) continue;
    if (rows > kRows) refuse(name, t, "more than 16 rows");
    if (row_bytes > kRowBytes) refuse(name, t, "more than 64 bytes a row");
    if ((rows == 0) != (row_bytes == 0)) refuse(name, t, "rows without bytes, or bytes without rows");
    state.tiles[t] = Tile();
    state.tiles[t].rows = rows;
    state.tiles[t].row_bytes = row_bytes;
  }
  state.configured = true;
}

inline void release() {
  for (Tile& tile : state.tiles) tile = Tile();
  state.configured = false;
}

template <int T>
inline void zero() {
  static_assert(T >= 0 && T < kTiles);
  memset(state.use("TILEZERO", T).at, 0, sizeof(Tile::at));
}

template <int T>
inline void load(const void* base, int64_t stride) {
  static_assert(T >= 0 && T < kTiles);
  Tile& tile = state.use("TILELOADD", T);
  memset(tile.at, 0, sizeof tile.at);
  for (int r = 0; r < tile.rows; ++r) memcpy(tile.at[r], static_cast<const uint8_t*>(base) + r * stride, tile.row_bytes);
}

template <int T>
inline void store(void* base, int64_t stride) {
  static_assert(T >= 0 && T < kTiles);
  const Tile& tile = state.use("TILESTORED", T);
  for (int r = 0; r < tile.rows; ++r) memcpy(static_cast<uint8_t*>(base) + r * stride, tile.at[r], tile.row_bytes);
}

// The shapes that a product of tiles, to += a b, must have.
inline void check_shapes(const char* name, int t, const Tile& to, const Tile& a, const Tile& b) {
  if (&to == &a || &to == &b || &a == &b) refuse(name, t, "its three tiles are not three");
  if (to.row_bytes % 4 || a.row_bytes % 4 || b.row_bytes % 4) refuse(name, t, "a row is not of whole 32-bit elements");
  if (to.rows != a.rows) refuse(name, t, "it has other rows than the first operand");
  if (to.row_bytes != b.row_bytes) refuse(name, t, "it has other columns than the second operand");
  if (a.row_bytes / 4 != b.rows) refuse(name, t, "the first operand's columns are not the second's rows");
}

// Rounds to nearest even, takes subnormal numbers for zeros and makes none, whatever the thread's settings are. What is
// computed in between must be loaded and stored in between.
class OwnRounding {
 public:
  OwnRounding() : before_(_mm_getcsr()) {
    _mm_setcsr(0x9FC0);  // flush to zero, all exceptions masked, subnormals are zeros
    asm volatile("" ::: "memory");
  }
  ~OwnRounding() {
    asm volatile("" ::: "memory");
    _mm_setcsr(before_);
  }
  OwnRounding(const OwnRounding&) = delete;
  OwnRounding& operator=(const OwnRounding&) = delete;

 private:
  unsigned before_;
};

inline float float_of_bf16(uint32_t bits) {  // the high half of 32 bits
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Beyond a tile's rows and bytes there are zeros, so all 16 columns are computed, for a compiler's vectors.
template <int To, int A, int B>
__attribute__((noinline)) void dot_bf16() {
  const char* name = "TDPBF16PS";
  Tile& to = state.use(name, To);
  const Tile &a = state.use(name, A), &b = state.use(name, B);
  check_shapes(name, To, to, a, b);
  const OwnRounding own;
  for (int m = 0; m < to.rows; ++m) {
    float even[16] = {}, odd[16] = {}, sums[16];
    for (int k = 0; k < a.row_bytes / 4; ++k) {
      uint32_t pair, row[16];
      memcpy(&pair, a.at[m] + 4 * k, 4);
      memcpy(row, b.at[k], sizeof row);
      const float first = float_of_bf16(pair << 16), second = float_of_bf16(pair & 0xFFFF0000u);
      for (int n = 0; n < 16; ++n) {
        even[n] = fmaf(first, float_of_bf16(row[n] << 16), even[n]);
        odd[n] = fmaf(second, float_of_bf16(row[n] & 0xFFFF0000u), odd[n]);
      }
    }
    memcpy(sums, to.at[m], sizeof sums);
    for (int n = 0; n < 16; ++n) sums[n] = sums[n] + (even[n] + odd[n]);
    memcpy(to.at[m], sums, to.row_bytes);
  }
}

// Bytes of A, signed, and of B, unsigned.
template <int To, int A, int B>
void dot_bytes() {
  const char* name = "TDPBSUD";
  Tile& to = state.use(name, To);
  const Tile &a = state.use(name, A), &b = state.use(name, B);
  check_shapes(name, To, to, a, b);
  for (int m = 0; m < to.rows; ++m) {
    uint32_t sums[16];  // which wrap around
    memcpy(sums, to.at[m], sizeof sums);
    for (int k = 0; k < a.row_bytes / 4; ++k) {
      const uint8_t* four = a.at[m] + 4 * k;
      for (int n = 0; n < 16; ++n)
        for (int i = 0; i < 4; ++i) sums[n] += static_cast<uint32_t>(static_cast<int8_t>(four[i]) * b.at[k][4 * n + i]);
    }
    memcpy(to.at[m], sums, to.row_bytes);
  }
}

inline uint16_t bf16_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t size = bits & 0x7FFFFFFFu;
  if (size < 0x00800000u) return static_cast<uint16_t>(bits >> 16 & 0x8000u);  // zero or subnormal
  if (size > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);    // NaN, made quiet
  if (size == 0x7F800000u) return static_cast<uint16_t>(bits >> 16);
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

// Floats as bf16: first those of the second operand.
inline __m512i two_as_bf16(__m512 second_half, __m512 first_half) {
  float from[32];
  uint16_t to[32];
  _mm512_storeu_ps(from, first_half);
  _mm512_storeu_ps(from + 16, second_half);
  for (int i = 0; i < 32; ++i) to[i] = bf16_of_float(from[i]);
  return _mm512_loadu_si512(to);
}

}  // namespace emulated
}  // namespace

// In place of those of immintrin.h, which some compilers have as macros.
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadconfig(config) emulated::load_config(config)
#define _tile_release() emulated::release()
#define _tile_zero(tile) emulated::zero<tile>()
#define _tile_loadd(tile, base, stride) emulated::load<tile>(base, stride)
#define _tile_stored(tile, base, stride) emulated::store<tile>(base, stride)
#define _tile_dpbf16ps(to, a, b) emulated::dot_bf16<to, a, b>()
#define _tile_dpbsud(to, a, b) emulated::dot_bytes<to, a, b>()
#define _mm512_cvtne2ps_pbh(a, b) emulated::two_as_bf16(a, b)
