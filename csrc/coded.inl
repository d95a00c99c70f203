// Products with weights in codes: all formats that weights.h has no kernels for.
//
// What stands in the headers becomes floats first (factors_of), a chunk at a time, and the codes whole numbers without
// their constant zero; so kernels differ by code alone. One token meets codes in registers, a few meet pairs of
// 16-bit integers that were made once for all of them, and many (or e4m3, which is no whole number) floats.

#include "codes.inl"

namespace {

// A chunk's codes as pairs of 16-bit integers without their constant zero, [32][16][2].
template <class C>
inline void decode(C, const Coded& c, const uint8_t* codes, int16_t* to) {
  const I less = I::set16(static_cast<int16_t>(c.constant)), low = I::set16(0x00FF);
  const auto table = I::load_table(c.table);
  for (int s = 0; s < kSixteens; ++s, to += 8 * 2 * kPanel)
    for (int v = 0; v < VP; ++v) {
      const auto put = [&](int pair, I w) { subtract16(w, less).store(to + (pair * kPanel + v * W) * 2); };
      if constexpr (C::kQuads) {
        for (int i = 0; i < 2; ++i) {
          Quads q;
          C::quads(codes, s, i, v, table, q);
          for (int j = 0; j < 2; ++j) {
            put(4 * i + j, q[j] & low);
            put(4 * i + j + 2, shift_right16<8>(q[j]));
          }
        }
      } else {
        for (int j = 0; j < 8; ++j) put(j, C::pair(codes + ((8 * s + j) * kPanel + v * W) * 2));
      }
    }
}

inline void decode(E4m3, const Coded&, const uint8_t*, int16_t*) {}

// As weights.h has it, for formats of codes.
inline void convert(const Coded& c, const uint8_t* panel, int64_t begin, int64_t count, float* to) {
  Factors f;
  alignas(64) int16_t pairs[kPairs * 2 * kPanel];
  const int of_group = kPairs / c.layout.groups;
  for (int64_t chunk = begin / kGroup; chunk * kGroup < begin + count; ++chunk) {
    factors_of(c, panel, 0, 1, chunk, chunk == begin / kGroup, &f);
    const uint8_t* codes = c.codes_at(panel, chunk);
    const uint8_t* next = c.codes_at(panel, chunk + (count + kGroup - 1) / kGroup);
    for (int64_t i = 0; i < c.layout.codes; i += 64) prefetch(next + i);
    with_code(c.code, [&](auto code) { decode(code, c, codes, pairs); });
    for (int i = 0; i < kPairs; ++i, to += 2 * kPanel) {
      const int g = i / of_group;
      for (int v = 0; v < VP; ++v) {
        const int64_t at = (i * kPanel + v * W) * 2;
        V even, odd;
        if (c.is_whole()) {
          const I both = I::load(pairs + at);
          even = even_half(both), odd = odd_half(both);
        } else {
          load_e4m3(codes + at, even, odd);
        }
        const V scale = V::load(f.scale[g] + v * W), add = c.adds ? V::load(f.add[g] + v * W) : V::zero();
        fma(even, scale, add).store(to + v * W);
        fma(odd, scale, add).store(to + kPanel + v * W);
      }
    }
  }
}

// Whether one token's activations meet codes as bytes: by one instruction for four of them, or by one for two, where the
// 16-bit sums of a sixteenth suffice: of 8 products of a code and a signed byte.
template <class C>
constexpr bool meets_bytes() {
  if constexpr (std::is_same_v<C, E4m3>) {
    return false;
  } else if constexpr (!C::kQuads) {
    return false;
  } else {
#if defined(MOESTRO_BYTE_DOTS)
    return true;
#elif defined(MOESTRO_BYTE_PAIRS)
    return 8 * C::kLargest * 128 <= 32767;
#else
    return false;
#endif
  }
}

inline Packing packing_of(const Coded& c, int64_t n, Type) {
  if (n > moestro::kThinTokens || !c.is_whole() || c.is_strided()) return Packing::kFloats;
  bool bytes = false;
  with_code(c.code, [&](auto code) { bytes = meets_bytes<decltype(code)>(); });
  return n == 1 && bytes ? Packing::kBytePlanes : Packing::kWhole;
}

// One token's sums with a sixteenth s of P panels. There are two sums of a panel where registers allow, which total()
// adds up; the first counts 256 times where quads meet the high bytes of the activations by it and the low by the second.
template <class C, int P, int S, class T>
inline void meet(const uint8_t* codes, int64_t stride, int s, const int16_t* x, [[maybe_unused]] T table, I (&dots)[P][S][VP]) {
  constexpr int kStepBytes = C::kBytes / kSixteens;
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
    for (int i = 0; i < kStepBytes; i += 64) prefetch(codes + p * stride + s * kStepBytes + i + kAhead);
#if defined(MOESTRO_BYTE_PAIRS)
  if constexpr (meets_bytes<C>()) {
    I of_x[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) of_x[i] = I::set_pair(x + 2 * i);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < VP; ++v) {
        Quads q;
        C::quads(codes + p * stride, s, 0, v, table, q);
        I high = add16(multiply_bytes(q[0], of_x[0]), multiply_bytes(q[1], of_x[2]));
        I low = add16(multiply_bytes(q[0], of_x[1]), multiply_bytes(q[1], of_x[3]));
        C::quads(codes + p * stride, s, 1, v, table, q);
        high = add16(high, add16(multiply_bytes(q[0], of_x[4]), multiply_bytes(q[1], of_x[6])));
        low = add16(low, add16(multiply_bytes(q[0], of_x[5]), multiply_bytes(q[1], of_x[7])));
        I& sum = dots[p][0][v];
        sum = dot_pairs(low, I::set16(1), dot_pairs(high, I::set16(256), sum));
      }
    return;
  }
#endif
  if constexpr (C::kQuads) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i, x += 8) {
      const I x0 = I::set_pair(x), x1 = I::set_pair(x + 2), x2 = I::set_pair(x + 4), x3 = I::set_pair(x + 6);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < VP; ++v) {
          Quads q;
          C::quads(codes + p * stride, s, i, v, table, q);
          I &a = dots[p][0][v], &b = dots[p][S - 1][v];
#if defined(MOESTRO_BYTE_DOTS)
          a = dot_bytes(q[0], x0, a);
          b = dot_bytes(q[0], x1, b);
          a = dot_bytes(q[1], x2, a);
          b = dot_bytes(q[1], x3, b);
#else
          const I low = I::set16(0x00FF);
          a = dot_pairs(q[0] & low, x0, a);
          b = dot_pairs(shift_right16<8>(q[0]), x2, b);
          a = dot_pairs(q[1] & low, x1, a);
          b = dot_pairs(shift_right16<8>(q[1]), x3, b);
#endif
        }
    }
  } else {
#pragma GCC unroll 1
    for (int j = 0; j < 8; j += 2)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const I pair = I::set_pair(x + 2 * (j + i));
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
          for (int v = 0; v < VP; ++v) {
            I& sum = dots[p][i % S][v];
            sum = dot_pairs(C::pair(codes + p * stride + ((8 * s + j + i) * kPanel + v * W) * 2), pair, sum);
          }
      }
  }
}

