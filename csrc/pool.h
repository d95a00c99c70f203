// A pool of threads of our own: pinned to physical cores, they spin briefly for the next call and then sleep.
//
// The calling thread works too, as thread 0, and is not pinned. torch's own pool is idle while we compute and
// ours while torch does, so both may have one thread a core; ours must not spin for long, or it takes
// the core from torch's next operation.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace moestro {

// How many forks this process is away from the one that loaded these kernels. Of a pool, a child has no thread.
int forks();

// What a call throws that was told to stop; what it had begun is not done.
struct Interrupted {};

// Asks whether the calling thread is to stop, every 50 ms of a call and only from the thread that made it. Of the process.
void ask_whether_to_stop(bool (*ask)());

class Pool {
 public:
  // `threads` in all, the caller included; `cpus` are the processors to pin to, one a thread (may be empty).
  explicit Pool(int threads, const std::vector<int>& cpus = {}, int spin_us = 50);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Runs task(i, thread) for each i in [0, count), each once, on any thread; returns when all are done.
  // One call at a time: a second caller waits. Throws Interrupted.
  void run(int count, const std::function<void(int, int)>& task);

 private:
  void work(int thread, int cpu);
  void take_items(int thread);
  bool take_items_until_told();

  std::vector<std::thread> workers_;
  std::mutex one_call_, mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> call_{0};   // counts calls; a change is the signal to begin
  std::atomic<int> next_{0}, busy_{0};
  std::atomic<bool> stop_{false};
  int count_ = 0;
  const std::function<void(int, int)>* task_ = nullptr;
  int spin_us_;
};

}  // namespace moestro
