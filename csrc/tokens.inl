// Activations as the products take them: packed once for all rows of weights that they meet.

namespace {

using moestro::ColumnTable;
using moestro::Type;

constexpr int kSixteens = kGroup / 16;

// What a token has for a chunk of 64 columns: floats; 16-bit integers; these as two planes of signed bytes,
// integer = 256 high + low, in the order of quads (codes.inl) or of columns; or, for matrix tiles (amx.inl), bf16 as they
// are, and floats as two planes of bf16.
enum class Form : int { kFloats, kPairs, kQuadBytes, kPlainBytes, kBf16, kFloatPlanes };

// And what integers bring along for codes: how many groups of a chunk have scales of their own, and what comes off a code.
struct Packing {
  Form form = Form::kFloats;
  int groups = 1;
  int32_t less = 0;
  bool tiled = false;  // for matrix tiles

  bool operator==(const Packing& o) const {
    return form == o.form && groups == o.groups && less == o.less && tiled == o.tiled;
  }
  bool is_whole() const { return form == Form::kPairs || form == Form::kQuadBytes || form == Form::kPlainBytes; }
  int64_t unit_bytes() const { return form == Form::kFloats || form == Form::kFloatPlanes ? 4 * kGroup : 2 * kGroup; }
};

// Tokens, packed [chunk][token]: a token's chunk lies together, and so do those of all tokens.
struct Tokens {
  int64_t count, columns;  // columns rounded up to chunks
  int64_t rows;            // with those that fill up
  Packing as;
  uint8_t* memory;
  float* scales;  // of integers [chunk][token]
  float* sums;    // of a group, times the scale [chunk][group][token]
  int32_t* offs;  // of a group, times `less` and negative [chunk][group][token]

  Tokens(int64_t n, int64_t K, Packing packing, float* at)
      : count(n), columns(moestro::round_up(K, kGroup)), rows(moestro::packed_rows(n)), as(packing),
        memory(reinterpret_cast<uint8_t*>(at)) {
    scales = at + rows * columns / 2;
    sums = scales + rows * chunks();
    offs = reinterpret_cast<int32_t*>(sums + rows * chunks() * as.groups);
  }
  int64_t chunks() const { return columns / kGroup; }
  int64_t tile_rows() const { return (count + (count + 15) / 16 - 1) / ((count + 15) / 16); }  // of matrix tiles
  int64_t tiled_rows() const { return (count + 15) / 16 * tile_rows(); }
  uint8_t* unit(int64_t chunk, int64_t token) const { return memory + (chunk * rows + token) * as.unit_bytes(); }
  const float* floats(int64_t chunk, int64_t token) const { return reinterpret_cast<const float*>(unit(chunk, token)); }
  int64_t group(int64_t chunk, int g, int64_t token) const { return (chunk * as.groups + g) * rows + token; }
};

// Calls do_tile(first token, tokens) for tiles of nearly equal size, `most` at most.
template <class Do>
inline void for_tiles(int64_t n, int64_t most, Do do_tile) {
  const int64_t tiles = (n + most - 1) / most;
  for (int64_t i = 0, t = 0; i < tiles; ++i) {
    const int64_t size = n / tiles + (i < n % tiles);
    do_tile(t, size);
    t += size;
  }
}

// A chunk of x as 16-bit integers, near 15 bits and a sign of its largest, and the sums of each 16 of them: returns their
// scale, which is NaN if there is one, or an infinity, among them, since integers and a maximum would hide it.
inline float whole_of(const float* x, int16_t* whole, int32_t (&sixteens)[kSixteens]) {
  V most = V::zero(), nothing = V::zero();
  for (int64_t k = 0; k < kGroup; k += W) {
    const V xv = V::load(x + k);
    most = vmax(most, vabs(xv));
    nothing = fma(xv, V::zero(), nothing);
  }
  const float scale = largest(most) / 32639.0f + sum(nothing);  // two signed bytes: 127 * 256 + 127
  const V inverse = V::set(scale > 1e-35f ? 1.0f / scale : 0.0f);
  for (int i = 0; i < kSixteens; ++i) {
    V total = V::zero();
    for (int k = 16 * i; k < 16 * i + 16; k += W) total = total + store_int16(V::load(x + k) * inverse, whole + k);
    const float found = sum(total);
    sixteens[i] = fabsf(found) < 1e6f ? static_cast<int32_t>(found) : 0;  // NaN is no integer
  }
  return scale;
}

// What the level has of matrix tiles.
#if defined(MOESTRO_TILES)
void pack_bf16_planes(const float* x, int planes, uint8_t* to);
#else
inline void pack_bf16_planes(const float*, int, uint8_t*) {}
#endif

inline void pack_chunk(const Tokens& to, int64_t chunk, int64_t token, const float* x) {
  uint8_t* unit = to.unit(chunk, token);
  if (to.as.form == Form::kFloats) return static_cast<void>(memcpy(unit, x, 4 * kGroup));
  if (!to.as.is_whole()) return pack_bf16_planes(x, to.as.form == Form::kBf16 ? 1 : 2, unit);
  alignas(64) int16_t whole[kGroup];
  int32_t sixteens[kSixteens];
  const bool pairs = to.as.form == Form::kPairs;
  const float scale = whole_of(x, pairs ? reinterpret_cast<int16_t*>(unit) : whole, sixteens);
#if defined(MOESTRO_BYTE_DOTS) || defined(MOESTRO_BYTE_PAIRS)
  if (!pairs) to_byte_planes(whole, to.as.form == Form::kQuadBytes, unit);
#endif
  to.scales[chunk * to.rows + token] = scale;
  for (int g = 0; g < to.as.groups; ++g) {
    int32_t total = 0;
    for (int i = g * kSixteens / to.as.groups; i < (g + 1) * kSixteens / to.as.groups; ++i) total += sixteens[i];
    to.sums[to.group(chunk, g, token)] = static_cast<float>(total) * scale;
    to.offs[to.group(chunk, g, token)] = -to.as.less * total;
  }
}

// Packs columns [begin, begin + count), both whole chunks, of all tokens; row(t) gives those of the t-th.
template <class Row>
inline void pack(const Tokens& to, int64_t begin, int64_t count, Row row) {
  for (int64_t t = 0; t < to.count; ++t) {
    const float* x = row(t);
    for (int64_t k = 0; k < count; k += kGroup) pack_chunk(to, (begin + k) / kGroup, t, x + k);
  }
  if (!to.as.tiled) return;
  for (int64_t k = begin / kGroup; k < (begin + count) / kGroup; ++k)  // the last tile is filled up
    memset(to.unit(k, to.count), 0, (to.tiled_rows() - to.count) * to.as.unit_bytes());
}

// Where some panels stand in a matrix whose scales belong to columns: its table, and the first panel and column.
struct Place {
  ColumnTable table;
  int64_t panel = 0, column = 0;
};

// Where a product's panels are read from and its results go: panels are `stride` bytes apart, and their results
// `apart` floats; the rows of out, one a token, are ld floats apart. Panels may be cut into blocks of columns.
struct Panels {
  const uint8_t* w;
  int64_t stride;
  float* out;
  int64_t apart, ld;
  bool add;  // to what is in out
  Place place = {};
  int64_t block_chunks = INT64_MAX, block_apart = 0;  // chunks of a block, and bytes from one block to the next

