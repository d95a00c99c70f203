// Products with weights whose scales and zeros belong to columns: Scale::kColumn (formats.h, memory/formats/strided.py).
//
// The rows of a class are neighbouring panels, which have equal shares of the bytes of its columns. A weight is
// (code - zero) * scale. For one token, scales are folded into the activations, once for all rows of a class:
// y[r] = sum of code[r, k] * (x[k] * scale[k]) less the sum of x[k] * scale[k] * zero[k], which all rows share.

namespace {

// A chunk of a class of rows, of which `first` is the first panel: what codes are multiplied with, and what comes off them.
inline void factors_of_columns(const Coded& c, const Panels& all, const uint8_t* first, int64_t of_matrix, int64_t chunk,
                               float* scale, float* zero) {
  const int64_t of_class = c.group / kPanel, share = kGroup / of_class, at = c.layout.scales_at(chunk);
  uint8_t gathered[2][kGroup];
  const uint8_t *scales = first + at, *zeros = scales + kGroup;
  if (of_class > 1) {
    for (int64_t i = 0; i < of_class; ++i) {
      memcpy(gathered[0] + i * share, first + i * all.stride + at, share);
      memcpy(gathered[1] + i * share, first + i * all.stride + at + share, share);
    }
    scales = gathered[0], zeros = gathered[1];
  }
  const ColumnTable& table = all.place.table;
  const int64_t row = (all.place.panel + of_matrix) / of_class % table.rows;
  const uint8_t* of_scales = table.at + moestro::kTableHeader + row * table.columns * 4 + (all.place.column + chunk * kGroup) * 2;
  float of_zeros[2];
  memcpy(of_zeros, table.at, sizeof(of_zeros));
  const V zero_scale = V::set(of_zeros[0]), zero_zero = V::set(of_zeros[1]);
#pragma GCC unroll 4
  for (int k = 0; k < kGroup; k += W) {
    const V less = V::load_fp16(of_scales + table.columns * 2 + 2 * k);
    ((to_float(I::load_bytes(scales + k)) - less) * V::load_fp16(of_scales + 2 * k)).store(scale + k);
    ((to_float(I::load_bytes(zeros + k)) - zero_zero) * zero_scale).store(zero + k);
  }
}

// The first panel of the class that a panel belongs to.
inline int64_t first_of_class(const Coded& c, const Panels& all, int64_t panel) {
  return panel - (all.place.panel + panel) % (c.group / kPanel);
}

// Calls do_with(C()) with the class of codes that are whole numbers from 0.
template <class Do>
inline void with_unsigned(Code code, Do do_with) {
  switch (code) {
    case Code::kU2: return do_with(U2());
    case Code::kU3: return do_with(U3());
    case Code::kU4: return do_with(U4());
    case Code::kU5: return do_with(U5());
    case Code::kU6: return do_with(U6());
    default: return do_with(U8());
  }
}

// The low bits of 32-bit lanes as floats, by looking them up: codes below kCounted need no other bit masked off.
#if defined(__AVX512F__)
constexpr int kCounted = 16;
inline V counts() { return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }
inline V counted(V table, I code) { return {_mm512_permutexvar_ps(code.v, table.v)}; }
#elif defined(__AVX2__)
constexpr int kCounted = 8;
inline V counts() { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)}; }
inline V counted(V table, I code) { return {_mm256_permutevar8x32_ps(table.v, code.v)}; }
#else
constexpr int kCounted = 0;
inline V counts() { return V::zero(); }
inline V counted(V, I code) { return to_float(code); }
#endif

// Byte N of 32-bit lanes as floats, where no code has 8 bits.
template <class C, int N>
inline V byte_of(V table, I quad) {
  I code = quad;
  if constexpr (N > 0) code = shift_right32<8 * N>(quad);
  if constexpr (C::kLargest < kCounted) return counted(table, code);
  else if constexpr (N == 3) return to_float(code);
  else return to_float(code & I::set32(0xFF));
}

