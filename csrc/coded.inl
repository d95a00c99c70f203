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

// Four columns of a row as unsigned bytes of a 32-bit lane: a quad. A step of 8 columns has two, of columns 0 4 1 5 and
// 2 6 3 7; two steps, i = 0 and 1, are the sixteenth s of a chunk.
using Quads = I[2];

struct U2 {
  static constexpr bool kQuads = true;
  static constexpr int kBytes = 256;  // of a chunk
  template <class T>
  static void quads(const uint8_t* codes, int s, int i, int v, T, Quads& q) {
    const I words = I::load(codes + s * 64 + v * W * 4), two = I::set16(0x0303);
    q[0] = (i ? shift_right16<4>(words) : words) & two;
    q[1] = (i ? shift_right16<6>(words) : shift_right16<2>(words)) & two;
  }
};

// The plane of single bits, whose words serve 32 columns: those of sixteenth s come first.
inline I bits_of_plane(const uint8_t* plane, int s, int v) {
  const I words = I::load(plane + s / 2 * 64 + v * W * 4);
  return s % 2 ? shift_right16<4>(words) : words;
}

struct U3 {
  static constexpr bool kQuads = true;
  static constexpr int kBytes = 384;
  template <class T>
  static void quads(const uint8_t* codes, int s, int i, int v, T none, Quads& q) {
    U2::quads(codes, s, i, v, none, q);
    const I bits = bits_of_plane(codes + 256, s, v), place = I::set16(0x0404);
    q[0] = q[0] | ((i ? bits : shift_left16<2>(bits)) & place);
    q[1] = q[1] | ((i ? shift_right16<1>(bits) : shift_left16<1>(bits)) & place);
  }
};

struct U4 {
  static constexpr bool kQuads = true;
  static constexpr int kBytes = 512;
  template <class T>
  static void quads(const uint8_t* codes, int s, int i, int v, T, Quads& q) {
    const I words = I::load(codes + (2 * s + i) * 64 + v * W * 4), nibble = I::set16(0x0F0F);
    q[0] = words & nibble;
    q[1] = shift_right16<4>(words) & nibble;
  }
};

struct U5 {
  static constexpr bool kQuads = true;
  static constexpr int kBytes = 640;
  template <class T>
  static void quads(const uint8_t* codes, int s, int i, int v, T none, Quads& q) {
    U4::quads(codes, s, i, v, none, q);
    const I bits = bits_of_plane(codes + 512, s, v), place = I::set16(0x1010);
    q[0] = q[0] | ((i ? shift_left16<2>(bits) : shift_left16<4>(bits)) & place);
    q[1] = q[1] | ((i ? shift_left16<1>(bits) : shift_left16<3>(bits)) & place);
  }
};

struct U6 {
  static constexpr bool kQuads = true;
  static constexpr int kBytes = 768;
  template <class T>
  static void quads(const uint8_t* codes, int s, int i, int v, T none, Quads& q) {
    U4::quads(codes, s, i, v, none, q);
    const I words = I::load(codes + 512 + s * 64 + v * W * 4), place = I::set16(0x3030);
    q[0] = q[0] | ((i ? words : shift_left16<4>(words)) & place);
    q[1] = q[1] | ((i ? shift_right16<2>(words) : shift_left16<2>(words)) & place);
  }
};

struct Table {
  static constexpr bool kQuads = true;
  static constexpr int kBytes = 512;
  template <class T>
  static void quads(const uint8_t* codes, int s, int i, int v, T table, Quads& q) {
    U4::quads(codes, s, i, v, table, q);
    for (I& quad : q) quad = look_up_bytes(table, quad);
  }
};

struct S8 {
  static constexpr bool kQuads = false;
  static constexpr int kBytes = 1024;
  static I pair(const uint8_t* at) { return I::load_int8(at); }
};

struct U8 {
  static constexpr bool kQuads = false;
  static constexpr int kBytes = 1024;
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
  bool shares_zeros;               // two whole ones in a byte
  int64_t scale_bytes;             // of 16 rows
  const uint8_t* table = kE2m1;

