// What Python sees of repacking: matrices as files hold them, each checked against its format before a byte is read.
#include <nanobind/nanobind.h>

#include <string>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "checks.h"
#include "repack.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace moestro;

namespace {

struct Stored {
  Raw raw;
  MatrixFormat format;
};

int64_t code_bytes(const Raw& raw, const MatrixFormat& f) {
  const int64_t bits = bits_of(f.code);
  switch (raw.layout) {
    case Layout::kNibbles:
      require(bits == 4, "codes: nibbles hold 4 bits");
      return raw.rows * ((raw.columns + 1) / 2);
    case Layout::kAwq:
      require(bits == 4 && raw.rows % 8 == 0, "codes: words of AWQ hold 8 rows of 4 bits");
      return raw.columns * (raw.rows / 8) * 4;
    case Layout::kGptq:
      require((bits == 4 || bits == 8) && raw.columns % (32 / bits) == 0, "codes: words of GPTQ hold whole columns of 4 or 8 bits");
      return raw.columns / (32 / bits) * raw.rows * 4;
    case Layout::kGguf: {
      const int64_t bytes = raw_row_bytes(raw, f);
      require(bytes > 0, "codes: no blocks of GGUF of that format and width");
      return raw.rows * bytes;
    }
    case Layout::kStrided:
      if (bits == 3) return (f.group + 9) / 10 * (raw.rows / f.group) * raw.columns * 4;
      return raw.rows * raw.columns * (bits == 2 || bits == 4 ? bits : 8) / 8;
    default:
      require(bits >= 8, "codes: plain ones are whole bytes");
      require(raw.row_stride >= 0 && raw.row_stride <= kMostSize && raw.column_stride >= 0 && raw.column_stride <= kMostSize,
              "strides: not in bytes of a matrix");
      return (raw.rows - 1) * raw.row_stride + (raw.columns - 1) * raw.column_stride + bits / 8;
  }
}

const int64_t* order_of(nb::handle given, const char* name, int64_t most, int64_t* count) {
  const Array array(given, name);
  *count = array.count();
  const int64_t* order = array.integers(*count);
  for (int64_t i = 0; i < *count; ++i) {
    if (order[i] < 0 || order[i] >= most) throw std::out_of_range(std::string(name) + ": no " + std::to_string(order[i]));
  }
  return order;
}

void make_stored(Stored* self, const MatrixFormat& format, Layout layout, int64_t rows, int64_t columns, nb::handle codes,
                 int64_t row_stride, int64_t column_stride, nb::handle scales, nb::handle zeros, int flip, float tensor_scale,
                 nb::handle row_order, nb::handle column_order) {
  Raw raw;
  check_size(rows, "rows");
  check_size(columns, "columns");
  raw.layout = layout, raw.rows = rows, raw.columns = columns;
  raw.row_stride = row_stride, raw.column_stride = column_stride;
  require(is_strided(format) == (layout == Layout::kStrided), "layout: does not fit the format");
  require(!is_strided(format) || rows % format.group == 0, "rows: no whole classes");
  require(!is_strided(format) || row_order.is_none(), "row_order: classes have their own");
  require(flip == 0 || flip == 128, "flip: not 0 or 128");
  raw.flip = static_cast<uint8_t>(flip), raw.tensor_scale = tensor_scale;
  const Array bytes(codes, "codes");
  const int64_t wanted = code_bytes(raw, format);
  raw.codes = bytes.bytes(layout == Layout::kPlain ? bytes.count() : wanted);
  if (bytes.count() < wanted) bytes.refuse(std::to_string(wanted) + " bytes");
  if (layout == Layout::kStrided) {
    raw.scales = Array(scales, "scales").bytes(rows / format.group * columns);
    raw.zeros = Array(zeros, "zeros").bytes(rows / format.group * columns);
  } else if (!format.is_float() && layout != Layout::kGguf) {
    const Array sides(scales, "scales");
    raw.scales = sides.bytes(sides.count());
    const int64_t group = format.group == kRow ? columns : format.group, groups = (columns + group - 1) / group;
    if (format.scale == Scale::kBlock) {
      sides.bytes((rows + 127) / 128 * groups * 4);
    } else {
      sides.bytes(rows * groups * scale_bytes(format.scale));
    }
    if (format.zero != Zero::kNone && format.zero != Zero::kConstant)
      raw.zeros = Array(zeros, "zeros").bytes(rows * groups * (format.zero == Zero::kInt ? 1 : 2));
  }
  raw.rows_taken = rows;
  if (!row_order.is_none()) raw.row_order = order_of(row_order, "row_order", rows, &raw.rows_taken);
  if (!column_order.is_none()) {
    int64_t count = 0;
    require(layout != Layout::kGguf, "column_order: blocks of GGUF keep theirs");
    raw.column_order = order_of(column_order, "column_order", columns, &count);
    require(count == columns, "column_order: not all columns");
  }
  new (self) Stored{raw, format};
}

void repack_stored(Runner& runner, const nb::object& jobs) {
  std::vector<RepackJob> list;
  std::vector<nb::object> kept;
  for (const nb::handle item : jobs) {
    const char* expected = "jobs: expected matrix, first row, rows, first column, columns and out";
    if (!PyTuple_Check(item.ptr()) || nb::len(item) != 6) throw nb::type_error(expected);
    const nb::tuple job = nb::borrow<nb::tuple>(item);
    const Stored* stored = nullptr;
    int64_t sizes[4];
    if (!nb::try_cast(job[0], stored) || stored == nullptr) throw nb::type_error(expected);
    for (int i = 0; i < 4; ++i)
      if (!nb::try_cast(job[i + 1], sizes[i])) throw nb::type_error(expected);
    const auto [row, rows, column, columns] = sizes;
    require(row >= 0 && row <= kMostSize && column >= 0 && column < stored->raw.columns, "jobs: begins beyond the matrix");
    check_size(rows, "rows");
    check_size(columns, "columns");
    const int64_t unit = stored->format.is_float() ? 2 : repack_column_unit(stored->format);
    const bool is_whole = columns % unit == 0 || column + columns >= stored->raw.columns;
    require(column % unit == 0 && is_whole, "jobs: begins or ends within a unit of columns");
    require(!is_strided(stored->format) || row % stored->format.group == 0, "jobs: begins within a class of rows");
    uint8_t* out = Array(job[5], "out").bytes(panels_bytes(stored->format, rows, columns));
    list.push_back({&stored->raw, stored->format, row, rows, column, columns, out});
    kept.push_back(nb::borrow(job[0]));
  }
  nb::gil_scoped_release release;
  repack(runner, list);
}

}  // namespace

void bind_repack(nb::module_& m) {
  nb::enum_<Layout>(m, "Layout")
      .value("plain", Layout::kPlain)
      .value("nibbles", Layout::kNibbles)
      .value("awq", Layout::kAwq)
      .value("gptq", Layout::kGptq)
      .value("gguf", Layout::kGguf)
      .value("strided", Layout::kStrided);
  nb::class_<Stored>(m, "Stored")
      .def("__init__", &make_stored, nb::kw_only(), "format"_a, "layout"_a, "rows"_a, "columns"_a, "codes"_a, "row_stride"_a = 0,
           "column_stride"_a = 0, "scales"_a.none() = nb::none(), "zeros"_a.none() = nb::none(), "flip"_a = 0, "tensor_scale"_a = 1.0f,
           "row_order"_a.none() = nb::none(), "column_order"_a.none() = nb::none(), nb::keep_alive<1, 6>(),
           nb::keep_alive<1, 9>(), nb::keep_alive<1, 10>(), nb::keep_alive<1, 13>(), nb::keep_alive<1, 14>());
  m.def("repack", &repack_stored, "runner"_a, "jobs"_a);
}
