// What the test driver's checks share: numbers of any float type, packed matrices, and runs at every level.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "run.h"

struct Rng {
  std::mt19937 engine;
  std::normal_distribution<float> normal;
  float operator()() { return normal(engine); }
  int64_t below(int64_t n) { return engine() % n; }
};

// The distance of neighbours around v.
inline double step_of(moestro::Type type, double v) {
  const int bits = type == moestro::Type::kFp32 ? 24 : type == moestro::Type::kFp16 ? 11 : 8;
  const int least = type == moestro::Type::kFp16 ? -14 : -126;
  return std::ldexp(1.0, (v == 0 ? least : std::max(std::ilogb(v), least)) + 1 - bits);
}
inline double round_to(moestro::Type type, double v) {
  return std::isfinite(v) ? std::nearbyint(v / step_of(type, v)) * step_of(type, v) : v;
}

// Float numbers of one type, all NaN at first.
struct Numbers {
  moestro::Type type;
  std::vector<uint8_t> bytes;

  Numbers(moestro::Type of, int64_t count) : type(of), bytes(count * (of == moestro::Type::kFp32 ? 4 : 2), 0xFF) {}
  Numbers(moestro::Type of, int64_t count, Rng& rng, double scale = 1) : Numbers(of, count) {
    for (int64_t i = 0; i < count; ++i) set(i, rng() * scale);
  }
  int64_t size() const { return static_cast<int64_t>(bytes.size()) / (type == moestro::Type::kFp32 ? 4 : 2); }
  float* floats() { return reinterpret_cast<float*>(bytes.data()); }
  double at(int64_t i) const;
  void set(int64_t i, double v);  // rounded to the type
};

double bf16(uint16_t v);
double fp16(uint16_t v);
uint16_t fp16_bits(double v);  // of one that fp16 has

// Every kind of code, scale and zero, those with kernels of their own first.
struct NamedFormat {
  const char* name;
  moestro::MatrixFormat format;
};
const std::vector<NamedFormat>& formats();
std::string name_of(const moestro::MatrixFormat& format);

// Fills a packed matrix [R, K] with random weights of about the given size and returns them, as the format means
// them: written from the description of the bytes, not from the kernels.
std::vector<double> random_matrix(const moestro::MatrixFormat& format, uint8_t* packed, int64_t R, int64_t K, double scale, Rng& rng);

// |got - want| / |want|, where each number of a 16-bit type may be off by its rounding besides. Infinite if one is
// finite that should not be, or the other way round; infinities and NaN are taken for each other.
double relative_error(const Numbers& got, const std::vector<double>& want);

// What float32 arithmetic is allowed; codes meet 16-bit integers, and bf16 in matrix tiles meets two bf16 planes.
double tolerance(const moestro::Level& level, const moestro::MatrixFormat& format, int64_t tokens);

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));

// The levels of this CPU, or one of them, and pools of different sizes, whose results must be equal.
class Machine {
 public:
  explicit Machine(const char* only = nullptr);

  // Calls run(runner, level, out) at every level with every pool, each time with out as `start` is. The error must
  // be within bound(level), and all pools' results equal, bit for bit.
  template <class Run, class Error, class Bound>
  void check(const std::string& what, const Numbers& start, Run run, Error error, Bound bound) {
    for (const moestro::Level* level : levels) {
      Numbers first = start;
      run(used(), *level, first);
      bool equal = true;
      for (int threads : {1, 2}) {  // of fresh ones: their memory is as large as it must be, so overruns show
        Numbers other = start;
        moestro::Runner runner(threads, {});
        run(runner, *level, other);
        equal = equal && other.bytes == first.bytes;
      }
      report(what, *level, error(first), bound(*level), equal);
    }
  }

  // A check of equal bits.
  void note(const std::string& what, const moestro::Level& level, bool equal) { report(what, level, 0, 1, equal); }

  int finish() const;  // prints how it went, and returns whether anything failed

  std::vector<const moestro::Level*> levels;

 private:
  moestro::Runner& used();  // with memory full of NaN, which must not show
  void report(const std::string& what, const moestro::Level& level, double error, double bound, bool equal);

  std::unique_ptr<moestro::Runner> used_;
  int checks_ = 0, failures_ = 0;
  double closest_ = 0;  // an error came to its bound, as a share of it
  std::string closest_what_;
};

void check_norms(Machine& machine, Rng& rng);
void check_attention(Machine& machine, Rng& rng);
void check_layers(Machine& machine, Rng& rng);
void check_emulated_amx(Machine& machine);  // test_amx.cpp
