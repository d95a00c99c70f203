// Products with weights in codes: all formats that weights.h has no kernels for.
//
// What stands in the headers becomes floats first (factors_of), a chunk at a time, and the codes whole numbers without
// their constant zero; so kernels differ by code alone. One token meets codes in registers, a few meet pairs of
// 16-bit integers that were made once for all of them, and many (or e4m3, which is no whole number) floats.

namespace {

using moestro::Code;
using moestro::PanelLayout;
using moestro::Scale;
using moestro::Zero;

constexpr int kPairs = kGroup / 2;   // of columns, in a chunk
constexpr int kMostGroups = 4;       // in a chunk

// Four columns of a row as unsigned bytes of a 32-bit lane: a quad. Of 16 columns 16s..16s+15, quads hold columns
// 0 4 1 5, 2 6 3 7, 8 12 9 13 and 10 14 11 15.
using Quads = I[4];

struct U2 {
  static constexpr bool kQuads = true;
  template <class T>
  static void quads(const uint8_t* codes, int s, int v, T, Quads& q) {
    const I words = I::load(codes + s * 64 + v * W * 4), two = I::set16(0x0303);
    q[0] = words & two;
    q[1] = shift_right16<2>(words) & two;
    q[2] = shift_right16<4>(words) & two;
    q[3] = shift_right16<6>(words) & two;
  }
};

// The plane of single bits, whose words serve 32 columns: those of columns 16s..16s+15 come first.
inline I bits_of_plane(const uint8_t* plane, int s, int v) {
  const I words = I::load(plane + s / 2 * 64 + v * W * 4);
  return s % 2 ? shift_right16<4>(words) : words;
}

struct U3 {
  static constexpr bool kQuads = true;
  template <class T>
  static void quads(const uint8_t* codes, int s, int v, T none, Quads& q) {
    U2::quads(codes, s, v, none, q);
    const I bits = bits_of_plane(codes + 256, s, v), place = I::set16(0x0404);
    q[0] = q[0] | (shift_left16<2>(bits) & place);
    q[1] = q[1] | (shift_left16<1>(bits) & place);
    q[2] = q[2] | (bits & place);
    q[3] = q[3] | (shift_right16<1>(bits) & place);
  }
};

struct U4 {
  static constexpr bool kQuads = true;
  template <class T>
  static void quads(const uint8_t* codes, int s, int v, T, Quads& q) {
    const I nibble = I::set16(0x0F0F);
    for (int i = 0; i < 2; ++i) {
      const I words = I::load(codes + (2 * s + i) * 64 + v * W * 4);
      q[2 * i] = words & nibble;
      q[2 * i + 1] = shift_right16<4>(words) & nibble;
    }
  }
};

struct U5 {
  static constexpr bool kQuads = true;
  template <class T>
  static void quads(const uint8_t* codes, int s, int v, T none, Quads& q) {
    U4::quads(codes, s, v, none, q);
    const I bits = bits_of_plane(codes + 512, s, v), place = I::set16(0x1010);
    q[0] = q[0] | (shift_left16<4>(bits) & place);
    q[1] = q[1] | (shift_left16<3>(bits) & place);
    q[2] = q[2] | (shift_left16<2>(bits) & place);
    q[3] = q[3] | (shift_left16<1>(bits) & place);
  }
};

struct U6 {
  static constexpr bool kQuads = true;
  template <class T>
  static void quads(const uint8_t* codes, int s, int v, T none, Quads& q) {
    U4::quads(codes, s, v, none, q);
    const I words = I::load(codes + 512 + s * 64 + v * W * 4), place = I::set16(0x3030);
    q[0] = q[0] | (shift_left16<4>(words) & place);
    q[1] = q[1] | (shift_left16<2>(words) & place);
    q[2] = q[2] | (words & place);
    q[3] = q[3] | (shift_right16<2>(words) & place);
  }
};

struct Table {
  static constexpr bool kQuads = true;
  template <class T>
  static void quads(const uint8_t* codes, int s, int v, T table, Quads& q) {
    U4::quads(codes, s, v, table, q);
    for (I& quad : q) quad = look_up_bytes(table, quad);
  }
};

struct S8 {
  static constexpr bool kQuads = false;
  static I pair(const uint8_t* at) { return I::load_int8(at); }
};

struct U8 {
  static constexpr bool kQuads = false;
  static I pair(const uint8_t* at) { return I::load_uint8(at); }
};

struct E4m3 {};

// Tables, made unsigned by adding a constant, which is then a constant zero.
alignas(16) constexpr uint8_t kE2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};  // 2 * value + 12
alignas(16) constexpr uint8_t kIq4nl[16] = {0,   23,  44,  62,  78,  92,  105, 117,
                                            128, 140, 152, 165, 180, 196, 216, 240};  // value + 127

