// Attention of few tokens: rotary embedding, and queries against keys and values of a cache.

namespace {

// Rotates the first `turned` elements of a head in place, the first half of them against the second. Rounds where
// the families' own code does: after each product and after the sum.
template <Type kType>
void rotate_of(float* head, const float* __restrict cosine, const float* __restrict sine, int64_t turned) {
  const int64_t half = turned / 2;
  float *__restrict low = head, *__restrict high = head + half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = low[i], b = high[i];
    low[i] = rounded(rounded(a * cosine[i], kType) + rounded(-b * sine[i], kType), kType);
    high[i] = rounded(rounded(b * cosine[half + i], kType) + rounded(a * sine[half + i], kType), kType);
  }
}

void rotate(float* head, const float* cosine, const float* sine, int64_t turned, Type type) {
  if (type == Type::kFp32) rotate_of<Type::kFp32>(head, cosine, sine, turned);
  else if (type == Type::kBf16) rotate_of<Type::kBf16>(head, cosine, sine, turned);
  else rotate_of<Type::kFp16>(head, cosine, sine, turned);
}

void read_first(const Input& x, float* to) { read_row(x, 0, nullptr, to); }
void write_plain(const float* from, int64_t count, Type type, void* to) { write_row(from, nullptr, count, type, to, 0); }

// All heads of a row of x, read and written in its type.
void rotate_row(const Input& x, void* out, int64_t head, const float* cosine, const float* sine, int64_t turned, float* row) {
  read_row(x, 0, nullptr, row);
  for (int64_t h = 0; h < x.width; h += head) rotate(row + h, cosine, sine, turned, x.type);
  write_row(row, nullptr, x.width, x.type, out, 0);
}

// Queries of a tile, and vectors beside each: as many sums as leave registers for what they are made of.
constexpr int kTileQueries = 6, kTileVectors = V::kRegisters >= 32 ? 4 : 2;
constexpr int64_t kTileKeys = kTileVectors * W;

// Memory that is asked for a line at a time, between what is computed: the loads that come later find it near.
struct Ahead {
  const uint8_t *at = nullptr, *end = nullptr;

  template <int Lines>
  void ask() {
    for (int i = 0; i < Lines && at < end; ++i, at += moestro::kLineBytes) {
#if defined(__GNUC__)
      __builtin_prefetch(at, 0, 2);
#endif
    }
  }
};
// In each step of a loop over a tile, so that as many bytes are asked for as the tile of that type has.
template <class Reader>
constexpr int lines_of_step() { return kTileKeys * Reader::kBytes > moestro::kLineBytes ? kTileKeys * Reader::kBytes / moestro::kLineBytes : 1; }

// out += p values for Q queries and N vectors of the columns, p [Q, p_apart], values [count, d].
template <int Q, int N, class Reader>
inline void weigh_tile(Reader read, const float* p, int64_t p_apart, const uint8_t* values, int64_t count, int64_t d, float* out, Ahead& ahead) {
  V acc[Q][N];
  for (int q = 0; q < Q; ++q)
    for (int n = 0; n < N; ++n) acc[q][n] = V::load(out + q * d + n * W);
  for (int64_t s = 0; s < count; ++s) {
    ahead.ask<lines_of_step<Reader>()>();
    V value[N];
    for (int n = 0; n < N; ++n) value[n] = read.load(values + s * d * read.kBytes, n * W);
    for (int q = 0; q < Q; ++q) {
      const V weight = V::set(p[q * p_apart + s]);
      for (int n = 0; n < N; ++n) acc[q][n] = fma(weight, value[n], acc[q][n]);
    }
  }
  for (int q = 0; q < Q; ++q)
    for (int n = 0; n < N; ++n) acc[q][n].store(out + q * d + n * W);
}

// p = exp(scores * scaling - their largest) in place, zeros up to a whole panel; returns the largest, fills the sum.
inline float soften(float* scores, int64_t count, float scaling, float* total) {
  const int64_t wide = moestro::round_up(count, kPanel);
  for (int64_t s = count; s < wide; ++s) scores[s] = scores[0];
  V most = V::load(scores) * V::set(scaling), finite = V::zero();
  for (int64_t s = 0; s < wide; s += W) {
    const V scaled = V::load(scores + s) * V::set(scaling);
    scaled.store(scores + s);
    most = vmax(most, scaled);
    finite = finite + scaled;
  }
  float lanes[W], largest = -INFINITY;
  most.store(lanes);
  for (float lane : lanes) largest = lane > largest ? lane : largest;
  if (fabsf(sum(finite)) < INFINITY) {
    for (int64_t s = 0; s < wide; s += W) vexp(V::load(scores + s) - V::set(largest)).store(scores + s);
  } else {  // NaN stays, which vexp would hide
    for (int64_t s = 0; s < wide; ++s) scores[s] = expf(scores[s] - largest);
  }
  for (int64_t s = count; s < wide; ++s) scores[s] = 0;
  V sums[VP];
  for (V& each : sums) each = V::zero();
  for (int64_t s = 0; s < wide; s += kPanel)
    for (int v = 0; v < VP; ++v) sums[v] = sums[v] + V::load(scores + s + v * W);
  for (int v = 1; v < VP; ++v) sums[0] = sums[0] + sums[v];
  *total = sum(sums[0]);
  return largest;
}

