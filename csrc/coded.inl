// Products with weights in codes.
//
// What stands in the headers becomes floats first (factors_of), a chunk at a time, and the codes meet the tokens' integers:
// their products are summed exactly within a group of columns. So kernels differ by code alone, and a token's result has
// the same bits however many tokens are beside it. Few tokens meet codes in registers; many meet operands of whole numbers
// that were made once for all of them. Codes of e4m3, which is no whole number, meet floats.

namespace {

// Operands are vectors of weights as dot products take them, of 16 rows each: [16][4] bytes, which meet the high and the
// low bytes of tokens, or [16][2] 16-bit integers.
#if defined(MOESTRO_BYTE_DOTS)
constexpr int kOperandColumns = 4, kPlanes = 2;
#else
constexpr int kOperandColumns = 2, kPlanes = 1;
#endif
constexpr int kOperands = kGroup / kOperandColumns;      // of a chunk
constexpr int kStepOperands = 8 / kOperandColumns;       // of 8 columns
constexpr int kUnit = 2 * kGroup, kPlane = kGroup;       // bytes of a token's chunk of integers, and of its plane

template <class C>
inline void operands_of(const uint8_t* codes, int step, int v, [[maybe_unused]] decltype(I::load_table(nullptr)) table,
                        I (&w)[kStepOperands]) {
#if defined(MOESTRO_BYTE_DOTS)
  C::quads(codes, step / 2, step % 2, v, table, w);
#else
  if constexpr (C::kQuads) {
    const I low = I::set16(0x00FF);
    Quads q;
    C::quads(codes, step / 2, step % 2, v, table, q);
    for (int j = 0; j < 2; ++j) {
      w[j] = q[j] & low;
      w[j + 2] = shift_right16<8>(q[j]);
    }
  } else {
    for (int j = 0; j < 4; ++j) w[j] = C::pair(codes + ((4 * step + j) * kPanel + v * W) * 2);
  }
#endif
}

inline I dot(I weights, I x, I sum) {
#if defined(MOESTRO_BYTE_DOTS)
  return dot_bytes(weights, x, sum);
#else
  return dot_pairs(weights, x, sum);
#endif
}
inline I dot(I weights, const uint8_t* x, I sum) { return dot(weights, I::set_lane(x), sum); }

// What comes off each code of an operand.
inline int32_t less_of(const Coded& c) {
#if defined(MOESTRO_BYTE_DOTS)
  if (c.code == Code::kS8) return 128;
#endif
  return c.constant;
}

// Whether one token meets codes as bytes by instructions for pairs of them: where the 16-bit sums of a sixteenth suffice,
// of 8 products of a code and a signed byte.
template <class C>
constexpr bool meets_byte_pairs() {
#if defined(MOESTRO_BYTE_PAIRS)
  if constexpr (!std::is_same_v<C, E4m3>)
    if constexpr (C::kQuads) return 8 * C::kLargest * 128 <= 32767;
#endif
  return false;
}

inline Packing packing_of(const Coded& c, int64_t n) {
  if (!c.is_whole() || c.is_strided()) return {};
  Packing as{Form::kPairs, c.layout.groups, less_of(c), n >= kCodeTilesFrom};
#if defined(MOESTRO_BYTE_DOTS)
  as.form = c.is_plain() ? Form::kPlainBytes : Form::kQuadBytes;
#else
  with_code(c.code, [&](auto code) {
    if (n == 1 && meets_byte_pairs<decltype(code)>()) as.form = Form::kQuadBytes;
  });
#endif
  return as;
}

// Sums with a sixteenth s of P panels: the first counts 256 times where there are two planes.
template <class C, int P, int N, int S, class T>
inline void meet(const uint8_t* codes, int64_t stride, int s, const uint8_t* x, T table, I (&dots)[P][N][S][VP]) {
  constexpr int kStepBytes = C::kBytes / kSixteens;
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
    for (int i = 0; i < kStepBytes; i += 64) prefetch(codes + p * stride + s * kStepBytes + i + kAhead);
#if defined(MOESTRO_BYTE_PAIRS)
  if constexpr (N == 1 && meets_byte_pairs<C>()) {
    I of_x[4][2];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q)
      for (int plane = 0; plane < 2; ++plane) of_x[q][plane] = I::set_lane(x + plane * kPlane + 16 * s + 4 * q);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < VP; ++v) {
        Quads q;
        C::quads(codes + p * stride, s, 0, v, table, q);
        I high = add16(multiply_bytes(q[0], of_x[0][0]), multiply_bytes(q[1], of_x[1][0]));
        I low = add16(multiply_bytes(q[0], of_x[0][1]), multiply_bytes(q[1], of_x[1][1]));
        C::quads(codes + p * stride, s, 1, v, table, q);
        high = add16(high, add16(multiply_bytes(q[0], of_x[2][0]), multiply_bytes(q[1], of_x[3][0])));
        low = add16(low, add16(multiply_bytes(q[0], of_x[2][1]), multiply_bytes(q[1], of_x[3][1])));
        I& sum = dots[p][0][0][v];
        sum = dot_pairs(low, I::set16(1), dot_pairs(high, I::set16(256), sum));
      }
    return;
  }
