// Half-quadratic quantization (solver.h), W groups at a time: a group for each lane of the vectors, so that its sums
// are lanes of a sum. All levels thus add in the same order, and nothing is summed across a vector.

#include "solver.h"

namespace {

using moestro::Fit;
using moestro::kFitIterations;

constexpr int kFitSlots = 16;  // sums of errors, by a group's number, at every level: W divides it

// W groups of one matrix.
struct Groups {
  int64_t first, count;                     // the first one's number; lanes beyond the count hold zeros
  float scaled[moestro::kMostFitGroup * W];  // [group, W]: weights in steps of their group's scale
  float scale[W], inverse[W];                // a step in weights, and how many steps a weight of 1 is
  float low[W], high[W];                     // extremes, in steps
  float zero[W];
  bool is_still[W], is_any_still;  // whose zeros stay as they start
};

inline float number_at(const uint8_t* at, Type type, int64_t i) {
  if (type == Type::kFp32) return reinterpret_cast<const float*>(at)[i];
  const uint16_t bits = reinterpret_cast<const uint16_t*>(at)[i];
  return type == Type::kBf16 ? scalar_from_bf16(bits) : scalar_from_fp16(bits);
}

// The weights of one group, with zeros behind the matrix's last column.
inline void read_group(const Fit& f, int64_t number, float* to) {
  const int64_t row = number / f.groups_of_row(), column = number % f.groups_of_row() * f.group;
  const int64_t columns = f.columns - column < f.group ? f.columns - column : f.group;
  const uint8_t* from = f.weights + (row * f.columns + column) * moestro::size_of(f.type);
  int64_t k = 0;
  for (; k + W <= columns; k += W) {
    if (f.type == Type::kBf16) V::load_bf16(from + 2 * k).store(to + k);
    else if (f.type == Type::kFp16) V::load_fp16(from + 2 * k).store(to + k);
    else V::load(reinterpret_cast<const float*>(from) + k).store(to + k);
  }
  for (; k < columns; ++k) to[k] = number_at(from, f.type, k);
  for (; k < f.group; ++k) to[k] = 0;
}

// A group's scale and first zero from its extremes. Returns whether the zero is not to be improved.
inline bool start_group(const Fit& f, float low, float high, float* scale, float* inverse, float* zero) {
  const float range = high - low;
  if (range < moestro::kLeastFitRange) {  // one weight: (0 - zero) * scale
    const float most = fabsf(low);
    const bool is_zero = most < moestro::kLeastFitRange;
    *scale = is_zero ? 0.0f : most, *inverse = is_zero ? 0.0f : 1.0f / most;
    *zero = is_zero ? 0.0f : low > 0 ? -1.0f : 1.0f;
    return true;
  }
  *inverse = 1.0f / range * f.levels;  // in this order, which decides ties of the first zero as hqq does
  if (*inverse == 0.0f) *inverse = f.levels / 2 / (high / 2 - low / 2);  // the range is no float32
  *scale = 1.0f / *inverse;
  *zero = -low * *inverse;
  if (range <= f.levels * moestro::kLeastFitScale) return true;
  if (f.rounded_zero) *zero = nearbyintf(*zero);
  return false;
}

// Reads groups and finds where they start. Returns the number of the first that is not finite, or -1.
inline int64_t read_groups(const Fit& f, int64_t first, int64_t count, Groups& to) {
  to.first = first, to.count = count, to.is_any_still = false;
  float row[moestro::kMostFitGroup];
  for (int64_t lane = 0; lane < W; ++lane) {
    if (lane < count) read_group(f, first + lane, row);
    for (int64_t k = 0; k < f.group; ++k) to.scaled[k * W + lane] = lane < count ? row[k] : 0.0f;
  }
  V low = V::load(to.scaled), high = low, nothing = V::zero();
  for (int64_t k = 0; k < f.group; ++k) {
    const V w = V::load(to.scaled + k * W);
    low = vmin(low, w), high = vmax(high, w);
    nothing = nothing + w * V::zero();  // NaN if there is one, or an infinity
  }
  float faults[W];
  nothing.store(faults), low.store(to.low), high.store(to.high);
  for (int64_t lane = 0; lane < W; ++lane) {
    if (lane < count && faults[lane] != 0.0f) return first + lane;
    to.is_still[lane] = start_group(f, to.low[lane], to.high[lane], &to.scale[lane], &to.inverse[lane], &to.zero[lane]);
    to.is_any_still |= to.is_still[lane];
    to.low[lane] *= to.inverse[lane], to.high[lane] *= to.inverse[lane];
  }
  const V inverse = V::load(to.inverse);
  for (int64_t k = 0; k < f.group; ++k) (V::load(to.scaled + k * W) * inverse).store(to.scaled + k * W);
  return -1;
}

inline V nearest(V scaled, V zero, V levels) { return vmin(vmax(vround(scaled + zero), V::zero()), levels); }

// Whether an error of a weight may be so large that it is not shrunk to 0. In steps an error is at most a half, or
// how far a weight lies outside of the whole numbers.
inline bool may_shrink(const Groups& g, V zero, V levels) {
  const V below = V::zero() - (V::load(g.low) + zero), above = V::load(g.high) + zero - levels;
  const V most = vmax(vmax(below, above), V::set(0.5f)) * V::load(g.scale);
  return !(largest(most) < moestro::kFitFree);
}

// What is left of an error after shrinking, in steps as the error is.
inline V shrunk(V error, V scale, V inverse) {
  const V size = vabs(error), of_weight = vmin(vmax(size * scale, V::set(1e-3f)), V::set(1e38f));
  const V taken = V::set(moestro::kFitShrink) * vexp(V::set(moestro::kFitPower) * vlog(of_weight)) * inverse;
  const V left = vmax(size - taken, V::zero());
  return vmin(left, vmax(error, V::zero() - left));  // with the error's sign, since |error| >= left
}

// One iteration: the mean zero of the nearest whole numbers, and, where asked for, sums of the errors in steps.
template <bool kShrink, bool kErrors>
inline V next_zero(const Fit& f, const Groups& g, V zero, V* errors) {
  constexpr int kSums = 4;  // which hide the latency of an addition
  const V levels = V::set(f.levels), scale = V::load(g.scale), inverse = V::load(g.inverse);
  V sums[kSums], sizes[kSums];
  for (int j = 0; j < kSums; ++j) sums[j] = sizes[j] = V::zero();
  for (int64_t k = 0; k < f.group; k += kSums) {
    for (int j = 0; j < kSums; ++j) {
      const V scaled = V::load(g.scaled + (k + j) * W);
      const V own = nearest(scaled, zero, levels) - scaled;  // the zero that this weight alone would want
      const V error = zero - own;
      sums[j] = sums[j] + own;
      if constexpr (kShrink) sums[j] = sums[j] + shrunk(error, scale, inverse);
      if constexpr (kErrors) sizes[j] = sizes[j] + vabs(error);
    }
  }
  if constexpr (kErrors) *errors = (sizes[0] + sizes[1]) + (sizes[2] + sizes[3]);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) * V::set(1.0f / static_cast<float>(f.group));
}

