// Activations as the products take them: packed once for all rows of weights that they meet.

namespace {

using moestro::ColumnTable;
using moestro::Type;

constexpr int kSixteens = kGroup / 16;

// What a token has for a chunk of 64 columns: floats; 16-bit integers; these as two planes of signed bytes,
// integer = 256 high + low, in the order of quads (codes.inl) or of columns; or, for matrix tiles (amx.inl), bf16 as they
// are, and floats as two planes of bf16.
enum class Packing : int { kFloats, kPairs, kQuadBytes, kPlainBytes, kBf16, kFloatPlanes };

// Tokens, packed [chunk][token]: a token's chunk lies together, and so do those of all tokens. Integers have a scale
// [chunk][token] and the sums of each 16 of them [chunk][token][4].
struct Tokens {
  int64_t count, columns;  // columns rounded up to chunks
  int64_t rows;            // with those that fill up the last of several matrix tiles
  Packing as;
  uint8_t* memory;
  float* scales;
  int32_t* sixteens;

  Tokens(int64_t n, int64_t K, Packing packing, bool tiled, float* at)
      : count(n), columns(moestro::round_up(K, kGroup)), rows(n), as(packing), memory(reinterpret_cast<uint8_t*>(at)),
        tiled_(tiled) {
    if (tiled) rows = (n + 15) / 16 * tile_rows();
    scales = at + rows * columns / 2;
    sixteens = reinterpret_cast<int32_t*>(scales + rows * chunks());
  }
  bool tiled() const { return tiled_; }
  int64_t chunks() const { return columns / kGroup; }
  int64_t tile_rows() const { return (count + (count + 15) / 16 - 1) / ((count + 15) / 16); }  // of matrix tiles
  int64_t unit_bytes() const { return as == Packing::kFloats || as == Packing::kFloatPlanes ? 4 * kGroup : 2 * kGroup; }
  uint8_t* unit(int64_t chunk, int64_t token) const { return memory + (chunk * rows + token) * unit_bytes(); }
  const float* floats(int64_t chunk, int64_t token) const { return reinterpret_cast<const float*>(unit(chunk, token)); }
  // The sum of a token's integers over the sixteenths [begin, end) of a chunk.
  int32_t sum(int64_t chunk, int64_t token, int begin, int end) const {
    const int32_t* of_token = sixteens + (chunk * rows + token) * kSixteens;
    int32_t total = 0;
    for (int i = begin; i < end; ++i) total += of_token[i];
    return total;
  }

 private:
  bool tiled_;
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
inline float whole_of(const float* x, int16_t* whole, int32_t* sixteens) {
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
#if defined(__AMX_TILE__)
void pack_bf16_planes(const float* x, int planes, uint8_t* to);
#else
inline void pack_bf16_planes(const float*, int, uint8_t*) {}
#endif

inline void pack_chunk(const Tokens& to, int64_t chunk, int64_t token, const float* x) {
  uint8_t* unit = to.unit(chunk, token);
  const int64_t at = chunk * to.rows + token;
  switch (to.as) {
    case Packing::kFloats: memcpy(unit, x, 4 * kGroup); return;
    case Packing::kBf16: return pack_bf16_planes(x, 1, unit);
    case Packing::kFloatPlanes: return pack_bf16_planes(x, 2, unit);
    case Packing::kPairs:
      to.scales[at] = whole_of(x, reinterpret_cast<int16_t*>(unit), to.sixteens + at * kSixteens);
      return;
    default: {
#if defined(MOESTRO_BYTE_DOTS) || defined(MOESTRO_BYTE_PAIRS)
      alignas(64) int16_t whole[kGroup];
      to.scales[at] = whole_of(x, whole, to.sixteens + at * kSixteens);
      to_byte_planes(whole, to.as == Packing::kQuadBytes, unit);
#endif
    }
  }
}

// Packs columns [begin, begin + count), both whole chunks, of all tokens; row(t) gives those of the t-th.
template <class Row>
inline void pack(const Tokens& to, int64_t begin, int64_t count, Row row) {
  for (int64_t t = 0; t < to.count; ++t) {
    const float* x = row(t);
    for (int64_t k = 0; k < count; k += kGroup) pack_chunk(to, (begin + k) / kGroup, t, x + k);
  }
  for (int64_t k = begin / kGroup; k < (begin + count) / kGroup && to.rows > to.count; ++k)
    memset(to.unit(k, to.count), 0, (to.rows - to.count) * to.unit_bytes());
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
