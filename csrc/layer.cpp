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
constexpr int64_t kPoolAdded = 1 << 15;          // numbers to add, likewise

// The tokens' own keys or values [T, heads], each to its place in the cache.
void append(const uint8_t* own, int64_t heads, int64_t head_bytes, uint8_t* to, const CachePlace& cache, const Step& step, int64_t size) {
  for (int64_t t = 0; t < step.tokens; ++t) {
    for (int64_t h = 0; h < heads; ++h, own += head_bytes) {
      const int64_t sequence = (step.seen[t].sequence * cache.between + h * cache.apart) * size;
      memcpy(to + sequence + (step.seen[t].end - 1) * head_bytes, own, head_bytes);
    }
  }
}

// out = a + b, all [T, D] of one type.
void add(Runner& runner, const Level& level, const void* a, const void* b, Type type, int64_t T, int64_t D, void* out) {
  const int64_t row = D * size_of(type);
  runner.each(static_cast<int>(T), 2 * round_up(D, kGroup), T * D >= kPoolAdded, [&](int t, float* sum) {
    float* other = sum + round_up(D, kGroup);
    level.read({static_cast<const uint8_t*>(a) + t * row, type, D}, sum);
    level.read({static_cast<const uint8_t*>(b) + t * row, type, D}, other);
    level.axpy(1.0f, other, sum, D);
    level.write(sum, D, type, static_cast<uint8_t*>(out) + t * row);
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

void FirstHalf::run(Runner& runner, const Level& level, const void* x, const Step& step, const CachePlace& cache,
                    void* hidden, void* normed) const {
  const Type type = attention.type;
  const int64_t size = size_of(type), T = step.tokens, D = attention.q.columns, Q = attention.q.rows, K = attention.k.rows;
  thread_local std::vector<uint8_t> memory;  // kept from call to call; several threads may generate
  memory.resize(2 * T * (Q + K) * size);
  uint8_t *q = memory.data(), *k = q + T * Q * size, *v = k + T * K * size, *heads = v + T * K * size;

  runner.rms_norm(level, x, type, T, before, normed);
  attention.project(runner, level, normed, step, q, k, v);
  const int64_t head_bytes = attention.head * size, key_heads = K / attention.head;
  append(k, key_heads, head_bytes, static_cast<uint8_t*>(cache.keys), cache, step, size);
  append(v, key_heads, head_bytes, static_cast<uint8_t*>(cache.values), cache, step, size);
  attention.attend(runner, level, q, cache, step, heads);
  Linear linear = output;
  linear.out = hidden;
  linear.out_type = type;
  runner.run_linears(level, {heads, type, Q}, T, &linear, 1);
  add(runner, level, x, hidden, type, T, D, hidden);
  runner.rms_norm(level, hidden, type, T, after, normed);
}

void Router::run(Runner& runner, const Level& level, const void* x, int64_t tokens, void* logits, void* scores,
                 int64_t* chosen) const {
  const int64_t D = round_up(hidden, kGroup), E = round_up(experts, kGroup), size = size_of(type);
  thread_local std::vector<float> memory;
  memory.resize(tokens * D + tokens * E + E);
  float *from = memory.data(), *all = from + tokens * D, *rounded = all + tokens * E;
  for (int64_t t = 0; t < tokens; ++t) level.read({static_cast<const uint8_t*>(x) + t * hidden * size, type, hidden}, from + t * D);
  const int64_t row_bytes = hidden * size, items = (experts + kRouterRows - 1) / kRouterRows;
  runner.each(static_cast<int>(items), 0, experts * row_bytes >= kRouterPoolBytes, [&](int i, float*) {
    const int64_t begin = i * kRouterRows, count = std::min(kRouterRows, experts - begin);
    const uint8_t* rows = static_cast<const uint8_t*>(weight) + begin * row_bytes;
    for (int64_t t = 0; t < tokens; ++t) level.dot_rows(from + t * D, rows, type, count, hidden, all + t * E + begin);
  });
  for (int64_t t = 0; t < tokens; ++t) {
    float* p = all + t * E;
    uint8_t* own_logits = static_cast<uint8_t*>(logits) + t * experts * size;
    level.write(p, experts, type, own_logits);
    level.read({own_logits, type, experts}, rounded);  // the softmax is of what the caller sees
    choose(rounded, p, chosen + t * top_k);
    level.write(p, top_k, score_type, static_cast<uint8_t*>(scores) + t * top_k * size_of(score_type));
  }
}

void Router::choose(float* logits, float* scores, int64_t* chosen) const {
  const float most = *std::max_element(logits, logits + experts);
  float total = 0;
  for (int64_t e = 0; e < experts; ++e) total += logits[e] = expf(logits[e] - most);
  thread_local std::vector<std::pair<float, int64_t>> queue;
  queue.clear();
  for (int64_t e = 0; e < experts; ++e) queue.emplace_back(logits[e] / total, e);
  best(queue, top_k);
  float sum = 0;
  for (int64_t i = 0; i < top_k; ++i) sum += queue[i].first;
  for (int64_t i = 0; i < top_k; ++i) {
    scores[i] = normalized ? queue[i].first / sum : queue[i].first;
    chosen[i] = queue[i].second;
  }
}

Asked DecoderLayer::run(Runner& runner, const Level& level, const void* x, const Step& step, const CachePlace& cache,
                        void* hidden) const {
  const Type type = first.attention.type;
  const int64_t T = step.tokens, D = shape.hidden, k = router.top_k, n = T * k, score_size = size_of(router.score_type);
  thread_local std::vector<uint8_t> normed, logits, scores;
  thread_local std::vector<float> all_weights, weights, sum;
  thread_local std::vector<int64_t> chosen, rows;
  normed.resize(T * D * size_of(type));
  logits.resize(T * router.experts * size_of(router.type));
  scores.resize(n * score_size);
  all_weights.resize(n + kGroup);
  chosen.resize(n);
  weights.resize(n);
  rows.resize(n);

  first.run(runner, level, x, step, cache, hidden, normed.data());
  router.run(runner, level, normed.data(), T, logits.data(), scores.data(), chosen.data());
  for (int64_t t = 0; t < T; ++t)
    level.read({scores.data() + t * k * score_size, router.score_type, k}, all_weights.data() + t * k);

  // Experts by number, each with its tokens in order: so each token's sum has an order of its own.
  std::vector<int64_t> picks;
  for (int64_t i = 0; i < n; ++i)
    if (all_weights[i] != 0) picks.push_back(i);
  std::stable_sort(picks.begin(), picks.end(), [&](int64_t a, int64_t b) { return chosen[a] < chosen[b]; });
  std::vector<Work> works;
  for (size_t i = 0; i < picks.size(); ++i) {
    rows[i] = picks[i] / k, weights[i] = all_weights[picks[i]];
    if (i == 0 || chosen[picks[i]] != chosen[picks[i - 1]])
      works.push_back({experts[chosen[picks[i]]], 0, shape.neurons, &rows[i], &weights[i], 0});
    ++works.back().tokens;
  }
  sum.assign(T * D, 0.0f);
  runner.run(level, shape, {normed.data(), type, D}, T, works.data(), static_cast<int>(works.size()), sum.data());
  for (int64_t t = 0; t < T; ++t) level.write(sum.data() + t * D, D, type, normed.data() + t * D * size_of(type));
  add(runner, level, hidden, normed.data(), type, T, D, hidden);
  return {static_cast<int64_t>(works.size()), static_cast<int64_t>(picks.size())};
}

Asked DecoderLayers::run(Runner& runner, const Level& level, const void* x, const Step& step, const CachePlace* caches,
                         void* hidden) const {
  thread_local std::vector<uint8_t> other;  // a layer may not write where it reads
  other.resize(step.tokens * layers[0].shape.hidden * size_of(layers[0].first.attention.type));
  Asked asked;
  for (size_t i = 0; i < layers.size(); ++i) {
    void* out = (layers.size() - i) % 2 ? hidden : other.data();  // so that the last one ends in hidden
    const Asked more = layers[i].run(runner, level, x, step, caches[i], out);
    asked = {asked.experts + more.experts, asked.tokens + more.tokens};
    x = out;
  }
  return asked;
}

}  // namespace moestro
