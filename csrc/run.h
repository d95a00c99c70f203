// Runs layer steps on a pool of threads; what the bindings hold.
#pragma once

#include <atomic>
#include <functional>
#include <vector>

#include "experts.h"
#include "pool.h"

namespace moestro {

// norm(x) * (offset + weight) over `width` numbers at a time. The weight is read where it lies, at each use, in the type
// that it has: it may be edited.
struct Norm {
  const void* weight = nullptr;  // [width], or none
  Type type = Type::kFp32;   // of the weight
  int64_t width = 0;
  float offset = 0, epsilon = 0;
};

class Runner {
 public:
  Runner(int threads, const std::vector<int>& cpus);
  ~Runner();

  int threads() const { return threads_; }
  double busy_s() const { return busy_s_.load(); }  // spent in calls that compute, so far

  // Adds, for each work and each of its tokens, weight * FFN(x row) to out: x [tokens, D], out float32 [tokens, D].
  void run(const Level& level, const Shape& shape, const Input& x, int64_t tokens, const Work* works, int count, float* out);

  // Dense layers that share one input: each fills its own out [tokens, R].
  void run_linears(const Level& level, const Input& x, int64_t tokens, const Linear* linears, int count);

  // Rows `ids` [n] of a packed table, as its out_type, to its out [n, K]. Throws where there is no such row.
  void look_up(const Level& level, const Linear& table, const int64_t* ids, int64_t n);

  // A norm of each of `rows` rows, which are as wide as it; see norm.inl.
  void rms_norm(const Level& level, const void* x, Type type, int64_t rows, const Norm& norm, void* out);

  // Calls do_with(memory) on this thread, or do_one(i, memory) for each i on the pool or on this thread.
  template <class Do>
  void with_scratch(int64_t floats, Do do_with) {
    each(1, floats, false, [&](int, float* memory) { do_with(memory); });
  }
  void each(int count, int64_t floats, bool on_pool, const std::function<void(int, float*)>& do_one);

  // Writes a zero into each page of fresh memory, whose pages then lie near the threads that will read them.
  void touch(uint8_t* memory, int64_t bytes);

  // Limits of this machine with this pool: seconds to sum `floats` of memory, and multiply-adds a second.
  double read_seconds(const Level& level, const float* memory, int64_t floats, int64_t prefetch);
  double fma_flops(const Level& level, int64_t rounds);
  double dot_flops(const Level& level, int64_t rounds);  // of codes with a token's integers

 private:
  double flops(double (*loop)(int64_t), int64_t rounds);

  struct Crew;
  class Call;
  Crew& crew();

  const int threads_;
  const std::vector<int> cpus_;
  std::atomic<Crew*> crew_;  // of this process: a forked child makes one of its own
  std::atomic<double> busy_s_{0};
};

}  // namespace moestro