  // Panel p of the block that a chunk lies in, and the chunk's number within it.
  const uint8_t* panel_of(int64_t p, int64_t chunk) const { return w + chunk / block_chunks * block_apart + p * stride; }
  int64_t within(int64_t chunk) const { return chunk % block_chunks; }
  // The results of panel p and those behind it, of the token `first` and those behind it.
  Panels results(int64_t p, int64_t first, bool adds) const {
    Panels part = *this;
    part.out += first * ld + p * apart;
    part.add = adds;
    return part;
  }
};

// Sums go on from what is in out, or from zero: never added up apart, so that their bits do not depend on the cut.
template <int P, int N>
inline void begin_sums(const Panels& to, V (&acc)[P][N][VP]) {
  for (int p = 0; p < P; ++p)
    for (int t = 0; t < N; ++t)
      for (int v = 0; v < VP; ++v) acc[p][t][v] = to.add ? V::load(to.out + t * to.ld + p * to.apart + v * W) : V::zero();
}

template <int P, int N>
inline void store_sums(const Panels& to, const V (&acc)[P][N][VP]) {
  for (int p = 0; p < P; ++p)
    for (int t = 0; t < N; ++t)
      for (int v = 0; v < VP; ++v) acc[p][t][v].store(to.out + t * to.ld + p * to.apart + v * W);
}

// Calls multiply(constant, part) for P panels at a time, a quarter (of 4) of all apart, since memory is read faster in
// several streams than in one, and then for each that is left.
template <int P, class Do>
inline void in_streams(const Panels& all, int64_t panels, Do multiply) {
  const int64_t apart = panels / P;
  const auto part = [&](int64_t p, int64_t between) {
    return Panels{all.w + p * all.stride, all.stride * between, all.out + p * all.apart, all.apart * between, all.ld, all.add};
  };
  for (int64_t p = 0; p < apart; ++p) multiply(std::integral_constant<int, P>(), part(p, apart));
  for (int64_t p = apart * P; p < panels; ++p) multiply(std::integral_constant<int, 1>(), part(p, 1));
}

// How many panels, of 4, have sums for N tokens in so many registers.
template <int N>
constexpr int panels_in(int registers) {
  return 4 * N * VP <= registers ? 4 : 2 * N * VP <= registers ? 2 : 1;
}

// Calls do_with(constant N) for N == n, which is at most Most.
template <int Most, class Do>
inline void with_tokens(int64_t n, Do do_with) {
  if (n == Most) return do_with(std::integral_constant<int, Most>());
  if constexpr (Most > 1) with_tokens<Most - 1>(n, do_with);
}

}  // namespace
