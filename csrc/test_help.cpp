#include "test_help.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

using namespace moestro;

double bf16(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

double fp16(uint16_t v) {
  const int exponent = v >> 10 & 31, mantissa = v & 0x3FF;
  const double size = exponent == 0    ? std::ldexp(mantissa, -24)
                      : exponent < 31  ? std::ldexp(1024 + mantissa, exponent - 25)
                      : mantissa == 0 ? INFINITY
                                       : NAN;
  return v & 0x8000 ? -size : size;
}

uint16_t fp16_bits(double v) {
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  const double size = std::fabs(v);
  if (std::isnan(v)) return 0x7E00;
  if (size >= 65536) return sign | 0x7C00;
  if (size < std::ldexp(1, -14)) return static_cast<uint16_t>(sign | static_cast<int>(std::ldexp(size, 24)));
  const int exponent = std::ilogb(size);
  return static_cast<uint16_t>(sign | ((exponent + 15) << 10) | (static_cast<int>(std::ldexp(size, 10 - exponent)) - 1024));
}

static uint16_t get16(const uint8_t* at) { uint16_t v; memcpy(&v, at, 2); return v; }
static void put16(uint8_t* at, uint16_t v) { memcpy(at, &v, 2); }

double Numbers::at(int64_t i) const {
  if (type != Type::kFp32) return type == Type::kBf16 ? bf16(get16(&bytes[2 * i])) : fp16(get16(&bytes[2 * i]));
  float v;
  memcpy(&v, &bytes[4 * i], 4);
  return v;
}

void Numbers::set(int64_t i, double v) {
  const float f = static_cast<float>(round_to(type, v));
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if (type == Type::kFp32) memcpy(&bytes[4 * i], &f, 4);
  else put16(&bytes[2 * i], type == Type::kBf16 ? static_cast<uint16_t>(bits >> 16) : fp16_bits(f));
}

const std::vector<NamedFormat>& formats() {
  using C = Code;
  using S = Scale;
  using Z = Zero;
  static const std::vector<NamedFormat> all = {
      {"fp32", {C::kFp32}}, {"fp16", {C::kFp16}}, {"bf16", {C::kBf16}}, {"int8", kInt8}, {"int4", kInt4},
      {"mxfp4", {C::kE2m1, 32, S::kE8m0}}, {"nvfp4", {C::kE2m1, 16, S::kE4m3}},
      {"fp8", {C::kE4m3, 128, S::kBlock}}, {"mxfp8", {C::kE4m3, 32, S::kE8m0}}, {"fp8row", {C::kE4m3, kRow, S::kFp32}},
      {"q8_0", {C::kS8, 32, S::kFp16}}, {"q4_0", {C::kU4, 32, S::kFp16, Z::kConstant, 8}},
      {"q4_1", {C::kU4, 32, S::kFp16, Z::kAdd}}, {"q5_0", {C::kU5, 32, S::kFp16, Z::kConstant, 16}},
      {"q5_1", {C::kU5, 32, S::kFp16, Z::kAdd}}, {"q4_k", {C::kU4, 32, S::kK4, Z::kMin}},
      {"q5_k", {C::kU5, 32, S::kK4, Z::kMin}}, {"q6_k", {C::kU6, 16, S::kK6, Z::kConstant, 32}},
      {"q2_k", {C::kU2, 16, S::kK2, Z::kMin}}, {"q3_k", {C::kU3, 16, S::kK3, Z::kConstant, 4}},
      {"iq4_nl", {C::kIq4nl, 32, S::kFp16}}, {"iq4_xs", {C::kIq4nl, 32, S::kIq4xs}},
      {"hqq4", {C::kU4, 64, S::kShifted, Z::kFixed}}, {"hqq3", {C::kU3, 64, S::kShifted, Z::kFixed}},
      {"hqq2", {C::kU2, 16, S::kShifted, Z::kFixed}},
      {"int4g16", {C::kU4, 16, S::kFp32, Z::kInt}}, {"int4g32", {C::kU4, 32, S::kBf16, Z::kInt}},
      {"int4g64", {C::kU4, 64, S::kFp16, Z::kInt}}, {"int4g128", {C::kU4, 128, S::kBf16, Z::kConstant, 8}},
      {"int4g128z", {C::kU4, 128, S::kFp16, Z::kInt}}, {"int4row", {C::kU4, kRow, S::kFp32, Z::kFp16}},
      {"int8g128", {C::kS8, 128, S::kBf16}}, {"int8row", {C::kS8, kRow, S::kFp32}}, {"int8g32z", {C::kU8, 32, S::kFp16, Z::kInt}},
      {"uint8row", {C::kU8, kRow, S::kBf16, Z::kConstant, 128}}, {"int2g16", {C::kU2, 16, S::kFp16, Z::kFp16}},
      {"int3g64", {C::kU3, 64, S::kFp16, Z::kInt}}, {"int6g32", {C::kU6, 32, S::kFp16, Z::kInt}},
  };
  return all;
}

namespace {

struct CodeInfo { int bits; double largest; };
CodeInfo info_of(Code code) {
  switch (code) {
    case Code::kU2: return {2, 3};
    case Code::kU3: return {3, 7};
    case Code::kU4: return {4, 15};
    case Code::kU5: return {5, 31};
    case Code::kU6: return {6, 63};
    case Code::kU8: return {8, 255};
    case Code::kE2m1: return {4, 6};
    case Code::kIq4nl: return {4, 127};
    case Code::kE4m3: return {8, 16};
    default: return {8, 127};
  }
}

double e4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const double size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return bits & 0x80 ? -size : size;
}

// The number of column j (of 64) and row r that lies in a chunk's codes, as the description of the bytes has it.
double code_at(Code code, const uint8_t* codes, int64_t j, int64_t r) {
  const int64_t i = j / 8, c = j % 8, h = c % 4 / 2, b = 2 * (c % 2) + c / 4;  // step, half and byte of a quad
  const uint8_t* twos = codes + (code == Code::kU6 ? 512 : 0);
  const uint8_t* ones = codes + (code == Code::kU3 ? 256 : 512);
  const auto nibble = [&] { return codes[i * 64 + r * 4 + b] >> 4 * h & 15; };
  const auto two = [&] { return twos[i / 2 * 64 + r * 4 + b] >> 2 * (2 * (i % 2) + h) & 3; };
  const auto one = [&] { return ones[i / 4 * 64 + r * 4 + b] >> (2 * (i % 4) + h) & 1; };
  static constexpr double kE2m1[] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6};
  static constexpr double kIq4nl[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  switch (code) {
    case Code::kU2: return two();
    case Code::kU3: return two() | one() << 2;
    case Code::kU4: return nibble();
    case Code::kU5: return nibble() | one() << 4;
    case Code::kU6: return nibble() | two() << 4;
    case Code::kE2m1: return kE2m1[nibble()];
    case Code::kIq4nl: return kIq4nl[nibble()];
    default: break;
  }
  const uint8_t byte = codes[j / 2 * 32 + r * 2 + j % 2];
  return code == Code::kE4m3 ? e4m3(byte) : code == Code::kU8 ? byte : static_cast<int8_t>(byte);
}

double float_at(const uint8_t* at) { float v; memcpy(&v, at, 4); return v; }

// The scale and the zero of a group of a chunk, where the headers begin there.
struct Pair { double scale, zero; };
Pair factors_at(const MatrixFormat& f, const uint8_t* panel, const uint8_t* unit, const uint8_t* at, int64_t g, int64_t r) {
  const double d = fp16(get16(unit + 2 * r));
  const auto six = [&](int i) {  // of four numbers of 6 bits in three bytes
    const int b0 = at[r], b1 = at[16 + r], b2 = at[32 + r];
    return i < 3 ? at[16 * i + r] & 63 : b0 >> 6 | b1 >> 6 << 2 | b2 >> 6 << 4;
  };
  switch (f.scale) {
    case Scale::kK4: return {d * six(static_cast<int>(g)), fp16(get16(unit + 32 + 2 * r)) * six(g ? 2 : 3)};
    case Scale::kK2: return {d * (at[16 * g + r] & 15), fp16(get16(unit + 32 + 2 * r)) * (at[16 * g + r] >> 4)};
    case Scale::kK6: case Scale::kIq4xs: return {d * static_cast<int8_t>(at[16 * g + r]), 0};
    case Scale::kK3: return {d * (six(static_cast<int>(g)) - 32), 0};
    case Scale::kBlock: return {float_at(unit), 0};
    case Scale::kShifted:
      return {std::ldexp(at[16 * g + r], panel[r] - 127), at[(64 / f.group + g) * 16 + r] * std::ldexp(1, info_of(f.code).bits - 8) - 0.5};
    default: break;
  }
  const int64_t groups = f.group == kRow || f.group >= 64 ? 1 : 64 / f.group;
  const uint8_t* header = f.group == kRow || f.group == 128 ? unit : at;
  const int64_t size = f.scale == Scale::kFp32 ? 4 : f.scale == Scale::kFp16 || f.scale == Scale::kBf16 ? 2 : 1;
  const uint8_t *scale = header + (g * 16 + r) * size, *zeros = header + groups * 16 * size;
  Pair p{0, 0};
  switch (f.scale) {
    case Scale::kFp16: p.scale = fp16(get16(scale)); break;
    case Scale::kBf16: p.scale = bf16(get16(scale)); break;
    case Scale::kFp32: p.scale = float_at(scale); break;
    case Scale::kE8m0: p.scale = std::ldexp(1, *scale - 127); break;
    default: p.scale = e4m3(*scale) * float_at(panel);
  }
  if (f.zero == Zero::kFp16 || f.zero == Zero::kAdd) p.zero = fp16(get16(zeros + (g * 16 + r) * 2));
  if (f.zero == Zero::kInt && (info_of(f.code).bits > 4 || groups == 1)) p.zero = zeros[g * 16 + r];
  else if (f.zero == Zero::kInt) p.zero = zeros[g / 2 * 16 + r] >> g % 2 * 4 & 15;
  return p;
}

// Fills the headers with scales so that weights are of about the given size, and are zero in the last of 16 rows.
void fill_header(const MatrixFormat& f, uint8_t* at, int64_t groups, int64_t rows, double scale, Rng& rng) {
  const double size = scale / info_of(f.code).largest * 2;
  for (int64_t i = 0; i < groups * 16; ++i) {
    const double s = i % 16 < rows ? size * (1 + rng.below(1024) / 1024.0) : 0;
    if (f.scale == Scale::kFp16) put16(at + 2 * i, fp16_bits(s));
    else if (f.scale == Scale::kBf16) put16(at + 2 * i, s == 0 ? 0 : static_cast<uint16_t>((127 + std::ilogb(s)) << 7 | (rng.engine() & 127)));
    else if (f.scale == Scale::kFp32) { const float v = static_cast<float>(s); memcpy(at + 4 * i, &v, 4); }
    else if (f.scale == Scale::kE8m0) at[i] = static_cast<uint8_t>(s == 0 ? 0 : 127 + std::ilogb(s));
    else at[i] = static_cast<uint8_t>(s == 0 ? 0 : 6 << 3 | (rng.engine() & 15));  // e4m3, .5 to 2
  }
  at += groups * 16 * (f.scale == Scale::kFp32 ? 4 : f.scale == Scale::kFp16 || f.scale == Scale::kBf16 ? 2 : 1);
  const double middle = info_of(f.code).largest / 2;
  if (f.zero == Zero::kFp16 || f.zero == Zero::kAdd) {
    for (int64_t i = 0; i < groups * 16; ++i) {
      const double z = i % 16 < rows ? middle * (1 + rng.below(1024) / 2048.0) : 0;
      put16(at + 2 * i, fp16_bits(f.zero == Zero::kAdd ? -size * z : z));
    }
  } else if (f.zero == Zero::kInt) {
    const bool shared = info_of(f.code).bits <= 4 && groups > 1;
    for (int64_t i = 0; i < (shared ? groups / 2 : groups) * 16; ++i)
      at[i] = static_cast<uint8_t>(shared ? rng.engine() : rng.below(static_cast<int64_t>(info_of(f.code).largest) + 1));
  }
}

}  // namespace

