// How a matrix is written down: what memory/formats/descriptor.py says, for C++. docs/formats.md has the bytes.
//
// A panel holds 16 rows: [panel header][unit]..., a unit [unit header][chunk]..., a chunk [chunk header][codes of 64
// columns]. A weight is scale * (code - zero), or scale * code + add.
#pragma once

#include <cstdint>

namespace moestro {

constexpr int64_t kPanelRows = 16, kChunk = 64, kSuper = 256;  // rows of a panel, columns of a chunk and of a super-group

enum class Code : int { kFp32, kFp16, kBf16, kS8, kU8, kU2, kU3, kU4, kU5, kU6, kE2m1, kIq4nl, kE4m3 };
// kE4m3 has a float of the tensor in the panel's header; kBlock is one float for 16 rows and 128 columns; the last five
// are two-level: whole numbers for each group, and fp16 for each super-group of 256 columns.
enum class Scale : int { kNone, kFp16, kBf16, kFp32, kE8m0, kE4m3, kBlock, kK4, kK2, kK6, kK3, kIq4xs };
// kInt: a whole number for each row and group. kAdd: fp16, added. kMin: two-level, subtracted; of kK4 and kK2.
enum class Zero : int { kNone, kConstant, kFp16, kInt, kAdd, kMin };

struct MatrixFormat {
  Code code = Code::kBf16;
  int64_t group = 0;  // columns that share a scale; 0 for a whole row
  Scale scale = Scale::kNone;
  Zero zero = Zero::kNone;
  int64_t constant = 0;  // of Zero::kConstant
};

inline bool is_float(const MatrixFormat& f) { return f.code <= Code::kBf16; }
inline bool is_two_level(const MatrixFormat& f) { return f.scale >= Scale::kK4; }

inline int64_t code_bits(Code code) {
  switch (code) {
    case Code::kFp32: return 32;
    case Code::kFp16: case Code::kBf16: return 16;
    case Code::kS8: case Code::kU8: case Code::kE4m3: return 8;
    case Code::kU2: return 2;
    case Code::kU3: return 3;
    case Code::kU5: return 5;
    case Code::kU6: return 6;
    default: return 4;
  }
}

inline int64_t scale_bytes(Scale scale) {  // of a row and group
  switch (scale) {
    case Scale::kFp16: case Scale::kBf16: return 2;
    case Scale::kFp32: return 4;
    case Scale::kE8m0: case Scale::kE4m3: return 1;
    default: return 0;
  }
}

inline int64_t unit_columns(const MatrixFormat& f) {
  if (is_two_level(f)) return kSuper;
  if (f.group == 0) return int64_t{1} << 40;  // the whole row
  return f.group > kChunk ? f.group : kChunk;
}

inline int64_t groups_of_chunk(const MatrixFormat& f) { return f.group == 0 || f.group > kChunk ? 1 : kChunk / f.group; }

// Bytes of `groups` zeros of 16 rows.
inline int64_t zero_bytes(const MatrixFormat& f, int64_t groups) {
  if (f.zero == Zero::kFp16 || f.zero == Zero::kAdd) return groups * kPanelRows * 2;
  if (f.zero != Zero::kInt) return 0;
  return (code_bits(f.code) <= 4 ? (groups + 1) / 2 : groups) * kPanelRows;
}

inline int64_t panel_header_bytes(const MatrixFormat& f) {
  if (f.scale == Scale::kE4m3) return 4;
  if (f.group != 0 || is_float(f)) return 0;
  return kPanelRows * scale_bytes(f.scale) + zero_bytes(f, 1);
}

inline int64_t unit_header_bytes(const MatrixFormat& f) {
  if (f.scale == Scale::kBlock) return 4;
  if (is_two_level(f)) return kPanelRows * (f.zero == Zero::kMin ? 4 : 2);
  return f.group > kChunk ? kPanelRows * scale_bytes(f.scale) + zero_bytes(f, 1) : 0;
}

inline int64_t chunk_header_bytes(const MatrixFormat& f) {
  switch (f.scale) {
    case Scale::kK4: case Scale::kK3: return 3 * kPanelRows;
    case Scale::kK2: case Scale::kK6: return 4 * kPanelRows;
    case Scale::kIq4xs: return 2 * kPanelRows;
    default: break;
  }
  if (f.group == 0 || f.group > kChunk) return 0;
  const int64_t groups = groups_of_chunk(f);
  return groups * kPanelRows * scale_bytes(f.scale) + zero_bytes(f, groups);
}

inline int64_t chunk_bytes(const MatrixFormat& f) { return chunk_header_bytes(f) + kPanelRows * kChunk * code_bits(f.code) / 8; }

// Bytes of a panel of K columns.
inline int64_t panel_bytes(const MatrixFormat& f, int64_t K) {
  if (is_float(f)) return (f.code == Code::kBf16 ? (K + 1) / 2 * 2 : K) * kPanelRows * code_bits(f.code) / 8;
  const int64_t chunks = (K + kChunk - 1) / kChunk, unit = unit_columns(f), units = (K + unit - 1) / unit;
  return panel_header_bytes(f) + units * unit_header_bytes(f) + chunks * chunk_bytes(f);
}

// nullptr for a format that is none, and what is wrong with it otherwise.
inline const char* why_no_format(const MatrixFormat& f) {
  if (is_float(f)) return f.scale == Scale::kNone && f.zero == Zero::kNone ? nullptr : "floats have no scale";
  const bool fits = f.group == 0 || f.group == 16 || f.group == 32 || f.group == 64 || f.group == 128;
  if (!fits) return "group: not 16, 32, 64, 128 or 0 for a row";
  if (f.scale == Scale::kNone) return "scale: none";
  const int64_t of_scale = f.scale == Scale::kBlock                            ? 128
                           : f.scale == Scale::kK4 || f.scale == Scale::kIq4xs ? 32
                           : is_two_level(f)                                   ? 16
                                                                               : f.group;
  if (f.group != of_scale) return "group: not what its scale has";
  if (f.scale == Scale::kE4m3 && (f.group == 0 || f.group > kChunk)) return "group: too wide for scales of e4m3";
  if ((f.zero == Zero::kMin) != (f.scale == Scale::kK4 || f.scale == Scale::kK2)) return "zero: not what its scale has";
  const bool is_unsigned = f.code == Code::kU8 || (f.code >= Code::kU2 && f.code <= Code::kU6);
  if (f.zero != Zero::kNone && !is_unsigned) return "zero: of codes that are signed";
  if (f.zero == Zero::kConstant && (f.constant < 0 || f.constant >> code_bits(f.code) != 0)) return "constant: no code";
  return nullptr;
}

}  // namespace moestro
