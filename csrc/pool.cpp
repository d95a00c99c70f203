#include "pool.h"

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace moestro {
namespace {

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
  asm volatile("yield");
#endif
}

void pin_to(int cpu) {
#if defined(__linux__)
  if (cpu < 0) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof(set), &set);  // a refusal costs speed, not correctness
#else
  (void)cpu;
#endif
}

std::atomic<int> fork_count{0};
std::atomic<bool (*)()> stop_asked{nullptr};
constexpr std::chrono::milliseconds kAskEvery{50};

#if !defined(_WIN32)
[[maybe_unused]] const int counts_forks = pthread_atfork(nullptr, nullptr, [] { fork_count.fetch_add(1); });
#endif

}  // namespace

int forks() { return fork_count.load(); }
void ask_whether_to_stop(bool (*ask)()) { stop_asked.store(ask); }

Pool::Pool(int threads, const std::vector<int>& cpus, int spin_us) : spin_us_(spin_us) {
  for (int i = 1; i < threads; ++i) {
    const int cpu = i < static_cast<int>(cpus.size()) ? cpus[i] : -1;
    workers_.emplace_back([this, i, cpu] { work(i, cpu); });
  }
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_.store(true);
    call_.fetch_add(1);
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::run(int count, const std::function<void(int, int)>& task) {
  if (count <= 0) return;
  std::lock_guard<std::mutex> one(one_call_);
  task_ = &task;
  count_ = count;
  next_.store(0, std::memory_order_relaxed);
  busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  {
    // Under the lock, so that a worker that is about to sleep sees either the new call or the notification.
    std::lock_guard<std::mutex> lock(mutex_);
    call_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  const bool stopped = take_items_until_told();
  // Every worker passes through each call, so no task outlives it. The last items are short: spin.
  for (int spins = 0; busy_.load(std::memory_order_acquire) > 0; ++spins) {
    if (spins < 20000) relax();
    else std::this_thread::yield();
  }
  task_ = nullptr;
  if (stopped) throw Interrupted();
}

// The caller's own items; then true where it was told to stop, and no thread takes any more.
bool Pool::take_items_until_told() {
  bool (*const ask)() = stop_asked.load();
  auto next_time = std::chrono::steady_clock::now() + kAskEvery;
  for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
    (*task_)(i, 0);
    if (ask == nullptr || std::chrono::steady_clock::now() < next_time) continue;
    if (ask()) {
      next_.store(count_, std::memory_order_relaxed);
      return true;
    }
    next_time = std::chrono::steady_clock::now() + kAskEvery;
  }
  return false;
}

void Pool::take_items(int thread) {
  for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) (*task_)(i, thread);
}

void Pool::work(int thread, int cpu) {
  pin_to(cpu);
  uint64_t seen = 0;
  for (;;) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(spin_us_);
    while (call_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until) {
      for (int i = 0; i < 32; ++i) relax();
    }
    if (call_.load(std::memory_order_acquire) == seen) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return call_.load(std::memory_order_acquire) != seen; });
    }
    seen = call_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    take_items(thread);
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace moestro
