#include "layer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

namespace moestro {
namespace {

constexpr int64_t kRouterRows = 16;              // of an item on the pool
constexpr int64_t kRouterPoolBytes = 1 << 16;    // of a router that is worth waking other threads

// The token's own key or value, heads next to one another, behind those in the cache.
void append(const void* own, int64_t heads, int64_t head_bytes, void* cache, int64_t apart_bytes, int64_t place) {
  for (int64_t h = 0; h < heads; ++h) {
    memcpy(static_cast<uint8_t*>(cache) + h * apart_bytes + place * head_bytes,
           static_cast<const uint8_t*>(own) + h * head_bytes, head_bytes);
  }
}

// out = a + b, all [D] of one type.
void add(Runner& runner, const Level& level, const void* a, const void* b, Type type, int64_t D, void* out) {
  runner.with_scratch(2 * round_up(D, kGroup), [&](float* sum) {
    float* other = sum + round_up(D, kGroup);
    level.read({a, type, D}, sum);
    level.read({b, type, D}, other);
    level.axpy(1.0f, other, sum, D);
    level.write(sum, D, type, out);
  });
}

// The best k of the probabilities in order, by the very algorithm of torch.topk, so that equals fall alike.
void best(std::vector<std::pair<float, int64_t>>& queue, int64_t k) {
  const auto greater = [](const auto& a, const auto& b) {
    return (std::isnan(a.first) && !std::isnan(b.first)) || a.first > b.first;
  };
  if (k * 64 <= static_cast<int64_t>(queue.size())) {
    std::partial_sort(queue.begin(), queue.begin() + k, queue.end(), greater);
  } else {
    std::nth_element(queue.begin(), queue.begin() + k - 1, queue.end(), greater);
    std::sort(queue.begin(), queue.begin() + k - 1, greater);
  }
}

}  // namespace

void FirstHalf::run(Runner& runner, const Level& level, const void* x, const void* cosine, const void* sine,
                    int64_t turned, const CachePlace& cache, void* hidden, void* normed) const {
  const Type type = attention.type;
  const int64_t size = size_of(type), D = attention.q.columns, Q = attention.q.rows, K = attention.k.rows;
  thread_local std::vector<uint8_t> memory;  // kept from call to call; several threads may generate
  memory.resize(2 * (Q + K) * size);
  uint8_t *q = memory.data(), *k = q + Q * size, *v = k + K * size, *heads = v + K * size;

  runner.rms_norm(level, x, type, 1, before, normed);
  attention.project(runner, level, normed, cosine, sine, turned, q, k, v);
  const int64_t head_bytes = attention.head * size;
  append(k, K / attention.head, head_bytes, cache.keys, cache.apart * size, cache.length - 1);
  append(v, K / attention.head, head_bytes, cache.values, cache.apart * size, cache.length - 1);
  attention.attend(runner, level, q, cache.keys, cache.values, cache.length, cache.apart, heads);
  Linear linear = output;
  linear.out = hidden;
  linear.out_type = type;
  runner.run_linears(level, {heads, type, Q}, 1, &linear, 1);
  add(runner, level, x, hidden, type, D, hidden);
  runner.rms_norm(level, hidden, type, 1, after, normed);
}

void Router::run(Runner& runner, const Level& level, const void* x, void* logits, void* scores, int64_t* chosen) const {
  thread_local std::vector<float> memory;
  memory.resize(round_up(hidden, kGroup) + 2 * round_up(experts, kGroup));
  float *from = memory.data(), *p = from + round_up(hidden, kGroup), *rounded = p + round_up(experts, kGroup);
  level.read({x, type, hidden}, from);
  const int64_t row_bytes = hidden * size_of(type), items = (experts + kRouterRows - 1) / kRouterRows;
  runner.each(static_cast<int>(items), 0, experts * row_bytes >= kRouterPoolBytes, [&](int i, float*) {
    const int64_t begin = i * kRouterRows, count = std::min(kRouterRows, experts - begin);
    level.dot_rows(from, static_cast<const uint8_t*>(weight) + begin * row_bytes, type, count, hidden, p + begin);
  });
  level.write(p, experts, type, logits);
  level.read({logits, type, experts}, rounded);  // the softmax is of what the caller sees

  const float most = *std::max_element(rounded, rounded + experts);
  float total = 0;
  for (int64_t e = 0; e < experts; ++e) total += rounded[e] = expf(rounded[e] - most);
  thread_local std::vector<std::pair<float, int64_t>> queue;
  queue.clear();
  for (int64_t e = 0; e < experts; ++e) queue.emplace_back(rounded[e] / total, e);
  best(queue, top_k);
  float sum = 0;
  for (int64_t i = 0; i < top_k; ++i) sum += queue[i].first;
  for (int64_t i = 0; i < top_k; ++i) {
    p[i] = normalized ? queue[i].first / sum : queue[i].first;
    chosen[i] = queue[i].second;
  }
  level.write(p, top_k, score_type, scores);
}

int64_t DecoderLayer::run(Runner& runner, const Level& level, const void* x, const void* cosine, const void* sine,
                          int64_t turned, const CachePlace& cache, void* hidden) const {
  const Type type = first.attention.type;
  const int64_t D = shape.hidden, k = router.top_k;
  thread_local std::vector<uint8_t> normed, logits, scores;
  thread_local std::vector<float> weights, sum;
  thread_local std::vector<int64_t> chosen;
  normed.resize(D * size_of(type));
  logits.resize(router.experts * size_of(router.type));
  scores.resize(k * size_of(router.score_type));
  weights.resize(round_up(k, kGroup));
  chosen.resize(k);

  first.run(runner, level, x, cosine, sine, turned, cache, hidden, normed.data());
  router.run(runner, level, normed.data(), logits.data(), scores.data(), chosen.data());
  level.read({scores.data(), router.score_type, k}, weights.data());

  static const int64_t first_row = 0;
  std::vector<std::pair<int64_t, Work>> by_expert;  // whose order is that of the sum
  for (int64_t i = 0; i < k; ++i) {
    const Work work{experts[chosen[i]], 0, shape.neurons, &first_row, &weights[i], 1};
    if (weights[i] != 0) by_expert.emplace_back(chosen[i], work);
  }
  std::sort(by_expert.begin(), by_expert.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<Work> works;
  for (const auto& [expert, work] : by_expert) works.push_back(work);
  sum.assign(D, 0.0f);
  runner.run(level, shape, {normed.data(), type, D}, 1, works.data(), static_cast<int>(works.size()), sum.data());
  level.write(sum.data(), D, type, normed.data());
  add(runner, level, hidden, normed.data(), type, D, hidden);
  return static_cast<int64_t>(works.size());
}

int64_t DecoderLayers::run(Runner& runner, const Level& level, const void* x, const void* cosine, const void* sine,
                           int64_t turned, const CachePlace* caches, void* hidden) const {
  thread_local std::vector<uint8_t> other;  // a layer may not write where it reads
  other.resize(layers[0].shape.hidden * size_of(layers[0].first.attention.type));
  int64_t experts = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    void* out = (layers.size() - i) % 2 ? hidden : other.data();  // so that the last one ends in hidden
    experts += layers[i].run(runner, level, x, cosine, sine, turned, caches[i], out);
    x = out;
  }
  return experts;
}

}  // namespace moestro