std::vector<double> random_matrix(const MatrixFormat& format, uint8_t* packed, int64_t R, int64_t K, double scale, Rng& rng) {
  std::vector<double> values(R * K);
  const int exponent = static_cast<int>(std::floor(std::log2(scale)));
  const int64_t stride = panel_bytes(format, K);
  const auto random_half = [&](int bias, int mantissa) {  // sign, an exponent near the scale's, mantissa
    const uint32_t bits = rng.engine();
    return static_cast<uint16_t>((bits & 1) << 15 | ((exponent + bias - (bits >> 1 & 1)) << mantissa) | (bits >> 8 & ((1 << mantissa) - 1)));
  };
  if (format.is_float()) {
    for (int64_t r = 0; r < R; ++r)
      for (int64_t k = 0; k < K; ++k) {
        uint8_t* panel = packed + r / kPanel * stride;
        const int64_t i = r % kPanel;
        double& value = values[r * K + k];
        if (format.code == Code::kFp32) {
          const float v = static_cast<float>(rng() * scale);
          memcpy(panel + (k * kPanel + i) * 4, &v, 4);
          value = v;
        } else if (format.code == Code::kFp16) {
          put16(panel + (k * kPanel + i) * 2, random_half(15, 10));
          value = fp16(get16(panel + (k * kPanel + i) * 2));
        } else {
          uint8_t* at = panel + (k / 2 * kPanel * 2 + i * 2 + k % 2) * 2;
          put16(at, random_half(127, 7));
          value = bf16(get16(at));
        }
      }
    return values;
  }
  const CodeInfo info = info_of(format.code);
  const int64_t chunks = (K + 63) / 64, codes = 16 * 64 * info.bits / 8, groups = format.group == kRow || format.group >= 64 ? 1 : 64 / format.group;
  const double size = scale / info.largest * 2;
  const bool two_level = format.scale >= Scale::kK4, is_block = format.scale == Scale::kBlock;
  const auto half_of = [&](double s) { return fp16_bits(s * (1 + rng.below(1024) / 1024.0)); };
  const auto sides_bytes = [&](int64_t g) {  // scales, then zeros, of g groups
    const int64_t zeros = format.zero == Zero::kFp16 || format.zero == Zero::kAdd ? g * 32
                          : format.zero != Zero::kInt ? 0 : info.bits <= 4 && g > 1 ? g * 8 : g * 16;
    return g * 16 * (format.scale == Scale::kFp32 ? 4 : format.scale == Scale::kFp16 || format.scale == Scale::kBf16 ? 2 : 1) + zeros;
  };
  const bool shares = format.group == kRow || format.group == 128;
  const int64_t of_unit = two_level ? 4 : format.group == kRow ? chunks : format.group == 64 ? 1 : 2;
  const int64_t own = format.scale == Scale::kK4 || format.scale == Scale::kK3 ? 48 : format.scale == Scale::kIq4xs ? 32
                      : format.scale == Scale::kShifted ? 32 * groups
                      : two_level ? 64 : is_block || shares ? 0 : sides_bytes(groups);
  const int64_t shared = is_block ? 4 : two_level && format.scale != Scale::kShifted ? (format.zero == Zero::kMin ? 64 : 32) : shares ? sides_bytes(1) : 0;
  int64_t unit_header = shared + of_unit * own;
  if (const int64_t more = (64 - unit_header % 64) % 64; two_level && more * 100 <= unit_header + of_unit * codes) unit_header += more;
  for (int64_t p = 0; p * kPanel < R; ++p) {
    uint8_t *panel = packed + p * stride, *at = panel, *unit = panel;
    if (format.scale == Scale::kE4m3) { const float tensor = static_cast<float>(size); memcpy(at, &tensor, 4); at += 4; }
    if (format.scale == Scale::kShifted)
      for (int r = 0; r < 16; ++r)
        *at++ = static_cast<uint8_t>(p * 16 + r < R ? 127 + std::ilogb(size / 256) - static_cast<int>(rng.below(2)) : 0);
    for (int64_t c = 0; c < chunks; ++c) {
      if (c % of_unit == 0) {
        unit = at;
        at += unit_header;
        memset(unit, 0, unit_header);
        const double most = format.scale == Scale::kK2 ? 15 : format.scale == Scale::kK4 ? 63 : 32;
        if (is_block) { const float s = static_cast<float>(size); memcpy(unit, &s, 4); }
        else if (two_level && format.scale != Scale::kShifted) {
          for (int r = 0; r < 16; ++r) put16(unit + 2 * r, p * 16 + r < R ? half_of(size / most) : 0);
          if (format.zero == Zero::kMin)
            for (int r = 0; r < 16; ++r) put16(unit + 32 + 2 * r, p * 16 + r < R ? half_of(size * info.largest / 2 / most) : 0);
        } else if (shares) {
          fill_header(format, unit, 1, R - p * 16, scale, rng);
        }
      }
      uint8_t* header = unit + shared + c % of_unit * own;
      if (two_level) {
        for (int64_t i = 0; i < own; ++i)
          header[i] = static_cast<uint8_t>(format.scale == Scale::kK6 || format.scale == Scale::kIq4xs ? static_cast<int>(rng.below(64)) - 32 : rng.engine());
      } else if (own > 0) {
        fill_header(format, header, groups, R - p * 16, scale, rng);
      }
      for (int64_t i = 0; i < codes; ++i) {
        at[i] = static_cast<uint8_t>(rng.engine());
        if (format.code == Code::kE4m3) at[i] = static_cast<uint8_t>((at[i] & 0x87) | rng.below(11) << 3);  // up to 16, and subnormals
        if (format.scale == Scale::kBlock && p * 16 + i % 32 / 2 >= R) at[i] = 0;
      }
      for (int64_t r = p * 16; r < std::min(R, p * 16 + 16); ++r)
        for (int64_t j = 0; j < 64 && c * 64 + j < K; ++j) {
          const Pair f = factors_at(format, panel, unit, header, groups == 1 ? 0 : j / format.group, r % 16);
          const double code = code_at(format.code, at, j, r % 16);
          values[r * K + c * 64 + j] = format.zero == Zero::kAdd        ? f.scale * code + f.zero
                                       : format.zero == Zero::kMin      ? f.scale * code - f.zero
                                       : format.zero == Zero::kConstant ? f.scale * (code - format.constant)
                                                                        : f.scale * (code - f.zero);
        }
      at += codes;
    }
    if (at != panel + stride) {
      printf("FAIL a panel of %ld columns in %s: %ld bytes, not %ld\n", (long)K, name_of(format).c_str(), (long)(at - panel), (long)stride);
      std::abort();
    }
  }
  return values;
}

