#include "attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace moestro {
namespace {

constexpr int64_t kPoolBytes = 1 << 17;      // of a cache that is worth waking other threads
constexpr int64_t kPoolRotated = 1 << 15;    // numbers to rotate, likewise
constexpr int64_t kPieceTokens = 512;        // of a cache, counted from the first that a token sees

const uint8_t* bytes(const void* p) { return static_cast<const uint8_t*>(p); }
uint8_t* bytes(void* p) { return static_cast<uint8_t*>(p); }

// Tokens of one sequence that see its cache from the same token on, and a piece of what they see.
struct Piece {
  int64_t first, count;  // tokens of the step
  int64_t begin, end;    // of the cache
  float* partial;        // of each key head: [queries, d] not yet divided, then the largest score of each, then the sum
};

}  // namespace

void Attention::project(Runner& runner, const Level& level, const void* x, const Step& step, void* q_out, void* k_out,
                        void* v_out) const {
  Linear linears[3] = {q, k, v};
  void* outs[3] = {q_out, k_out, v_out};
  for (int i = 0; i < 3; ++i) {
    linears[i].out = outs[i];
    linears[i].out_type = type;
  }
  const int64_t T = step.tokens, size = size_of(type), turned = step.turned, wide = round_up(turned, kGroup);
  runner.run_linears(level, {x, type, q.columns}, T, linears, 3);
  if (q_norm.weight) runner.rms_norm(level, q_out, type, T * (q.rows / q_norm.width), q_norm, q_out);
  if (k_norm.weight) runner.rms_norm(level, k_out, type, T * (k.rows / k_norm.width), k_norm, k_out);
  const auto rotate = [&](int t, float* memory) {
    float *cosine = memory, *sine = cosine + wide, *row = sine + wide;
    level.read({bytes(step.cosine) + t * turned * size, type, turned}, cosine);
    level.read({bytes(step.sine) + t * turned * size, type, turned}, sine);
    uint8_t *q_row = bytes(q_out) + t * q.rows * size, *k_row = bytes(k_out) + t * k.rows * size;
    level.rotate_row({q_row, type, q.rows}, q_row, head, cosine, sine, turned, row);
    level.rotate_row({k_row, type, k.rows}, k_row, head, cosine, sine, turned, row);
  };
  runner.each(static_cast<int>(T), 2 * wide + round_up(std::max(q.rows, k.rows), kGroup), T * q.rows >= kPoolRotated, rotate);
}

void Attention::attend(Runner& runner, const Level& level, const void* query, const CachePlace& cache, const Step& step,
                       void* out) const {
  const int64_t heads = q.rows / head, key_heads = k.rows / head, shared = heads / key_heads;
  const int64_t size = size_of(type), d = head;
  std::vector<Piece> pieces;
  int64_t floats = 0, most_queries = 0, seen_tokens = 0;
  for (int64_t first = 0, stop; first < step.tokens; first = stop) {
    const Seen& seen = step.seen[first];
    int64_t end = seen.end;
    for (stop = first + 1; stop < step.tokens; ++stop) {
      const Seen& other = step.seen[stop];
      if (other.sequence != seen.sequence || other.begin != seen.begin) break;
      end = std::max(end, other.end);
    }
    const int64_t queries = (stop - first) * shared;
    for (int64_t at = seen.begin; at < end; at += kPieceTokens) {
      pieces.push_back({first, stop - first, at, std::min(at + kPieceTokens, end), nullptr});
      floats += key_heads * queries * (d + 2);
    }
    most_queries = std::max(most_queries, queries);
    seen_tokens += end - seen.begin;
  }
  thread_local std::vector<float> partials;
  partials.resize(floats);
  floats = 0;
  for (Piece& piece : pieces) {
    piece.partial = partials.data() + floats;
    floats += key_heads * piece.count * shared * (d + 2);
  }
  const bool on_pool = k.rows * seen_tokens * size >= kPoolBytes;
  const int64_t scratch = most_queries * (d + kPieceTokens + 2) + 2 * kGroup;  // 64-bit counts take the room of two floats
  const auto do_piece = [&](int i, float* memory) {
    const Piece& piece = pieces[i / key_heads];
    const int64_t g = i % key_heads, n = piece.count * shared, sequence = step.seen[piece.first].sequence;
    int64_t* seen = reinterpret_cast<int64_t*>(memory);
    float *queries = memory + round_up(2 * n, kPanel), *scores = queries + n * d + kGroup;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t t = piece.first + j / shared, h = g * shared + j % shared;
      level.read({bytes(query) + (t * heads + h) * d * size, type, d}, queries + j * d);
      seen[j] = std::max<int64_t>(0, std::min(step.seen[t].end, piece.end) - piece.begin);
    }
    const int64_t place = (sequence * cache.between + g * cache.apart + piece.begin * d) * size;
    float* to = piece.partial + g * n * (d + 2);
    level.attend({queries, n, d, bytes(cache.keys) + place, bytes(cache.values) + place, type, piece.end - piece.begin, seen,
                  scaling, scores, to, to + n * d, to + n * (d + 1)});
  };
  runner.each(static_cast<int>(pieces.size() * key_heads), scratch, on_pool, do_piece);

  // Each query of a token: the sum of its pieces, each times exp(its largest score - the largest of all).
  const auto join = [&](int i, float* sum) {
    const int64_t t = i / heads, g = i % heads / shared, h = i % shared;
    float most = -INFINITY, total = 0;
    const auto each_piece = [&](auto do_one) {
      for (const Piece& piece : pieces) {
        if (t < piece.first || t >= piece.first + piece.count || step.seen[t].end <= piece.begin) continue;
        const int64_t n = piece.count * shared, j = (t - piece.first) * shared + h;
        const float* part = piece.partial + g * n * (d + 2);
        do_one(part + j * d, part[n * d + j], part[n * (d + 1) + j]);
      }
    };
    each_piece([&](const float*, float largest, float) { most = std::max(most, largest); });
    std::fill(sum, sum + d, 0.0f);
    each_piece([&](const float* part, float largest, float weight) {
      const float factor = most == largest ? 1.0f : std::exp(largest - most);
      total += factor * weight;
      level.axpy(factor, part, sum, d);
    });
    for (int64_t e = 0; e < d; ++e) sum[e] /= total;
    level.write(sum, d, type, bytes(out) + (t * heads + g * shared + h) * d * size);
  };
  runner.each(static_cast<int>(step.tokens * heads), d, on_pool && step.tokens > 1, join);
}

}  // namespace moestro