template <class C, int S>
inline I total(const I (&dots)[S][VP], int v) {
#if defined(MOESTRO_BYTE_DOTS)
  if constexpr (C::kQuads) return shift_left32<8>(dots[0][v]) + dots[1][v];
#endif
  if constexpr (S == 1) return dots[0][v];
  else return dots[0][v] + dots[1][v];
}

// out[r] = (or +=) P panels times one token: exact sums of integers within a group.
template <class C, int P>
inline void multiply_one(const Coded& c, const Panels& to, const Tokens& x) {
  constexpr int S = VP == 1 ? 2 : 1;
  const int groups = c.layout.groups, of_group = kSixteens / groups;
  const auto table = I::load_table(c.table);
  V acc[P][1][VP];
  Factors f[P];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < VP; ++v) acc[p][0][v] = V::zero();
  for (int64_t chunk = 0; chunk < x.columns / kGroup; ++chunk) {
    factors_of(c, to.w, to.stride, P, chunk, chunk == 0, f);
    const uint8_t* codes = c.codes_at(to.w, chunk);
    const V of_x = V::set(x.scales[chunk]);
    for (int g = 0; g < groups; ++g) {
      int32_t sum = 0;
      for (int i = 0; i < of_group; ++i) sum += x.sixteens[chunk * kSixteens + g * of_group + i];
      const I start = I::set32(-c.constant * sum);
      I dots[P][S][VP];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < VP; ++v) {
          dots[p][0][v] = I::zero();
          dots[p][S - 1][v] = start;
        }
      for (int s = g * of_group; s < (g + 1) * of_group; ++s)
        meet<C, P, S>(codes, to.stride, s, x.integers + chunk * kGroup + s * 16, table, dots);
      const V whole = V::set(static_cast<float>(sum)) * of_x;
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < VP; ++v) {
          V& out = acc[p][0][v];
          out = fma(to_float(total<C, S>(dots[p], v)) * of_x, V::load(f[p].scale[g] + v * W), out);
          if (c.adds) out = fma(whole, V::load(f[p].add[g] + v * W), out);
        }
    }
  }
  finish(to, acc);
}