// Calls do_one(Q, q) for tiles of n queries from q on, nearly equal ones.
template <int Q, class Do>
inline void with_count(int64_t count, int64_t q, Do do_one) {
  if (count == Q) return do_one(std::integral_constant<int, Q>(), q);
  if constexpr (Q > 1) with_count<Q - 1>(count, q, do_one);
}
template <int Most, class Do>
inline void tile_queries(int64_t n, Do do_one) {
  int64_t left = (n + Most - 1) / Most;
  for (int64_t q = 0; q < n; --left) {
    const int64_t count = (n - q + left - 1) / left;
    with_count<Most>(count, q, do_one);
    q += count;
  }
}

// kTileKeys rows of d elements as float32 [d, kTileKeys].
template <class Reader>
inline void turn(Reader, const uint8_t* rows, int64_t d, float* to) {
  constexpr int kOfUnit = 4 / Reader::kBytes;  // elements in 32 bits
  const int64_t row = d * Reader::kBytes;
  for (int64_t s = 0; s < kTileKeys; s += W) {
    for (int64_t i = 0; i < d; i += 4 * kOfUnit) {
      I columns[4];
      load_columns(rows + s * row + i * Reader::kBytes, row, columns);
      for (int j = 0; j < 4; ++j) {
        float* at = to + (i + j * kOfUnit) * kTileKeys + s;
        Reader::first(columns[j]).store(at);
        if constexpr (kOfUnit == 2) Reader::second(columns[j]).store(at + kTileKeys);
      }
    }
  }
}

// The same for [count, d] of keys, with zeros behind the last of them; `room` is for kTileKeys of them.
template <class Reader>
inline void turn_keys(Reader read, const uint8_t* keys, int64_t count, int64_t d, float* room, float* to) {
  if (count >= kTileKeys) return turn(read, keys, d, to);
  uint8_t* whole = reinterpret_cast<uint8_t*>(room);
  memcpy(whole, keys, count * d * read.kBytes);
  memset(whole + count * d * read.kBytes, 0, (kTileKeys - count) * d * read.kBytes);
  turn(read, whole, d, to);
}

// scores[q, s] = queries[q] . keys[s], each in one sum in the order of d, for keys as `turn` leaves them.
template <int Q, int Lines>
inline void score_tile(const float* queries, const float* keys, int64_t d, float* scores, int64_t apart, Ahead& ahead) {
  V acc[Q][kTileVectors];
  for (auto& of_query : acc)
    for (V& a : of_query) a = V::zero();
  for (int64_t i = 0; i < d; ++i) {
    ahead.ask<Lines>();
    V key[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) key[v] = V::load(keys + i * kTileKeys + v * W);
    for (int q = 0; q < Q; ++q) {
      const V x = V::set(queries[q * d + i]);
      for (int v = 0; v < kTileVectors; ++v) acc[q][v] = fma(x, key[v], acc[q][v]);
    }
  }
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < kTileVectors; ++v) acc[q][v].store(scores + q * apart + v * W);
}

// Query heads of a key head up to which scores are computed as below, where turning keys costs more than it saves.
constexpr int64_t kRowHeads = V::kRegisters >= 32 ? 4 : 1;

// The same for keys [count, d] as they lie: each in sums of every 16th element, added in the end. `room` is for four keys.
template <class Reader>
inline void score_rows(Reader read, const moestro::Attend& a, const uint8_t* keys, int64_t count, float* room, float* scores,
                       int64_t apart, Ahead& ahead) {
  constexpr int Most = V::kRegisters >= 32 ? 4 : 2;
  const int64_t row = a.d * read.kBytes;
  for (int64_t s = 0; s < count; s += 4) {
    for (int64_t i = 0; i < 4 * row; i += moestro::kLineBytes) ahead.ask<1>();
    const uint8_t* rows = keys + s * row;
    if (count - s < 4) {
      uint8_t* whole = reinterpret_cast<uint8_t*>(room);
      memcpy(whole, rows, (count - s) * row);
      memset(whole + (count - s) * row, 0, (4 - count + s) * row);
      rows = whole;
    }
    tile_queries<Most>(a.n, [&](auto tile, int64_t q) {
      dot_tile<decltype(tile)::value, 4>(read, a.queries + q * a.d, a.d, rows, a.d, scores + q * apart + s, apart);
    });
  }
}

