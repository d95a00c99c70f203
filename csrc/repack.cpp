#include "repack.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "interleave.h"
#include "panels.h"
#include "repack_strided.h"

namespace moestro {

// A scale of a block or of a row is repeated in each part of it.
int64_t repack_column_unit(const MatrixFormat& f) {
  return f.group == kRow || f.scale == Scale::kBlock ? kGroup : columns_at_once(f);
}

namespace {

// Bits of n bytes, a multiple of 8, 8 bytes at a time: those of `mask` once they are shifted down by Down and up by Up.
template <int Down, int Up, int Mask>
inline uint64_t some_bits(uint64_t eight) { return (eight >> Down << Up) & kEach * Mask; }

template <int Down, int Up, int Mask>
inline void take_bits(const uint8_t* from, int n, uint8_t* to) {
  for (int i = 0; i < n; i += 8) store64(to + i, some_bits<Down, Up, Mask>(load64(from + i)));
}

template <int Down, int Up, int Mask>
inline void add_bits(const uint8_t* from, int n, uint8_t* to) {
  for (int i = 0; i < n; i += 8) store64(to + i, load64(to + i) | some_bits<Down, Up, Mask>(load64(from + i)));
}

// A plane of single bits of 256 codes: bit j of byte i belongs to code 32 j + i, as its bit number Place.
template <int Place, int J = 0>
inline void add_plane(const uint8_t* plane, uint8_t* codes) {
  add_bits<(J > Place ? J - Place : 0), (Place > J ? Place - J : 0), 1 << Place>(plane, 32, codes + 32 * J);
  if constexpr (J < 7) add_plane<Place, J + 1>(plane, codes);
}

// n bytes of nibbles, of which the low ones come before the high ones.
inline void split_nibbles(const uint8_t* from, int n, uint8_t* to) {
  take_bits<0, 0, 15>(from, n, to);
  take_bits<4, 0, 15>(from, n, to + n);
}

// For each byte, its 8 bits as 8 bytes, the lowest first.
struct SpreadBits {
  uint64_t of[256] = {};
  constexpr SpreadBits() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0; bit < 8; ++bit) of[byte] |= static_cast<uint64_t>(byte >> bit & 1) << 8 * bit;
  }
};
constexpr SpreadBits kSpread;

// GGUF's blocks, each as ggml's quantization code defines it.

inline void read_q8_0(const uint8_t* at, UnitRow& row, int64_t g) {
  row.scale[g] = load16(at);
  memcpy(row.codes + 32 * g, at + 2, 32);
}

inline void read_q4(const uint8_t* at, bool has_add, UnitRow& row, int64_t g) {
  row.scale[g] = load16(at);
  if (has_add) row.zero[g] = load16(at + 2);
  split_nibbles(at + (has_add ? 4 : 2), 16, row.codes + 32 * g);
}

inline void read_q5(const uint8_t* at, bool has_add, UnitRow& row, int64_t g) {
  row.scale[g] = load16(at);
  if (has_add) row.zero[g] = load16(at + 2);
  at += has_add ? 4 : 2;
  uint8_t* to = row.codes + 32 * g;
  split_nibbles(at + 4, 16, to);
  for (int j = 0; j < 4; ++j) store64(to + 8 * j, load64(to + 8 * j) | kSpread.of[at[j]] << 4);
}

inline void read_mxfp4(const uint8_t* at, UnitRow& row, int64_t g) {
  row.scale[g] = at[0];
  split_nibbles(at + 1, 16, row.codes + 32 * g);
}

// The scale of each 16 columns is an e4m3 without a sign; ggml reads 127, which is no number, as 0.
inline void read_nvfp4(const uint8_t* at, UnitRow& row, int64_t b) {
  for (int g = 0; g < 4; ++g) {
    row.scale[4 * b + g] = at[g] == 127 ? 0 : at[g];
    split_nibbles(at + 4 + 8 * g, 8, row.codes + 64 * b + 16 * g);
  }
}

