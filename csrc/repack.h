// From the bytes of a checkpoint's file to panels, without loss: only places change, never a number.
#pragma once

#include <cstdint>
#include <vector>

#include "formats.h"
#include "run.h"

namespace moestro {

// How a file writes a matrix [R, K] down.
//   kPlain: floats or bytes, each at row * row_stride + column * column_stride.
//   kNibbles: [R, K / 2], the low half of a byte is the even column. Also words of 8 columns, the first lowest.
//   kAwq: 32-bit words [K, R / 8], AutoAWQ's order of rows. kGptq: words of 8 or 4 columns of a row [K / 8, R].
//   kGguf: rows of blocks, each with its own scales; the format says which.
//   kStrided: hqq's packing (BitPack) of a matrix with Scale::kColumn: bytes of 8 / bits weights, each part of all
//     weights in its own bits, the first in the highest; of 3 bits 32-bit words [ceil(g / 10), R / g * K].
enum class Layout : int { kPlain, kNibbles, kAwq, kGptq, kGguf, kStrided };

struct Raw {
  Layout layout = Layout::kPlain;
  int64_t rows = 0, columns = 0;
  const uint8_t* codes = nullptr;
  int64_t row_stride = 0, column_stride = 0;  // bytes; of kPlain
  const uint8_t* scales = nullptr;  // [R, groups] of scale_bytes; of kBlock floats [ceil(R / 128), ceil(K / 128)]; of kColumn [R / group, K]
  const uint8_t* zeros = nullptr;   // [R, groups]: whole numbers of a byte, or fp16; of kColumn bytes [R / group, K]
  uint8_t flip = 0;                 // what codes of a byte are combined with: 128 turns signed ones into unsigned ones
  float tensor_scale = 1;           // of Scale::kE4m3
  const int64_t* row_order = nullptr;     // [rows_taken]: which row comes where, or none
  int64_t rows_taken = 0;                 // R without an order
  const int64_t* column_order = nullptr;  // [K], or none; groups are of columns in this order
};

int64_t repack_column_unit(const MatrixFormat& format);  // columns at whose multiples a job may begin
int64_t raw_row_bytes(const Raw& raw, const MatrixFormat& format);  // of kGguf: of a row of blocks; 0 if there is no such type

// A matrix's rows [row_begin, row_begin + rows) in their order, and columns [column_begin, column_begin + columns), to
// whole panels at `out`. What reaches beyond the matrix is zero. column_begin is a multiple of a unit's columns.
struct RepackJob {
  const Raw* raw;
  MatrixFormat format;
  int64_t row_begin, rows, column_begin, columns;
  uint8_t* out;
};

// Throws std::invalid_argument where something cannot be kept, naming it; what was written is of no use then.
void repack(Runner& runner, const std::vector<RepackJob>& jobs);

}  // namespace moestro
