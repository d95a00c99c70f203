#include "test_help.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>

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
  if (type != Format::kFp32) return type == Format::kBf16 ? bf16(get16(&bytes[2 * i])) : fp16(get16(&bytes[2 * i]));
  float v;
  memcpy(&v, &bytes[4 * i], 4);
  return v;
}

void Numbers::set(int64_t i, double v) {
  const float f = static_cast<float>(round_to(type, v));
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if (type == Format::kFp32) memcpy(&bytes[4 * i], &f, 4);
  else put16(&bytes[2 * i], type == Format::kBf16 ? static_cast<uint16_t>(bits >> 16) : fp16_bits(f));
}

std::vector<double> random_matrix(Format format, uint8_t* packed, int64_t R, int64_t K, double scale, Rng& rng) {
  std::vector<double> values(R * K);
  const int exponent = static_cast<int>(std::floor(std::log2(scale)));
  const int64_t stride = panel_bytes(format, K);
  for (int64_t r = 0; r < R; ++r) {
    uint8_t* panel = packed + r / kPanel * stride;
    const int64_t i = r % kPanel;
    const auto random_half = [&](int bias, int mantissa) {  // sign, an exponent near the scale's, mantissa
      const uint32_t bits = rng.engine();
      return static_cast<uint16_t>((bits & 1) << 15 | ((exponent + bias - (bits >> 1 & 1)) << mantissa) | (bits >> 8 & ((1 << mantissa) - 1)));
    };
    for (int64_t k = 0; k < K; ++k) {
      double value;
      const int64_t g = k / kGroup, j = k % kGroup;
      if (format == Format::kFp32) {
        const float v = static_cast<float>(rng() * scale);
        memcpy(panel + (k * kPanel + i) * 4, &v, 4);
        value = v;
      } else if (format == Format::kFp16) {
        put16(panel + (k * kPanel + i) * 2, random_half(15, 10));
        value = fp16(get16(panel + (k * kPanel + i) * 2));
      } else if (format == Format::kBf16) {
        uint8_t* at = panel + (k / 2 * kPanel * 2 + i * 2 + k % 2) * 2;
        put16(at, random_half(127, 7));
        value = bf16(get16(at));
      } else if (format == Format::kInt8) {
        uint8_t* group = panel + g * (32 + 1024);
        if (j == 0) put16(group + 2 * i, random_half(15 - 6, 10) & 0x7FFF);
        const int8_t q = static_cast<int8_t>(rng.engine() % 255 - 127);
        group[32 + j / 2 * 32 + i * 2 + j % 2] = static_cast<uint8_t>(q);
        value = q * fp16(get16(group + 2 * i));
      } else {
        uint8_t* group = panel + g * (64 + 512);
        if (j == 0) {
          put16(group + 2 * i, random_half(15 - 2, 10) & 0x7FFF);
          put16(group + 32 + 2 * i, static_cast<uint16_t>(18 << 10 | (rng.engine() & 0x3FF)));  // 8 to 16
        }
        const uint32_t q = rng.engine() & 15;
        uint8_t* word = group + 64 + j / 8 * 64 + i * 4 + j % 2 * 2;
        const int shift = j % 8 / 2 * 4;
        put16(word, static_cast<uint16_t>((get16(word) & ~(15 << shift)) | q << shift));
        value = (q - fp16(get16(group + 32 + 2 * i))) * fp16(get16(group + 2 * i));
      }
      values[r * K + k] = value;
    }
  }
  return values;
}

double relative_error(const Numbers& got, const std::vector<double>& want) {
  double error = 0, norm = 0;
  for (int64_t i = 0; i < got.size(); ++i) {
    const double g = got.at(i), w = want[i];
    if (std::isfinite(g) != std::isfinite(w)) return INFINITY;
    if (!std::isfinite(w)) continue;
    const double gap = std::max(0.0, std::fabs(g - w) - (got.type == Format::kFp32 ? 0 : step_of(got.type, w) / 2));
    error += gap * gap;
    norm += w * w;
  }
  return norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
}

double tolerance(const Level& level, Format format, int64_t tokens) {
  const bool quantized = format == Format::kInt8 || format == Format::kInt4;
  const bool tiles = strcmp(level.name, "amx") == 0 && tokens > 8;
  if (quantized && (tiles || tokens <= kThinTokens)) return 5e-4;
  return tiles && format == Format::kBf16 ? 2e-5 : 2e-6;
}

std::string text(const char* format, ...) {
  char line[200];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  return line;
}

Machine::Machine() : used_(new Runner(3, {})) {
  const char* names[8];
  bool usable[8];
  const int count = compiled_levels(names, usable, 8);
  for (int i = 0; i < count; ++i) {
    if (usable[i]) levels.push_back(find_level(names[i]));
    else printf("%s: not on this CPU\n", names[i]);
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
    printf("FAIL %s; threads %s\n", line.c_str(), equal ? "agree" : "DIFFER");
  } else if (error > closest_ * bound) {
    closest_ = error / bound;
    closest_what_ = line;
  }
}

int Machine::finish() const {
  printf("closest to its bound: %s\n%d passed, %d failed\n", closest_what_.c_str(), checks_ - failures_, failures_);
  return failures_ != 0;
}