inline void read_k4_scales(const uint8_t* q, UnitRow& row) {
  for (int j = 0; j < 4; ++j) {
    row.scale[j] = q[j] & 63u;
    row.zero[j] = q[j + 4] & 63u;
    row.scale[j + 4] = (q[j + 8] & 15u) | (q[j] >> 6 << 4);
    row.zero[j + 4] = (q[j + 8] >> 4) | (q[j + 4] >> 6 << 4);
  }
}

inline void read_q4_k(const uint8_t* at, UnitRow& row) {
  row.d = load16(at);
  row.dmin = load16(at + 2);
  read_k4_scales(at + 4, row);
  for (int j = 0; j < 4; ++j) split_nibbles(at + 16 + 32 * j, 32, row.codes + 64 * j);
}

inline void read_q5_k(const uint8_t* at, UnitRow& row) {
  row.d = load16(at);
  row.dmin = load16(at + 2);
  read_k4_scales(at + 4, row);
  const uint8_t* high = at + 16;
  for (int j = 0; j < 4; ++j) split_nibbles(at + 48 + 32 * j, 32, row.codes + 64 * j);
  add_plane<4>(high, row.codes);
}

inline void read_q6_k(const uint8_t* at, UnitRow& row) {
  const uint8_t *scales = at + 192;
  for (int half = 0; half < 2; ++half) {
    const uint8_t *low = at + 64 * half, *high = at + 128 + 32 * half;
    uint8_t* to = row.codes + 128 * half;
    split_nibbles(low, 64, to);
    add_bits<0, 4, 48>(high, 32, to);
    add_bits<0, 2, 48>(high, 32, to + 32);
    add_bits<0, 0, 48>(high, 32, to + 64);
    add_bits<2, 0, 48>(high, 32, to + 96);
  }
  for (int g = 0; g < 16; ++g) row.scale[g] = scales[g];
  row.d = load16(at + 208);
}

inline void read_two_bits(const uint8_t* q, uint8_t* to) {
  for (int half = 0; half < 2; ++half, q += 32, to += 128) {
    take_bits<0, 0, 3>(q, 32, to);
    take_bits<2, 0, 3>(q, 32, to + 32);
    take_bits<4, 0, 3>(q, 32, to + 64);
    take_bits<6, 0, 3>(q, 32, to + 96);
  }
}

inline void read_q2_k(const uint8_t* at, UnitRow& row) {
  for (int g = 0; g < 16; ++g) {
    row.scale[g] = at[g] & 15u;
    row.zero[g] = at[g] >> 4;
  }
  read_two_bits(at + 16, row.codes);
  row.d = load16(at + 80);
  row.dmin = load16(at + 82);
}

inline void read_q3_k(const uint8_t* at, UnitRow& row) {
  const uint8_t *high = at, *scales = at + 96;
  read_two_bits(at + 32, row.codes);
  add_plane<2>(high, row.codes);
  for (int g = 0; g < 16; ++g) {
    const unsigned low = g < 8 ? scales[g] & 15u : scales[g - 8] >> 4;
    row.scale[g] = low | (scales[8 + g % 4] >> 2 * (g / 4) & 3u) << 4;
  }
  row.d = load16(at + 108);
}

inline void read_iq4_xs(const uint8_t* at, UnitRow& row) {
  row.d = load16(at);
  const unsigned high = load16(at + 2);
  for (int g = 0; g < 8; ++g) {
    const int whole = static_cast<int>((at[4 + g / 2] >> 4 * (g % 2) & 15u) | (high >> 2 * g & 3u) << 4) - 32;
    row.scale[g] = static_cast<uint8_t>(whole);
    split_nibbles(at + 8 + 16 * g, 16, row.codes + 32 * g);
  }
}

struct GgufType {
  int64_t columns, bytes;  // of a block
};

