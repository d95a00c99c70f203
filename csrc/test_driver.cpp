// A plain C++ driver: every level, format, activation and size against float64, with any number of threads.
// Built with the sanitizers by `make sanitize`; `--bench` times decode at Mixtral's and OLMoE's shapes.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "run.h"

using namespace moestro;

namespace {

uint16_t to_bf16(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
float from_bf16(uint16_t v) {
  uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

struct Rng {
  std::mt19937 engine;
  std::normal_distribution<float> normal;
  float operator()() { return normal(engine); }
};

// Writes one weight and gives back what it was rounded to.
double put(Format format, uint8_t* at, int64_t i, float v) {
  if (format == Format::kFp32) {
    memcpy(at + 4 * i, &v, 4);
    return v;
  }
  uint16_t bits;
  double rounded;
  if (format == Format::kBf16) {
    bits = to_bf16(v);
    rounded = from_bf16(bits);
  } else {  // fp16: a value with 10 bits of mantissa in its normal range
    const int e = static_cast<int>(std::floor(std::log2(std::fabs(v) + 1e-30f)));
    const int exponent = e < -14 ? -14 : e > 15 ? 15 : e;
    const int m = static_cast<int>(std::lround(std::fabs(v) / std::ldexp(1.0, exponent) * 1024));
    int mantissa = m, biased = exponent + 15;
    if (m < 1024) { biased = 0; }                    // subnormal
    else if (m >= 2048) { biased += 1; mantissa = m / 2; }
    rounded = std::copysign(biased == 0 ? m * std::ldexp(1.0, -24) : mantissa * std::ldexp(1.0, biased - 25), v);
    bits = static_cast<uint16_t>((v < 0 ? 0x8000 : 0) | biased << 10 | (mantissa & 0x3FF));
  }
  memcpy(at + 2 * i, &bits, 2);
  return rounded;
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
  const float scale = 1.0f / std::sqrt(static_cast<float>(D));
  const int64_t matrix = kBlock * D * weight_bytes(s.format);
  for (int64_t f = 0; f < F; ++f) {
    uint8_t* block = e.packed.data() + f / kBlock * size;
    const int64_t i = f % kBlock;
    uint8_t* up = block + (s.has_gate ? matrix : 0);
    for (int64_t d = 0; d < D; ++d) {
      if (s.has_gate) e.gate[f * D + d] = put(s.format, block, i * D + d, rng() * scale);
      e.up[f * D + d] = put(s.format, up, i * D + d, rng() * scale);
      e.down[d * F + f] = put(s.format, up + matrix, d * kBlock + i, rng() * scale);
    }
    if (s.has_bias) {
      float* biases = reinterpret_cast<float*>(up + 2 * matrix);
      if (s.has_gate) { biases[i] = rng(); e.gate_bias[f] = biases[i]; biases += kBlock; }
      biases[i] = rng();
      e.up_bias[f] = biases[i];
    }
  }
  if (s.has_bias) {
    float* bias = reinterpret_cast<float*>(e.packed.data() + blocks * size);
    for (int64_t d = 0; d < D; ++d) { bias[d] = rng(); e.down_bias[d] = bias[d]; }
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
  runner.run(level, s, x.data(), T, works.data(), static_cast<int>(works.size()), out.data());
  std::vector<float> again = start;
  alone.run(level, s, x.data(), T, works.data(), static_cast<int>(works.size()), again.data());
  double error = 0, norm = 0;
  for (int64_t i = 0; i < T * D; ++i) {
    error += (out[i] - expected[i]) * (out[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  error = std::sqrt(error / norm);
  const bool equal = memcmp(out.data(), again.data(), sizeof(float) * out.size()) == 0;
  ++checks;
  if (!(error <= 2e-6) || !equal) {
    ++failures;
    printf("FAIL level=%s format=%d gate=%d bias=%d act=%d D=%ld F=%ld n=%ld error=%.3g threads %s\n", level.name,
           static_cast<int>(s.format), s.has_gate, s.has_bias, static_cast<int>(s.activation), (long)D, (long)F, (long)n,
           error, equal ? "agree" : "DIFFER");
  }
}

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

int bench(int threads);

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "--bench") return bench(argc > 2 ? atoi(argv[2]) : 2);
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
    for (int f = 0; f < 3; ++f)
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
    wide.format = Format::kBf16;
    check(level, three, one, wide, 3, rng);
    check(level, three, one, wide, 30, rng);
  }
  printf("%d passed, %d failed\n", checks - failures, failures);
  return failures != 0;
}

int bench(int threads) {
  Runner runner(threads, {});
  struct Model { const char* name; int64_t D, F; int experts, top; };
  // Read limit: summing loops over a large buffer, in the same run.
  const size_t big = size_t(2) << 30;
  float* buffer = static_cast<float*>(aligned_alloc(1 << 21, big));
  Pool pool(threads);
  pool.run(64, [&](int i, int) {  // plausible bf16 weights: denormal ones would time the microcode
    uint16_t* at = reinterpret_cast<uint16_t*>(buffer) + i * (big / 128);
    for (size_t k = 0; k < big / 128; ++k) at[k] = static_cast<uint16_t>(0x3C00 + (k * 37 & 0xFF) + (k * 5 & 1 ? 0x8000 : 0));
  });
  for (const Model& m : {Model{"mixtral", 4096, 14336, 8, 2}, Model{"olmoe", 2048, 1024, 64, 8}}) {
    Shape s;
    s.hidden = m.D;
    s.neurons = m.F;
    const int64_t bytes = m.F / kBlock * block_bytes(s);
    const int count = static_cast<int>(big / bytes);
    for (int64_t n : {1, 4, 16, 64, 256}) {
      for (const char* name : {"avx512", "avx2"}) {
        const Level* level = find_level(name);
        if (!level) continue;
        std::vector<float> x(n * m.D, 0.01f), out(n * m.D), weights(n, 0.1f);
        std::vector<int64_t> rows(n);
        for (int64_t t = 0; t < n; ++t) rows[t] = t;
        std::vector<double> times, reads;
        int at = 0;
        for (int rep = 0; rep < 7; ++rep) {
          std::vector<Work> works;
          for (int e = 0; e < m.top; ++e) {
            works.push_back({reinterpret_cast<uint8_t*>(buffer) + size_t(at) * bytes, 0, m.F, rows.data(), weights.data(), n});
            at = (at + 1) % count;
          }
          double begin = seconds();
          runner.run(*level, s, x.data(), n, works.data(), m.top, out.data());
          times.push_back(seconds() - begin);
          volatile double sink = 0;
          begin = seconds();
          pool.run(64, [&](int i, int) {
            const float* p = buffer + size_t(i) * (big / 256);
            float acc[64] = {0};
            for (size_t k = 0; k < big / 256 / 2; k += 64)
              for (int j = 0; j < 64; ++j) acc[j] += p[k + j];
            double total = 0;
            for (float v : acc) total += v;
            sink = sink + total;
          });
          reads.push_back(big / 2 / (seconds() - begin));
        }
        std::sort(times.begin(), times.end());
        std::sort(reads.begin(), reads.end());
        const double t = times[times.size() / 2], gb = m.top * bytes / t / 1e9, limit = reads.back() / 1e9;
        fflush(stdout);
        printf("%-8s %-7s n=%-4ld %8.2f ms  %6.2f GB/s  share %.2f of %.1f  %7.1f GFLOP/s\n", m.name, name, (long)n, t * 1e3, gb,
               gb / limit, limit, 2.0 * n * 3 * m.D * m.F * m.top / t / 1e9);
      }
    }
  }
  free(buffer);
  return 0;
}