// out += p values for Q queries, p [Q, p_apart], values [count, d]; each in the order of the values.
template <int Q, class Reader>
inline void weigh(Reader read, const float* p, int64_t p_apart, const uint8_t* values, int64_t count, int64_t d, float* out, Ahead& ahead) {
  constexpr int N = Q <= 2 ? 2 * kTileVectors : kTileVectors;  // as many sums as hide the latency of each
  int64_t i = 0;
  for (; i + N * W <= d; i += N * W)
    weigh_tile<Q, N>(read, p, p_apart, values + i * read.kBytes, count, d, out + i, ahead);
  for (; i < d; i += W) weigh_tile<Q, 1>(read, p, p_apart, values + i * read.kBytes, count, d, out + i, ahead);
}

// The same for values [first, first + count) of those that each query sees, which is given nothing of the others.
template <int Q, class Reader>
inline void weigh_seen(Reader read, const moestro::Attend& a, int64_t q, int64_t apart, const uint8_t* values, int64_t first,
                       int64_t count, Ahead& ahead) {
  const auto of = [&](int i) { return a.seen[q + i] - first < count ? a.seen[q + i] - first : count; };
  int64_t all = count;
  for (int i = 0; i < Q; ++i) all = of(i) < all ? of(i) : all;
  all = all > 0 ? all : 0;
  const float* p = a.scores + q * apart + first;
  float* out = a.out + q * a.d;
  if (all > 0) weigh<Q>(read, p, apart, values, all, a.d, out, ahead);
  for (int i = 0; i < Q; ++i)
    if (of(i) > all) weigh<1>(read, p + i * apart + all, apart, values + all * a.d * read.kBytes, of(i) - all, a.d, out + i * a.d, ahead);
}

constexpr int64_t kNear = moestro::kNearTokens;
static_assert(kNear % kTileKeys == 0, "a tile of keys is part of what is near");

// Each number is summed in an order that depends neither on the other queries nor on how they are cut into tiles.
void attend(const moestro::Attend& a) {
  const int64_t wide = moestro::round_up(a.count, kNear), d = a.d;
  float *turned = a.near, *copied = turned + kNear * d;
  const bool by_rows = 0 < a.shared && a.shared <= kRowHeads;  // by the model alone: a query's result is the same beside others
  with_reader(a.type, [&](auto read) {
    const int64_t row = d * read.kBytes;
    // Those rows of keys or values from s on, or what comes behind the last.
    const auto ahead_of = [&](const uint8_t* rows, int64_t s, int64_t most, const uint8_t* behind, int64_t count) {
      const uint8_t* from = s < a.count ? rows + s * row : behind;
      const int64_t n = s < a.count ? (a.count - s < most ? a.count - s : most) : count;
      return from ? Ahead{from, from + n * row} : Ahead{};
    };
    for (int64_t s = 0; s < a.count; s += kTileKeys) {
      Ahead ahead = ahead_of(a.keys, s + kTileKeys, kTileKeys, a.values, a.count < kNear ? a.count : kNear);
      if (by_rows) {
        score_rows(read, a, a.keys + s * row, a.count - s < kTileKeys ? a.count - s : kTileKeys, copied, a.scores + s, wide, ahead);
        continue;
      }
      turn_keys(read, a.keys + s * row, a.count - s, d, copied, turned);
      tile_queries<kTileQueries>(a.n, [&](auto tile, int64_t q) {
        constexpr int Q = decltype(tile)::value;
        bool sees = false;
        for (int i = 0; i < Q; ++i) sees |= a.seen[q + i] > s;
        if (sees) score_tile<Q, lines_of_step<decltype(read)>()>(a.queries + q * d, turned, d, a.scores + q * wide + s, wide, ahead);
      });
    }
    for (int64_t q = 0; q < a.n; ++q) {
      a.most[q] = -INFINITY, a.total[q] = 0;
      if (a.seen[q] > 0) a.most[q] = soften(a.scores + q * wide, a.seen[q], a.scaling, a.total + q);
      for (int64_t i = 0; i < d; ++i) a.out[q * d + i] = 0;
    }
    const bool copies = a.type != Type::kFp32 && a.n > 2 * kTileQueries;  // converted once for all tiles of queries
    for (int64_t s = 0; s < a.count; s += kNear) {
      const int64_t count = a.count - s < kNear ? a.count - s : kNear;
      Ahead ahead = ahead_of(a.values, s + kNear, kNear, a.likely_next, kTileKeys);
      for (int64_t i = 0; copies && i < count * d; i += W) read.load(a.values + s * row, i).store(copied + i);
      tile_queries<kTileQueries>(a.n, [&](auto tile, int64_t q) {
        constexpr int Q = decltype(tile)::value;
        if (copies) weigh_seen<Q>(ReadFp32(), a, q, wide, reinterpret_cast<const uint8_t*>(copied), s, count, ahead);
        else weigh_seen<Q>(read, a, q, wide, a.values + s * row, s, count, ahead);
      });
    }
  });
}

}  // namespace
