// A plain C++ driver: every level, format, activation and size against float64, with any number of threads.
// Built with the sanitizers by `make sanitize`: driver [SEED [LEVEL]].
#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "test_help.h"

using namespace moestro;

namespace {

struct Expert {
  std::vector<uint8_t> packed;
  std::vector<double> gate, up, down, gate_bias, up_bias, down_bias;  // [F, D], [F, D], [D, F]
};

Expert make_expert(const Shape& s, Rng& rng) {
  const int64_t D = s.hidden, F = s.neurons, B = s.block, blocks = s.blocks(), size = block_bytes(s);
  Expert e;
  e.packed.assign(blocks * size + (s.has_bias ? D * 4 : 0), 0);
  e.gate.assign(F * D, 0); e.up = e.gate; e.down = e.gate;
  e.gate_bias.assign(F, 0); e.up_bias = e.gate_bias; e.down_bias.assign(D, 0);
  const double scale = 1.0 / std::sqrt(static_cast<double>(D));
  for (int64_t b = 0; b < blocks; ++b) {
    uint8_t* at = e.packed.data() + b * size;
    const int64_t n = std::min(B, F - b * B);  // a last block is padded with zero rows
    const auto rows = [&](const MatrixFormat& format, std::vector<double>& to) {
      const std::vector<double> values = random_matrix(format, at, n, D, scale, rng);
      std::copy(values.begin(), values.end(), to.begin() + b * B * D);
      at += matrix_bytes(format, B, D);
    };
    if (s.has_gate) rows(s.gate, e.gate);
    rows(s.up, e.up);
    const std::vector<double> down = random_matrix(s.down, at, D, B, scale, rng);
    for (int64_t d = 0; d < D; ++d)
      for (int64_t i = 0; i < n; ++i) e.down[d * F + b * B + i] = down[d * B + i];
    at += matrix_bytes(s.down, D, B);
    const auto bias = [&](std::vector<double>& to) {
      float* values = reinterpret_cast<float*>(at);
      for (int64_t i = 0; i < n; ++i) to[b * B + i] = values[i] = rng();
      at += B * sizeof(float);
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
    case Activation::kRelu2: { const double r = a < 0 ? 0 : a; return s.has_gate ? r * r * u : r * r; }
    default: {
      const double limit = s.limit, c = a > limit ? limit : a, up = u < -limit ? -limit : u > limit ? limit : u;
      return c / (1 + std::exp(-s.alpha * c)) * (up + s.offset);
    }
  }
}

// Puts an infinity, its negative and a NaN among the numbers of up to three tokens.
void spoil(Numbers& x, int64_t width, const std::vector<int64_t>& rows, Rng& rng) {
  const double bad[] = {NAN, INFINITY, -INFINITY};
  const size_t first = rng.below(3);
  for (size_t i = 0; i < rows.size() && i < 3; ++i) x.set(rows[i] * width + rng.below(width), bad[(first + i) % 3]);
}

void check_linear(Machine& machine, MatrixFormat format, Type type, int64_t R, int64_t K, int64_t n, bool spoilt, Rng& rng) {
  std::vector<uint8_t> packed(matrix_bytes(format, R, K));
  const std::vector<double> w = random_matrix(format, packed.data(), R, K, 0.1, rng);
  Numbers x(type, n * K, rng), bias(Type::kFp32, R, rng);
  std::vector<int64_t> rows(n);
  for (int64_t t = 0; t < n; ++t) rows[t] = t;
  if (spoilt) spoil(x, K, rows, rng);
  Linear linear{packed.data(), R, K, format, n % 2 ? bias.floats() : nullptr, nullptr, type};
  std::vector<double> want(n * R);
  for (int64_t t = 0; t < n; ++t)
    for (int64_t r = 0; r < R; ++r) {
      double y = linear.bias ? bias.at(r) : 0;
      for (int64_t k = 0; k < K; ++k) y += w[r * K + k] * x.at(t * K + k);
      want[t * R + r] = y;
    }
  const auto run = [&](Runner& runner, const Level& level, Numbers& out) {
    Linear here = linear;
    here.out = out.bytes.data();
    runner.run_linears(level, {x.bytes.data(), type, K}, n, &here, 1);
  };
  machine.check(text("linear %s type=%d R=%ld K=%ld n=%ld%s", name_of(format).c_str(), static_cast<int>(type),
                     (long)R, (long)K, (long)n, spoilt ? " spoilt" : ""),
                Numbers(type, n * R), run, [&](const Numbers& out) { return relative_error(out, want); },
                [&](const Level& level) { return tolerance(level, format, n); });
}

void check_experts(Machine& machine, const Shape& s, Type type, int64_t n, bool spoilt, Rng& rng) {
  const int64_t D = s.hidden, F = s.neurons, T = n + 2;
  const Expert experts[2] = {make_expert(s, rng), make_expert(s, rng)};
  Numbers x(type, T * D, rng), start(Type::kFp32, T * D, rng);
  std::vector<float> weights(n);
  for (auto& v : weights) v = std::fabs(rng());
  std::vector<int64_t> rows(n);
  for (int64_t t = 0; t < n; ++t) rows[t] = T - 1 - t;
  if (spoilt) spoil(x, D, rows, rng);
  std::vector<Work> works;
  works.push_back({experts[0].packed.data(), 0, F, rows.data(), weights.data(), n});
  const int64_t edge = F > s.block ? s.block : F;  // the second expert in two shares
  works.push_back({experts[1].packed.data(), 0, edge, rows.data(), weights.data(), n});
  if (edge < F) works.push_back({experts[1].packed.data(), edge, F, rows.data(), weights.data(), n});
  std::vector<double> want(T * D);
  for (int64_t i = 0; i < T * D; ++i) want[i] = start.at(i);
  for (const Expert& e : experts) {
    for (int64_t t = 0; t < n; ++t) {
      const int64_t row = rows[t] * D;
      std::vector<double> h(F);
      for (int64_t f = 0; f < F; ++f) {
        double g = e.gate_bias[f], u = e.up_bias[f];
        for (int64_t d = 0; d < D; ++d) { g += e.gate[f * D + d] * x.at(row + d); u += e.up[f * D + d] * x.at(row + d); }
        h[f] = activate(s, g, u);
      }
      for (int64_t d = 0; d < D; ++d) {
        double y = e.down_bias[d];
        for (int64_t f = 0; f < F; ++f) y += e.down[d * F + f] * h[f];
        want[rows[t] * D + d] += weights[t] * y;
      }
    }
  }
  const auto run = [&](Runner& runner, const Level& level, Numbers& out) {
    runner.run(level, s, {x.bytes.data(), type, D}, T, works.data(), static_cast<int>(works.size()), out.floats());
  };
  machine.check(text("experts %s %s %s type=%d gate=%d bias=%d act=%d D=%ld F=%ld n=%ld%s", name_of(s.gate).c_str(), name_of(s.up).c_str(), name_of(s.down).c_str(), static_cast<int>(type), s.has_gate,
                     s.has_bias, static_cast<int>(s.activation), (long)D, (long)F, (long)n, spoilt ? " spoilt" : ""),
                start, run, [&](const Numbers& out) { return relative_error(out, want); },
                [&](const Level& level) { return std::max({tolerance(level, s.gate, n), tolerance(level, s.up, n), tolerance(level, s.down, n)}); });
}

Shape shape_of(const MatrixFormat& gate, const MatrixFormat& up, const MatrixFormat& down) {
  Shape s;
  s.gate = gate, s.up = up, s.down = down;
  s.block = least_block(down);
  return s;
}

// How many tokens meet a token alone for its bits to be those among n: one, but where matrix tiles round otherwise than
// the vectors that fewer tokens meet, as many as go there.
int64_t least_tokens(const Level& level, const MatrixFormat& format, int64_t n) {
  return strcmp(level.name, "amx") == 0 && format.code == Code::kBf16 && n > 8 ? 9 : 1;
}

// A token's results have the bits that it has alone, whatever is computed beside it: through a matrix, through experts that
// fewer tokens share, and beside so many experts that each is an item of its own.
void check_alone(Machine& machine, const MatrixFormat& format, int64_t n, int64_t R, int64_t K, Rng& rng) {
  Shape s = shape_of(format, format, format);
  s.hidden = K, s.neurons = R, s.has_bias = n % 2;
  std::vector<uint8_t> packed(matrix_bytes(format, R, K));
  random_matrix(format, packed.data(), R, K, 0.1, rng);
  const Expert experts[2] = {make_expert(s, rng), make_expert(s, rng)};
  Numbers x(Type::kFp32, n * K, rng);
  std::vector<int64_t> rows(n);
  for (int64_t t = 0; t < n; ++t) rows[t] = t;
  std::vector<float> weights(n);
  for (auto& w : weights) w = std::fabs(rng());
  for (const Level* level : machine.levels) {
    const int64_t least = least_tokens(*level, format, n);
    Runner runner(2, {});
    const auto run = [&](int64_t first, int64_t count, int others, Numbers& linear, Numbers& out) {
      const Input some{x.bytes.data() + first * K * 4, Type::kFp32, K};
      const Linear matrix{packed.data(), R, K, format, nullptr, linear.bytes.data(), Type::kFp32};
      runner.run_linears(*level, some, count, &matrix, 1);
      std::fill(out.bytes.begin(), out.bytes.end(), 0);
      std::vector<Work> works = {{experts[0].packed.data(), 0, R, rows.data(), weights.data() + first, count},
                                 {experts[1].packed.data(), 0, R, rows.data(), weights.data() + first, least > 1 ? count : (count + 1) / 2}};
      for (int i = 0; i < others; ++i) works.push_back({experts[1].packed.data(), 0, R, &rows[n - 1], weights.data(), 1});
      runner.run(*level, s, some, count, works.data(), static_cast<int>(works.size()), out.floats());
    };
    bool equal = true;
    for (int others : {0, 40}) {  // which are the last token's
      Numbers all(Type::kFp32, n * R), sums(Type::kFp32, n * K);
      run(0, n, others, all, sums);
      for (int64_t t = 0; t < n / 2 && t + least <= n; t += 1 + n / 8) {
        Numbers one(Type::kFp32, least * R), sum(Type::kFp32, least * K);
        run(t, least, 0, one, sum);
        equal = equal && memcmp(one.floats(), all.floats() + t * R, R * 4) == 0;
        equal = equal && memcmp(sum.floats(), sums.floats() + t * K, K * 4) == 0;
      }
    }
    machine.note(text("alone %s R=%ld K=%ld n=%ld", name_of(format).c_str(), (long)R, (long)K, (long)n), *level, equal);
  }
}

// Sums of memory, in every way that the limits of a machine are measured.
void check_sums(Machine& machine, Rng& rng) {
  for (int64_t n : {1, 63, 1000})
    for (int64_t prefetch : {0, 64, -1}) {
      Numbers x(Type::kFp32, n, rng);
      std::vector<double> want(1);
      for (int64_t i = 0; i < n; ++i) want[0] += x.at(i);
      const double room = std::sqrt(static_cast<double>(n)) / std::fabs(want[0]);  // terms cancel
      machine.check(text("sum n=%ld prefetch=%ld", (long)n, (long)prefetch), Numbers(Type::kFp32, 1),
                    [&](Runner&, const Level& level, Numbers& out) { out.set(0, level.sum(x.floats(), n, prefetch)); },
                    [&](const Numbers& out) { return relative_error(out, want); },
                    [&](const Level&) { return 2e-6 * (1 + room); });
    }
}

constexpr size_t kOwnKernels = 5;  // formats that have kernels of their own, which are tried with more

}  // namespace

int main(int argc, char** argv) {
  const unsigned seed = argc > 1 ? static_cast<unsigned>(atoi(argv[1])) : std::random_device{}();
  printf("seed %u\n", seed);
  Rng rng{std::mt19937(seed), {}};
  Machine machine(argc > 2 ? argv[2] : nullptr);
#if defined(MOESTRO_EMULATE_AMX)
  check_emulated_amx(machine);
#endif
  check_sums(machine, rng);
  check_norms(machine, rng);
  check_attention(machine, rng);
  check_layers(machine, rng);
  for (size_t f = 0; f < formats().size(); ++f) {
    const MatrixFormat format = formats()[f].format;
    for (int64_t n : {1, 2, 3, 5, 16, 17, 100})
      for (int type = 0; type < 3; ++type)
        for (bool spoilt : {false, true}) {
          if (f >= kOwnKernels && (type + n) % 3 != 0) continue;
          check_linear(machine, format, static_cast<Type>(type), 150 - n, 91 + n, n, spoilt, rng);
        }
    for (int64_t K : {1, 300, 700}) check_linear(machine, format, Type::kFp32, 70, K, K % 4, false, rng);
    for (int a = 0; a < 5; ++a)
      for (int64_t n : {1, 2, 3, 7, 8, 9, 12, 16, 17, 128}) {
        if (f >= kOwnKernels && (a + n) % 5 != 0) continue;
        Shape s = shape_of(format, format, format);
        const Type type = static_cast<Type>((a + n) % 3);
        s.activation = static_cast<Activation>(a);
        s.alpha = 1.702f;
        s.limit = 0.9f;
        s.offset = n % 2 ? 1.0f : 0.0f;
        s.has_gate = a == 4 || (n + f) % 3 != 0;
        s.has_bias = a == 4 || (n + f) % 4 == 0;
        s.hidden = n == 128 ? 40 : 33 + 7 * a;
        s.neurons = n == 128 ? 130 : 200 - 17 * a;
        check_experts(machine, s, type, n, false, rng);
        if (n == 3 || n == 17) check_experts(machine, s, type, n, true, rng);
      }
    for (int64_t n : {2, 3, 4, 5, 6, 7, 9, 12, 13, 16, 17, 33, 64}) {
      if (f >= kOwnKernels && (f + n) % 4 != 0) continue;
      check_alone(machine, format, n, n % 2 ? 290 : 600, n % 2 ? 500 : 130, rng);
    }
    for (bool wide : {false, true}) {  // more than one chunk, and rows or columns of neurons that are cut
      Shape s = shape_of(format, format, format);
      s.hidden = wide ? 1100 : 70;
      s.neurons = wide ? 200 : 2200;
      for (int64_t n : {3, 20}) check_experts(machine, s, Type::kFp32, n, false, rng);
    }
  }
  for (int i = 0; i < 60; ++i) {  // another format for each matrix
    const auto any = [&] { return formats()[rng.below(formats().size())].format; };
    Shape s = shape_of(any(), any(), any());
    s.hidden = 1 + rng.below(150);
    s.neurons = 1 + rng.below(400);
    s.has_bias = i % 2;
    check_experts(machine, s, static_cast<Type>(i % 3), i % 4 == 3 ? 20 : 1 + i % 4, i % 5 == 4, rng);
  }
  for (const MatrixFormat& format : {MatrixFormat(), kInt8}) {  // more tokens than a tile
    Shape s = shape_of(format, format, format);
    s.hidden = 70;
    s.neurons = 90;
    for (Type type : {Type::kFp32, Type::kBf16}) check_experts(machine, s, type, 300, false, rng);
  }
  return machine.finish();
}
