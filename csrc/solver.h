// Half-quadratic quantization: whole numbers, a scale and a zero for each group of columns of a matrix.
//
// Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023): the scale spans a group's
// extremes, and the zero is improved in turns with the whole numbers, while errors are shrunk towards sparse ones. The
// rules of start, steps and end are those of the hqq package, version 0.2.8 (Quantizer.quantize with axis=1). Its end
// depends on the whole matrix: iteration ends when the mean error of all weights falls no more.
#pragma once

#include <cstdint>

#include "experts.h"
#include "run.h"

namespace moestro {

constexpr int kFitIterations = 20;  // at most
constexpr int kFitKept = 10;        // after so many the zeros are kept: most matrices take as many
constexpr int64_t kMostFitGroup = 128;
constexpr int64_t kFitItemWeights = 1 << 16;  // of an item, so that sums do not depend on the number of threads
constexpr float kLeastFitScale = 1 / 2e4f;    // groups of a smaller one, in which hqq takes no steps, keep their start
constexpr float kLeastFitRange = 1e-30f;      // groups of a smaller range hold one weight
// The norm 0.7 with beta 10 shrinks an error e to |e| - |e|^-0.3 / 10, or to 0; to 0 while it is below this.
constexpr float kFitPower = -0.3f, kFitShrink = 0.1f, kFitFree = 0.17f;

// One matrix [R, K]; G = ceil(K / group) groups a row, of which the last is filled up with weights of 0.
struct Fit {
  const uint8_t* weights;  // [R, K] of `type`
  Type type;
  int64_t rows, columns, group;
  float levels;        // the largest whole number
  bool rounded_zero;   // at the start
  uint8_t* codes;      // [R, G * group]
  float *scales, *zeros;  // [R, G]: weight = (code - zero) * scale

  int64_t groups_of_row() const { return (columns + group - 1) / group; }
  int64_t groups() const { return rows * groups_of_row(); }
};

// Fills codes, scales and zeros. `iterate`: improve the zeros, rather than keep those of the start. Throws
// std::invalid_argument where a weight is not finite, naming its group; what was written is of no use then.
void fit(Runner& runner, const Level& level, const Fit& matrix, bool iterate);

}  // namespace moestro