  explicit Coded(const MatrixFormat& f)
      : code(f.code), scale(f.scale), zero(f.zero), group(f.group), layout(moestro::layout_of(f)), constant(f.constant),
        adds(f.zero > Zero::kConstant), shares_zeros(layout.codes <= 512 && layout.groups > 1),
        scale_bytes((scale == Scale::kFp32 ? 4 : scale <= Scale::kBf16 ? 2 : 1) * kPanel) {
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

// Calls put(v, V) for the vectors of 16 rows.
template <class Put>
inline void for_rows(Put put) {
#pragma GCC unroll 4
  for (int v = 0; v < VP; ++v) put(v * W);
}

// The scales of 16 rows and one group, of the kinds of one level, times `unit`.
inline void load_scale(Scale scale, const uint8_t* at, V unit, float* to) {
  switch (scale) {
    case Scale::kFp16: return for_rows([&](int r) { (V::load_fp16(at + 2 * r) * unit).store(to + r); });
    case Scale::kBf16: return for_rows([&](int r) { (V::load_bf16(at + 2 * r) * unit).store(to + r); });
    case Scale::kFp32: return for_rows([&](int r) { (V::load(reinterpret_cast<const float*>(at) + r) * unit).store(to + r); });
    case Scale::kE8m0: return for_rows([&](int r) { (even_bf16(shift_left32<7>(I::load_bytes(at + r))) * unit).store(to + r); });
    default: return for_rows([&](int r) {  // kE4m3: its bits are those of a float32 2^-120 times as large
      const I bits = I::load_bytes(at + r);
      const V small = even_bf16(shift_left32<8>(bits & I::set32(0x80)) | shift_left32<4>(bits & I::set32(0x7F)));
      (small * V::set(1.329227995784916e36f) * unit).store(to + r);
    });
  }
}

// The scales and zeros of two levels.
inline void two_level(const Coded& c, const uint8_t* unit, const uint8_t* at, Factors& f) {
  for_rows([&](int r) {
    const V d = V::load_fp16(unit + 2 * r);
    const V less = c.zero == Zero::kMin ? V::zero() - V::load_fp16(unit + 32 + 2 * r) : V::zero();
    const auto six = [&](int i) {  // of four numbers of 6 bits in three bytes
      const I six_bits = I::set32(63);
      if (i < 3) return to_float(I::load_bytes(at + 16 * i + r) & six_bits);
      const I high[] = {shift_right32<6>(I::load_bytes(at + r)), shift_right32<6>(I::load_bytes(at + 16 + r)),
                        shift_right32<6>(I::load_bytes(at + 32 + r))};
      return to_float(high[0] | shift_left32<2>(high[1]) | shift_left32<4>(high[2]));
    };
    switch (c.scale) {
      case Scale::kK4:
        (d * six(0)).store(f.scale[0] + r);
        (d * six(1)).store(f.scale[1] + r);
        (less * six(3)).store(f.add[0] + r);
        (less * six(2)).store(f.add[1] + r);
        return;
      case Scale::kK2:
        for (int g = 0; g < 4; ++g) {
          const I both = I::load_bytes(at + g * kPanel + r);
          (d * to_float(both & I::set32(15))).store(f.scale[g] + r);
          (less * to_float(shift_right32<4>(both))).store(f.add[g] + r);
        }
        return;
      case Scale::kK3:
        for (int g = 0; g < 4; ++g) (d * (six(g) - V::set(32.0f))).store(f.scale[g] + r);
        return;
      default:  // kK6, kIq4xs
        for (int g = 0; g < c.layout.groups; ++g) (d * to_float(I::load_signed_bytes(at + g * kPanel + r))).store(f.scale[g] + r);
    }
  });
}

// Reads the headers of a chunk of several panels, `stride` bytes apart, unless they are those of the chunk before.
#if defined(__GNUC__)
__attribute__((noinline))
#endif
void factors_of(const Coded& c, const uint8_t* panel, int64_t stride, int panels, int64_t chunk, bool first, Factors* f) {
  const PanelLayout& l = c.layout;
  if (l.chunk_header == 0 && !first && (chunk & ((int64_t{1} << l.unit_shift) - 1)) != 0) return;
  const int64_t unit = l.unit_at(chunk), chunk_at = l.chunk_at(chunk);
  const int64_t header = c.group == moestro::kRow ? 0 : l.chunk_header == 0 || c.scale >= Scale::kBlock ? unit : chunk_at;
  for (int p = 0; p < panels; ++p, panel += stride, ++f) {
    if (c.scale >= Scale::kK4) {
      two_level(c, panel + unit, panel + chunk_at, *f);
      continue;
    }
    float one = c.unit, more = 1;
    if (c.scale == Scale::kBlock || c.scale == Scale::kE4m3) memcpy(&more, panel + (c.scale == Scale::kBlock ? unit : 0), 4);
    const V times = V::set(one * more);
    if (c.scale == Scale::kBlock) {
      for_rows([&](int r) { times.store(f->scale[0] + r); });
      continue;
    }
    const uint8_t *scales = panel + header, *zeros = scales + l.groups * c.scale_bytes;
    for (int g = 0; g < l.groups; ++g) load_scale(c.scale, scales + g * c.scale_bytes, times, f->scale[g]);
    if (!c.adds) continue;
    for (int g = 0; g < l.groups; ++g) {
      const bool high = c.shares_zeros && g % 2;
      const uint8_t* whole = zeros + (c.shares_zeros ? g / 2 : g) * kPanel;
      for_rows([&](int r) {
        const V scale = V::zero() - V::load(f->scale[g] + r);
        V add;
        if (c.zero == Zero::kInt) {
          const I byte = I::load_bytes(whole + r);
          add = scale * to_float(high ? shift_right32<4>(byte) : c.shares_zeros ? byte & I::set32(15) : byte);
        } else {
          add = V::load_fp16(zeros + 2 * (g * kPanel + r));
          if (c.zero == Zero::kFp16) add = scale * add;
        }
        add.store(f->add[g] + r);
      });
    }
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

// One token's sums with a sixteenth s of P panels. There are two sums of a panel where registers allow, which total()
// adds up; the first counts 256 times where quads meet the high bytes of the activations by it and the low by the second.
template <class C, int P, int S, class T>
inline void meet(const uint8_t* codes, int64_t stride, int s, const int16_t* x, [[maybe_unused]] T table, I (&dots)[P][S][VP]) {
  constexpr int kStepBytes = C::kBytes / kSixteens;
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
    for (int i = 0; i < kStepBytes; i += 64) prefetch(codes + p * stride + s * kStepBytes + i + kAhead);
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
          for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
            for (int v = 0; v < VP; ++v) {
              V even, odd;
              load_e4m3(codes + p * to.stride + (j * kPanel + v * W) * 2, even, odd);
              part[p][v] = fma(odd, second, fma(even, first, part[p][v]));
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
          const uint8_t *panel = all.w + (p + i) * all.stride, *codes = c.codes_at(panel, k + j);
          for (int64_t b = 0; b < c.layout.chunk_bytes(); b += 64) prefetch(codes + b + count * c.layout.chunk_bytes());
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
