// Matrices in hqq's own packing whose scales belong to columns, to their panels (Layout::kStrided).
#pragma once

#include "panels.h"
#include "repack.h"

namespace moestro {

// The codes of hqq's packing: `row` is a place in the order of classes.
inline void read_strided(const Raw& raw, const MatrixFormat& f, int64_t row, int64_t k, int64_t n, uint8_t* to) {
  const int64_t bits = bits_of(f.code), member = row % f.group, classes = raw.rows / f.group;
  const int64_t* order = raw.column_order;
  if (bits == 3) {
    const int64_t words = (f.group + 9) / 10;
    const uint8_t* from = raw.codes + (member % words * classes + row / f.group) * raw.columns * 4;
    const int64_t shift = 27 - 3 * (member / words);
    for (int64_t i = 0; i < n; ++i) to[i] = load32(from + (order ? order[k + i] : k + i) * 4) >> shift & 7;
    return;
  }
  const int64_t held = bits == 2 || bits == 4 ? bits : 8, own = own_row(f, raw.rows, row), part = raw.rows * held / 8;
  const uint8_t* from = raw.codes + own % part * raw.columns;
  const int64_t shift = 8 - held - held * (own / part);
  const uint8_t mask = static_cast<uint8_t>((1 << held) - 1);
  if (order == nullptr) for (int64_t i = 0; i < n; ++i) to[i] = static_cast<uint8_t>(from[k + i] >> shift & mask);
  else for (int64_t i = 0; i < n; ++i) to[i] = static_cast<uint8_t>(from[order[k + i]] >> shift & mask);
}

// A panel's share of the scales and zeros of its class, for the chunk of n columns from k on.
inline void write_columns(const Raw& raw, const MatrixFormat& f, int64_t first, int64_t k, int64_t n, uint8_t* to) {
  const int64_t share = kGroup * kPanel / f.group, begin = first % f.group / kPanel * share, row = first / f.group * raw.columns;
  for (int64_t i = 0; i < share && begin + i < n; ++i) {
    const int64_t column = row + (raw.column_order ? raw.column_order[k + begin + i] : k + begin + i);
    to[i] = raw.scales[column];
    to[share + i] = raw.zeros[column];
  }
}

}  // namespace moestro
