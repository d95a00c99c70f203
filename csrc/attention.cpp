#include "attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace moestro {
namespace {

constexpr int64_t kPoolBytes = 1 << 17;      // of a cache that is worth waking other threads
constexpr int64_t kPoolRotated = 1 << 15;    // numbers to rotate, likewise
constexpr int64_t kPieceTokens = 512;        // of a cache, counted from the first that a token sees
constexpr int64_t kItemQueries = 96;         // that go through a cache together, at least one token's
constexpr int64_t kMostPartials = 1 << 24;   // floats that pieces may leave until they are joined

const uint8_t* bytes(const void* p) { return static_cast<const uint8_t*>(p); }
uint8_t* bytes(void* p) { return static_cast<uint8_t*>(p); }

// Tokens of one sequence that see its cache from the same token on, up to `end` at most.
struct Group {
  int64_t first, count;  // tokens of the step
  int64_t begin, end;    // of the cache
};

// Consecutive tokens that belong together, at most so many in a group.
std::vector<Group> groups_of(const Step& step, int64_t most) {
  std::vector<Group> groups;
  for (int64_t t = 0; t < step.tokens; ++t) {
    const Seen& seen = step.seen[t];
    const Seen* before = groups.empty() ? nullptr : &step.seen[groups.back().first];
    if (before && groups.back().count < most && before->sequence == seen.sequence && before->begin == seen.begin) {
      ++groups.back().count;
      groups.back().end = std::max(groups.back().end, seen.end);
    } else {
      groups.push_back({t, 1, seen.begin, seen.end});
    }
  }
  return groups;
}

// What some queries have seen so far: [n, d] sums of values times exp(score - most), the largest score and the sum of the
// weights of each.
struct Sums {
  float *out, *most, *total;

  static int64_t floats(int64_t n, int64_t d) { return n * d + 2 * round_up(n, kPanel); }  // whole cache lines
  Sums(float* memory, int64_t n, int64_t d) : out(memory), most(memory + n * d), total(most + round_up(n, kPanel)) {}
};

// Adds a piece of the cache, part j of `part`, to a query's sums, number i of `to`. A query that has seen none has a sum of
// weights of 0.
void fold(const Sums& part, int64_t j, int64_t d, const Sums& to, int64_t i) {
  const float weight = part.total[j], before = to.total[i];
  if (weight == 0) return;
  const float most = before == 0 ? part.most[j] : std::max(to.most[i], part.most[j]);
  const float mine = part.most[j] == most ? 1.0f : std::exp(part.most[j] - most);
  const float theirs = before == 0 ? 0.0f : to.most[i] == most ? 1.0f : std::exp(to.most[i] - most);
  const float* from = part.out + j * d;
  float* sum = to.out + i * d;
  if (before == 0) {
    for (int64_t e = 0; e < d; ++e) sum[e] = mine * from[e];
  } else {
    for (int64_t e = 0; e < d; ++e) sum[e] = theirs * sum[e] + mine * from[e];
  }
  to.most[i] = most;
  to.total[i] = before == 0 ? mine * weight : theirs * before + mine * weight;
}

// One attend of a step: the queries of a group against pieces of what a key head has for them.
struct Attending {
  const Attention& attention;
  const Level& level;
  const uint8_t* query;
  const CachePlace& cache;
  const Step& step;
  uint8_t* out;

  const int64_t d = attention.head, size = size_of(attention.type), heads = attention.q.rows / d;
  const int64_t key_heads = attention.k.rows / d, shared = heads / key_heads;

  // Of `read` for n queries.
  int64_t read_floats(int64_t n) const { return n * d + kGroup; }

  // The queries of a group that share key head g, [n, d].
  void read(const Group& group, int64_t g, float* queries) const {
    for (int64_t j = 0; j < group.count * shared; ++j) {
      const int64_t t = group.first + j / shared, h = g * shared + j % shared;
      level.read({query + (t * heads + h) * d * size, attention.type, d}, queries + j * d);
    }
  }

  // Of `meet` for n queries. 64-bit counts take the room of two floats.
  int64_t meet_floats(int64_t n) const { return round_up(2 * n, kPanel) + n * kPieceTokens + 2 * kNearTokens * d; }

  // Where key head g's keys of a group's sequence lie, from that token on.
  int64_t place(const Group& group, int64_t g, int64_t begin) const {
    return (step.seen[group.first].sequence * cache.between + g * cache.apart + begin * d) * size;
  }

  // What they find in the tokens [begin, end) of the cache. next: keys that this thread will probably read then.
  void meet(const Group& group, int64_t g, int64_t begin, int64_t end, const float* queries, float* memory, const uint8_t* next,
            const Sums& part) const {
    const int64_t n = group.count * shared;
    int64_t* seen = reinterpret_cast<int64_t*>(memory);
    float *scores = memory + round_up(2 * n, kPanel), *near = scores + n * kPieceTokens;
    for (int64_t j = 0; j < n; ++j) seen[j] = std::max<int64_t>(0, std::min(step.seen[group.first + j / shared].end, end) - begin);
    const int64_t at = place(group, g, begin);
    level.attend({queries, n, d, bytes(cache.keys) + at, bytes(cache.values) + at, attention.type, end - begin, seen,
                  attention.scaling, scores, near, next, step.tokens <= kAloneTokens ? shared : 0, part.out, part.most, part.total});
  }

