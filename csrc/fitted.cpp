#include "fitted.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "panels.h"
#include "simd.h"
#include "solver.h"

namespace moestro {

namespace {

constexpr float kMostByte = 255;

// To the nearest, ties to even, of numbers of up to 2^20: what is added leaves no bits for fractions, and a whole
// number in the lowest bits.
constexpr float kWhole = 12582912.0f;
inline float nearest(float x) { return (x + kWhole) - kWhole; }

inline uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

// The bits of a weight as a float. Of fp16 exact, subnormals too; what is not finite there becomes 2^16 or more.
template <Type kType>
inline uint32_t float_bits(const uint8_t* from, int64_t i) {
  if constexpr (kType == Type::kFp32) return load32(from + 4 * i);
  if constexpr (kType == Type::kBf16) return static_cast<uint32_t>(load16(from + 2 * i)) << 16;
  const uint32_t half = load16(from + 2 * i);
  constexpr float kHalfToFloat = 5.192296858534828e33f;  // 2^112, by which the exponents of fp16 are less
  return bits_of(float_of_bits((half & 0x7FFFu) << 13) * kHalfToFloat) | (half & 0x8000u) << 16;
}

template <Type kType>
inline void read_floats(const uint8_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = float_of_bits(float_bits<kType>(from, i));
}

void read_floats(const FittedMatrix& m, int64_t row, int64_t k, int64_t count, float* to) {
  const uint8_t* from = m.weights + (row * m.columns + k) * size_of(m.type);
  if (m.type == Type::kFp32) read_floats<Type::kFp32>(from, count, to);
  else if (m.type == Type::kBf16) read_floats<Type::kBf16>(from, count, to);
  else read_floats<Type::kFp16>(from, count, to);
}

// A group's scale and zero such that its zero lies between the least and the largest code. Groups that want another,
// and those of equal weights, of which the solver makes one large step, get a range that reaches from 0 to their weights.
void take_sides(const float* weights, int64_t group, float levels, float* scale, float* zero) {
  constexpr int kLanes = 16;  // which divide a group: of several a compiler finds the extremes at once
  float lows[kLanes], highs[kLanes];
  for (int j = 0; j < kLanes; ++j) lows[j] = highs[j] = weights[j];
  for (int64_t i = kLanes; i < group; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      lows[j] = std::min(lows[j], weights[i + j]);
      highs[j] = std::max(highs[j], weights[i + j]);
    }
  float low = lows[0], high = highs[0];
  for (int j = 1; j < kLanes; ++j) low = std::min(low, lows[j]), high = std::max(high, highs[j]);
  if (*zero >= -0.5f && *zero <= levels + 0.5f && low != high) return;
  low = std::min(low, 0.0f), high = std::max(high, 0.0f);
  *scale = (high - low) / levels;
  *zero = *scale > 0 ? -low / *scale : 0.0f;
}

// Codes of a group's weights, of a scale and zero that were rounded.
void write_codes(const float* weights, int64_t count, float scale, float zero, float levels, uint8_t* to) {
  if (scale == 0) return;  // they are 0 already
  for (int64_t i = 0; i < count; ++i) {
    to[i] = static_cast<uint8_t>(bits_of(std::min(std::max(weights[i] / scale + zero, 0.0f), levels) + kWhole));
  }
}

// The sides that a row's groups get, and the power of two of their scales.
struct RowSides {
  std::vector<float> scales, zeros;  // [groups of the row]
  int exponent;                      // -127 where all weights are 0
  uint8_t power;                     // exponent + 127, or 0
};

// `to` holds as many scales and zeros as a row has groups.
void read_sides(const FittedMatrix& m, int64_t row, RowSides& to) {
  const int64_t group = m.format.group, groups = static_cast<int64_t>(to.scales.size());
  const float levels = static_cast<float>((1 << bits_of(m.format.code)) - 1);
  float most = 0;
  for (int64_t k = 0; k < m.columns; k += kSuper) {
    float weights[kSuper] = {};
    const int64_t count = std::min(kSuper, m.columns - k);
    read_floats(m, row, k, count, weights);
    for (int64_t at = 0; at < count; at += group) {
      const int64_t g = (k + at) / group;
      to.scales[g] = m.scales[row * groups + g], to.zeros[g] = m.zeros[row * groups + g];
      take_sides(weights + at, group, levels, &to.scales[g], &to.zeros[g]);
      most = std::max(most, to.scales[g]);
    }
  }
  const float of_byte = most / kMostByte;  // 0, which has no exponent, of the smallest subnormals
  std::frexp(of_byte, &to.exponent);
  to.exponent = of_byte > 0 ? std::min(std::max(to.exponent, -127), 127) : -127;
  to.power = static_cast<uint8_t>(most > 0 ? to.exponent + 127 : 0);
}

// Columns [k, k + count) of a row, up to 256, filled up with weights of 0. `to` holds zeros.
void read_row(const FittedMatrix& m, const RowSides& sides, int64_t row, int64_t k, int64_t count, UnitRow& to) {
  const int64_t group = m.format.group, groups = (count + group - 1) / group;
  const int64_t bits = bits_of(m.format.code);
  const float levels = static_cast<float>((1 << bits) - 1), steps = static_cast<float>(1 << (8 - bits));
  const float *scales = sides.scales.data() + k / group, *zeros = sides.zeros.data() + k / group;
  const float power = std::ldexp(1.0f, sides.exponent);
  float weights[kSuper] = {};
  read_floats(m, row, k, count, weights);
  for (int64_t g = 0; g < groups; ++g) {
    float scale = nearest(std::min(scales[g] / power, kMostByte));
    if (scale == 0 && scales[g] > 0) scale = 1;
    const float zero = nearest(std::min(std::max((zeros[g] + 0.5f) * steps, 0.0f), kMostByte));
    to.scale[g] = static_cast<uint32_t>(scale), to.zero[g] = static_cast<uint32_t>(zero);
    write_codes(weights + g * group, std::min(group, count - g * group), power * scale, zero / steps - 0.5f, levels,
                to.codes + g * group);
  }
}

constexpr float kMostSigned = 127, kLeastHalf = 6.103515625e-5f, kHalfSteps = 16777216.0f;  // 2^-14, and 2^24
constexpr uint16_t kHalfInfinity = 0x7C00;

// `count` weights as floats. Returns the bits of the largest size, 0x7F800000 or more where one is not finite: whole
// numbers, of which a compiler takes the largest of several at once.
template <Type kType>
inline uint32_t read_sizes(const uint8_t* from, int64_t count, float* to) {
  int32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = float_bits<kType>(from, i);
    to[i] = float_of_bits(bits);
    most = std::max(most, static_cast<int32_t>(bits & 0x7FFFFFFFu));
  }
  if (kType == Type::kFp16 && most >= 0x47800000) return 0x7F800000u;
  return static_cast<uint32_t>(most);
}

// Signed bytes of a group's weights, and its scale. Those of fp16 below 2^-14 are whole steps of 2^-24: rounded up, so
// that no weight has to be cut. Returns whether the weights are finite and such a scale covers them.
template <Type kType>
inline bool round_group(const uint8_t* from, int64_t count, uint8_t* codes, uint32_t* scale) {
  float weights[kMostFitGroup];
  const uint32_t most_bits = read_sizes<kType>(from, count, weights);
  if (most_bits >= 0x7F800000u) return false;
  const float most = float_of_bits(most_bits);
  float wanted = most / kMostSigned;
  if (most < kMostSigned * kLeastHalf) wanted = std::ceil(wanted * kHalfSteps) / kHalfSteps;
  const uint16_t half = fp16_of(wanted);
  *scale = half;
  if (half == 0) memset(codes, 0, count);
  const float step = scalar_from_fp16(half);
  if (half != 0 && half < kHalfInfinity)
    for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(bits_of(weights[i] / step + kWhole));
  return half < kHalfInfinity;
}

template <Type kType>
void write_byte_panels(Runner& runner, const ByteMatrices& m, int64_t matrices, const PanelRows& out, std::atomic<bool>& is_unfit) {
  const PanelLayout layout = layout_of(m.format);
  const int64_t unit = columns_at_once(m.format), group = m.format.group;
  runner.each(static_cast<int>(matrices * out.together), 0, true, [&](int number, float*) {
    const int64_t matrix = number / out.together, first = number % out.together * kPanel;
    const uint8_t* weights = m.weights + (matrix * m.matrix_stride + first * m.row_stride) * size_of(kType);
    UnitRow rows[kPanel] = {};  // those beyond the matrix stay zeros
    for (int64_t k = 0; k < m.columns; k += unit) {
      const int64_t columns = std::min(unit, m.columns - k);
      if (columns < unit) memset(rows, 0, sizeof(rows));
      for (int64_t r = 0; r < std::min(kPanel, m.rows - first); ++r) {
        const uint8_t* row = weights + (r * m.row_stride + k) * size_of(kType);
        for (int64_t at = 0; at < columns; at += group) {
          const int64_t count = std::min(group, columns - at);
          if (!round_group<kType>(row + at * size_of(kType), count, rows[r].codes + at, &rows[r].scale[at / group])) {
            is_unfit = true;
            return;
          }
        }
      }
      write_unit(m.format, layout, rows, k, columns, out.at(number));
    }
  });
}

}  // namespace

