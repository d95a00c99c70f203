// Weights with fitted scales and zeros, written into panels whose scales and zeros are bytes (Scale::kShifted).
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

}  // namespace moestro