// Calls put(column, codes as floats of 16 rows) for the sixteenth s of a chunk's columns, in the order of bytes.
template <class C, class Put>
inline void for_codes(const uint8_t* codes, int s, V table, Put put) {
  if constexpr (C::kQuads) {
    const auto nothing = I::load_table(kE2m1);  // no code that is strided looks anything up there
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      Quads q[VP];
#pragma GCC unroll 4
      for (int v = 0; v < VP; ++v) C::quads(codes, s, i, v, nothing, q[v]);
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const int column = 16 * s + 8 * i + 2 * j;  // bytes are columns 0 4 1 5 from here
        V code[VP];
#pragma GCC unroll 4
        for (int v = 0; v < VP; ++v) code[v] = byte_of<C, 0>(table, q[v][j]);
        put(column, code);
#pragma GCC unroll 4
        for (int v = 0; v < VP; ++v) code[v] = byte_of<C, 1>(table, q[v][j]);
        put(column + 4, code);
#pragma GCC unroll 4
        for (int v = 0; v < VP; ++v) code[v] = byte_of<C, 2>(table, q[v][j]);
        put(column + 1, code);
#pragma GCC unroll 4
        for (int v = 0; v < VP; ++v) code[v] = byte_of<C, 3>(table, q[v][j]);
        put(column + 5, code);
      }
    }
  } else {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      V even[VP], odd[VP];
#pragma GCC unroll 4
      for (int v = 0; v < VP; ++v) {
        const I pair = C::pair(codes + ((8 * s + j) * kPanel + v * W) * 2);
        even[v] = even_half(pair), odd[v] = odd_half(pair);
      }
      put(16 * s + 2 * j, even);
      put(16 * s + 2 * j + 1, odd);
    }
  }
}

template <class C>
inline void convert_chunk(const uint8_t* codes, const float* scale, const float* zero, float* to) {
  const V table = counts();
  for (int s = 0; s < kSixteens; ++s)
    for_codes<C>(codes, s, table, [&](int k, const V (&code)[VP]) {
      const V less = V::set(zero[k]), times = V::set(scale[k]);
#pragma GCC unroll 4
      for (int v = 0; v < VP; ++v) ((code[v] - less) * times).store(to + k * kPanel + v * W);
    });
}

// Columns [begin, begin + count) of a panel as float32 [count, 16], in whole chunks.
inline void convert_strided(const Coded& c, const Panels& all, int64_t panel, int64_t begin, int64_t count, float* to) {
  const int64_t first = first_of_class(c, all, panel);
  alignas(64) float scale[kGroup], zero[kGroup];
  for (int64_t chunk = begin / kGroup; chunk * kGroup < begin + count; ++chunk, to += kGroup * kPanel) {
    factors_of_columns(c, all, all.w + first * all.stride, panel, chunk, scale, zero);
    const uint8_t* codes = c.codes_at(all.w + panel * all.stride, chunk);
    const uint8_t* next = codes + (count + kGroup - 1) / kGroup * (c.layout.codes + c.layout.own);
    for (int64_t i = 0; i < c.layout.codes; i += 64) prefetch(next + i);
    with_unsigned(c.code, [&](auto code) { convert_chunk<decltype(code)>(codes, scale, zero, to); });
  }
}