// A format of codes, as kernels take it.
struct Coded {
  Code code;
  Scale scale;
  Zero zero;
  int64_t group;
  PanelLayout layout;
  int32_t constant = 0;            // comes off each code
  float unit = 1;                  // the value of a code is so many times the number that kernels read
  bool adds;                       // whether there are zeros besides the constant
  const uint8_t* table = kE2m1;

  explicit Coded(const MatrixFormat& f)
      : code(f.code), scale(f.scale), zero(f.zero), group(f.group), layout(moestro::layout_of(f)), constant(f.constant),
        adds(f.zero > Zero::kConstant) {
    if (code == Code::kE2m1) constant = 12, unit = 0.5f;
    if (code == Code::kIq4nl) constant = 127, table = kIq4nl;
    if (code == Code::kE4m3) unit = 256;
  }
  bool is_whole() const { return code != Code::kE4m3; }
  const uint8_t* codes_at(const uint8_t* panel, int64_t chunk) const {
    return panel + layout.chunk_at(chunk) + layout.chunk_header;
  }
};

// Calls do_with(C()) with the class of the codes.
template <class Do>
inline void with_code(Code code, Do do_with) {
  switch (code) {
    case Code::kS8: return do_with(S8());
    case Code::kU2: return do_with(U2());
    case Code::kU3: return do_with(U3());
    case Code::kU4: return do_with(U4());
    case Code::kU5: return do_with(U5());
    case Code::kU6: return do_with(U6());
    case Code::kU8: return do_with(U8());
    case Code::kE4m3: return do_with(E4m3());
    default: return do_with(Table());
  }
}

// A weight of a chunk is scale * code + add, of its group and row.
struct Factors {
  alignas(64) float scale[kMostGroups][kPanel], add[kMostGroups][kPanel];
};

inline void load_halves(const uint8_t* from, float* to) {
  for (int v = 0; v < VP; ++v) V::load_fp16(from + v * W * 2).store(to + v * W);
}

// The scales of 16 rows and one group, of the kinds of one level.
inline void load_scale(const Coded& c, const uint8_t* at, float tensor, float* to) {
  switch (c.scale) {
    case Scale::kFp16: return load_halves(at, to);
    case Scale::kBf16:
      for (int v = 0; v < VP; ++v) V::load_bf16(at + v * W * 2).store(to + v * W);
      return;
    case Scale::kFp32:
      memcpy(to, at, kPanel * 4);
      return;
    case Scale::kE8m0: {
      uint32_t bits[kPanel];
      for (int r = 0; r < kPanel; ++r) bits[r] = static_cast<uint32_t>(at[r]) << 23 | (at[r] == 0 ? 1u << 22 : 0);
      memcpy(to, bits, sizeof(bits));
      return;
    }
    default: {  // kE4m3
      uint16_t bits[kPanel];
      for (int r = 0; r < kPanel; ++r) bits[r] = static_cast<uint16_t>((at[r] & 0x80) << 8 | (at[r] & 0x7F) << 7);
      load_halves(reinterpret_cast<const uint8_t*>(bits), to);
      for (int r = 0; r < kPanel; ++r) to[r] *= 256 * tensor;
    }
  }
}

