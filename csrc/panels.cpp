#include "panels.h"

namespace moestro {

namespace {

// A byte of each of four columns: half 0 has columns 0 4 1 5 of eight, half 1 columns 2 6 3 7.
inline uint32_t quad(uint64_t eight, int half) {
  const uint32_t low = static_cast<uint32_t>(eight) >> 16 * half, high = static_cast<uint32_t>(eight >> 32) >> 16 * half;
  return (low & 0xFFu) | (high & 0xFFu) << 8 | (low & 0xFF00u) << 8 | (high & 0xFF00u) << 16;
}

inline uint32_t nibble_word(uint64_t eight) {
  const auto close = [](uint64_t x) {  // bytes 0 2 4 6 to nibbles
    x &= 0x00FF00FF00FF00FFull;
    x = (x | x >> 12) & 0x000000FF000000FFull;
    return static_cast<uint32_t>((x | x >> 24) & 0xFFFFu);
  };
  return close(eight) | close(eight >> 8) << 16;
}

// A plane of some bits of each code: 32-bit words [64 * bits / 32][16].
template <int Bits>
inline void write_plane(const UnitRow* rows, int64_t chunk, int shift, uint8_t* to) {
  constexpr int kSteps = 4 / Bits;  // of 8 columns, that share a word
  for (int r = 0; r < kPanel; ++r) {
    const uint8_t* codes = rows[r].codes + kGroup * chunk;
    for (int word = 0; word < 8 / kSteps; ++word) {
      uint64_t steps = 0;  // those of a column in its byte
      for (int s = 0; s < kSteps; ++s)
        steps |= (load64(codes + 8 * (kSteps * word + s)) >> shift & kEach * ((1 << Bits) - 1)) << Bits * 2 * s;
      store32(to + (word * kPanel + r) * 4, quad(steps, 0) | quad(steps, 1) << Bits);
    }
  }
}

inline void write_nibbles(const UnitRow* rows, int64_t chunk, uint8_t* to) {
  for (int r = 0; r < kPanel; ++r)
    for (int i = 0; i < 8; ++i) {
      const uint64_t eight = load64(rows[r].codes + kGroup * chunk + 8 * i) & kEach * 15;
      store32(to + (i * kPanel + r) * 4, nibble_word(eight));
    }
}

// Pairs of columns: [32][16 rows][2], four pairs of four rows at a time.
inline void write_bytes(const UnitRow* rows, int64_t chunk, uint8_t* to) {
  const auto even = [](uint64_t a, uint64_t b) { return (a & 0x0000FFFF0000FFFFull) | (b & 0x0000FFFF0000FFFFull) << 16; };
  const auto odd = [](uint64_t a, uint64_t b) { return (a >> 16 & 0x0000FFFF0000FFFFull) | (b & 0xFFFF0000FFFF0000ull); };
  const auto low = [](uint64_t a, uint64_t b) { return (a & 0xFFFFFFFFull) | b << 32; };
  const auto high = [](uint64_t a, uint64_t b) { return a >> 32 | (b & 0xFFFFFFFF00000000ull); };
  for (int j = 0; j < kGroup / 2; j += 4)
    for (int r = 0; r < kPanel; r += 4) {
      uint64_t row[4];
      for (int i = 0; i < 4; ++i) row[i] = load64(rows[r + i].codes + kGroup * chunk + 2 * j);
      const uint64_t even01 = even(row[0], row[1]), even23 = even(row[2], row[3]);  // pairs 0 and 2
      const uint64_t odd01 = odd(row[0], row[1]), odd23 = odd(row[2], row[3]);      // pairs 1 and 3
      uint8_t* at = to + (j * kPanel + r) * 2;
      store64(at, low(even01, even23));
      store64(at + 2 * kPanel, low(odd01, odd23));
      store64(at + 4 * kPanel, high(even01, even23));
      store64(at + 6 * kPanel, high(odd01, odd23));
    }
}

// Scales [groups][16], then zeros, of groups that begin at `first` of a unit.
inline void write_sides(const MatrixFormat& f, const UnitRow* rows, int64_t first, int64_t groups, uint8_t* to) {
  const int64_t size = scale_bytes(f.scale);
  for (int64_t g = 0; g < groups; ++g)
    for (int r = 0; r < kPanel; ++r, to += size) memcpy(to, &rows[r].scale[first + g], size);
  if (f.zero == Zero::kFp16 || f.zero == Zero::kAdd) {
    for (int64_t g = 0; g < groups; ++g)
      for (int r = 0; r < kPanel; ++r, to += 2) store16(to, static_cast<uint16_t>(rows[r].zero[first + g]));
  } else if (f.zero == Zero::kInt) {
    const int64_t held = bits_of(f.code) <= 4 ? 2 : 1;  // in a byte
    for (int64_t g = 0; g < groups; g += held)
      for (int r = 0; r < kPanel; ++r) {
        const uint32_t high = held == 2 && g + 1 < groups ? rows[r].zero[first + g + 1] << 4 : 0;
        *to++ = static_cast<uint8_t>(rows[r].zero[first + g] | high);
      }
  }
}

inline void write_codes(Code code, const UnitRow* rows, int64_t chunk, uint8_t* to) {
  constexpr int64_t kNibbleBytes = kPanel * kGroup / 2;
  switch (code) {
    case Code::kU2: return write_plane<2>(rows, chunk, 0, to);
    case Code::kU3: write_plane<2>(rows, chunk, 0, to); return write_plane<1>(rows, chunk, 2, to + kNibbleBytes / 2);
    case Code::kU5: write_nibbles(rows, chunk, to); return write_plane<1>(rows, chunk, 4, to + kNibbleBytes);
    case Code::kU6: write_nibbles(rows, chunk, to); return write_plane<2>(rows, chunk, 4, to + kNibbleBytes);
    case Code::kU4: case Code::kE2m1: case Code::kIq4nl: return write_nibbles(rows, chunk, to);
    default: return write_bytes(rows, chunk, to);
  }
}

// What a chunk of a unit has for itself.
inline void write_own(const MatrixFormat& f, const PanelLayout& layout, const UnitRow* rows, int64_t chunk, uint8_t* to) {
  if (layout.own == 0 || is_strided(f)) return;  // the bytes of columns are no row's
  if (!is_two_level(f)) return write_sides(f, rows, chunk * layout.groups, layout.groups, to);
  for (int r = 0; r < kPanel; ++r) {
    const uint32_t *s = rows[r].scale + chunk * kGroup / f.group, *m = rows[r].zero + chunk * kGroup / f.group;
    const auto put = [&](int array, uint32_t value) { to[array * kPanel + r] = static_cast<uint8_t>(value); };
    switch (f.scale) {
      case Scale::kK4:
        put(0, s[0] | (m[0] & 3) << 6);
        put(1, s[1] | (m[0] >> 2 & 3) << 6);
        put(2, m[1] | (m[0] >> 4) << 6);
        break;
      case Scale::kK3:
        put(0, s[0] | (s[3] & 3) << 6);
        put(1, s[1] | (s[3] >> 2 & 3) << 6);
        put(2, s[2] | (s[3] >> 4) << 6);
        break;
      case Scale::kK2:
        for (int g = 0; g < 4; ++g) put(g, s[g] | m[g] << 4);
        break;
      case Scale::kShifted:
        for (int g = 0; g < layout.groups; ++g) put(g, s[g]), put(layout.groups + g, m[g]);
        break;
      default:
        for (int g = 0; g < layout.groups; ++g) put(g, s[g]);
    }
  }
}

// What all chunks of a unit share.
inline void write_shared(const MatrixFormat& f, const PanelLayout& layout, const UnitRow* rows, uint8_t* to) {
  if (layout.shared == 0) return;
  if (f.scale == Scale::kBlock) return store32(to, rows[0].scale[0]);
  if (!is_two_level(f)) return write_sides(f, rows, 0, 1, to);
  for (int r = 0; r < kPanel; ++r, to += 2) store16(to, rows[r].d);
  if (f.zero == Zero::kMin)
    for (int r = 0; r < kPanel; ++r, to += 2) store16(to, rows[r].dmin);
}

}  // namespace

int64_t columns_at_once(const MatrixFormat& f) { return f.group == kRow ? kSuper : kGroup << layout_of(f).unit_shift; }

void write_unit(const MatrixFormat& f, const PanelLayout& layout, const UnitRow* rows, int64_t k, int64_t columns, uint8_t* panel) {
  const int64_t chunk = k / kGroup;
  if (layout.begins_unit(chunk)) {
    memset(panel + layout.unit_at(chunk), 0, layout.unit_header);
    write_shared(f, layout, rows, panel + layout.unit_at(chunk));
  }
  for (int64_t c = 0; c * kGroup < columns; ++c) {
    write_own(f, layout, rows, c, panel + layout.scales_at(chunk + c));
    write_codes(f.code, rows, c, panel + layout.codes_at(chunk + c));
  }
}

}  // namespace moestro
