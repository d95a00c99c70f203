// Whole decoder layers against their parts called one by one, which are tested by themselves; the router's choice and
// rows of a table against float64.
#include <algorithm>
#include <numeric>

#include "layer.h"
#include "test_help.h"

using namespace moestro;

namespace {

struct Weights {
  std::vector<uint8_t> packed;
  Linear linear;
  Weights(MatrixFormat format, int64_t R, int64_t K, Rng& rng) : packed(matrix_bytes(format, R, K)) {
    random_matrix(format, packed.data(), R, K, 0.1, rng);
    linear = {packed.data(), R, K, format};
  }
};

// A packed expert without biases: random matrices, as its shape lays them out.
std::vector<uint8_t> random_expert(const Shape& s, Rng& rng) {
  const int64_t blocks = s.blocks();
  std::vector<uint8_t> packed(blocks * block_bytes(s));
  uint8_t* at = packed.data();
  for (int64_t b = 0; b < blocks; ++b) {
    for (int i = 0; i < 2; ++i, at += matrix_bytes(s.up, s.block, s.hidden)) random_matrix(s.up, at, s.block, s.hidden, 0.1, rng);
    random_matrix(s.down, at, s.hidden, s.block, 0.1, rng);
    at += matrix_bytes(s.down, s.hidden, s.block);
  }
  return packed;
}

struct Sizes {
  int64_t D, head, heads, key_heads, experts, top_k, length, sequences, own;
};

void check_layers(Machine& machine, MatrixFormat format, Type type, const Sizes& z, Rng& rng) {
  const int64_t Q = z.heads * z.head, K = z.key_heads * z.head, apart = (z.length + 2) * z.head, between = z.key_heads * apart;
  const int64_t T = z.sequences * z.own;
  Weights q(format, Q, z.D, rng), k(format, K, z.D, rng), v(format, K, z.D, rng), o(format, z.D, Q, rng);
  Numbers before(Type::kFp32, z.D, rng), after(type, z.D, rng), gate(type, z.experts * z.D, rng, 0.2);
  DecoderLayer layer;
  Attention& attention = layer.first.attention;
  attention.q = q.linear, attention.k = k.linear, attention.v = v.linear;
  attention.head = z.head, attention.type = type, attention.scaling = 0.25f;
  layer.first.output = o.linear;
  layer.first.before = {before.bytes.data(), before.type, z.D, 0, 1e-5f};
  layer.first.after = {after.bytes.data(), after.type, z.D, 1, 1e-5f};
  layer.router = {gate.bytes.data(), type, z.experts, z.D, z.top_k, true, Type::kFp32};
  layer.shape.hidden = z.D, layer.shape.neurons = 100, layer.shape.gate = layer.shape.up = layer.shape.down = format, layer.shape.block = least_block(format);
  std::vector<std::vector<uint8_t>> experts;
  for (int64_t e = 0; e < z.experts; ++e) experts.push_back(random_expert(layer.shape, rng));
  for (const auto& expert : experts) layer.experts.push_back(expert.data());

  const Numbers x(type, T * z.D, rng), past(type, z.sequences * between, rng), cosine(type, T * z.head, rng), sine(type, T * z.head, rng);
  std::vector<Seen> seen;
  for (int64_t t = 0; t < T; ++t) seen.push_back({t / z.own, t / z.own, z.length - z.own + t % z.own + 1});
  const Step step{T, seen.data(), cosine.bytes.data(), sine.bytes.data(), z.head};
  int64_t experts_used = 0;
  const auto run = [&](Runner& runner, const Level& level, Numbers& out) {
    const DecoderLayers layers{{3, layer}};
    std::vector<Numbers> caches(6, past);
    std::vector<CachePlace> places;
    for (int i = 0; i < 6; i += 2) places.push_back({caches[i].bytes.data(), caches[i + 1].bytes.data(), z.sequences, z.length, apart, between});
    const Asked asked = layers.run(runner, level, x.bytes.data(), step, places.data(), out.bytes.data());
    if (asked.tokens != 3 * T * z.top_k || asked.experts != experts_used) out.set(0, NAN);
    for (const Numbers& cache : caches) out.bytes.insert(out.bytes.end(), cache.bytes.begin(), cache.bytes.end());
  };
  std::vector<double> want;
  const auto by_parts = [&](Runner& runner, const Level& level) {
    Numbers hidden = x, caches(type, 0);
    want.clear();
    experts_used = 0;
    for (int i = 0; i < 3; ++i) {
      Numbers normed(type, T * z.D), query(type, T * Q), heads(type, T * Q), added(type, T * z.D), keys = past, values = past;
      Numbers own[2] = {{type, T * K}, {type, T * K}};
      runner.rms_norm(level, hidden.bytes.data(), type, T, layer.first.before, normed.bytes.data());
      attention.project(runner, level, normed.bytes.data(), step, query.bytes.data(), own[0].bytes.data(), own[1].bytes.data());
      for (int64_t j = 0; j < T * K; ++j) {
        const Seen& one = seen[j / K];
        const int64_t place = one.sequence * between + j % K / z.head * apart + (one.end - 1) * z.head + j % z.head;
        keys.set(place, own[0].at(j));
        values.set(place, own[1].at(j));
      }
      const CachePlace cache{keys.bytes.data(), values.bytes.data(), z.sequences, z.length, apart, between};
      attention.attend(runner, level, query.bytes.data(), cache, step, heads.bytes.data());
      Linear output = o.linear;
      output.out = added.bytes.data();
      output.out_type = type;
      runner.run_linears(level, {heads.bytes.data(), type, Q}, T, &output, 1);
      for (int64_t d = 0; d < T * z.D; ++d) hidden.set(d, hidden.at(d) + added.at(d));
      runner.rms_norm(level, hidden.bytes.data(), type, T, layer.first.after, normed.bytes.data());
      Numbers logits(type, T * z.experts), scores(Type::kFp32, T * z.top_k), sum(Type::kFp32, T * z.D);
      std::vector<int64_t> chosen(T * z.top_k);
      layer.router.run(runner, level, normed.bytes.data(), T, logits.bytes.data(), scores.bytes.data(), chosen.data());
      std::vector<std::vector<int64_t>> rows(z.experts);
      std::vector<std::vector<float>> weights(z.experts);
      for (int64_t j = 0; j < T * z.top_k; ++j) {
        rows[chosen[j]].push_back(j / z.top_k);
        weights[chosen[j]].push_back(scores.floats()[j]);
      }
      std::vector<Work> works;
      for (int64_t e = 0; e < z.experts; ++e) {
        const int64_t n = rows[e].size();
        if (n > 0) works.push_back({layer.experts[e], 0, layer.shape.neurons, rows[e].data(), weights[e].data(), n});
      }
      experts_used += works.size();
      std::fill(sum.bytes.begin(), sum.bytes.end(), 0);
      runner.run(level, layer.shape, {normed.bytes.data(), type, z.D}, T, works.data(), static_cast<int>(works.size()), sum.floats());
      for (int64_t d = 0; d < T * z.D; ++d) hidden.set(d, hidden.at(d) + round_to(type, sum.at(d)));
      for (const Numbers* part : {&keys, &values}) caches.bytes.insert(caches.bytes.end(), part->bytes.begin(), part->bytes.end());
    }
    for (const Numbers* part : {&hidden, &caches})
      for (int64_t i = 0; i < part->size(); ++i) want.push_back(part->at(i));
  };
  machine.check(text("layers %s type=%d tokens=%ldx%ld D=%ld heads=%ld/%ld experts=%ld/%ld length=%ld", name_of(format).c_str(),
                     static_cast<int>(type), (long)z.sequences, (long)z.own, (long)z.D, (long)z.heads, (long)z.key_heads, (long)z.top_k, (long)z.experts,
                     (long)z.length),
                Numbers(type, T * z.D),
                [&](Runner& runner, const Level& level, Numbers& out) {
                  by_parts(runner, level);
                  run(runner, level, out);
                },
                [&](const Numbers& out) { return out.size() == static_cast<int64_t>(want.size()) ? relative_error(out, want) : INFINITY; },
                [](const Level&) { return 1e-12; });
}

void check_router(Machine& machine, Type type, int64_t E, int64_t D, int64_t top_k, bool normalized, Rng& rng) {
  constexpr int64_t T = 3;
  const Numbers x(type, T * D, rng), weight(type, E * D, rng, 0.3);
  const Router router{weight.bytes.data(), type, E, D, top_k, normalized, Type::kFp32};
  std::vector<double> want(T * E);
  for (int64_t e = 0; e < T * E; ++e)
    for (int64_t d = 0; d < D; ++d) want[e] += weight.at(e % E * D + d) * x.at(e / E * D + d);
  // Only the logits have rounding errors of their own: scores and choice are checked against those that came out.
  const auto run = [&](Runner& runner, const Level& level, Numbers& out) {
    Numbers logits(type, T * E), scores(Type::kFp32, T * top_k);
    std::vector<int64_t> chosen(T * top_k), order(E);
    router.run(runner, level, x.bytes.data(), T, logits.bytes.data(), scores.bytes.data(), chosen.data());
    bool right = true;
    for (int64_t t = 0; t < T; ++t) {
      const auto logit = [&](int64_t e) { return logits.at(t * E + e); };
      double total = 0, kept = 0;
      for (int64_t e = 0; e < E; ++e) total += std::exp(logit(e));
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return logit(a) > logit(b); });
      for (int64_t i = 0; i < top_k; ++i) kept += std::exp(logit(order[i])) / total;
      for (int64_t i = 0; i < top_k; ++i) {
        const double score = std::exp(logit(order[i])) / total / (normalized ? kept : 1);
        const bool is_chosen = logit(chosen[t * top_k + i]) == logit(order[i]);
        right = right && std::fabs(scores.at(t * top_k + i) - score) <= 1e-5 * score && is_chosen;
      }
    }
    for (int64_t e = 0; e < T * E; ++e) out.set(e, right ? logits.at(e) : NAN);
  };
  machine.check(text("router type=%d experts=%ld/%ld D=%ld normalized=%d", static_cast<int>(type), (long)top_k, (long)E, (long)D, normalized),
                Numbers(type, T * E), run, [&](const Numbers& out) { return relative_error(out, want); },
                [](const Level&) { return 2e-6; });
}