#endif
#pragma GCC unroll 2
  for (int step = 2 * s; step < 2 * s + 2; ++step)
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < VP; ++v) {
        I w[kStepOperands];
        operands_of<C>(codes + p * stride, step, v, table, w);
#pragma GCC unroll 4
        for (int j = 0; j < kStepOperands; ++j)
#pragma GCC unroll 4
          for (int t = 0; t < N; ++t) {
            const uint8_t* at = x + t * kUnit + 4 * (step * kStepOperands + j);
            I(&sums)[S][VP] = dots[p][t];
            if constexpr (kPlanes == 2) {
              sums[0][v] = dot(w[j], at, sums[0][v]);
              sums[1][v] = dot(w[j], at + kPlane, sums[1][v]);
            } else {
              sums[j % S][v] = dot(w[j], at, sums[j % S][v]);
            }
          }
      }
}

template <int S>
inline I total(const I (&dots)[S][VP], int v) {
  if constexpr (kPlanes == 2) return shift_left32<8>(dots[0][v]) + dots[1][v];
  else if constexpr (S == 2) return dots[0][v] + dots[1][v];
  else return dots[0][v];
}

// Adds a group's exact sum: `whole` is the token's sum of integers times their scale.
inline V add_group(const Coded& c, const Factors& f, int g, int v, I dots, V scale, V whole, V sum) {
  sum = fma(to_float(dots) * scale, V::load(f.scale[g] + v * W), sum);
  return c.adds ? fma(whole, V::load(f.add[g] + v * W), sum) : sum;
}

constexpr int kStreams = 4 * VP <= V::kRegisters / 2 ? 4 : 1;  // panels that few tokens read side by side
constexpr int kDirectTokens = VP == 1 ? 4 : 2;                  // so many meet codes in registers

// out[t, r] = (or +=) some panels times N tokens, straight from codes.
template <class C, int P, int N>
inline void multiply_codes(const Coded& c, const Panels& to, const Tokens& x) {
  constexpr int S = kPlanes == 2 || (N == 1 && VP == 1) ? 2 : 1;
  constexpr int kMost = panels_in<N * (kPlanes == 2 ? 2 : 1)>(V::kRegisters / 2), R = kMost < P ? kMost : P;
  const int groups = c.layout.groups, of_group = kSixteens / groups;
  const auto table = I::load_table(c.table);
  V acc[P][N][VP];
  begin_sums(to, acc);
  Factors f[P];
  for (int64_t chunk = 0; chunk < x.chunks(); ++chunk) {
    factors_of(c, to.w, to.stride, P, chunk, chunk == 0, f);
    const uint8_t *codes = c.codes_at(to.w, chunk), *of_x = x.unit(chunk, 0);
    const float* scales = x.scales + chunk * x.rows;
    for (int g = 0; g < groups; ++g) {
      const float* sums = x.sums + x.group(chunk, g, 0);
      const int32_t* offs = x.offs + x.group(chunk, g, 0);
#pragma GCC unroll 4
      for (int p0 = 0; p0 < P; p0 += R) {
        I dots[R][N][S][VP];
#pragma GCC unroll 4
        for (int p = 0; p < R; ++p)
#pragma GCC unroll 4
          for (int t = 0; t < N; ++t)
#pragma GCC unroll 4
            for (int v = 0; v < VP; ++v) {
              dots[p][t][0][v] = I::zero();
              dots[p][t][S - 1][v] = I::set32(offs[t]);
            }
        for (int s = g * of_group; s < (g + 1) * of_group; ++s)
          meet<C, R, N, S>(codes + p0 * to.stride, to.stride, s, of_x, table, dots);
#pragma GCC unroll 4
        for (int t = 0; t < N; ++t) {
          const V scale = V::set(scales[t]), whole = V::set(sums[t]);
#pragma GCC unroll 4
          for (int p = 0; p < R; ++p)
#pragma GCC unroll 4
            for (int v = 0; v < VP; ++v)
              acc[p0 + p][t][v] = add_group(c, f[p0 + p], g, v, total<S>(dots[p][t], v), scale, whole, acc[p0 + p][t][v]);
        }
      }
    }
  }
  store_sums(to, acc);
}

