// Tensors as Python hands them over: where they are, what they hold, how they lie. All that Python names goes through
// here and is checked before a kernel sees an address.
//
// Read from a tensor's own attributes, 0.2 us each; by DLPack it would be 1.7 us. Nothing links against torch.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <string>

#include "experts.h"

namespace moestro {

enum class Element : int { kFp32 = 0, kFp16 = 1, kBf16 = 2, kUint8 = 3, kInt64 = 4 };  // the first three as in Type

class Array {
 public:
  // Of a tensor on the CPU; ValueError for one elsewhere, TypeError for something else. `name`: the argument's, for messages.
  Array(nanobind::handle tensor, const char* name);

  const char* name() const { return name_; }
  int64_t count() const { return count_; }
  int dims() const { return dims_; }
  int64_t size(int dim) const { return sizes_[dim]; }
  int64_t stride(int dim) const { return strides_[dim]; }

  // Its data, contiguous and of so many elements; ValueError otherwise.
  float* floats(int64_t count) const { return static_cast<float*>(of(Element::kFp32, count)); }
  uint8_t* bytes(int64_t count) const { return static_cast<uint8_t*>(of(Element::kUint8, count)); }
  int64_t* integers(int64_t count) const { return static_cast<int64_t*>(of(Element::kInt64, count)); }
  const uint8_t* packed(int64_t count) const;  // bytes that begin on a cache line, as packed weights do
  void* numbers(Type type, int64_t count) const { return of(static_cast<Element>(type), count); }

  // Its data, of this type, however it lies.
  void* data_of(Type type) const;
  uint8_t* bytes_of_rows() const;

  Type number_type() const;      // fp32, fp16 or bf16; ValueError for others
  int64_t rows_of(int64_t columns) const;  // how many there are in [..., columns]; ValueError for another shape

  [[noreturn]] void refuse(const std::string& wanted) const;

 private:
  static constexpr int kMostDims = 8;

  void* of(Element type, int64_t count) const;
  bool is_contiguous() const;

  const char* name_;
  uint8_t* data_;
  Element type_;
  int dims_;
  int64_t count_ = 1, sizes_[kMostDims], strides_[kMostDims];
};

}  // namespace moestro
