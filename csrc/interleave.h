// Rows of numbers, 16 of them side by side.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "formats.h"

#if defined(__SSE2__) || defined(_M_X64)
#include <emmintrin.h>
#endif

namespace moestro {

#if defined(__SSE2__) || defined(_M_X64)
// As `interleave`, of 32-bit units and up to a multiple of four, which is returned. `to` is at a multiple of 16 bytes.
// Lines are written past the caches: what loads is larger than these, and a line is not read before it is written.
inline int64_t stream_words(const uint8_t* const from[kPanel], int64_t n, uint8_t* to) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    __m128i turned[4][4];  // [unit][rows, four at a time]
    for (int q = 0; q < 4; ++q) {
      const auto row = [&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[4 * q + r] + 4 * i)); };
      const __m128i a = row(0), b = row(1), c = row(2), d = row(3);
      const __m128i low_ab = _mm_unpacklo_epi32(a, b), high_ab = _mm_unpackhi_epi32(a, b);
      const __m128i low_cd = _mm_unpacklo_epi32(c, d), high_cd = _mm_unpackhi_epi32(c, d);
      turned[0][q] = _mm_unpacklo_epi64(low_ab, low_cd), turned[1][q] = _mm_unpackhi_epi64(low_ab, low_cd);
      turned[2][q] = _mm_unpacklo_epi64(high_ab, high_cd), turned[3][q] = _mm_unpackhi_epi64(high_ab, high_cd);
    }
    for (int u = 0; u < 4; ++u)
      for (int q = 0; q < 4; ++q) _mm_stream_si128(reinterpret_cast<__m128i*>(to + 64 * (i + u) + 16 * q), turned[u][q]);
  }
  _mm_sfence();  // before another thread is told that they are there
  return i;
}
#endif

// Units of one size, of 16 rows side by side: `to` is [n][16]. A unit is a float, or a pair of bf16 columns.
template <typename Unit>
void interleave(const uint8_t* const from[kPanel], int64_t n, uint8_t* to) {
  constexpr int64_t kTile = 128 / sizeof(Unit);  // two cache lines of each row at a time
  int64_t first = 0;
#if defined(__SSE2__) || defined(_M_X64)
  if constexpr (sizeof(Unit) == 4)
    if (reinterpret_cast<uintptr_t>(to) % 16 == 0) first = stream_words(from, n, to);
#endif
  for (int64_t k = first; k < n; k += kTile) {
    const int64_t stop = std::min(n, k + kTile);
    for (int64_t i = k; i < stop; ++i) {
      Unit units[kPanel];
      for (int64_t r = 0; r < kPanel; ++r) memcpy(&units[r], from[r] + i * sizeof(Unit), sizeof(Unit));
      memcpy(to + i * sizeof(units), units, sizeof(units));
    }
  }
}

}  // namespace moestro