#if !defined(MOESTRO_E4M3_ROWS)
inline void load_e4m3_rows(const uint8_t* p, V (&even)[VP], V (&odd)[VP]) {
#pragma GCC unroll 4
  for (int v = 0; v < VP; ++v) load_e4m3(p + v * W * 2, even[v], odd[v]);
}
#endif

template <int P, int N>
inline void multiply_e4m3(const Coded& c, const Panels& to, const Tokens& x) {
  const int groups = c.layout.groups, of_group = kGroup / 2 / groups;
  V acc[P][N][VP];
  begin_sums(to, acc);
  Factors f[P];
  for (int64_t chunk = 0; chunk < x.chunks(); ++chunk) {
    factors_of(c, to.w, to.stride, P, chunk, chunk == 0, f);
    const uint8_t* codes = c.codes_at(to.w, chunk);
    const float* xs = x.floats(chunk, 0);
    for (int g = 0; g < groups; ++g) {
      V part[P][N][VP];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int t = 0; t < N; ++t)
          for (int v = 0; v < VP; ++v) part[p][t][v] = V::zero();
      for (int i = g * of_group; i < (g + 1) * of_group; i += 2) {
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) prefetch(codes + p * to.stride + i * 2 * kPanel + kAhead);
#pragma GCC unroll 2
        for (int j = i; j < i + 2; ++j)
#pragma GCC unroll 4
          for (int p = 0; p < P; ++p) {
            V even[VP], odd[VP];
            load_e4m3_rows(codes + p * to.stride + j * kPanel * 2, even, odd);
#pragma GCC unroll 4
            for (int t = 0; t < N; ++t) {
              const V first = V::set(xs[t * kGroup + 2 * j]), second = V::set(xs[t * kGroup + 2 * j + 1]);
#pragma GCC unroll 4
              for (int v = 0; v < VP; ++v) part[p][t][v] = fma(odd[v], second, fma(even[v], first, part[p][t][v]));
            }
          }
      }
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int t = 0; t < N; ++t)
          for (int v = 0; v < VP; ++v) acc[p][t][v] = fma(part[p][t][v], V::load(f[p].scale[g] + v * W), acc[p][t][v]);
    }
  }
  store_sums(to, acc);
}

template <class C, int P, int N>
inline void multiply_few(C, const Coded& c, const Panels& to, const Tokens& x) {
  if constexpr (std::is_same_v<C, E4m3>) multiply_e4m3<P, N>(c, to, x);
  else multiply_codes<C, P, N>(c, to, x);
}

// All panels times few tokens.
template <class C>
inline void direct_product(C code, const Coded& c, const Panels& all, int64_t panels, const Tokens& x) {
  with_tokens<kDirectTokens>(x.count, [&](auto n) {
    in_streams<kStreams>(all, panels, [&](auto p, const Panels& part) { multiply_few<C, p, n>(code, c, part, x); });
  });
}

// Some chunks of columns of some panels, which all tokens meet while they are in cache: operands, or floats of e4m3.
constexpr int kDecodedChunks = 8, kDecodedPanels = 2;
struct Decoded {
  alignas(64) uint8_t operands[kDecodedPanels][kDecodedChunks][kOperands * kPanel * 4];
  Factors factors[kDecodedPanels][kDecodedChunks];
};
struct DecodedFloats {
  alignas(64) float weights[kDecodedPanels][kDecodedChunks][kGroup * kPanel];
  Factors factors[kDecodedPanels][kDecodedChunks];
};
static_assert(sizeof(DecodedFloats) <= moestro::kTileBytes && sizeof(Decoded) <= moestro::kTileBytes);

template <class C>
inline void decode(C, const Coded& c, const uint8_t* codes, uint8_t* to) {
  const auto table = I::load_table(c.table);
  for (int step = 0; step < static_cast<int>(kGroup) / 8; ++step)
    for (int v = 0; v < VP; ++v) {
      I w[kStepOperands];
      operands_of<C>(codes, step, v, table, w);
      for (int j = 0; j < kStepOperands; ++j) w[j].store(to + ((step * kStepOperands + j) * kPanel + v * W) * 4);
    }
}
inline void decode(E4m3, const Coded&, const uint8_t*, uint8_t*) {}

