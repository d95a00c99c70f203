#include "arrays.h"

#include <stdexcept>

namespace nb = nanobind;

namespace moestro {
namespace {

constexpr const char* kNames[] = {"float32", "float16", "bfloat16", "uint8", "int64"};
constexpr int64_t kBytes[] = {4, 2, 2, 1, 8};
constexpr int kElements = 5;

// What a tensor is asked, as Python strings, and torch's dtypes, each one object for good.
struct Names {
  PyObject *is_cpu, *dtype, *shape, *stride, *data_ptr, *dtypes[kElements];

  Names() {
    is_cpu = PyUnicode_InternFromString("is_cpu");
    dtype = PyUnicode_InternFromString("dtype");
    shape = PyUnicode_InternFromString("shape");
    stride = PyUnicode_InternFromString("stride");
    data_ptr = PyUnicode_InternFromString("data_ptr");
    const nb::module_ torch = nb::module_::import_("torch");
    for (int i = 0; i < kElements; ++i) dtypes[i] = nb::object(torch.attr(kNames[i])).release().ptr();
  }
};

const Names& names() {
  static const Names* made = nullptr;  // under the GIL; an import may let go of it, which only costs a second one
  if (made == nullptr) made = new Names;
  return *made;
}

nb::object attribute(nb::handle of, PyObject* name) {
  PyObject* found = PyObject_GetAttr(of.ptr(), name);
  if (found == nullptr) throw nb::python_error();
  return nb::steal(found);
}

nb::object call(nb::handle of, PyObject* name) {
  PyObject* found = PyObject_CallMethodNoArgs(of.ptr(), name);
  if (found == nullptr) throw nb::python_error();
  return nb::steal(found);
}

}  // namespace

Array::Array(nb::handle tensor, const char* name) : name_(name) {
  try {
    const Names& known = names();
    const nb::object dtype = attribute(tensor, known.dtype);
    int type = 0;
    while (type < kElements && dtype.ptr() != known.dtypes[type]) ++type;
    if (type == kElements || attribute(tensor, known.is_cpu).ptr() != Py_True)
      throw std::invalid_argument(std::string(name) + ": expected numbers of a known type on the CPU");
    type_ = static_cast<Element>(type);
    const auto sizes = nb::cast<nb::tuple>(attribute(tensor, known.shape)), strides = nb::cast<nb::tuple>(call(tensor, known.stride));
    dims_ = static_cast<int>(nb::len(sizes));
    if (dims_ > kMostDims) throw std::invalid_argument(std::string(name) + ": too many dimensions");
    for (int i = 0; i < dims_; ++i) {
      sizes_[i] = nb::cast<int64_t>(sizes[i]);
      strides_[i] = nb::cast<int64_t>(strides[i]);
      count_ *= sizes_[i];
    }
    data_ = reinterpret_cast<uint8_t*>(nb::cast<uintptr_t>(call(tensor, known.data_ptr)));
  } catch (nb::python_error& error) {  // no tensor, or one without memory
    throw nb::type_error((std::string(name) + ": expected a tensor: " + error.what()).c_str());
  }
  if (count_ != 0 && data_ == nullptr) refuse("memory");
  if (reinterpret_cast<uintptr_t>(data_) % kBytes[static_cast<int>(type_)] != 0) refuse("an aligned address");
}

void Array::refuse(const std::string& wanted) const {
  std::string found = kNames[static_cast<int>(type_)];
  for (int i = 0; i < dims_; ++i) found += (i ? ", " : " [") + std::to_string(sizes_[i]);
  if (dims_ != 0) found += "]";
  throw std::invalid_argument(std::string(name_) + ": expected " + wanted + ", got " + found);
}

void* Array::of(Element type, int64_t count) const {
  const char* kind = kNames[static_cast<int>(type)];
  if (type_ != type || count_ != count) refuse(std::to_string(count) + " x " + kind);
  if (!is_contiguous()) refuse("contiguous " + std::string(kind));
  return data_;
}

const uint8_t* Array::packed(int64_t count) const {
  const uint8_t* data = bytes(count);
  if (reinterpret_cast<uintptr_t>(data) % kLineBytes != 0) refuse("an address on a cache line");
  return data;
}

void* Array::data_of(Type type) const {
  if (type_ != static_cast<Element>(type)) refuse(kNames[static_cast<int>(type)]);
  return data_;
}

uint8_t* Array::bytes_of_rows() const {
  if (type_ != Element::kUint8) refuse(kNames[static_cast<int>(Element::kUint8)]);
  return data_;
}

Type Array::number_type() const {
  if (type_ > Element::kBf16) refuse("float32, float16 or bfloat16");
  return static_cast<Type>(type_);
}

int64_t Array::rows_of(int64_t columns) const {
  if (dims_ == 0 || sizes_[dims_ - 1] != columns) refuse("[..., " + std::to_string(columns) + "]");
  return count_ / columns;
}

bool Array::is_contiguous() const {
  int64_t expected = 1;
  for (int i = dims_ - 1; i >= 0; --i) {
    if (sizes_[i] != 1 && strides_[i] != expected && count_ != 0) return false;
    expected *= sizes_[i];
  }
  return true;
}

}  // namespace moestro