void check_look_up(Machine& machine, MatrixFormat format, Type type, int64_t R, int64_t K, int64_t n, Rng& rng) {
  std::vector<uint8_t> packed(matrix_bytes(format, R, K));
  const std::vector<double> w = random_matrix(format, packed.data(), R, K, 0.1, rng);
  std::vector<int64_t> ids(n);
  std::vector<double> want;
  for (int64_t& id : ids) {
    id = rng.below(R);
    want.insert(want.end(), w.begin() + id * K, w.begin() + (id + 1) * K);
  }
  machine.check(text("look up %s type=%d R=%ld K=%ld n=%ld", name_of(format).c_str(), static_cast<int>(type), (long)R, (long)K, (long)n),
                Numbers(type, n * K),
                [&](Runner& runner, const Level& level, Numbers& out) {
                  runner.look_up(level, {packed.data(), R, K, format, nullptr, out.bytes.data(), type}, ids.data(), n);
                },
                [&](const Numbers& out) { return relative_error(out, want); }, [](const Level&) { return 2e-7; });
}

constexpr Type kTypes[] = {Type::kFp32, Type::kFp16, Type::kBf16};

}  // namespace

void check_layers(Machine& machine, Rng& rng) {
  for (Type type : kTypes) {
    for (int f = 0; f < 5; ++f) {
      const MatrixFormat format = formats()[f].format;
      check_layers(machine, format, type, {70, 16, 4, 2, 5, 2, 9, 1, 1}, rng);
      check_layers(machine, format, type, {70, 16, 4, 2, 5, 2, 9, 1 + rng.below(4), 1 + rng.below(4)}, rng);
      check_look_up(machine, format, type, 50, 91, 7, rng);
      check_look_up(machine, format, type, 33, 1200, 60, rng);  // enough for the pool
    }
    check_layers(machine, kInt4, type, {128, 32, 4, 4, 70, 8, 400, 1, 1}, rng);
    check_layers(machine, kInt4, type, {128, 32, 4, 2, 70, 8, 600, 8, 2}, rng);  // cache and router, too
    for (bool normalized : {false, true}) {
      check_router(machine, type, 5, 33, 2, normalized, rng);
      check_router(machine, type, 64, 700, 8, normalized, rng);
      check_router(machine, type, 600, 70, 4, normalized, rng);
    }
  }
}
