// Attention of few tokens: rotary embedding, and queries against keys and values of a cache.

namespace {

// Rotates the first `turned` elements of a head in place, the first half of them against the second. Rounds where
// the families' own code does: after each product and after the sum.
void rotate(float* head, const float* cosine, const float* sine, int64_t turned, Type type) {
  const int64_t half = turned / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[half + i];
    head[i] = rounded(rounded(a * cosine[i], type) + rounded(-b * sine[i], type), type);
    head[half + i] = rounded(rounded(b * cosine[half + i], type) + rounded(a * sine[half + i], type), type);
  }
}

void read_first(const Input& x, float* to) { read_row(x, 0, nullptr, to); }
void write_plain(const float* from, int64_t count, Type type, void* to) { write_row(from, nullptr, count, type, to, 0); }

// All heads of a row of x, read and written in its type.
void rotate_row(const Input& x, void* out, int64_t head, const float* cosine, const float* sine, int64_t turned, float* row) {
  read_row(x, 0, nullptr, row);
  for (int64_t h = 0; h < x.width; h += head) rotate(row + h, cosine, sine, turned, x.type);
  write_row(row, nullptr, x.width, x.type, out, 0);
}

// out += p values for Q queries and N vectors of the columns, p [Q, p_apart], values [count, d].
template <int Q, int N, class Reader>
inline void weigh_tile(Reader read, const float* p, int64_t p_apart, const uint8_t* values, int64_t count, int64_t d, float* out) {
  V acc[Q][N];
  for (int q = 0; q < Q; ++q)
    for (int n = 0; n < N; ++n) acc[q][n] = V::load(out + q * d + n * W);
  for (int64_t s = 0; s < count; ++s) {
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

template <int Q, class Reader>
inline void weigh(Reader read, const float* p, int64_t p_apart, const uint8_t* values, int64_t count, int64_t d, float* out) {
  int64_t i = 0;
  for (; i + 4 * W <= d; i += 4 * W) weigh_tile<Q, 4>(read, p, p_apart, values + i * read.kBytes, count, d, out + i);
  for (; i < d; i += W) weigh_tile<Q, 1>(read, p, p_apart, values + i * read.kBytes, count, d, out + i);
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

constexpr int kAttendQueries = V::kRegisters >= 32 && VP == 1 ? 4 : V::kRegisters >= 16 ? 2 : 1;  // of a tile
constexpr int kAttendKeys = VP == 1 ? 4 : 2;
constexpr int64_t kNearTokens = 64;  // whose values stay in a core's first cache while all queries take them

// Each number is summed in an order that depends neither on the other queries nor on how they are cut into tiles.
void attend(const moestro::Attend& a) {
  const int64_t wide = moestro::round_up(a.count, kPanel), d = a.d;
  with_reader(a.type, [&](auto read) {
    const int64_t row = d * read.kBytes;
    const auto dots = [&](auto keys, int64_t s) {
      constexpr int S = decltype(keys)::value;
      int64_t q = 0;
      for (; q + kAttendQueries <= a.n; q += kAttendQueries)
        dot_tile<kAttendQueries, S>(read, a.queries + q * d, d, a.keys + s * row, d, a.scores + q * wide + s, wide);
      for (; q < a.n; ++q) dot_tile<1, S>(read, a.queries + q * d, d, a.keys + s * row, d, a.scores + q * wide + s, wide);
    };
    int64_t s = 0;
    for (; s + kAttendKeys <= a.count; s += kAttendKeys) dots(std::integral_constant<int, kAttendKeys>(), s);
    for (; s < a.count; ++s) dots(std::integral_constant<int, 1>(), s);
    for (int64_t q = 0; q < a.n; ++q) {
      a.most[q] = -INFINITY, a.total[q] = 0;
      if (a.seen[q] > 0) a.most[q] = soften(a.scores + q * wide, a.seen[q], a.scaling, a.total + q);
      for (int64_t i = 0; i < d; ++i) a.out[q * d + i] = 0;
    }
    for (int64_t near = 0; near < a.count; near += kNearTokens) {
      const uint8_t* values = a.values + near * row;
      for (int64_t q = 0; q < a.n;) {
        const int64_t left = a.seen[q] - near, count = left < kNearTokens ? left : kNearTokens;
        const float* p = a.scores + q * wide + near;
        bool alike = q + kAttendQueries <= a.n;  // a query is given nothing of tokens that it does not see
        for (int i = 1; alike && i < kAttendQueries; ++i) alike = a.seen[q + i] == a.seen[q];
        if (alike) weigh<kAttendQueries>(read, p, wide, values, count, d, a.out + q * d);
        else weigh<1>(read, p, wide, values, count, d, a.out + q * d);
        q += alike ? kAttendQueries : 1;
      }
    }
  });
}

}  // namespace
