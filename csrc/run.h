// Runs layer steps on a pool of threads; what the bindings hold.
#pragma once

#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "experts.h"
#include "pool.h"

namespace moestro {

class Runner {
 public:
  Runner(int threads, const std::vector<int>& cpus);
  ~Runner();

  int threads() const { return pool_.threads(); }

  // Adds, for each work and each of its tokens, weight * FFN(x row) to out: x, out float32 [tokens, D].
  void run(const Level& level, const Shape& shape, const float* x, int64_t tokens, const Work* works, int count, float* out);

 private:
  struct Memory;
  Pool pool_;
  std::unique_ptr<Memory> memory_;
  std::mutex one_call_;
};

}  // namespace moestro
