// The codes of a chunk in registers, and what stands in the headers as floats: scale * code + add.

namespace {

using moestro::Code;
using moestro::PanelLayout;
using moestro::Scale;
using moestro::Zero;

constexpr int kMostGroups = 4;       // in a chunk

// Four columns of a row as unsigned bytes of a 32-bit lane: a quad. A step of 8 columns has two, of columns 0 4 1 5 and
// 2 6 3 7; two steps, i = 0 and 1, are the sixteenth s of a chunk.
using Quads = I[2];

struct U2 {
  static constexpr bool kQuads = true, kPlain = false;
  static constexpr int kLargest = 3;
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
  static constexpr bool kQuads = true, kPlain = false;
  static constexpr int kLargest = 7;
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
  static constexpr bool kQuads = true, kPlain = false;
  static constexpr int kLargest = 15;
  static constexpr int kBytes = 512;
  template <class T>
  static void quads(const uint8_t* codes, int s, int i, int v, T, Quads& q) {
    const I words = I::load(codes + (2 * s + i) * 64 + v * W * 4), nibble = I::set16(0x0F0F);
    q[0] = words & nibble;
    q[1] = shift_right16<4>(words) & nibble;
  }
};

struct U5 {
  static constexpr bool kQuads = true, kPlain = false;
  static constexpr int kLargest = 31;
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
  static constexpr bool kQuads = true, kPlain = false;
  static constexpr int kLargest = 63;
  static constexpr int kBytes = 768;
  template <class T>
  static void quads(const uint8_t* codes, int s, int i, int v, T none, Quads& q) {
    U4::quads(codes, s, i, v, none, q);
    const I words = I::load(codes + 512 + s * 64 + v * W * 4), place = I::set16(0x3030);
    q[0] = q[0] | ((i ? words : shift_left16<4>(words)) & place);
    q[1] = q[1] | ((i ? shift_right16<2>(words) : shift_left16<2>(words)) & place);
  }
};

template <int Largest>
struct Table {
  static constexpr bool kQuads = true, kPlain = false;
  static constexpr int kLargest = Largest;
  static constexpr int kBytes = 512;
  template <class T>
  static void quads(const uint8_t* codes, int s, int i, int v, T table, Quads& q) {
    U4::quads(codes, s, i, v, table, q);
    for (I& quad : q) quad = look_up_bytes(table, quad);
  }
};

using E2m1 = Table<24>;
using Iq4nl = Table<240>;

// Bytes, whose quads are of columns 0 1 2 3 and 4 5 6 7 of a step.
template <bool Signed>
struct Bytes {
#if defined(MOESTRO_BYTE_DOTS)
  static constexpr bool kQuads = true;
  template <class T>
  static void quads(const uint8_t* codes, int s, int i, int, T, Quads& q) {
    const int32_t flip = Signed ? static_cast<int32_t>(0x80808080) : 0;
    q[0] = load_quads(codes + (2 * s + i) * 128, flip);
    q[1] = load_quads(codes + (2 * s + i) * 128 + 64, flip);
  }
#else
  static constexpr bool kQuads = false;
#endif
  static constexpr bool kPlain = true;
  static constexpr int kLargest = 255;
  static constexpr int kBytes = 1024;
  static I pair(const uint8_t* at) { return Signed ? I::load_int8(at) : I::load_uint8(at); }
};
using S8 = Bytes<true>;
using U8 = Bytes<false>;

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
  float zero_step = 0;             // of a zero in fixed point
  float unit = 1;                  // the value of a code is so many times the number that kernels read
  bool adds;                       // whether there are zeros besides the constant
  bool shares_zeros;               // two whole ones in a byte
  int64_t scale_bytes;             // of 16 rows
  const uint8_t* table = kE2m1;