std::string name_of(const MatrixFormat& format) {
  for (const NamedFormat& named : formats())
    if (named.format == format) return named.name;
  return "?";
}

double relative_error(const Numbers& got, const std::vector<double>& want) {
  double error = 0, norm = 0;
  for (int64_t i = 0; i < got.size(); ++i) {
    const double g = got.at(i), w = want[i];
    if (std::isfinite(g) != std::isfinite(w)) return INFINITY;
    if (!std::isfinite(w)) continue;
    const double gap = std::max(0.0, std::fabs(g - w) - (got.type == Type::kFp32 ? 0 : step_of(got.type, w) / 2));
    error += gap * gap;
    norm += w * w;
  }
  return norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
}

double tolerance(const Level& level, const MatrixFormat& format, int64_t tokens) {
  const bool whole = !format.is_float() && format.code != Code::kE4m3 && !is_strided(format);
  const bool tiles = strcmp(level.name, "amx") == 0 && tokens > 8;
  if (whole) return 5e-4;
  return tiles && format.code == Code::kBf16 ? 2e-5 : 2e-6;
}

std::string text(const char* format, ...) {
  char line[200];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  return line;
}

Machine::Machine(const char* only) : used_(new Runner(3, {})) {
  const char* names[8];
  bool usable[8];
  const int count = compiled_levels(names, usable, 8);
  for (int i = 0; i < count; ++i) {
    if (only != nullptr && strcmp(only, names[i]) != 0) continue;
    if (usable[i]) levels.push_back(find_level(names[i]));
    else printf("%s: not on this CPU\n", names[i]);
  }
  if (only != nullptr && levels.empty()) {
    printf("no level %s runs here\n", only);
    std::exit(2);
  }
}

Runner& Machine::used() {
  constexpr int64_t kFloats = 1 << 16;
  used_->each(4, kFloats, true, [](int, float* memory) { memset(memory, 0xFF, kFloats * sizeof(float)); });
  return *used_;
}

void Machine::report(const std::string& what, const Level& level, double error, double bound, bool equal) {
  const std::string line = what + " level=" + level.name + text(": error %.3g, bound %.3g", error, bound);
  ++checks_;
  if (!(error <= bound) || !equal) {
    ++failures_;
    printf("FAIL %s; bits %s\n", line.c_str(), equal ? "agree" : "DIFFER");
  } else if (error > closest_ * bound) {
    closest_ = error / bound;
    closest_what_ = line;
  }
}

int Machine::finish() const {
  printf("closest to its bound: %s\n%d passed, %d failed\n", closest_what_.c_str(), checks_ - failures_, failures_);
  return failures_ != 0;
}
