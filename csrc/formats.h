// A number format as a value, and the bytes that follow from it; memory/formats/base.py has the same in Python.
//
// A matrix [R, K] lies in panels of 16 rows. A panel of floats is its columns one after another. All others:
//   panel = [panel header][unit]...   unit = [what its chunks share][what each chunk has][codes of 64 columns]...
// with scales and zeros before the codes, of 16 rows side by side. A weight is scale * (code - zero), or
// scale * code + zero where the zero is additive.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moestro {

constexpr int64_t kPanel = 16;  // rows
constexpr int64_t kGroup = 64;  // columns of a chunk
constexpr int64_t kRow = 0;     // the group of a whole row

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

enum class Code : int {
  kFp32 = 0, kFp16 = 1, kBf16 = 2,  // floats, without scales
  kS8 = 3,                          // signed bytes
  kU2 = 4, kU3 = 5, kU4 = 6, kU5 = 7, kU6 = 8, kU8 = 9,  // whole numbers from 0
  kE2m1 = 10,   // of 4 bits: 0 .5 1 1.5 2 3 4 6 and their negatives
  kIq4nl = 11,  // of 4 bits: llama.cpp's table
  kE4m3 = 12,   // float8_e4m3fn
};

// What multiplies the codes of a row and group of columns.
enum class Scale : int {
  kNone = 0, kFp16 = 1, kBf16 = 2, kFp32 = 3,
  kE8m0 = 4,   // a byte: 2^(byte - 127)
  kE4m3 = 5,   // a byte, times a float32 of the whole tensor
  kBlock = 6,  // a float32 for 16 rows and 128 columns
  // Small whole numbers of each group, times an fp16 of 256 columns: llama.cpp's Q4_K and Q5_K, Q2_K, Q6_K, Q3_K, IQ4_XS.
  kK4 = 7, kK2 = 8, kK6 = 9, kK3 = 10, kIq4xs = 11,
  kShifted = 12,  // a byte of each group, times 2^(byte - 127) of the whole row
  kColumn = 13,   // (byte - fp16) * fp16, of a class of rows and a column
};

enum class Zero : int {
  kNone = 0,
  kConstant = 1,
  kFp16 = 2,  // of each row and group
  kInt = 3,   // a whole number of each row and group
  kAdd = 4,   // fp16, added to scale * code
  kMin = 5,   // small whole numbers times an fp16, subtracted: with the scales kK4 and kK2
  kFixed = 6,  // a byte of each row and group: byte * 2^(bits - 8) - 1/2, with kShifted
  kColumn = 7,  // (byte - float) * float, of a class of rows and a column, with kColumn
};

struct MatrixFormat {
  Code code = Code::kBf16;
  int64_t group = kGroup;  // columns that share a scale, or kRow; of kColumn, the rows of a class
  Scale scale = Scale::kNone;
  Zero zero = Zero::kNone;
  int32_t constant = 0;  // the zero, where it is one
  int64_t super_group = 0;  // of kColumn: scales that share two fp16

  bool operator==(const MatrixFormat& o) const {
    return code == o.code && group == o.group && scale == o.scale && zero == o.zero && constant == o.constant &&
           super_group == o.super_group;
  }
  bool operator!=(const MatrixFormat& o) const { return !(*this == o); }
  bool is_float() const { return code <= Code::kBf16; }
};

constexpr MatrixFormat kInt8{Code::kS8, 64, Scale::kFp16, Zero::kNone, 0};
constexpr MatrixFormat kInt4{Code::kU4, 64, Scale::kFp16, Zero::kFp16, 0};

// Where things lie in a panel of codes, in bytes.
struct PanelLayout {
  int64_t panel_header, shared, own;  // shared by the chunks of a unit, and of each chunk
  int64_t codes;                      // of a chunk
  int unit_shift;                     // a unit is 2^unit_shift chunks
  int groups;                         // of a chunk that have scales of their own
  int64_t unit_header = 0;            // all that is before a unit's codes

  bool begins_unit(int64_t chunk) const { return (chunk & ((int64_t{1} << unit_shift) - 1)) == 0; }
  int64_t unit_at(int64_t chunk) const {
    return panel_header + (chunk >> unit_shift) * (unit_header + (codes << unit_shift));
  }
  // Where the scales are that a chunk has for itself; if it has none, those of its unit.
  int64_t scales_at(int64_t chunk) const {
    return unit_at(chunk) + (own == 0 ? 0 : shared + (chunk & ((int64_t{1} << unit_shift) - 1)) * own);
  }
  int64_t codes_at(int64_t chunk) const {
    return panel_header + ((chunk >> unit_shift) + 1) * unit_header + chunk * codes;
  }
};

int64_t bits_of(Code code);
int64_t scale_bytes(Scale scale);  // of a row and group
inline bool is_strided(const MatrixFormat& format) { return format.scale == Scale::kColumn; }
inline bool is_two_level(const MatrixFormat& format) { return format.scale >= Scale::kK4 && !is_strided(format); }

PanelLayout layout_of(const MatrixFormat& format);

// Bytes of a panel of K columns, and of a matrix's panels.
int64_t panel_bytes(const MatrixFormat& format, int64_t K);
inline int64_t panels_bytes(const MatrixFormat& format, int64_t R, int64_t K) {
  return round_up(R, kPanel) / kPanel * panel_bytes(format, K);
}

// With kColumn, a matrix has a table behind its panels (an expert before its blocks): float32 scale and zero of all zeros,
// filled up to a cache line, and for each of some classes of rows, after which they repeat, fp16 scales of the columns'
// scales and then fp16 zeros of these, for whole chunks of columns.
struct ColumnTable {
  const uint8_t* at = nullptr;
  int64_t rows = 0, columns = 0;  // classes until they repeat, and columns up to a whole chunk
};
constexpr int64_t kTableHeader = 64;
inline int64_t table_columns(int64_t K) { return round_up(K, kGroup); }
int64_t table_rows(const MatrixFormat& format, int64_t R);  // 0 of other scales
int64_t table_bytes(const MatrixFormat& format, int64_t R, int64_t K);
inline int64_t matrix_bytes(const MatrixFormat& format, int64_t R, int64_t K) {
  return panels_bytes(format, R, K) + table_bytes(format, R, K);
}
// Which row of a matrix of R rows stands at place i: with kColumn the rows of a class are neighbours, R / group apart.
inline int64_t own_row(const MatrixFormat& format, int64_t R, int64_t i) {
  return is_strided(format) ? i % format.group * (R / format.group) + i / format.group : i;
}
inline int64_t place_of_row(const MatrixFormat& format, int64_t R, int64_t row) {
  if (!is_strided(format)) return row;
  const int64_t classes = R / format.group;
  return row % classes * format.group + row / classes;
}

// Neurons of an expert's block, at the least: as many as a unit of down's columns.
int64_t least_block(const MatrixFormat& down);

// What is wrong with a format, or null.
const char* fault_of(const MatrixFormat& format);

}  // namespace moestro
