// Weights that come as floats, quantized into panels: with fitted scales and zeros that become bytes (Scale::kShifted),
// or as signed bytes (Code::kS8).
#pragma once

#include "experts.h"
#include "run.h"

namespace moestro {

// Where panels go: `together` of them one after another, and the next so many `stride` bytes behind these.
struct PanelRows {
  uint8_t* data;
  int64_t together, stride, panel_bytes;

  uint8_t* at(int64_t panel) const { return data + panel / together * stride + panel % together * panel_bytes; }
};

// A matrix [R, K], and of each row and group of its format's columns what solver.h found: weight = (code - zero) * scale.
struct FittedMatrix {
  MatrixFormat format;
  const uint8_t* weights;  // [R, K] of `type`
  Type type;
  int64_t rows, columns;
  const float *scales, *zeros;  // [R, ceil(K / group)]
};

// Rounds scales and zeros to what bytes hold and weights to the whole numbers that fit these best.
void write_fitted(Runner& runner, const FittedMatrix& matrix, const PanelRows& out);

// Matrices [R, K] whose format has signed bytes, fp16 scales and groups of 16, 32, 64 or 128 columns.
struct ByteMatrices {
  MatrixFormat format;
  const uint8_t* weights;  // [matrices, R, K] of `type`, K of them side by side
  Type type;
  int64_t rows, columns, matrix_stride, row_stride;  // strides in weights
};

// Rounds weights to signed bytes: the largest of a group is 127 scales. `out` has a matrix's panels together. Throws
// std::invalid_argument where a weight is not finite or no fp16 scale covers it; what was written is of no use then.
void write_signed_bytes(Runner& runner, const ByteMatrices& from, int64_t matrices, const PanelRows& out);

}  // namespace moestro