// One iteration of a group's zeros. Returns whether one of them changed.
template <bool kErrors>
inline bool iterate_once(const Fit& f, Groups& g, V* errors) {
  const V zero = V::load(g.zero), levels = V::set(f.levels);
  V next = may_shrink(g, zero, levels) ? next_zero<true, kErrors>(f, g, zero, errors) : next_zero<false, kErrors>(f, g, zero, errors);
  if (g.is_any_still) {
    float all[W];
    next.store(all);
    for (int lane = 0; lane < W; ++lane) all[lane] = g.is_still[lane] ? g.zero[lane] : all[lane];
    next = V::load(all);
  }
  next.store(g.zero);
  return largest(vabs(next - zero)) > 0.0f;
}

// Sums of the errors of groups [begin, end) in each iteration, to errors [kFitIterations]; zeros after kFitKept of them.
int64_t fit_groups(const Fit& f, int64_t begin, int64_t end, double* errors) {
  double slots[kFitIterations][kFitSlots] = {};
  Groups g;
  for (int64_t at = begin; at < end; at += W) {
    const int64_t fault = read_groups(f, at, end - at < W ? end - at : W, g);
    if (fault >= 0) return fault;
    double step[W];
    for (int lane = 0; lane < W; ++lane) step[lane] = g.is_still[lane] || lane >= g.count ? 0.0 : g.scale[lane];
    bool changes = true;
    float sizes[W];
    for (int t = 0; t < kFitIterations; ++t) {
      if (changes) {
        V of_lanes;
        changes = iterate_once<true>(f, g, &of_lanes);
        of_lanes.store(sizes);
      }
      if (t + 1 == moestro::kFitKept) memcpy(f.zeros + at, g.zero, g.count * 4);
      double* to = slots[t] + (at - begin) % kFitSlots;
      for (int lane = 0; lane < W; ++lane) to[lane] += sizes[lane] * step[lane];
    }
  }
  for (int t = 0; t < kFitIterations; ++t) {
    errors[t] = 0;
    for (const double slot : slots[t]) errors[t] += slot;
  }
  return -1;
}

inline void write_codes(const Fit& f, const Groups& g) {
  int16_t whole[moestro::kMostFitGroup * W];
  const V zero = V::load(g.zero), levels = V::set(f.levels);
  for (int64_t k = 0; k < f.group; ++k) store_int16(nearest(V::load(g.scaled + k * W), zero, levels), whole + k * W);
  for (int64_t lane = 0; lane < g.count; ++lane) {
    uint8_t* to = f.codes + (g.first + lane) * f.group;
    for (int64_t k = 0; k < f.group; ++k) to[k] = static_cast<uint8_t>(whole[k * W + lane]);
  }
}

// Codes, scales and zeros of groups [begin, end) after so many iterations.
int64_t code_groups(const Fit& f, int64_t begin, int64_t end, int iterations) {
  Groups g;
  for (int64_t at = begin; at < end; at += W) {
    const int64_t fault = read_groups(f, at, end - at < W ? end - at : W, g);
    if (fault >= 0) return fault;
    int t = 0;
    if (iterations >= moestro::kFitKept) memcpy(g.zero, f.zeros + at, g.count * 4), t = moestro::kFitKept;
    for (V unused; t < iterations && iterate_once<false>(f, g, &unused);) ++t;
    write_codes(f, g);
    memcpy(f.scales + at, g.scale, g.count * 4);
    memcpy(f.zeros + at, g.zero, g.count * 4);
  }
  return -1;
}

}  // namespace