#if !defined(MOESTRO_E4M3_ROWS)
inline void load_e4m3_rows(const uint8_t* p, V (&even)[VP], V (&odd)[VP]) {
#pragma GCC unroll 4
  for (int v = 0; v < VP; ++v) load_e4m3(p + v * W * 2, even[v], odd[v]);
}
#endif

template <int P>
inline void multiply_one_e4m3(const Coded& c, const Panels& to, const Tokens& x) {
  const int groups = c.layout.groups, of_group = kPairs / groups;
  V acc[P][1][VP];
  Factors f[P];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < VP; ++v) acc[p][0][v] = V::zero();
  for (int64_t chunk = 0; chunk < x.columns / kGroup; ++chunk) {
    factors_of(c, to.w, to.stride, P, chunk, chunk == 0, f);
    const uint8_t* codes = c.codes_at(to.w, chunk);
    const float* xs = x.floats + chunk * kGroup;
    for (int g = 0; g < groups; ++g) {
      V part[P][VP];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
        for (int v = 0; v < VP; ++v) part[p][v] = V::zero();
      for (int i = g * of_group; i < (g + 1) * of_group; i += 2) {
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) prefetch(codes + p * to.stride + i * 2 * kPanel + kAhead);
#pragma GCC unroll 2
        for (int j = i; j < i + 2; ++j) {
          const V first = V::set(xs[2 * j]), second = V::set(xs[2 * j + 1]);
#pragma GCC unroll 4
          for (int p = 0; p < P; ++p) {
            V even[VP], odd[VP];
            load_e4m3_rows(codes + p * to.stride + j * kPanel * 2, even, odd);
#pragma GCC unroll 4
            for (int v = 0; v < VP; ++v) part[p][v] = fma(odd[v], second, fma(even[v], first, part[p][v]));
          }
        }
      }
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p)
        for (int v = 0; v < VP; ++v) acc[p][0][v] = fma(part[p][v], V::load(f[p].scale[g] + v * W), acc[p][0][v]);
    }
  }
  finish(to, acc);
}

// Some chunks of columns of 4 panels, which all tokens meet while they are in cache.
constexpr int kFewChunks = 2, kFewPanels = 4;
struct Decoded {
  alignas(64) int16_t pairs[kFewPanels][kFewChunks][kPairs * 2 * kPanel];
  Factors factors[kFewPanels][kFewChunks];
};

// out[t, r] = (or +=) P of these panels, from the p-th, times a tile of N tokens, from chunk `begin` of x.
template <int N, int P>
inline void multiply_pairs(const Coded& c, const Decoded& w, int p0, const Panels& to, const Tokens& x, int64_t first,
                           int64_t begin, int64_t chunks) {
  const int groups = c.layout.groups, of_group = kPairs / groups;
  V acc[P][N][VP];
  for (auto& of_panel : acc)
    for (auto& of_token : of_panel)
      for (V& a : of_token) a = V::zero();
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t chunk = begin + i;
    const int16_t* whole = x.integers + first * x.columns + chunk * kGroup * N;
    const int32_t* sixteens = x.sixteens + (first * x.columns / 16 + chunk * kSixteens * N);
    const float* scales = x.scales + first * x.columns / kGroup + chunk * N;
    for (int g = 0; g < groups; ++g) {
      I dots[P][N][VP];
      for (auto& of_panel : dots)
        for (auto& of_token : of_panel)
          for (I& d : of_token) d = I::zero();
      for (int j = g * of_group; j < (g + 1) * of_group; ++j)
        for (int p = 0; p < P; ++p)
          for (int v = 0; v < VP; ++v) {
            const I both = I::load(w.pairs[p0 + p][i] + (j * kPanel + v * W) * 2);
            for (int t = 0; t < N; ++t) dots[p][t][v] = dot_pairs(both, I::set_pair(whole + 2 * (j * N + t)), dots[p][t][v]);
          }
      for (int t = 0; t < N; ++t) {
        int32_t sum = 0;
        if (c.adds) for (int s = 0; s < of_group / 8; ++s) sum += sixteens[(g * (of_group / 8) + s) * N + t];
        const V scale = V::set(scales[t]), of_x = V::set(scales[t] * static_cast<float>(sum));
        for (int p = 0; p < P; ++p)
          for (int v = 0; v < VP; ++v) {
            const Factors& f = w.factors[p0 + p][i];
            acc[p][t][v] = fma(to_float(dots[p][t][v]) * scale, V::load(f.scale[g] + v * W), acc[p][t][v]);
            if (c.adds) acc[p][t][v] = fma(of_x, V::load(f.add[g] + v * W), acc[p][t][v]);
          }
      }
    }
  }
  finish(to, acc);
}

