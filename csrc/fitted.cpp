#include "fitted.h"

#include <algorithm>
#include <cmath>

#include "panels.h"
#include "simd.h"

namespace moestro {

namespace {

constexpr float kMostByte = 255;

// To the nearest, ties to even, of numbers in [-1, 2^20]: what is added leaves no bits for fractions.
inline float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }

void read_floats(const FittedMatrix& m, int64_t row, int64_t k, int64_t count, float* to) {
  const uint8_t* from = m.weights + (row * m.columns + k) * size_of(m.type);
  if (m.type == Type::kFp32) memcpy(to, from, count * 4);
  else if (m.type == Type::kBf16) for (int64_t i = 0; i < count; ++i) to[i] = scalar_from_bf16(load16(from + 2 * i));
  else for (int64_t i = 0; i < count; ++i) to[i] = scalar_from_fp16(load16(from + 2 * i));
}

// A group's scale and zero such that its zero lies between the least and the largest code. Groups that want another,
// and those of equal weights, of which the solver makes one large step, get a range that reaches from 0 to their weights.
void take_sides(const float* weights, int64_t group, float levels, float* scale, float* zero) {
  float low = weights[0], high = weights[0];
  for (int64_t i = 1; i < group; ++i) low = std::min(low, weights[i]), high = std::max(high, weights[i]);
  if (*zero >= -0.5f && *zero <= levels + 0.5f && low != high) return;
  low = std::min(low, 0.0f), high = std::max(high, 0.0f);
  *scale = (high - low) / levels;
  *zero = *scale > 0 ? -low / *scale : 0.0f;
}

// Codes of a group's weights, of a scale and zero that were rounded.
void write_codes(const float* weights, int64_t count, float scale, float zero, float levels, uint8_t* to) {
  if (scale == 0) return;  // they are 0 already
  for (int64_t i = 0; i < count; ++i) {
    to[i] = static_cast<uint8_t>(nearest(std::min(std::max(weights[i] / scale + zero, 0.0f), levels)));
  }
}

// Columns [k, k + count) of a row, up to 256, filled up with weights of 0. `to` holds zeros.
void read_row(const FittedMatrix& m, int64_t row, int64_t k, int64_t count, UnitRow& to) {
  const int64_t group = m.format.group, groups = (count + group - 1) / group, all = (m.columns + group - 1) / group;
  const int64_t bits = bits_of(m.format.code);
  const float levels = static_cast<float>((1 << bits) - 1), steps = static_cast<float>(1 << (8 - bits));
  float weights[kSuper] = {}, scales[kMostGroups], zeros[kMostGroups], most = 0;
  read_floats(m, row, k, count, weights);
  for (int64_t g = 0; g < groups; ++g) {
    scales[g] = m.scales[row * all + k / group + g], zeros[g] = m.zeros[row * all + k / group + g];
    take_sides(weights + g * group, group, levels, &scales[g], &zeros[g]);
    most = std::max(most, scales[g]);
  }
  int exponent;
  std::frexp(most / kMostByte, &exponent);
  exponent = std::min(std::max(exponent, -127), 127);
  const float power = std::ldexp(1.0f, exponent);
  to.d = static_cast<uint16_t>(most > 0 ? exponent + 127 : 0);
  for (int64_t g = 0; g < groups; ++g) {
    float scale = nearest(std::min(scales[g] / power, kMostByte));
    if (scale == 0 && scales[g] > 0) scale = 1;
    const float zero = nearest(std::min(std::max((zeros[g] + 0.5f) * steps, 0.0f), kMostByte));
    to.scale[g] = static_cast<uint32_t>(scale), to.zero[g] = static_cast<uint32_t>(zero);
    write_codes(weights + g * group, std::min(group, count - g * group), power * scale, zero / steps - 0.5f, levels,
                to.codes + g * group);
  }
}

}  // namespace

void write_fitted(Runner& runner, const FittedMatrix& m, uint8_t* out) {
  const PanelLayout layout = layout_of(m.format);
  const int64_t bytes = panel_bytes(m.format, m.columns), unit = columns_at_once(m.format);
  runner.each(static_cast<int>((m.rows + kPanel - 1) / kPanel), 0, true, [&](int panel, float*) {
    UnitRow rows[kPanel];
    for (int64_t k = 0; k < m.columns; k += unit) {
      const int64_t columns = std::min(unit, m.columns - k);
      memset(rows, 0, sizeof(rows));
      for (int64_t r = 0; r < std::min(kPanel, m.rows - panel * kPanel); ++r) read_row(m, panel * kPanel + r, k, columns, rows[r]);
      write_unit(m.format, layout, rows, k, columns, out + panel * bytes);
    }
  });
}

}  // namespace moestro
