// Root-mean-square norms, row by row: in plain torch they are eight operations, which at one token cost more than
// the arithmetic.

namespace {

inline float rounded(float value, Type type) {
  if (type == Type::kBf16) return scalar_from_bf16(bf16_of(value));
  return type == Type::kFp16 ? scalar_from_fp16(fp16_of(value)) : value;
}

// Each number of a row times `inverse`, rounded, times its weight. A loop for each type: compilers then use vectors.
template <Type kType>
void weigh_row(float* __restrict row, const float* __restrict weight, int64_t n, float inverse) {
  for (int64_t i = 0; i < n; ++i) row[i] = rounded(row[i] * inverse, kType) * weight[i];
}

// out = norm(x) * weight, where norm(x) is first rounded to the type of x; or, `offset` not 0, norm(x) * (offset +
// weight) in float32. `row` has room for x.width floats rounded up to a group; weight is float32 [width].
void rms_norm(const Input& x, int64_t at, const float* weight, float offset, float epsilon, void* out, float* row) {
  const int64_t n = x.width;
  read_row(x, at, nullptr, row);
  V squares[VP];  // 16 sums at every level, since one sum of thousands of squares loses bits
  for (V& s : squares) s = V::zero();
  for (int64_t i = 0; i < moestro::round_up(n, kGroup); i += kPanel)
    for (int v = 0; v < VP; ++v) squares[v] = fma(V::load(row + i + v * W), V::load(row + i + v * W), squares[v]);
  for (int v = 1; v < VP; ++v) squares[0] = squares[0] + squares[v];
  const float inverse = 1.0f / sqrtf(sum(squares[0]) / static_cast<float>(n) + epsilon);
  if (offset != 0) for (int64_t i = 0; i < n; ++i) row[i] = row[i] * inverse * (offset + weight[i]);
  else if (x.type == Type::kFp32) weigh_row<Type::kFp32>(row, weight, n, inverse);
  else if (x.type == Type::kBf16) weigh_row<Type::kBf16>(row, weight, n, inverse);
  else weigh_row<Type::kFp16>(row, weight, n, inverse);
  write_row(row, nullptr, n, x.type, out, at * n);
}

}  // namespace