template <int N = V::kWholeTokens>
inline void multiply_few(const Coded& c, const Decoded& w, int panels, const Panels& to, const Tokens& x, int64_t first,
                         int64_t tokens, int64_t begin, int64_t chunks) {
  if (tokens == N) {
    constexpr int P = 4 * N * VP <= V::kRegisters / 2 ? 4 : 2 * N * VP <= V::kRegisters - 8 ? 2 : 1;
    int p = 0;
    const auto from = [&] { return Panels{nullptr, 0, to.out + p * to.apart, to.apart, to.ld, to.add}; };
    for (; p + P <= panels; p += P) multiply_pairs<N, P>(c, w, p, from(), x, first, begin, chunks);
    for (; p < panels; ++p) multiply_pairs<N, 1>(c, w, p, from(), x, first, begin, chunks);
  } else if constexpr (N > 1) {
    multiply_few<N - 1>(c, w, panels, to, x, first, tokens, begin, chunks);
  }
}

// out[t, r] = (or +=) a packed matrix of whole panels times a few tokens, packed as 16-bit integers.
inline void few_product(const Coded& c, const Panels& all, int64_t panels, const Tokens& x, float* memory) {
  Decoded& w = *reinterpret_cast<Decoded*>(memory);
  const int64_t chunks = x.columns / kGroup;
  for (int64_t p = 0; p < panels; p += kFewPanels) {
    const int height = static_cast<int>(panels - p < kFewPanels ? panels - p : kFewPanels);
    for (int64_t k = 0; k < chunks; k += kFewChunks) {
      const int64_t count = chunks - k < kFewChunks ? chunks - k : kFewChunks;
      for (int i = 0; i < height; ++i)
        for (int64_t j = 0; j < count; ++j) {
          const uint8_t* panel = all.w + (p + i) * all.stride;
          const uint8_t *codes = c.codes_at(panel, k + j), *next = c.codes_at(panel, k + j + count);
          for (int64_t b = 0; b < c.layout.codes; b += 64) prefetch(next + b);
          factors_of(c, panel, 0, 1, k + j, true, &w.factors[i][j]);
          with_code(c.code, [&](auto code) { decode(code, c, codes, w.pairs[i][j]); });
        }
      for_tiles(x, [&](int64_t first, int64_t tokens) {
        const Panels part{nullptr, 0, all.out + first * all.ld + p * all.apart, all.apart, all.ld, all.add || k > 0};
        multiply_few(c, w, height, part, x, first, tokens, k, count);
      });
    }
  }
}

template <class C, int P>
inline void multiply_one(C, const Coded& c, const Panels& to, const Tokens& x) {
  if constexpr (std::is_same_v<C, E4m3>) multiply_one_e4m3<P>(c, to, x);
  else multiply_one<C, P>(c, to, x);
}

// A quarter of the panels is read beside the next, as in multiply().
template <class C>
inline void one_product(C code, const Coded& c, const Panels& all, int64_t panels, const Tokens& x) {
  constexpr int P = 4 * VP <= V::kRegisters / 2 ? 4 : 1;
  const auto part = [&](int64_t p, int64_t apart) {
    return Panels{all.w + p * all.stride, all.stride * apart, all.out + p * all.apart, all.apart * apart, all.ld, all.add};
  };
  const int64_t apart = panels / P;
  for (int64_t p = 0; p < apart; ++p) multiply_one<C, P>(code, c, part(p, apart), x);
  if constexpr (P > 1) for (int64_t p = apart * P; p < panels; ++p) multiply_one<C, 1>(code, c, part(p, 1), x);
}

}  // namespace
