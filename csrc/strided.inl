// Products with weights whose scales and zeros belong to columns: Scale::kColumn (formats.h, memory/formats/strided.py).
//
// The rows of a class are neighbouring panels, which have equal shares of the bytes of its columns. A weight is
// (code - zero) * scale. Scales are folded into the activations, once for all rows of a class:
// y[r] = sum of code[r, k] * (x[k] * scale[k]) less the sum of x[k] * scale[k] * zero[k], which all rows share.

namespace {

// A chunk of the class of rows that the panel of_matrix belongs to, of which `first` is the first panel: what codes are
// multiplied with, and what comes off them.
inline void factors_of_columns(const Coded& c, const Panels& all, int64_t first, int64_t of_matrix, int64_t chunk,
                               float* scale, float* zero) {
  const int64_t of_class = c.group / kPanel, share = kGroup / of_class, at = c.layout.scales_at(all.within(chunk));
  uint8_t gathered[2][kGroup];
  const uint8_t* panel = all.panel_of(first, chunk);
  const uint8_t *scales = panel + at, *zeros = scales + kGroup;
  if (of_class > 1) {
    for (int64_t i = 0; i < of_class; ++i) {
      memcpy(gathered[0] + i * share, panel + i * all.stride + at, share);
      memcpy(gathered[1] + i * share, panel + i * all.stride + at + share, share);
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

// Columns of a panel as float32 [count, 16], from the beginning of a chunk on.
inline void convert_strided(const Coded& c, const Panels& all, int64_t panel, int64_t begin, int64_t count, float* to) {
  const int64_t first = first_of_class(c, all, panel);
  alignas(64) float scale[kGroup], zero[kGroup];
  const V table = counts();
  const auto of_codes = I::load_table(c.table);
  for (int64_t chunk = begin / kGroup; chunk * kGroup < begin + count; ++chunk, to += kGroup * kPanel) {
    factors_of_columns(c, all, first, panel, chunk, scale, zero);
    const uint8_t* codes = c.codes_at(all.panel_of(panel, chunk), all.within(chunk));
    with_unsigned(c.code, [&](auto code) {
      for (int s = 0; s < kSixteens; ++s)
        for_codes<decltype(code)>(codes, s, of_codes, table, [&](int k, const V (&w)[VP]) {
          const V less = V::set(zero[k]), times = V::set(scale[k]);
#pragma GCC unroll 4
          for (int v = 0; v < VP; ++v) ((w[v] - less) * times).store(to + k * kPanel + v * W);
        });
    });
  }
}

// The activations of some chunks for the rows of a class, and what comes off each token's sums.
constexpr int kScaledChunks = 8;
constexpr int kScaledTokens = V::kRegisters >= 8 * VP ? V::kRegisters / (4 * VP) : 1;
struct Scaled {
  alignas(64) float x[kScaledChunks][kScaledTokens][kGroup];
  V less[kScaledTokens];
};

// Scales N tokens for the class that `panel` belongs to, chunks from `begin` on.
inline void scale_tokens(const Coded& c, const Panels& all, int64_t panel, const Tokens& x, int64_t first, int64_t tokens,
                         int64_t begin, int chunks, Scaled& to) {
  alignas(64) float scale[kGroup], zero[kGroup];
  for (int i = 0; i < chunks; ++i) {
    factors_of_columns(c, all, first_of_class(c, all, panel), panel, begin + i, scale, zero);
    for (int64_t t = 0; t < tokens; ++t) {
      const float* xs = x.floats(begin + i, first + t);
#pragma GCC unroll 4
      for (int k = 0; k < kGroup; k += W) {
        const V scaled = V::load(xs + k) * V::load(scale + k);
        to.less[t] = fma(scaled, V::load(zero + k), to.less[t]);
        scaled.store(to.x[i][t] + k);
      }
    }
  }
}

// sums[t] += codes of P panels of one class times N scaled tokens. A panel has as many sums as four have together, since
// one would wait for its last addition.
template <class C, int P, int N>
inline void add_codes(const Coded& c, const Panels& all, int64_t panel, const Scaled& x, int64_t begin, int chunks,
                      V (&sums)[P][N][4 / P][VP]) {
  const V table = counts();
  const auto of_codes = I::load_table(c.table);
  for (int i = 0; i < chunks; ++i)
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const uint8_t* codes = c.codes_at(all.panel_of(panel + p, begin + i), all.within(begin + i));
      for (int64_t b = 0; b < c.layout.codes + c.layout.own; b += 64) prefetch(codes + b + kAhead);
#pragma GCC unroll 1
      for (int s = 0; s < kSixteens; ++s)
        for_codes<C>(codes, s, of_codes, table, [&](int k, const V (&w)[VP]) {
#pragma GCC unroll 4
          for (int t = 0; t < N; ++t) {
            const V times = V::set(x.x[i][t][k]);
#pragma GCC unroll 4
            for (int v = 0; v < VP; ++v) {
              V& sum = sums[p][t][(k % 2 + k / 4 % 2 * 2) % (4 / P)][v];
              sum = fma(w[v], times, sum);
            }
          }
        });
    }
}

// out[t, r] = (or +=) P panels of a class, from `panel` on, times N tokens, chunks [begin, end) of x.
template <class C, int P, int N>
inline void multiply_class(const Coded& c, const Panels& all, int64_t panel, const Tokens& x, int64_t first, int64_t begin,
                           int64_t end) {
  Scaled scaled;
  V sums[P][N][4 / P][VP];
  for (int t = 0; t < N; ++t) scaled.less[t] = V::zero();
  for (auto& of_panel : sums)
    for (auto& of_token : of_panel)
      for (auto& some : of_token)
        for (V& sum : some) sum = V::zero();
  for (int64_t k = begin; k < end; k += kScaledChunks) {
    const int chunks = static_cast<int>(end - k < kScaledChunks ? end - k : kScaledChunks);
    scale_tokens(c, all, panel, x, first, N, k, chunks, scaled);
    add_codes<C, P, N>(c, all, panel, scaled, k, chunks, sums);
  }
  const Panels to = all.results(panel, first, all.add);
  V out[P][N][VP];
  begin_sums(to, out);
  for (int t = 0; t < N; ++t) {
    const V off = V::set(sum(scaled.less[t]));
    for (int p = 0; p < P; ++p)
      for (int v = 0; v < VP; ++v) {
        V whole = sums[p][t][0][v];
        for (int i = 1; i < 4 / P; ++i) whole = whole + sums[p][t][i][v];
        out[p][t][v] = out[p][t][v] + (whole - off);
      }
  }
  store_sums(to, out);
}

// Calls do_one(n, first) for tiles of n tokens, each a power of two: the fewer there are, the sooner this is compiled.
template <int N = kScaledTokens, class Do>
inline void scaled_tiles(int64_t tokens, int64_t first, Do do_one) {
  for (; first + N <= tokens; first += N) do_one(std::integral_constant<int, N>(), first);
  if constexpr (N > 1) scaled_tiles<N / 2>(tokens, first, do_one);
}

// All panels times all tokens, four of a class at a time or one, and a block of columns after another.
template <class C>
inline void strided_product(C, const Coded& c, const Panels& all, int64_t panels, const Tokens& x, int64_t begin, int64_t end) {
  const int64_t of_class = c.group / kPanel;
  for (int64_t p = 0; p < panels;) {
    const int64_t of_this = of_class - (all.place.panel + p) % of_class, rest = panels - p < of_this ? panels - p : of_this;
    const int64_t height = rest >= 4 ? 4 : 1;
    scaled_tiles(x.count, 0, [&](auto n, int64_t first) {
      if (height == 4) multiply_class<C, 4, n>(c, all, p, x, first, begin, end);
      else multiply_class<C, 1, n>(c, all, p, x, first, begin, end);
    });
    p += height;
  }
}

inline void strided_product(const Coded& c, const Panels& all, int64_t panels, const Tokens& x) {
  with_unsigned(c.code, [&](auto code) {
    Panels to = all;
    for (int64_t k = 0; k < x.chunks(); k += all.block_chunks, to.add = true)
      strided_product(code, c, to, panels, x, k, x.chunks() - k < all.block_chunks ? x.chunks() : k + all.block_chunks);
  });
}

}  // namespace
