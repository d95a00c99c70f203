// Products with weights in any format.

namespace {

// Calls do_with(F()) with the class of a float format, or do_with(Coded).
template <class Do>
inline void with_format(const MatrixFormat& f, Do do_with) {
  if (f.code == Code::kFp32) do_with(Fp32());
  else if (f.code == Code::kFp16) do_with(Fp16());
  else if (f.code == Code::kBf16) do_with(Bf16());
  else do_with(Coded(f));
}

// How n tokens of numbers of that type are packed.
inline Packing packing_of(const MatrixFormat& f, int64_t n, Type type) {
  Packing as;
  with_format(f, [&](auto format) {
    if constexpr (std::is_same_v<decltype(format), Coded>) as = packing_of(format, n);
    else as = packing_of(format, n, type);
  });
  return as;
}

inline void product(const MatrixFormat& f, const Panels& all, int64_t panels, int64_t K, const Tokens& x, float* scratch) {
  with_format(f, [&](auto format) { product(format, all, panels, K, x, scratch); });
}

// Columns of a panel as float32 [count, 16], from the beginning of a chunk on.
inline void convert(const MatrixFormat& f, const Panels& all, int64_t panel, int64_t begin, int64_t count, float* to) {
  with_format(f, [&](auto format) {
    if constexpr (!std::is_same_v<decltype(format), Coded>) convert(format, all, panel, begin, count, to);
    else if (format.is_strided()) convert_strided(format, all, panel, begin, count, to);
    else convert_codes(format, all.panel_of(panel, 0), begin, count, to);
  });
}

}  // namespace