inline void decode_floats(const uint8_t* codes, float* to) {
  for (int j = 0; j < kGroup / 2; ++j, codes += 2 * kPanel, to += 2 * kPanel) {
    V even[VP], odd[VP];
    load_e4m3_rows(codes, even, odd);
    for (int v = 0; v < VP; ++v) even[v].store(to + v * W), odd[v].store(to + kPanel + v * W);
  }
}

// out[t, r] = (or +=) R of these panels, from p0 on, times N tokens from `first` on, chunks from `begin` on of x.
template <int N, int R>
inline void multiply_decoded(const Coded& c, const Decoded& w, int p0, const Panels& to, const Tokens& x, int64_t first,
                             int64_t begin, int chunks) {
  const int groups = c.layout.groups, of_group = kOperands / groups;
  V acc[R][N][VP];
  begin_sums(to, acc);
  for (int i = 0; i < chunks; ++i) {
    const uint8_t* of_x = x.unit(begin + i, first);
    const float* scales = x.scales + (begin + i) * x.rows + first;
    for (int g = 0; g < groups; ++g) {
      I dots[R][N][VP];
      for (auto& of_panel : dots)
        for (auto& of_token : of_panel)
          for (I& d : of_token) d = I::zero();
      for (int plane = 0; plane < kPlanes; ++plane) {
        if (plane > 0)
          for (auto& of_panel : dots)
            for (auto& of_token : of_panel)
              for (I& d : of_token) d = shift_left32<8>(d);
#pragma GCC unroll 8
        for (int j = g * of_group; j < (g + 1) * of_group; ++j) {
          const uint8_t* at = of_x + plane * kPlane + 4 * j;
          I weights[R][VP];
          for (int p = 0; p < R; ++p)
            for (int v = 0; v < VP; ++v) weights[p][v] = I::load(w.operands[p0 + p][i] + (j * kPanel + v * W) * 4);
          for (int t = 0; t < N; ++t)
            for (int p = 0; p < R; ++p)
              for (int v = 0; v < VP; ++v) dots[p][t][v] = dot(weights[p][v], at + t * kUnit, dots[p][t][v]);
        }
      }
      const float* sums = x.sums + x.group(begin + i, g, first);
      const int32_t* offs = x.offs + x.group(begin + i, g, first);
      for (int t = 0; t < N; ++t) {
        const V scale = V::set(scales[t]), whole = V::set(sums[t]);
        for (int p = 0; p < R; ++p)
          for (int v = 0; v < VP; ++v) {
            const I exact = x.as.less ? dots[p][t][v] + I::set32(offs[t]) : dots[p][t][v];
            acc[p][t][v] = add_group(c, w.factors[p0 + p][i], g, v, exact, scale, whole, acc[p][t][v]);
          }
      }
    }
  }
  store_sums(to, acc);
}

template <int N, int R>
inline void multiply_decoded(const Coded& c, const DecodedFloats& w, int p0, const Panels& to, const Tokens& x, int64_t first,
                             int64_t begin, int chunks) {
  const int groups = c.layout.groups, of_group = static_cast<int>(kGroup) / groups;
  V acc[R][N][VP];
  begin_sums(to, acc);
  for (int i = 0; i < chunks; ++i) {
    const float* xs = x.floats(begin + i, first);
    for (int g = 0; g < groups; ++g) {
      V part[R][N][VP];
      for (auto& of_panel : part)
        for (auto& of_token : of_panel)
          for (V& sum : of_token) sum = V::zero();
      for (int k = g * of_group; k < (g + 1) * of_group; ++k) {
        V weights[R][VP];
        for (int p = 0; p < R; ++p)
          for (int v = 0; v < VP; ++v) weights[p][v] = V::load(w.weights[p0 + p][i] + k * kPanel + v * W);
        for (int t = 0; t < N; ++t)
          for (int p = 0; p < R; ++p)
            for (int v = 0; v < VP; ++v) part[p][t][v] = fma(weights[p][v], V::set(xs[t * kGroup + k]), part[p][t][v]);
      }
      for (int p = 0; p < R; ++p)
        for (int t = 0; t < N; ++t)
          for (int v = 0; v < VP; ++v)
            acc[p][t][v] = fma(part[p][t][v], V::load(w.factors[p0 + p][i].scale[g] + v * W), acc[p][t][v]);
    }
  }
  store_sums(to, acc);
}

