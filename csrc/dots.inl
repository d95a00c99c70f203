// Rows as they lie in memory, not in panels, each times one vector: keys of a cache, a router's weights.

namespace {

struct ReadFp32 {
  static constexpr int kBytes = 4;
  static V load(const uint8_t* p, int64_t i) { return V::load(reinterpret_cast<const float*>(p) + i); }
  static float one(const uint8_t* p, int64_t i) { return reinterpret_cast<const float*>(p)[i]; }
  static V first(I unit) { return float_of(unit); }  // the elements of 32 bits
};
struct ReadFp16 {
  static constexpr int kBytes = 2;
  static V load(const uint8_t* p, int64_t i) { return V::load_fp16(p + 2 * i); }
  static float one(const uint8_t* p, int64_t i) { return scalar_from_fp16(reinterpret_cast<const uint16_t*>(p)[i]); }
  static V first(I unit) { return even_fp16(unit); }
  static V second(I unit) { return odd_fp16(unit); }
};
struct ReadBf16 {
  static constexpr int kBytes = 2;
  static V load(const uint8_t* p, int64_t i) { return V::load_bf16(p + 2 * i); }
  static float one(const uint8_t* p, int64_t i) { return scalar_from_bf16(reinterpret_cast<const uint16_t*>(p)[i]); }
  static V first(I unit) { return even_bf16(unit); }
  static V second(I unit) { return odd_bf16(unit); }
};

// Calls do_with(reader) with the reader of that type.
template <class Do>
inline void with_reader(Type type, Do do_with) {
  if (type == Type::kFp32) do_with(ReadFp32());
  else if (type == Type::kFp16) do_with(ReadFp16());
  else do_with(ReadBf16());
}

// out[q][r] = x[q] . rows[r], for Q vectors and R rows of K. Each in 16 sums at every level, since one sum of thousands
// of products loses bits.
template <int Q, int R, class Reader>
inline void dot_tile(Reader read, const float* x, int64_t x_apart, const uint8_t* rows, int64_t K, float* out, int64_t out_apart) {
  V acc[Q][R][VP];
  for (auto& of_vector : acc)
    for (auto& of_row : of_vector)
      for (V& a : of_row) a = V::zero();
  int64_t k = 0;
  for (; k + kPanel <= K; k += kPanel) {
    for (int v = 0; v < VP; ++v) {
      V row[R];
      for (int r = 0; r < R; ++r) row[r] = read.load(rows + r * K * read.kBytes, k + v * W);
      for (int q = 0; q < Q; ++q) {
        const V xv = V::load(x + q * x_apart + k + v * W);
        for (int r = 0; r < R; ++r) acc[q][r][v] = fma(xv, row[r], acc[q][r][v]);
      }
    }
  }
  for (int q = 0; q < Q; ++q) {
    float* totals = out + q * out_apart;
    V sums[R];
    for (int r = 0; r < R; ++r) {
      sums[r] = acc[q][r][0];
      for (int v = 1; v < VP; ++v) sums[r] = sums[r] + acc[q][r][v];
    }
    if constexpr (R == 4) store_sums(sums, totals);
    else for (int r = 0; r < R; ++r) totals[r] = sum(sums[r]);
    for (int64_t i = k; i < K; ++i)
      for (int r = 0; r < R; ++r) totals[r] += x[q * x_apart + i] * read.one(rows + r * K * read.kBytes, i);
  }
}

// out[r] = rows[r, :] . x, for rows [count, K] that are four streams where there are so many.
void dot_rows(const float* x, const uint8_t* rows, Type type, int64_t count, int64_t K, float* out) {
  with_reader(type, [&](auto read) {
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) dot_tile<1, 4>(read, x, K, rows + r * K * read.kBytes, K, out + r, count);
    for (; r < count; ++r) dot_tile<1, 1>(read, x, K, rows + r * K * read.kBytes, K, out + r, count);
  });
}

}  // namespace
