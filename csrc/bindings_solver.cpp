// What Python sees of the solver: a matrix and where its codes, scales and zeros go, checked before a weight is read.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "arrays.h"
#include "bindings.h"
#include "checks.h"
#include "fitted.h"
#include "solver.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace moestro;

namespace {

void solve(Runner& runner, const std::string& level_name, nb::handle weights, int64_t rows, int64_t columns, int64_t bits,
           int64_t group, bool iterate, bool round_zero, nb::handle codes, nb::handle scales, nb::handle zeros) {
  const Level& level = level_of(level_name);
  check_size(rows, "rows");
  check_size(columns, "columns");
  require((bits >= 2 && bits <= 6) || bits == 8, "bits: expected 2, 3, 4, 5, 6 or 8");
  require(group == 16 || group == 32 || group == 64 || group == 128, "group: expected 16, 32, 64 or 128 columns");
  const Array from(weights, "weights");
  Fit matrix{};
  matrix.type = from.number_type();
  matrix.weights = static_cast<const uint8_t*>(from.numbers(matrix.type, rows * columns));
  matrix.rows = rows, matrix.columns = columns, matrix.group = group;
  matrix.levels = static_cast<float>((1 << bits) - 1), matrix.rounded_zero = round_zero;
  const int64_t groups = matrix.groups();
  matrix.codes = Array(codes, "codes").bytes(groups * group);
  matrix.scales = Array(scales, "scales").floats(groups);
  matrix.zeros = Array(zeros, "zeros").floats(groups);
  nb::gil_scoped_release release;
  fit(runner, level, matrix, iterate);
}

// Bytes [blocks, a block's panels] that panels go to, in so many blocks or in any number that divides them.
PanelRows panel_rows(nb::handle tensor, const MatrixFormat& format, int64_t panels, int64_t columns, int64_t blocks) {
  const Array out(tensor, "out");
  if (out.dims() != 2) out.refuse("two dimensions");
  const int64_t size = panel_bytes(format, columns), found = out.size(0);
  if (found < 1 || (blocks != 0 && found != blocks) || panels % found != 0) out.refuse("a row for each block of panels");
  const int64_t together = panels / found, stride = out.stride(0);
  if (out.size(1) != together * size || out.stride(1) != 1 || (found > 1 && stride < together * size))
    out.refuse("rows of " + std::to_string(together * size) + " bytes side by side");
  return {out.bytes_of_rows(), together, stride, size};
}

void write_panels(Runner& runner, const MatrixFormat& format, nb::handle weights, int64_t rows, int64_t columns,
                  nb::handle scales, nb::handle zeros, nb::handle out) {
  check_size(rows, "rows");
  check_size(columns, "columns");
  require(format.scale == Scale::kShifted, "format: its scales are no bytes");
  const Array from(weights, "weights");
  FittedMatrix matrix{format, nullptr, from.number_type(), rows, columns, nullptr, nullptr};
  matrix.weights = static_cast<const uint8_t*>(from.numbers(matrix.type, rows * columns));
  const int64_t groups = rows * ((columns + format.group - 1) / format.group);
  matrix.scales = Array(scales, "scales").floats(groups);
  matrix.zeros = Array(zeros, "zeros").floats(groups);
  const PanelRows to = panel_rows(out, format, (rows + kPanel - 1) / kPanel, columns, 0);
  nb::gil_scoped_release release;
  write_fitted(runner, matrix, to);
}

void write_byte_panels(Runner& runner, const MatrixFormat& format, nb::handle weights, int64_t rows, int64_t columns,
                       nb::handle out) {
  check_size(rows, "rows");
  check_size(columns, "columns");
  require(format.code == Code::kS8 && format.scale == Scale::kFp16 && format.group != 0,
          "format: its codes are no signed bytes with a float16 scale for each group");
  const Array from(weights, "weights");
  if (from.dims() != 3 || from.size(0) < 1 || from.size(1) != rows || from.size(2) != columns || (columns > 1 && from.stride(2) != 1))
    from.refuse("[blocks, " + std::to_string(rows) + ", " + std::to_string(columns) + "], columns side by side");
  const int64_t blocks = from.size(0), panels = (rows + kPanel - 1) / kPanel;
  require(blocks <= kMostSize / panels, "weights: too many blocks");
  const Type type = from.number_type();
  const auto* data = static_cast<const uint8_t*>(from.data_of(type));
  const ByteMatrices matrices{format, data, type, rows, columns, from.stride(0), from.stride(1)};
  const PanelRows to = panel_rows(out, format, blocks * panels, columns, blocks);
  nb::gil_scoped_release release;
  write_signed_bytes(runner, matrices, blocks, to);
}

}  // namespace

void bind_solver(nb::module_& m) {
  m.def("write_signed_bytes", &write_byte_panels, "runner"_a, "format"_a, "weights"_a, "rows"_a, "columns"_a, "out"_a);
  m.def("write_fitted", &write_panels, "runner"_a, "format"_a, "weights"_a, "rows"_a, "columns"_a, "scales"_a, "zeros"_a, "out"_a);
  m.def("solve", &solve, "runner"_a, "level"_a, "weights"_a, "rows"_a, "columns"_a, "bits"_a, "group"_a, "iterate"_a,
        "round_zero"_a, "codes"_a, "scales"_a, "zeros"_a);
}
