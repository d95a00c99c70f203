// Rows of a unit as plain arrays, and how they are written into a panel (formats.h, docs/formats.md).
#pragma once

#include <cstring>

#include "formats.h"

namespace moestro {

constexpr int64_t kSuper = 256;  // columns of a super-group
constexpr int64_t kMostGroups = kSuper / 16;

// One row of a unit, or of 256 columns of a wider one, as it is before it becomes part of a panel.
struct UnitRow {
  uint8_t codes[kSuper];
  uint32_t scale[kMostGroups], zero[kMostGroups];  // the bits of each group's
  uint16_t d, dmin;                                // of a super-group: fp16
};

inline uint16_t load16(const uint8_t* at) { uint16_t v; memcpy(&v, at, 2); return v; }
inline uint32_t load32(const uint8_t* at) { uint32_t v; memcpy(&v, at, 4); return v; }
inline uint64_t load64(const uint8_t* at) { uint64_t v; memcpy(&v, at, 8); return v; }
inline void store16(uint8_t* at, uint16_t v) { memcpy(at, &v, 2); }
inline void store32(uint8_t* at, uint32_t v) { memcpy(at, &v, 4); }
inline void store64(uint8_t* at, uint64_t v) { memcpy(at, &v, 8); }

constexpr uint64_t kEach = 0x0101010101010101ull;  // a one in each of 8 bytes

// Columns of a unit, at most 256: a whole row goes in as many pieces as it needs.
int64_t columns_at_once(const MatrixFormat& f);

// Writes 16 rows of columns [k, k + columns) into a panel, with what stands in their units before the codes. k is a multiple of
// columns_at_once, and columns are that or up to the end of the matrix.
void write_unit(const MatrixFormat& f, const PanelLayout& layout, const UnitRow* rows, int64_t k, int64_t columns, uint8_t* panel);

}  // namespace moestro