void write_signed_bytes(Runner& runner, const ByteMatrices& m, int64_t matrices, const PanelRows& out) {
  std::atomic<bool> is_unfit{false};
  if (m.type == Type::kFp32) write_byte_panels<Type::kFp32>(runner, m, matrices, out, is_unfit);
  else if (m.type == Type::kBf16) write_byte_panels<Type::kBf16>(runner, m, matrices, out, is_unfit);
  else write_byte_panels<Type::kFp16>(runner, m, matrices, out, is_unfit);
  if (is_unfit) throw std::invalid_argument("weights: not all are finite, and covered by a float16 scale");
}

void write_fitted(Runner& runner, const FittedMatrix& m, const PanelRows& out) {
  const PanelLayout layout = layout_of(m.format);
  const int64_t unit = columns_at_once(m.format), groups = (m.columns + m.format.group - 1) / m.format.group;
  runner.each(static_cast<int>((m.rows + kPanel - 1) / kPanel), 0, true, [&](int panel, float*) {
    UnitRow rows[kPanel];
    std::array<RowSides, kPanel> sides;
    const int64_t first = panel * kPanel, count = std::min(kPanel, m.rows - first);
    uint8_t* const powers = out.at(panel);
    memset(powers, 0, layout.panel_header);
    for (int64_t r = 0; r < count; ++r) {
      sides[r].scales.resize(groups), sides[r].zeros.resize(groups);
      read_sides(m, first + r, sides[r]);
      powers[r] = sides[r].power;
    }
    for (int64_t k = 0; k < m.columns; k += unit) {
      const int64_t columns = std::min(unit, m.columns - k);
      memset(rows, 0, sizeof(rows));
      for (int64_t r = 0; r < count; ++r) read_row(m, sides[r], first + r, k, columns, rows[r]);
      write_unit(m.format, layout, rows, k, columns, out.at(panel));
    }
  });
}

}  // namespace moestro