// The scales and zeros of two levels.
inline void two_level(const Coded& c, const uint8_t* unit, const uint8_t* at, Factors& f) {
  float d[kPanel], m[kPanel];
  load_halves(unit, d);
  if (c.zero == Zero::kMin) load_halves(unit + 32, m);
  const int8_t* whole = reinterpret_cast<const int8_t*>(at);
  switch (c.scale) {
    case Scale::kK4:
      for (int r = 0; r < kPanel; ++r) {
        const int b0 = at[r], b1 = at[16 + r], b2 = at[32 + r];
        f.scale[0][r] = d[r] * static_cast<float>(b0 & 63);
        f.scale[1][r] = d[r] * static_cast<float>(b1 & 63);
        f.add[0][r] = -m[r] * static_cast<float>(b0 >> 6 | b1 >> 6 << 2 | b2 >> 6 << 4);
        f.add[1][r] = -m[r] * static_cast<float>(b2 & 63);
      }
      return;
    case Scale::kK2:
      for (int g = 0; g < 4; ++g, at += kPanel)
        for (int r = 0; r < kPanel; ++r) {
          f.scale[g][r] = d[r] * static_cast<float>(at[r] & 15);
          f.add[g][r] = -m[r] * static_cast<float>(at[r] >> 4);
        }
      return;
    case Scale::kK3:
      for (int r = 0; r < kPanel; ++r) {
        const int b0 = at[r], b1 = at[16 + r], b2 = at[32 + r];
        f.scale[0][r] = d[r] * static_cast<float>((b0 & 63) - 32);
        f.scale[1][r] = d[r] * static_cast<float>((b1 & 63) - 32);
        f.scale[2][r] = d[r] * static_cast<float>((b2 & 63) - 32);
        f.scale[3][r] = d[r] * static_cast<float>((b0 >> 6 | b1 >> 6 << 2 | b2 >> 6 << 4) - 32);
      }
      return;
    default:  // kK6, kIq4xs
      for (int g = 0; g < c.layout.groups; ++g, whole += kPanel)
        for (int r = 0; r < kPanel; ++r) f.scale[g][r] = d[r] * static_cast<float>(whole[r]);
  }
}

// Reads the headers of a chunk.
#if defined(__GNUC__)
__attribute__((noinline))
#endif
void factors_of(const Coded& c, const uint8_t* panel, int64_t chunk, Factors& f) {
  const PanelLayout& l = c.layout;
  const uint8_t *unit = panel + l.unit_at(chunk), *at = panel + l.chunk_at(chunk);
  if (c.scale >= Scale::kK4) return two_level(c, unit, at, f);
  float one;
  memcpy(&one, c.scale == Scale::kBlock ? unit : panel, 4);
  if (c.scale == Scale::kBlock) {
    for (int r = 0; r < kPanel; ++r) f.scale[0][r] = one * c.unit;
    return;
  }
  const int64_t scale_bytes = (c.scale == Scale::kFp32 ? 4 : c.scale <= Scale::kBf16 ? 2 : 1) * kPanel;
  const uint8_t* header = c.group == moestro::kRow ? panel : c.group > kGroup ? unit : at;
  const uint8_t* zeros = header + l.groups * scale_bytes;
  for (int g = 0; g < l.groups; ++g) {
    float *scale = f.scale[g], *add = f.add[g];
    load_scale(c, header + g * scale_bytes, one, scale);
    if (c.unit != 1) for (int r = 0; r < kPanel; ++r) scale[r] *= c.unit;
    if (c.zero == Zero::kFp16 || c.zero == Zero::kAdd) {
      load_halves(zeros + g * 2 * kPanel, add);
    } else if (c.zero == Zero::kInt) {
      const bool shared = l.codes < kPanel * kGroup / 2 + 1 && l.groups > 1;  // codes of up to 4 bits
      const uint8_t* whole = zeros + (shared ? g / 2 : g) * kPanel;
      const int shift = shared && g % 2 ? 4 : 0, mask = shared ? 15 : 255;
      for (int r = 0; r < kPanel; ++r) add[r] = static_cast<float>(whole[r] >> shift & mask);
    }
    if (c.zero == Zero::kFp16 || c.zero == Zero::kInt) for (int r = 0; r < kPanel; ++r) add[r] = -scale[r] * add[r];
  }
}