  // The result of token t's head h; zeros where it saw nothing.
  void finish(const Sums& sums, int64_t i, int64_t t, int64_t h) const {
    float* sum = sums.out + i * d;
    for (int64_t e = 0; e < d; ++e) sum[e] = sums.total[i] == 0 ? 0 : sum[e] / sums.total[i];
    level.write(sum, d, attention.type, out + (t * heads + h) * d * size);
  }
};

// Each item takes a few tokens through all that they see: what is between costs no memory.
void attend_by_tiles(Runner& runner, const Attending& all, const std::vector<Group>& tiles, bool on_pool) {
  int64_t n = 0;
  for (const Group& tile : tiles) n = std::max(n, tile.count * all.shared);
  const int64_t d = all.d, floats = all.read_floats(n) + all.meet_floats(n) + 2 * Sums::floats(n, d);
  const int items = static_cast<int>(tiles.size() * all.key_heads);
  runner.each(items, floats, on_pool, [&](int i, float* memory) {
    // The last tokens of a prompt see most: they go first, so that threads end together.
    const Group& tile = tiles[tiles.size() - 1 - i / all.key_heads];
    const int64_t g = i % all.key_heads, own = tile.count * all.shared;
    float *queries = memory, *scratch = queries + all.read_floats(n), *sums = scratch + all.meet_floats(n);
    const Sums part(sums, own, d), sum(sums + Sums::floats(n, d), own, d);
    all.read(tile, g, queries);
    std::fill(sum.total, sum.total + own, 0.0f);
    for (int64_t at = tile.begin; at < tile.end; at += kPieceTokens) {
      const int64_t end = std::min(at + kPieceTokens, tile.end);
      all.meet(tile, g, at, end, queries, scratch, end < tile.end ? bytes(all.cache.keys) + all.place(tile, g, end) : nullptr, part);
      for (int64_t j = 0; j < own; ++j) fold(part, j, d, sum, j);
    }
    for (int64_t j = 0; j < own; ++j) all.finish(sum, j, tile.first + j / all.shared, g * all.shared + j % all.shared);
  });
}

// Each item takes a group's tokens through one piece, so that few tokens and a long cache are work for many threads.
void attend_by_pieces(Runner& runner, const Attending& all, const std::vector<Group>& groups, int64_t floats, bool on_pool) {
  struct Piece {
    const Group* group;
    int64_t begin, end;
    float* partial;  // the sums of each key head
  };
  thread_local std::vector<float> partials;
  partials.resize(floats + kPanel);
  std::vector<Piece> pieces;
  float* next = reinterpret_cast<float*>(round_up(reinterpret_cast<intptr_t>(partials.data()), kLineBytes));
  int64_t most = 0;
  for (const Group& group : groups) {
    for (int64_t at = group.begin; at < group.end; at += kPieceTokens) {
      pieces.push_back({&group, at, std::min(at + kPieceTokens, group.end), next});
      next += all.key_heads * Sums::floats(group.count * all.shared, all.d);
    }
    most = std::max(most, group.count * all.shared);
  }
  const int64_t key_heads = all.key_heads, shared = all.shared, d = all.d;
  const auto sums_of = [&](const Piece& piece, int64_t g) {
    const int64_t n = piece.group->count * shared;
    return Sums(piece.partial + g * Sums::floats(n, d), n, d);
  };
  const auto meet = [&](int i, float* memory) {
    const Piece& piece = pieces[i / key_heads];
    float* queries = memory + all.meet_floats(most);
    all.read(*piece.group, i % key_heads, queries);
    const int64_t likely = i + runner.threads();  // which item
    const uint8_t* ahead = nullptr;
    if (likely < static_cast<int64_t>(pieces.size()) * key_heads) {
      const Piece& other = pieces[likely / key_heads];
      ahead = bytes(all.cache.keys) + all.place(*other.group, likely % key_heads, other.begin);
    }
    all.meet(*piece.group, i % key_heads, piece.begin, piece.end, queries, memory, ahead, sums_of(piece, i % key_heads));
  };
  runner.each(static_cast<int>(pieces.size() * key_heads), all.meet_floats(most) + all.read_floats(most), on_pool, meet);

  const auto join = [&](int i, float* memory) {
    const int64_t t = i / all.heads, h = i % all.heads, g = h / shared;
    const Sums sum(memory, 1, d);
    sum.total[0] = 0;
    for (const Piece& piece : pieces) {
      const int64_t own = t - piece.group->first;
      if (own < 0 || own >= piece.group->count) continue;
      fold(sums_of(piece, g), own * shared + h % shared, d, sum, 0);
    }
    all.finish(sum, 0, t, h);
  };
  runner.each(static_cast<int>(all.step.tokens * all.heads), Sums::floats(1, d), on_pool && all.step.tokens > 1, join);
}

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
  const Attending all{*this, level, bytes(query), cache, step, bytes(out)};
  const int64_t shared = all.shared, d = head;
  const auto tiles = groups_of(step, std::max<int64_t>(1, kItemQueries / shared));
  const auto groups = groups_of(step, step.tokens);
  int64_t seen = 0, partials = 0;
  for (const Group& group : groups) {
    const int64_t pieces = (group.end - group.begin + kPieceTokens - 1) / kPieceTokens;
    seen += group.end - group.begin;
    partials += pieces * all.key_heads * Sums::floats(group.count * shared, d);
  }
  const bool on_pool = k.rows * seen * size_of(type) >= kPoolBytes;
  // Either way pieces are the same and are added in the same order, so results are too.
  const bool enough = static_cast<int64_t>(tiles.size()) * all.key_heads >= 4 * runner.threads();
  if (enough || partials > kMostPartials) attend_by_tiles(runner, all, tiles, on_pool);
  else attend_by_pieces(runner, all, groups, partials, on_pool);
}

}  // namespace moestro