// Of a format that GGUF has; {0, 0} otherwise.
inline GgufType gguf_type(const MatrixFormat& f) {
  if (f.group == 32 && f.scale == Scale::kFp16) {
    switch (f.code) {
      case Code::kS8: return {32, 34};
      case Code::kU4: return f.zero == Zero::kAdd ? GgufType{32, 20} : f.zero == Zero::kConstant ? GgufType{32, 18} : GgufType{0, 0};
      case Code::kU5: return f.zero == Zero::kAdd ? GgufType{32, 24} : f.zero == Zero::kConstant ? GgufType{32, 22} : GgufType{0, 0};
      case Code::kIq4nl: return {32, 18};
      default: return {0, 0};
    }
  }
  if (f.code == Code::kE2m1 && f.scale == Scale::kE8m0) return {32, 17};
  if (f.code == Code::kE2m1 && f.scale == Scale::kE4m3) return f.group == 16 ? GgufType{64, 36} : GgufType{0, 0};
  switch (f.scale) {
    case Scale::kK4: return f.code == Code::kU4 ? GgufType{256, 144} : f.code == Code::kU5 ? GgufType{256, 176} : GgufType{0, 0};
    case Scale::kK6: return f.code == Code::kU6 ? GgufType{256, 210} : GgufType{0, 0};
    case Scale::kK2: return f.code == Code::kU2 ? GgufType{256, 84} : GgufType{0, 0};
    case Scale::kK3: return f.code == Code::kU3 ? GgufType{256, 110} : GgufType{0, 0};
    case Scale::kIq4xs: return f.code == Code::kIq4nl ? GgufType{256, 136} : GgufType{0, 0};
    default: return {0, 0};
  }
}

void read_gguf(const MatrixFormat& f, const uint8_t* at, int64_t blocks, UnitRow& row) {
  const GgufType type = gguf_type(f);
  for (int64_t b = 0; b < blocks; ++b, at += type.bytes) {
    switch (f.scale) {
      case Scale::kK4: f.code == Code::kU4 ? read_q4_k(at, row) : read_q5_k(at, row); break;
      case Scale::kK6: read_q6_k(at, row); break;
      case Scale::kK2: read_q2_k(at, row); break;
      case Scale::kK3: read_q3_k(at, row); break;
      case Scale::kIq4xs: read_iq4_xs(at, row); break;
      case Scale::kE8m0: read_mxfp4(at, row, b); break;
      case Scale::kE4m3: read_nvfp4(at, row, b); break;
      default:
        if (f.code == Code::kS8) read_q8_0(at, row, b);
        else if (f.code == Code::kU5) read_q5(at, f.zero == Zero::kAdd, row, b);
        else read_q4(at, f.zero == Zero::kAdd, row, b);
    }
  }
}

// Codes that lie apart from their scales.

constexpr int kAwqPlaces[8] = {0, 4, 1, 5, 2, 6, 3, 7};  // of a word's nibbles, for row % 8

inline uint8_t code_at(const Raw& raw, const MatrixFormat& f, int64_t row, int64_t k) {
  switch (raw.layout) {
    case Layout::kNibbles: return raw.codes[row * ((raw.columns + 1) / 2) + k / 2] >> 4 * (k % 2) & 15;
    case Layout::kAwq: return load32(raw.codes + (k * (raw.rows / 8) + row / 8) * 4) >> 4 * kAwqPlaces[row % 8] & 15;
    case Layout::kGptq: {
      const int64_t bits = bits_of(f.code), held = 32 / bits;
      const uint32_t word = load32(raw.codes + (k / held * raw.rows + row) * 4);
      return static_cast<uint8_t>(word >> bits * (k % held) & ((1u << bits) - 1));
    }
    default: return raw.codes[row * raw.row_stride + k * raw.column_stride];
  }
}

void read_codes(const Raw& raw, const MatrixFormat& f, int64_t row, int64_t k, int64_t n, uint8_t* to) {
  if (raw.layout == Layout::kStrided) return read_strided(raw, f, row, k, n, to);
  if (raw.column_order != nullptr) {
    for (int64_t i = 0; i < n; ++i) to[i] = code_at(raw, f, row, raw.column_order[k + i]);
  } else if (raw.layout == Layout::kNibbles) {  // k is even
    const uint8_t* from = raw.codes + row * ((raw.columns + 1) / 2) + k / 2;
    for (int64_t i = 0; i < n / 2; ++i) {
      to[2 * i] = from[i] & 15;
      to[2 * i + 1] = from[i] >> 4;
    }
    if (n % 2) to[n - 1] = from[n / 2] & 15;
  } else if (raw.layout == Layout::kPlain && raw.column_stride == 1) {
    memcpy(to, raw.codes + row * raw.row_stride + k, n);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = code_at(raw, f, row, k + i);
  }
  if (raw.flip) for (int64_t i = 0; i < n; ++i) to[i] ^= raw.flip;
}

