// Weights that come as floats, quantized into panels: with fitted scales and zeros that become bytes (Scale::kShifted),
// or as signed bytes (Code::kS8).
#pragma once

#include "experts.h"
#include "run.h"

namespace moestro {

// A matrix [R, K], and of each row and group of its format's columns what solver.h found: weight = (code - zero) * scale.
struct FittedMatrix {
  MatrixFormat format;
  const uint8_t* weights;  // [R, K] of `type`
  Type type;
  int64_t rows, columns;
  const float *scales, *zeros;  // [R, ceil(K / group)]
};

// Rounds scales and zeros to what bytes hold and weights to the whole numbers that fit these best. `out` has
// matrix_bytes(format, rows, columns).
void write_fitted(Runner& runner, const FittedMatrix& matrix, uint8_t* out);

// A matrix [R, K] whose format has signed bytes, fp16 scales and groups of 16, 32, 64 or 128 columns.
struct ByteMatrix {
  MatrixFormat format;
  const uint8_t* weights;  // [R, K] of `type`
  Type type;
  int64_t rows, columns;
};

// Rounds weights to signed bytes: the largest of a group is 127 scales. `out` has matrix_bytes(format, rows, columns).
// Throws std::invalid_argument where a weight is not finite or no fp16 scale covers it; what was written is of no use then.
void write_signed_bytes(Runner& runner, const ByteMatrix& matrix, uint8_t* out);

}  // namespace moestro