  explicit Coded(const MatrixFormat& f)
      : code(f.code), scale(f.scale), zero(f.zero), group(f.group), layout(moestro::layout_of(f)), constant(f.constant),
        adds(f.zero > Zero::kConstant), shares_zeros(layout.codes <= 512 && layout.groups > 1),
        scale_bytes(moestro::scale_bytes(scale) * kPanel) {
    if (zero == Zero::kFixed) zero_step = static_cast<float>(1 << moestro::bits_of(code)) / 256;
    if (code == Code::kE2m1) constant = 12, unit = 0.5f;
    if (code == Code::kIq4nl) constant = 127, table = kIq4nl;
    if (code == Code::kE4m3) unit = 256;
  }
  bool is_whole() const { return code != Code::kE4m3; }
  bool is_plain() const { return code == Code::kS8 || code == Code::kU8; }
  bool is_strided() const { return scale == Scale::kColumn; }
  const uint8_t* codes_at(const uint8_t* panel, int64_t chunk) const {
    return panel + layout.codes_at(chunk);
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
    case Code::kE2m1: return do_with(E2m1());
    default: return do_with(Iq4nl());
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

// Byte N of 32-bit lanes as floats.
template <class C, int N>
inline V byte_of(V table, I quad) {
  I code = quad;
  if constexpr (N > 0) code = shift_right32<8 * N>(quad);
  if constexpr (C::kLargest < kCounted) return counted(table, code);
  else if constexpr (N == 3 && C::kLargest < 128) return to_float(code);
  else return to_float(code & I::set32(0xFF));
}

// Calls put(column, codes as floats of 16 rows) for the sixteenth s of a chunk's columns, in the order of bytes. `table` is
// counts().
template <class C, class T, class Put>
inline void for_codes(const uint8_t* codes, int s, T of_codes, V table, Put put) {
  if constexpr (C::kQuads && !C::kPlain) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      Quads q[VP];
#pragma GCC unroll 4
      for (int v = 0; v < VP; ++v) C::quads(codes, s, i, v, of_codes, q[v]);
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

// A weight of a chunk is scale * code + add, of its group and row.
struct Factors {
  alignas(64) float scale[kMostGroups][kPanel], add[kMostGroups][kPanel];
};

// Calls put(first row) for each vector of 16 rows.
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

// Shifted scales, and zeros in fixed point.
inline void shifted(const Coded& c, const uint8_t* panel, const uint8_t* at, Factors& f) {
  const V step = V::set(c.zero_step), half = V::set(0.5f);
  for_rows([&](int r) {
    const V power = even_bf16(shift_left32<7>(I::load_bytes(panel + r)));
    for (int g = 0; g < c.layout.groups; ++g) {
      const V scale = power * to_float(I::load_bytes(at + g * kPanel + r));
      const V zero = to_float(I::load_bytes(at + (c.layout.groups + g) * kPanel + r));
      scale.store(f.scale[g] + r);
      (scale * (half - zero * step)).store(f.add[g] + r);
    }
  });
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
  if (l.own == 0 && !first && !l.begins_unit(chunk)) return;
  const int64_t unit = l.unit_at(chunk), scales = l.scales_at(chunk);
  const bool begins = l.begins_unit(chunk);
  for (int p = 0; p < panels; ++p, panel += stride, ++f) {
    if (begins) for (int64_t i = 0; i < l.unit_header; i += 64) prefetch(panel + unit + i + kAhead);
    if (c.scale == Scale::kShifted) {
      shifted(c, panel, panel + scales, *f);
      continue;
    }
    if (c.scale >= Scale::kK4) {
      two_level(c, panel + unit, panel + scales, *f);
      continue;
    }
    float one = c.unit, more = 1;
    if (c.scale == Scale::kBlock || c.scale == Scale::kE4m3) memcpy(&more, panel + (c.scale == Scale::kBlock ? unit : 0), 4);
    const V times = V::set(one * more);
    if (c.scale == Scale::kBlock) {
      for_rows([&](int r) { times.store(f->scale[0] + r); });
      continue;
    }
    const uint8_t *of_groups = panel + scales, *zeros = of_groups + l.groups * c.scale_bytes;
    for (int g = 0; g < l.groups; ++g) load_scale(c.scale, of_groups + g * c.scale_bytes, times, f->scale[g]);
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

}  // namespace