// The scales and zeros of a unit's groups, from [R, groups].
void read_sides(const Raw& raw, const MatrixFormat& f, int64_t row, int64_t k, int64_t n, UnitRow& to) {
  if (f.scale == Scale::kBlock) {
    const int64_t across = (raw.columns + 127) / 128;
    to.scale[0] = load32(raw.scales + (row / 128 * across + k / 128) * 4);
    return;
  }
  const int64_t group = f.group == 0 ? raw.columns : f.group, all = (raw.columns + group - 1) / group;
  const int64_t size = scale_bytes(f.scale), zero_size = f.zero == Zero::kInt ? 1 : 2;
  for (int64_t g = k / group, i = 0; g < all && (i == 0 || g * group < k + n); ++g, ++i) {
    memcpy(&to.scale[i], raw.scales + (row * all + g) * size, size);
    if (raw.zeros != nullptr) memcpy(&to.zero[i], raw.zeros + (row * all + g) * zero_size, zero_size);
  }
}

// Floats as they are: [K][16], or for bf16 pairs of columns [K / 2][16][2].
void repack_floats(const RepackJob& job, int64_t first, uint8_t* to) {
  const Raw& raw = *job.raw;
  const int64_t size = bits_of(job.format.code) / 8, together = job.format.code == Code::kBf16 ? 2 : 1;
  const int64_t bytes = panel_bytes(job.format, job.columns);
  const int64_t rows = std::min(kPanel, job.row_begin + job.rows - first);
  const int64_t columns = std::min(job.columns, raw.columns - job.column_begin);
  const int64_t taken = std::min(rows, raw.rows_taken - first);
  const auto row_at = [&](int64_t r) { return raw.codes + (raw.row_order ? raw.row_order[first + r] : first + r) * raw.row_stride; };
  int64_t done = 0;
  if (taken == kPanel && raw.column_stride == size && raw.column_order == nullptr) {
    const uint8_t* from[kPanel];
    for (int64_t r = 0; r < kPanel; ++r) from[r] = row_at(r) + job.column_begin * size;
    const int64_t units = std::max<int64_t>(0, columns) / together;
    size * together == 4 ? interleave<uint32_t>(from, units, to) : interleave<uint16_t>(from, units, to);
    done = units * together;
    if (done == job.columns) return;
  }
  const int64_t written = done * kPanel * size;
  memset(to + written, 0, bytes - written);
  constexpr int64_t kTile = 32;  // columns, so that 16 rows of them stay in the first cache
  for (int64_t k = done; k < columns; k += kTile) {
    const int64_t stop = std::min(columns, k + kTile);
    for (int64_t r = 0; r < taken; ++r) {
      const uint8_t* from = row_at(r);
      for (int64_t i = k; i < stop; ++i) {
        const int64_t column = raw.column_order ? raw.column_order[job.column_begin + i] : job.column_begin + i;
        memcpy(to + (i / together * kPanel * together + r * together + i % together) * size, from + column * raw.column_stride, size);
      }
    }
  }
}

// What cannot be kept of a row that was read beside the first of its panel, or nullptr.
const char* fault_of_row(const MatrixFormat& f, const UnitRow& first, const UnitRow& row, int64_t columns) {
  if (f.code != Code::kE4m3) return nullptr;
  if (f.scale == Scale::kBlock && row.scale[0] != first.scale[0])
    return "FP8: 16 rows that are packed together are of two blocks of 128, which have a scale each";
  for (int64_t i = 0; i < columns; ++i)
    if ((row.codes[i] & 0x7F) == 0x7F) return "FP8: a weight is not a number";
  return nullptr;
}