// Some decoded panels, from chunk `begin` of x on, times all tokens.
template <class D>
inline void decoded_times(const Coded& c, const D& w, int panels, const Panels& to, const Tokens& x, int64_t begin, int chunks) {
  constexpr int kMost = std::is_same_v<D, Decoded> ? V::kWholeTokens : V::kTokens;
  for_tiles(x.count, kMost, [&](int64_t first, int64_t tokens) {
    with_tokens<kMost>(tokens, [&](auto n) {
      constexpr int kFit = panels_in<n>(V::kRegisters / 2), R = kFit < kDecodedPanels ? kFit : kDecodedPanels;
      int p = 0;
      for (; p + R <= panels; p += R) multiply_decoded<n, R>(c, w, p, to.results(p, first, to.add), x, first, begin, chunks);
      if constexpr (R > 1)
        for (; p < panels; ++p) multiply_decoded<n, 1>(c, w, p, to.results(p, first, to.add), x, first, begin, chunks);
    });
  });
}

// out[t, r] = (or +=) a packed matrix of whole panels times more tokens.
template <class D>
inline void decoded_product(const Coded& c, const Panels& all, int64_t panels, const Tokens& x, float* scratch) {
  D& w = *reinterpret_cast<D*>(scratch);
  const int64_t chunks = x.chunks();
  for (int64_t p = 0; p < panels; p += kDecodedPanels) {
    const int height = static_cast<int>(panels - p < kDecodedPanels ? panels - p : kDecodedPanels);
    for (int64_t k = 0; k < chunks; k += kDecodedChunks) {
      const int count = static_cast<int>(chunks - k < kDecodedChunks ? chunks - k : kDecodedChunks);
      for (int i = 0; i < height; ++i)
        for (int j = 0; j < count; ++j) {
          const uint8_t* panel = all.panel_of(p + i, k + j);
          const int64_t own = all.within(k + j);
          const uint8_t *codes = c.codes_at(panel, own), *next = c.codes_at(panel, own + count);
          for (int64_t b = 0; b < c.layout.codes; b += 64) prefetch(next + b);
          factors_of(c, panel, 0, 1, own, true, &w.factors[i][j]);
          if constexpr (std::is_same_v<D, DecodedFloats>) decode_floats(codes, w.weights[i][j]);
          else with_code(c.code, [&](auto code) { decode(code, c, codes, w.operands[i][j]); });
        }
      const Panels to = all.results(p, 0, all.add || k > 0);
      if constexpr (std::is_same_v<D, Decoded>) {
        if (x.as.tiled) {
          tiles_times(c, w, height, to, x, k, count);
          continue;
        }
      }
      decoded_times(c, w, height, to, x, k, count);
    }
  }
}

inline void product(const Coded& c, const Panels& all, int64_t panels, int64_t, const Tokens& x, float* scratch) {
  const bool one_block = all.block_chunks == INT64_MAX;
  if (c.is_strided()) return strided_product(c, all, panels, x);
  if (one_block && x.count <= kDirectTokens)
    return with_code(c.code, [&](auto code) { direct_product(code, c, all, panels, x); });
  if (c.is_whole()) decoded_product<Decoded>(c, all, panels, x, scratch);
  else decoded_product<DecodedFloats>(c, all, panels, x, scratch);
}

// Columns of a panel as float32 [count, 16], from the beginning of a chunk on.
inline void convert_codes(const Coded& c, const uint8_t* panel, int64_t begin, int64_t count, float* to) {
  Factors f;
  const V table = counts(), less = V::set(static_cast<float>(c.constant));
  const auto of_codes = I::load_table(c.table);
  const int of_group = static_cast<int>(kGroup) / c.layout.groups;
  alignas(64) float numbers[kGroup * kPanel];
  for (int64_t chunk = begin / kGroup; chunk * kGroup < begin + count; ++chunk, to += kGroup * kPanel) {
    factors_of(c, panel, 0, 1, chunk, true, &f);
    const uint8_t* codes = c.codes_at(panel, chunk);
    if (c.is_whole()) {
      with_code(c.code, [&](auto code) {
        if constexpr (!std::is_same_v<decltype(code), E4m3>)
          for (int s = 0; s < kSixteens; ++s)
            for_codes<decltype(code)>(codes, s, of_codes, table, [&](int k, const V (&w)[VP]) {
              for (int v = 0; v < VP; ++v) (w[v] - less).store(numbers + k * kPanel + v * W);
            });
      });
    } else {
      decode_floats(codes, numbers);
    }
    for (int k = 0; k < kGroup; ++k)
      for (int v = 0; v < VP; ++v) {
        const V add = c.adds ? V::load(f.add[k / of_group] + v * W) : V::zero();
        fma(V::load(numbers + k * kPanel + v * W), V::load(f.scale[k / of_group] + v * W), add).store(to + k * kPanel + v * W);
      }
  }
}

}  // namespace
