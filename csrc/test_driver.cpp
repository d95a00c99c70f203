// A plain C++ driver: every level, format, activation and size against float64, with any number of threads.
// Built with the sanitizers by `make sanitize`.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "run.h"

using namespace moestro;

namespace {

struct Rng {
  std::mt19937 engine;
  std::normal_distribution<float> normal;
  float operator()() { return normal(engine); }
};

double bf16(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
double fp16(uint16_t v) {  // normal ones, as written here
  return (v & 0x8000 ? -1.0 : 1.0) * std::ldexp(1024 + (v & 0x3FF), (v >> 10 & 31) - 25);
}
uint16_t get16(const uint8_t* at) { uint16_t v; memcpy(&v, at, 2); return v; }
void put16(uint8_t* at, uint16_t v) { memcpy(at, &v, 2); }

// Fills a packed matrix [R, K] with random weights of about the given size and returns them, as the format means
// them: written from the description of the bytes, not from the kernels.
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

struct Expert {
  std::vector<uint8_t> packed;
  std::vector<double> gate, up, down, gate_bias, up_bias, down_bias;  // [F, D], [F, D], [D, F]
};

Expert make_expert(const Shape& s, Rng& rng) {
  const int64_t D = s.hidden, F = s.neurons, blocks = (F + kBlock - 1) / kBlock, size = block_bytes(s);
  Expert e;
  e.packed.assign(blocks * size + (s.has_bias ? D * 4 : 0), 0);
  e.gate.assign(F * D, 0); e.up = e.gate; e.down = e.gate;
  e.gate_bias.assign(F, 0); e.up_bias = e.gate_bias; e.down_bias.assign(D, 0);
  const double scale = 1.0 / std::sqrt(static_cast<double>(D));
  for (int64_t b = 0; b < blocks; ++b) {
    uint8_t* at = e.packed.data() + b * size;
    const int64_t n = std::min(kBlock, F - b * kBlock);  // a last block is padded with zero rows
    const auto rows = [&](std::vector<double>& to) {
      const std::vector<double> values = random_matrix(s.format, at, n, D, scale, rng);
      std::copy(values.begin(), values.end(), to.begin() + b * kBlock * D);
      at += matrix_bytes(s.format, kBlock, D);
    };
    if (s.has_gate) rows(e.gate);
    rows(e.up);
    const std::vector<double> down = random_matrix(s.format, at, D, kBlock, scale, rng);
    for (int64_t d = 0; d < D; ++d)
      for (int64_t i = 0; i < n; ++i) e.down[d * F + b * kBlock + i] = down[d * kBlock + i];
    at += matrix_bytes(s.format, D, kBlock);
    const auto bias = [&](std::vector<double>& to) {
      float* values = reinterpret_cast<float*>(at);
      for (int64_t i = 0; i < n; ++i) to[b * kBlock + i] = values[i] = rng();
      at += kBlock * sizeof(float);
    };
    if (s.has_bias && s.has_gate) bias(e.gate_bias);
    if (s.has_bias) bias(e.up_bias);
  }
  if (s.has_bias) {
    float* bias = reinterpret_cast<float*>(e.packed.data() + blocks * size);
    for (int64_t d = 0; d < D; ++d) e.down_bias[d] = bias[d] = rng();
  }
  return e;
}

double activate(const Shape& s, double g, double u) {
  const double a = s.has_gate ? g : u;
  switch (s.activation) {
    case Activation::kSilu: { const double v = a / (1 + std::exp(-a)); return s.has_gate ? v * u : v; }
    case Activation::kGeluErf: { const double v = 0.5 * a * (1 + std::erf(a / std::sqrt(2.0))); return s.has_gate ? v * u : v; }
    case Activation::kGeluTanh: {
      const double v = 0.5 * a * (1 + std::tanh(std::sqrt(2 / M_PI) * (a + 0.044715 * a * a * a)));
      return s.has_gate ? v * u : v;
    }
    case Activation::kRelu2: { const double r = a > 0 ? a : 0; return s.has_gate ? r * r * u : r * r; }
    default: {
      const double limit = s.limit, c = a < limit ? a : limit, up = u < -limit ? -limit : u > limit ? limit : u;
      return c / (1 + std::exp(-s.alpha * c)) * (up + s.offset);
    }
  }
}

int failures = 0, checks = 0;

// Few tokens meet quantized weights as 16-bit integers, and so do many in matrix tiles, where they meet bf16 as two
// bf16 planes; all else is float32.
double tolerance(const Level& level, Format format, int64_t n) {
  const bool quantized = format == Format::kInt8 || format == Format::kInt4, tiles = strcmp(level.name, "amx") == 0;
  if (quantized && (tiles || n <= kThinTokens)) return 5e-4;
  return tiles && format == Format::kBf16 ? 2e-5 : 4e-6;
}

void check_linear(const Level& level, Runner& runner, Runner& alone, Format format, int64_t R, int64_t K, int64_t n, Rng& rng) {
  std::vector<uint8_t> packed(matrix_bytes(format, R, K));
  const std::vector<double> w = random_matrix(format, packed.data(), R, K, 0.1, rng);
  std::vector<float> x(n * K), bias(R), out(n * R, NAN), again(n * R, NAN);
  for (auto& v : x) v = rng();
  for (auto& v : bias) v = rng();
  Linear linear{packed.data(), R, K, format, n % 2 ? bias.data() : nullptr, out.data(), Format::kFp32};
  runner.run_linears(level, {x.data(), Format::kFp32, K}, n, &linear, 1);
  linear.out = again.data();
  alone.run_linears(level, {x.data(), Format::kFp32, K}, n, &linear, 1);
  double error = 0, norm = 0;
  for (int64_t t = 0; t < n; ++t)
    for (int64_t r = 0; r < R; ++r) {
      double y = linear.bias ? bias[r] : 0;
      for (int64_t k = 0; k < K; ++k) y += w[r * K + k] * x[t * K + k];
      error += (out[t * R + r] - y) * (out[t * R + r] - y);
      norm += y * y;
    }
  error = std::sqrt(error / norm);
  const bool equal = memcmp(out.data(), again.data(), sizeof(float) * out.size()) == 0;
  ++checks;
  if (!(error <= tolerance(level, format, n)) || !equal) {
    ++failures;
    printf("FAIL linear level=%s format=%d R=%ld K=%ld n=%ld error=%.3g threads %s\n", level.name, static_cast<int>(format),
           (long)R, (long)K, (long)n, error, equal ? "agree" : "DIFFER");
  }
}

void check(const Level& level, Runner& runner, Runner& alone, const Shape& s, int64_t n, Rng& rng) {
  const int64_t D = s.hidden, F = s.neurons, T = n + 2;
  std::vector<Expert> experts;
  for (int e = 0; e < 2; ++e) experts.push_back(make_expert(s, rng));
  std::vector<float> x(T * D), out(T * D), weights(n), start(T * D);
  for (auto& v : x) v = rng();
  for (auto& v : start) v = rng();
  for (auto& v : weights) v = std::fabs(rng());
  std::vector<int64_t> rows(n);
  for (int64_t t = 0; t < n; ++t) rows[t] = T - 1 - t;
  std::vector<Work> works;
  works.push_back({experts[0].packed.data(), 0, F, rows.data(), weights.data(), n});
  const int64_t edge = F > kBlock ? kBlock : F;  // the second expert in two shares
  works.push_back({experts[1].packed.data(), 0, edge, rows.data(), weights.data(), n});
  if (edge < F) works.push_back({experts[1].packed.data(), edge, F, rows.data(), weights.data(), n});
  std::vector<double> expected(start.begin(), start.end());
  for (const Expert& e : experts) {
    for (int64_t t = 0; t < n; ++t) {
      const float* xt = &x[rows[t] * D];
      std::vector<double> h(F);
      for (int64_t f = 0; f < F; ++f) {
        double g = e.gate_bias[f], u = e.up_bias[f];
        for (int64_t d = 0; d < D; ++d) { g += e.gate[f * D + d] * xt[d]; u += e.up[f * D + d] * xt[d]; }
        h[f] = activate(s, g, u);
      }
      for (int64_t d = 0; d < D; ++d) {
        double y = e.down_bias[d];
        for (int64_t f = 0; f < F; ++f) y += e.down[d * F + f] * h[f];
        expected[rows[t] * D + d] += weights[t] * y;
      }
    }
  }
  out = start;
  runner.run(level, s, {x.data(), Format::kFp32, D}, T, works.data(), static_cast<int>(works.size()), out.data());
  std::vector<float> again = start;
  alone.run(level, s, {x.data(), Format::kFp32, D}, T, works.data(), static_cast<int>(works.size()), again.data());
  double error = 0, norm = 0;
  for (int64_t i = 0; i < T * D; ++i) {
    error += (out[i] - expected[i]) * (out[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  error = std::sqrt(error / norm);
  const bool equal = memcmp(out.data(), again.data(), sizeof(float) * out.size()) == 0;
  ++checks;
  if (!(error <= tolerance(level, s.format, n)) || !equal) {
    ++failures;
    printf("FAIL experts level=%s format=%d gate=%d bias=%d act=%d D=%ld F=%ld n=%ld error=%.3g threads %s\n", level.name,
           static_cast<int>(s.format), s.has_gate, s.has_bias, static_cast<int>(s.activation), (long)D, (long)F, (long)n,
           error, equal ? "agree" : "DIFFER");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned seed = argc > 1 ? static_cast<unsigned>(atoi(argv[1])) : std::random_device{}();
  printf("seed %u\n", seed);
  Rng rng{std::mt19937(seed), {}};
  const char* names[8];
  bool usable[8];
  const int levels = compiled_levels(names, usable, 8);
  Runner three(3, {}), one(1, {});
  for (int l = 0; l < levels; ++l) {
    if (!usable[l]) { printf("%s: not on this CPU\n", names[l]); continue; }
    const Level& level = *find_level(names[l]);
    for (int f = 0; f < 5; ++f)
      for (int64_t n : {1, 2, 3, 5, 16, 17, 100}) check_linear(level, three, one, static_cast<Format>(f), 150 - n, 91 + n, n, rng);
    for (int f = 0; f < 5; ++f)
      for (int a = 0; a < 5; ++a)
        for (int64_t n : {1, 2, 3, 7, 8, 16, 17, 128}) {
          Shape s;
          s.format = static_cast<Format>(f);
          s.activation = static_cast<Activation>(a);
          s.alpha = 1.702f;
          s.limit = 0.9f;
          s.offset = n % 2 ? 1.0f : 0.0f;
          s.has_gate = a == 4 || (n + f) % 3 != 0;
          s.has_bias = a == 4 || (n + f) % 4 == 0;
          s.hidden = n == 128 ? 40 : 33 + 7 * a;
          s.neurons = n == 128 ? 130 : 200 - 17 * a;
          check(level, three, one, s, n, rng);
        }
    Shape wide;  // more than one chunk and a K that is cut
    wide.hidden = 1100;
    wide.neurons = 1200;
    for (int f = 0; f < 5; ++f) {
      wide.format = static_cast<Format>(f);
      check(level, three, one, wide, 3, rng);
      check(level, three, one, wide, 30, rng);
    }
  }
  printf("%d passed, %d failed\n", checks - failures, failures);
  return failures != 0;
}