// What cannot be kept of a row of GGUF's blocks, or nullptr.
const char* fault_of_blocks(const MatrixFormat& f, const UnitRow& row, int64_t columns) {
  if (f.scale != Scale::kE4m3) return nullptr;
  for (int64_t g = 0; g < columns / 16; ++g)
    if (row.scale[g] > 127) return "NVFP4: a scale has a sign, which GGUF's do not have";
  return nullptr;
}

// Returns what cannot be kept, or nullptr.
const char* repack_panel(const RepackJob& job, int64_t panel) {
  const Raw& raw = *job.raw;
  const MatrixFormat& f = job.format;
  uint8_t* const out = job.out + panel * panel_bytes(f, job.columns);
  const int64_t first = job.row_begin + panel * kPanel;
  if (f.is_float()) {
    repack_floats(job, first, out);
    return nullptr;
  }
  const PanelLayout layout = layout_of(f);
  const int64_t unit = columns_at_once(f), row_bytes = raw_row_bytes(raw, f);
  UnitRow rows[kPanel];
  if (f.scale == Scale::kE4m3) memcpy(out, &raw.tensor_scale, 4);
  for (int64_t k = 0; k < job.columns; k += unit) {
    const int64_t from = job.column_begin + k;
    const int64_t columns = std::max<int64_t>(0, std::min({unit, job.columns - k, raw.columns - from}));
    for (int64_t r = 0; r < kPanel; ++r) {
      const bool is_there = columns > 0 && first + r < std::min(job.row_begin + job.rows, raw.rows_taken);
      // GGUF's blocks say all of a whole unit that a panel keeps.
      if (!is_there || columns < unit || raw.layout != Layout::kGguf) memset(&rows[r], 0, sizeof(UnitRow));
      if (!is_there) continue;
      const int64_t row = raw.row_order ? raw.row_order[first + r] : first + r;
      if (raw.layout == Layout::kGguf) {
        const GgufType type = gguf_type(f);
        read_gguf(f, raw.codes + row * row_bytes + from / type.columns * type.bytes, columns / type.columns, rows[r]);
        if (const char* fault = fault_of_blocks(f, rows[r], columns)) return fault;
      } else {
        read_codes(raw, f, row, from, columns, rows[r].codes);
        if (!is_strided(f)) read_sides(raw, f, row, from, columns, rows[r]);
        if (const char* fault = fault_of_row(f, rows[0], rows[r], columns)) return fault;
      }
    }
    write_unit(f, layout, rows, k, std::min(unit, job.columns - k), out);
    if (is_strided(f) && first < raw.rows) write_columns(raw, f, first, from, columns, out + layout.scales_at(k / kGroup));
  }
  return nullptr;
}

}  // namespace

int64_t raw_row_bytes(const Raw& raw, const MatrixFormat& format) {
  if (raw.layout != Layout::kGguf) return 0;
  const GgufType type = gguf_type(format);
  return type.columns == 0 || raw.columns % type.columns != 0 ? 0 : raw.columns / type.columns * type.bytes;
}

void repack(Runner& runner, const std::vector<RepackJob>& jobs) {
  struct Part {
    const RepackJob* job;
    int64_t begin, end;  // panels
  };
  constexpr int64_t kPartWeights = 1 << 15;
  std::vector<Part> parts;
  for (const RepackJob& job : jobs) {
    const int64_t panels = (job.rows + kPanel - 1) / kPanel;
    const int64_t some = std::max<int64_t>(1, kPartWeights / (kPanel * std::max<int64_t>(1, job.columns)));
    for (int64_t p = 0; p < panels; p += some) parts.push_back({&job, p, std::min(panels, p + some)});
  }
  std::atomic<const char*> fault{nullptr};
  runner.each(static_cast<int>(parts.size()), 0, true, [&](int i, float*) {
    for (int64_t p = parts[i].begin; p < parts[i].end; ++p)
      if (const char* found = repack_panel(*parts[i].job, p)) fault.store(found);
  });
  if (const char* found = fault.load()) throw std::invalid_argument(found);
}

}  // namespace moestro
