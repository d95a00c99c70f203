// What Python sees of checksums.
#include <nanobind/nanobind.h>

#include "arrays.h"
#include "bindings.h"
#include "checks.h"
#include "checksum.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace moestro;

namespace {

uint32_t checked(int64_t crc, const char* what) {
  require(crc >= 0 && crc <= UINT32_MAX, what);
  return static_cast<uint32_t>(crc);
}

uint32_t crc_of(nb::handle data, int64_t crc, bool by_tables) {
  const Array array(data, "data");
  const uint8_t* bytes = array.bytes(array.count());
  const uint32_t before = checked(crc, "crc: no number of 32 bits");
  nb::gil_scoped_release release;
  return by_tables ? crc32c_by_tables(bytes, array.count(), before) : crc32c(bytes, array.count(), before);
}

uint32_t combine(int64_t first, int64_t second, int64_t second_bytes) {
  require(second_bytes >= 0, "second_bytes: below 0");
  return crc32c_combine(checked(first, "first: no number of 32 bits"), checked(second, "second: no number of 32 bits"),
                        second_bytes);
}

}  // namespace

void bind_checksum(nb::module_& m) {
  m.def("crc32c", &crc_of, "data"_a, "crc"_a = 0, "by_tables"_a = false);
  m.def("crc32c_combine", &combine, "first"_a, "second"_a, "second_bytes"_a);
}
