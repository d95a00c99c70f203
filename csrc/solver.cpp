#include "solver.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace moestro {
namespace {

// How many iterations make the zeros that hqq returns: those up to the first whose mean error is no smaller than the
// one before, its own change of the zeros included. Means are compared as float32, as hqq has them.
int iterations_of(const double (&sums)[kFitIterations], int64_t weights) {
  float best = std::numeric_limits<float>::infinity();
  for (int i = 0; i < kFitIterations; ++i) {
    const float mean = static_cast<float>(sums[i] / static_cast<double>(weights));
    if (!(mean < best)) return i + 1;
    best = mean;
  }
  return kFitIterations;
}

// The first group of all items that has a weight that is not finite.
void check_finite(const Fit& matrix, const std::vector<int64_t>& faults) {
  for (const int64_t at : faults) {
    if (at < 0) continue;
    const int64_t row = at / matrix.groups_of_row(), column = at % matrix.groups_of_row() * matrix.group;
    throw std::invalid_argument("weights: not all are finite in row " + std::to_string(row) + ", columns from " +
                                std::to_string(column));
  }
}

}  // namespace

void fit(Runner& runner, const Level& level, const Fit& matrix, bool iterate) {
  const int64_t groups = matrix.groups(), of_item = kFitItemWeights / matrix.group;
  const int items = static_cast<int>((groups + of_item - 1) / of_item);
  std::vector<int64_t> faults(items, -1);
  const auto on_all = [&](auto do_item) {
    runner.each(items, 0, items > 1, [&](int i, float*) {
      faults[i] = do_item(i, i * of_item, std::min(groups, (i + 1) * of_item));
    });
    check_finite(matrix, faults);
  };
  int iterations = 0;
  if (iterate) {
    std::vector<double> errors(static_cast<size_t>(items) * kFitIterations);
    on_all([&](int i, int64_t begin, int64_t end) {
      return level.fit_groups(matrix, begin, end, errors.data() + i * kFitIterations);
    });
    double sums[kFitIterations] = {};
    for (int i = 0; i < items; ++i)
      for (int t = 0; t < kFitIterations; ++t) sums[t] += errors[i * kFitIterations + t];
    iterations = iterations_of(sums, groups * matrix.group);
  }
  on_all([&](int, int64_t begin, int64_t end) { return level.code_groups(matrix, begin, end, iterations); });
}

}  // namespace moestro