// out[r] = (or +=) P panels of a class, from `panel` on, times one token.
template <class C, int P>
inline void multiply_class(const Coded& c, const Panels& all, int64_t panel, const Tokens& x) {
  constexpr int S = 4 / P;  // sums of a panel, since one waits for its last addition
  const uint8_t *first = all.w + first_of_class(c, all, panel) * all.stride, *w = all.w + panel * all.stride;
  alignas(64) float scale[kGroup], zero[kGroup];
  const V table = counts();
  V acc[P][S][VP], less = V::zero();
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
    for (int i = 0; i < S; ++i)
      for (int v = 0; v < VP; ++v) acc[p][i][v] = V::zero();
  for (int64_t chunk = 0; chunk < x.columns / kGroup; ++chunk) {
    factors_of_columns(c, all, first, panel, chunk, scale, zero);
    const float* xs = x.floats + chunk * kGroup;
#pragma GCC unroll 4
    for (int k = 0; k < kGroup; k += W) {
      const V scaled = V::load(xs + k) * V::load(scale + k);
      less = fma(scaled, V::load(zero + k), less);
      scaled.store(scale + k);
    }
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const uint8_t* codes = c.codes_at(w + p * all.stride, chunk);
      for (int64_t i = 0; i < c.layout.codes + c.layout.own; i += 64) prefetch(codes + i + kAhead);
#pragma GCC unroll 1
      for (int s = 0; s < kSixteens; ++s)
        for_codes<C>(codes, s, table, [&](int k, const V (&code)[VP]) {
          const V times = V::set(scale[k]);
#pragma GCC unroll 4
          for (int v = 0; v < VP; ++v) {
            V& sum = acc[p][(k % 2 + k / 4 % 2 * 2) % S][v];
            sum = fma(code[v], times, sum);
          }
        });
    }
  }
  const V off = V::set(sum(less));
  V out[P][1][VP];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < VP; ++v) {
      V whole = acc[p][0][v];
      for (int i = 1; i < S; ++i) whole = whole + acc[p][i][v];
      out[p][0][v] = whole - off;
    }
  finish(Panels{w, all.stride, all.out + panel * all.apart, all.apart, all.ld, all.add}, out);
}

// All panels times one token, four of a class at a time.
template <class C>
inline void strided_product(C, const Coded& c, const Panels& all, int64_t panels, const Tokens& x) {
  const int64_t of_class = c.group / kPanel;
  for (int64_t p = 0; p < panels;) {
    const int64_t of_this = of_class - (all.place.panel + p) % of_class, rest = panels - p < of_this ? panels - p : of_this;
    if (rest >= 4) multiply_class<C, 4>(c, all, p, x), p += 4;
    else if (rest >= 2) multiply_class<C, 2>(c, all, p, x), p += 2;
    else multiply_class<C, 1>(c, all, p, x), p += 1;
  }
}

// As weights.h has it, of one of some panels.
inline void convert(const Coded& c, const Panels& all, int64_t panel, int64_t begin, int64_t count, float* to) {
  if (c.is_strided()) convert_strided(c, all, panel, begin, count, to);
  else convert(c, all.w + panel * all.stride, begin, count, to);
}

inline void product(const Coded& c, const Panels& all, int64_t panels, int64_t K, const Tokens& x, float* tile) {
  if (x.count == 1 && c.is_strided()) return with_unsigned(c.code, [&](auto code) { strided_product(code, c, all, panels, x); });
  if (x.count == 1) return with_code(c.code, [&](auto code) { one_product(code, c, all, panels, x); });
  if (x.as != Packing::kFloats) return few_product(c, all, panels, x, tile);
  many_product(all, panels, K, x, tile, [&](int64_t panel, int64_t k, int64_t count, float* to) {
    convert(c, all, panel, k, count, to);
  });
}

// Calls do_with(F()) with the class of a format that has kernels of its own, or do_with(Coded).
template <class Do>
inline void with_format(const MatrixFormat& f, Do do_with) {
  if (f.code == Code::kFp32) do_with(Fp32());
  else if (f.code == Code::kFp16) do_with(Fp16());
  else if (f.code == Code::kBf16) do_with(Bf16());
  else if (f == moestro::kInt8) do_with(Int8());
  else if (f == moestro::kInt4) do_with(Int4());
  else do_with(Coded(f));
}

inline Packing packing_of(const MatrixFormat& f, int64_t n, Type type) {
  Packing as = Packing::kFloats;
  with_format(f, [&](auto format) { as = packing_of(format, n, type); });
  return as;
}

inline void product(const MatrixFormat& f, const Panels& all, int64_t panels, int64_t K, const Tokens& x, float* tile) {
  with_format(f, [&](auto format) { product(format, all, panels, K, x, tile); });
}

}  // namespace