// A chunk's codes as pairs of 16-bit integers without their constant zero, [32][16][2].
template <class C>
inline void decode(C, const Coded& c, const uint8_t* codes, int16_t* to) {
  const I less = I::set16(static_cast<int16_t>(c.constant)), low = I::set16(0x00FF);
  const auto table = I::load_table(c.table);
  for (int s = 0; s < kSixteens; ++s, to += 8 * 2 * kPanel)
    for (int v = 0; v < VP; ++v) {
      const auto put = [&](int pair, I w) { subtract16(w, less).store(to + (pair * kPanel + v * W) * 2); };
      if constexpr (C::kQuads) {
        Quads q;
        C::quads(codes, s, v, table, q);
        for (int j = 0; j < 4; ++j) {
          const int pair = j / 2 * 4 + j % 2;
          put(pair, q[j] & low);
          put(pair + 2, shift_right16<8>(q[j]));
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
    factors_of(c, panel, chunk, f);
    const uint8_t* codes = c.codes_at(panel, chunk);
    const uint8_t* next = codes + (count + kGroup - 1) / kGroup * c.layout.chunk_bytes();
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

inline Packing packing_of(const Coded& c, int64_t n, Type) {
  if (n > moestro::kThinTokens || !c.is_whole()) return Packing::kFloats;
  const bool quads = c.code != Code::kS8 && c.code != Code::kU8;
  return n == 1 && quads && kHasByteDots ? Packing::kBytePlanes : Packing::kWhole;
}

// One token's sums with 16 columns of a panel; the two sums are added up by total<C>, in which the first counts 256
// times where a quad meets the high bytes of the activations by it and the low ones by the second.
template <class C, int S>
inline void meet(const uint8_t* codes, int s, const int16_t* x, [[maybe_unused]] decltype(I::load_table(nullptr)) table,
                 I (&dots)[S][VP]) {
  for (int v = 0; v < VP; ++v) {
    if constexpr (C::kQuads) {
      Quads q;
      C::quads(codes, s, v, table, q);
      for (int j = 0; j < 4; ++j, x += 4) {
#if defined(MOESTRO_BYTE_DOTS)
        dots[0][v] = dot_bytes(q[j], I::set_pair(x), dots[0][v]);
        dots[1][v] = dot_bytes(q[j], I::set_pair(x + 2), dots[1][v]);
#else
        const int16_t* at = x - 4 * j + j / 2 * 8 + j % 2 * 2;
        dots[0][v] = dot_pairs(q[j] & I::set16(0x00FF), I::set_pair(at), dots[0][v]);
        dots[S - 1][v] = dot_pairs(shift_right16<8>(q[j]), I::set_pair(at + 4), dots[S - 1][v]);
#endif
      }
      x -= 16;
    } else {
      for (int j = 0; j < 8; ++j) {
        const I w = C::pair(codes + ((8 * s + j) * kPanel + v * W) * 2);
        dots[j % S][v] = dot_pairs(w, I::set_pair(x + 2 * j), dots[j % S][v]);
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
  const int64_t step_bytes = c.layout.codes / kSixteens;
  const auto table = I::load_table(c.table);
  V acc[P][1][VP];
  for (auto& of_panel : acc)
    for (V& a : of_panel[0]) a = V::zero();
  for (int64_t chunk = 0; chunk < x.columns / kGroup; ++chunk) {
    Factors f[P];
    const uint8_t* codes[P];
    V part[P][VP];
    for (int p = 0; p < P; ++p) {
      factors_of(c, to.w + p * to.stride, chunk, f[p]);
      codes[p] = c.codes_at(to.w + p * to.stride, chunk);
      for (V& a : part[p]) a = V::zero();
    }
    for (int g = 0; g < groups; ++g) {
      int32_t sum = 0;
      for (int i = 0; i < of_group; ++i) sum += x.sixteens[chunk * kSixteens + g * of_group + i];
      I dots[P][S][VP];
      for (int p = 0; p < P; ++p)
        for (int v = 0; v < VP; ++v) {
          dots[p][0][v] = I::zero();
          dots[p][S - 1][v] = I::set32(-c.constant * sum);
        }
      for (int s = g * of_group; s < (g + 1) * of_group; ++s)
        for (int p = 0; p < P; ++p) {
          for (int64_t i = 0; i < step_bytes; i += 64) prefetch(codes[p] + s * step_bytes + i + kAhead);
          meet<C, S>(codes[p], s, x.integers + chunk * kGroup + s * 16, table, dots[p]);
        }
      for (int p = 0; p < P; ++p)
        for (int v = 0; v < VP; ++v) part[p][v] = fma(to_float(total<C, S>(dots[p], v)), V::load(f[p].scale[g] + v * W), part[p][v]);
      if (!c.adds) continue;
      const V whole = V::set(static_cast<float>(sum));
      for (int p = 0; p < P; ++p)
        for (int v = 0; v < VP; ++v) part[p][v] = fma(whole, V::load(f[p].add[g] + v * W), part[p][v]);
    }
    const V scale = V::set(x.scales[chunk]);
    for (int p = 0; p < P; ++p)
      for (int v = 0; v < VP; ++v) acc[p][0][v] = fma(part[p][v], scale, acc[p][0][v]);
  }
  finish(to, acc);
}

template <class C, int P>
inline void multiply_one_e4m3(const Coded& c, const Panels& to, const Tokens& x) {
  const int groups = c.layout.groups, of_group = kPairs / groups;
  V acc[P][1][VP];
  for (auto& of_panel : acc)
    for (V& a : of_panel[0]) a = V::zero();
  for (int64_t chunk = 0; chunk < x.columns / kGroup; ++chunk) {
    Factors f[P];
    const uint8_t* codes[P];
    for (int p = 0; p < P; ++p) {
      factors_of(c, to.w + p * to.stride, chunk, f[p]);
      codes[p] = c.codes_at(to.w + p * to.stride, chunk);
    }
    for (int g = 0; g < groups; ++g) {
      V part[P][VP];
      for (auto& of_panel : part)
        for (V& a : of_panel) a = V::zero();
      for (int i = g * of_group; i < (g + 1) * of_group; ++i) {
        const V first = V::set(x.floats[chunk * kGroup + 2 * i]), second = V::set(x.floats[chunk * kGroup + 2 * i + 1]);
        for (int p = 0; p < P; ++p) {
          const uint8_t* at = codes[p] + i * 2 * kPanel;
          if (i % 2 == 0) prefetch(at + kAhead);
          for (int v = 0; v < VP; ++v) {
            V even, odd;
            load_e4m3(at + v * W * 2, even, odd);
            part[p][v] = fma(odd, second, fma(even, first, part[p][v]));
          }
        }
      }
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
          const uint8_t *panel = all.w + (p + i) * all.stride, *codes = c.codes_at(panel, k + j);
          for (int64_t b = 0; b < c.layout.chunk_bytes(); b += 64) prefetch(codes + b + count * c.layout.chunk_bytes());
          factors_of(c, panel, k + j, w.factors[i][j]);
          with_code(c.code, [&](auto code) { decode(code, c, codes, w.pairs[i][j]); });
        }
      for_tiles(x, [&](int64_t first, int64_t tokens) {
        const Panels part{nullptr, 0, all.out + first * all.ld + p * all.apart, all.apart, all.ld, all.add || k > 0};
        multiply_few(c, w, height, part, x, first, tokens, k, count);
      });
    }
  }
}

template <class C>
inline void one_product(C, const Coded& c, const Panels& all, int64_t panels, const Tokens& x) {
  // A quarter of the panels is read beside the next, as in multiply().
  const int64_t apart = panels / 4;
  for (int64_t p = 0; p < panels; ++p) {
    const bool four = p < apart;
    if (!four && p < 4 * apart) continue;
    const Panels part{all.w + p * all.stride, all.stride * apart, all.out + p * all.apart, all.apart * apart, all.ld, all.add};
    if constexpr (std::is_same_v<C, E4m3>) four ? multiply_one_e4m3<C, 4>(c, part, x) : multiply_one_e4m3<C, 1>(c, part, x);
    else four ? multiply_one<C, 4>(c, part, x) : multiply_one<C, 1>(c, part, x);
  }
}

inline void product(const Coded& c, const Panels& all, int64_t panels, int64_t K, const Tokens& x, float* tile) {
  if (x.count == 1) return with_code(c.code, [&](auto code) { one_product(code, c, all, panels, x); });
  if (x.as != Packing::kFloats) return few_product(c, all, panels, x, tile);
  many_product(all, panels, K, x, tile, [&](int64_t panel, int64_t k, int64_t count, float* to) {
    convert(c, all.w + panel * all.stride, k, count, to);
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
