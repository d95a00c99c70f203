// Products by AMX tiles, of 16 rows of 64 bytes each: included by level.inl where the compiler's flags have them.
//
// Float weights (bf16) lie packed as tiles are wanted: 32 columns of a panel are one. An activation is two bf16
// planes, x = high + low, which keep 16 of its 24 bits, or one where it is bf16 already. The operands of codes
// (coded.inl) are tiles as they are, a chunk each; they meet the two planes of bytes, so that sums within a group are
// exact, as without tiles.
//
// Tokens are taken in tiles of equally many rows, the last one filled up with zeros. Results have room for these rows.

#include <atomic>

namespace {

// Tiles 0 to 3 hold sums, 4 and 5 tokens, 6 and 7 weights. A thread has no tiles configured outside of a product: it
// would pay for saving them.
class TileRows {
 public:
  // rows: of tokens. bytes: of a row of tokens, four of which meet a row of weights.
  TileRows(int64_t rows, int bytes) {
    Config config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? bytes : 64);
      config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : bytes / 4);
    }
    // GCC takes the instruction to read 8 of the 64 bytes, and drops the stores of the others without this.
    asm volatile("" : "+m"(config));
    _tile_loadconfig(&config);
  }
  ~TileRows() { _tile_release(); }
  TileRows(const TileRows&) = delete;
  TileRows& operator=(const TileRows&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
};

// GCC's tile loads do not say that they read memory: keeps stores that come before them from moving behind.
inline void before_tile_loads() { std::atomic_signal_fence(std::memory_order_seq_cst); }

void pack_bf16_planes(const float* x, int planes, uint8_t* to) {
  for (int64_t k = 0; k < kGroup; k += 32, to += 64) {
    const __m512 a = _mm512_loadu_ps(x + k), b = _mm512_loadu_ps(x + k + 16);
    const __m512i high = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    const auto float_of = [](__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); };
    const auto rest = [](__m512 of, __m512 less) {  // an infinity has none
      return _mm512_maskz_sub_ps(_knot_mask16(_mm512_fpclass_ps_mask(less, 0x08 | 0x10)), of, less);
    };
    _mm512_storeu_si512(to, high);
    if (planes == 1) continue;
    const __m512 a_low = rest(a, float_of(_mm512_castsi512_si256(high)));
    const __m512 b_low = rest(b, float_of(_mm512_extracti64x4_epi64(high, 1)));
    _mm512_storeu_si512(to + 2 * kGroup, (__m512i)_mm512_cvtne2ps_pbh(b_low, a_low));
  }
}

// Chunks of columns [begin, end) of some panels of bf16, and the results of one or two tiles of tokens.
struct Strip {
  Panels to;
  int64_t begin, end;
  int64_t pass, passes;  // over the same weights: each asks for its part of the chunks behind these
};

constexpr int64_t kTile = 1024, kTwoTiles = 2 * kTile;  // bytes: a panel's chunk of bf16 is two

inline const uint8_t* tiles_at(const Panels& to, int64_t chunk) { return to.panel_of(0, chunk) + to.within(chunk) * kTwoTiles; }

// Asks for this pass's part of some bytes.
inline void ask_ahead(const Strip& s, const uint8_t* at, int64_t bytes) {
  for (int64_t i = s.pass * 64; i < bytes; i += s.passes * 64) _mm_prefetch(at + i, _MM_HINT_T1);
}

// T tiles of tokens in L planes, from `first` on, times P panels of bf16.
template <int L, int T, int P>
inline void multiply_planes(const Strip& s, const Tokens& x, int64_t first) {
  const int64_t rows = x.tile_rows();
  float *out = s.to.out, *below = out + rows * s.to.ld;
  const int64_t ld = s.to.ld * 4;
  if (s.to.add) {
    _tile_loadd(0, out, ld);
    if constexpr (P > 1) _tile_loadd(1, out + s.to.apart, ld);
    if constexpr (T > 1) _tile_loadd(2, below, ld);
    if constexpr (T > 1 && P > 1) _tile_loadd(3, below + s.to.apart, ld);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t g = s.begin; g < s.end; ++g) {
    const uint8_t *w = tiles_at(s.to, g), *later = tiles_at(s.to, g + s.end - s.begin);
    for (int step = 0; step < 2; ++step, w += kTile, later += kTile) {
      _tile_loadd(6, w, 64);
      if constexpr (P > 1) _tile_loadd(7, w + s.to.stride, 64);
      for (int i = 0; i < L; ++i) {
        const uint8_t* at = x.unit(g, first) + i * 2 * kGroup + step * 64;
        _tile_loadd(4, at, L * 2 * kGroup);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (P > 1) _tile_dpbf16ps(1, 4, 7);
        if constexpr (T > 1) _tile_loadd(5, at + rows * L * 2 * kGroup, L * 2 * kGroup);
        if constexpr (T > 1) _tile_dpbf16ps(2, 5, 6);
        if constexpr (T > 1 && P > 1) _tile_dpbf16ps(3, 5, 7);
      }
      for (int p = 0; p < P; ++p) ask_ahead(s, later + p * s.to.stride, kTile);
    }
  }
  _tile_stored(0, out, ld);
  if constexpr (P > 1) _tile_stored(1, out + s.to.apart, ld);
  if constexpr (T > 1) _tile_stored(2, below, ld);
  if constexpr (T > 1 && P > 1) _tile_stored(3, below + s.to.apart, ld);
}

template <int L>
inline void multiply_some(const Strip& s, bool two_tiles, bool two_panels, const Tokens& x, int64_t first) {
  if (two_tiles) two_panels ? multiply_planes<L, 2, 2>(s, x, first) : multiply_planes<L, 2, 1>(s, x, first);
  else two_panels ? multiply_planes<L, 1, 2>(s, x, first) : multiply_planes<L, 1, 1>(s, x, first);
}

// Some chunks of columns of a few panels times all tokens.
inline void strip_product(Strip s, int64_t panels, const Tokens& x) {
  const int64_t rows = x.tile_rows();
  const Panels to = s.to;
  s.passes = (x.tiled_rows() / rows + 1) / 2;
  for (int64_t first = 0; first < x.count; first += 2 * rows) {
    s.pass = first / (2 * rows);
    const bool two_tiles = first + rows < x.count;
    for (int64_t p = 0; p < panels; p += 2) {
      s.to = to.results(p, first, to.add);
      s.to.w = to.w + p * to.stride;
      if (x.as.form == Form::kBf16) multiply_some<1>(s, two_tiles, p + 1 < panels, x, first);
      else multiply_some<2>(s, two_tiles, p + 1 < panels, x, first);
    }
  }
}

// out[t, r] = (or +=) a packed matrix of bf16 times tokens in tiles.
template <class F>
inline void tile_product(const Panels& all, int64_t panels, int64_t K, const Tokens& x, float* scratch) {
  constexpr int64_t kHeight = 8, kChunks = 4;  // of a strip
  const TileRows configured(x.tile_rows(), 64);
  uint8_t* memory = reinterpret_cast<uint8_t*>(scratch);
  const int64_t chunks = K / kGroup;
  before_tile_loads();
  for (int64_t p = 0; p < panels; p += kHeight) {
    const int64_t height = panels - p < kHeight ? panels - p : kHeight;
    Strip s{all.results(p, 0, all.add), 0, 0, 0, 1};
    s.to.w += p * all.stride;
    for (int64_t g = 0; g < chunks; g += kChunks, s.to.add = true) {
      s.begin = g;
      s.end = chunks - g < kChunks ? chunks : g + kChunks;
      strip_product(s, height, x);
    }
    if (K == chunks * kGroup) continue;
    const int64_t bytes = moestro::round_up(K - chunks * kGroup, 2) * kPanel * 2;  // of the last columns, to be filled up
    memset(memory, 0, height * kTwoTiles);
    for (int64_t i = 0; i < height; ++i)
      memcpy(memory + i * kTwoTiles, tiles_at(s.to, chunks) + i * s.to.stride, bytes);
    before_tile_loads();
    s.to.w = memory - chunks * kTwoTiles;
    s.to.stride = kTwoTiles;
    s.to.block_chunks = INT64_MAX;
    s.begin = chunks;
    s.end = chunks + 1;
    strip_product(s, height, x);
  }
}

// Decoded panels, from chunk `begin` of x on, times all tokens.
void tiles_times(const Coded& c, const Decoded& w, int panels, const Panels& to, const Tokens& x, int64_t begin, int chunks) {
  const int groups = c.layout.groups, bytes = static_cast<int>(kGroup) / groups;
  const int64_t rows = x.tile_rows();
  const TileRows configured(rows, bytes);
  alignas(64) float acc[kDecodedPanels][16][kPanel];
  alignas(64) int32_t dots[2][2][16][kPanel];
  before_tile_loads();
  for (int64_t first = 0; first < x.count; first += rows) {
    const int64_t tokens = x.count - first < rows ? x.count - first : rows;
    const Panels part = to.results(0, first, to.add);
    for (int p = 0; p < panels; ++p)
      for (int64_t t = 0; t < tokens; ++t)
        (to.add ? V::load(part.out + t * to.ld + p * to.apart) : V::zero()).store(acc[p][t]);
    for (int i = 0; i < chunks; ++i) {
      const float* scales = x.scales + (begin + i) * x.rows + first;
      for (int g = 0; g < groups; ++g) {
        const uint8_t* at = x.unit(begin + i, first) + g * bytes;
        _tile_loadd(4, at, kUnit);
        _tile_loadd(5, at + kPlane, kUnit);
        for (int p = 0; p < panels; ++p) {
          auto &high = dots[p % 2][0], &low = dots[p % 2][1];
          _tile_loadd(6, w.operands[p][i] + g * bytes / 4 * 64, 64);
          _tile_zero(0);
          _tile_zero(1);
          _tile_dpbsud(0, 4, 6);
          _tile_dpbsud(1, 5, 6);
          _tile_stored(0, high, 64);
          _tile_stored(1, low, 64);
          for (int64_t t = 0; t < tokens; ++t) {
            const int64_t of_group = x.group(begin + i, g, first + t);
            const V scale = V::set(scales[t]), whole = V::set(x.sums[of_group]);
            const I all = shift_left32<8>(I::load(high[t])) + I::load(low[t]) + I::set32(x.offs[of_group]);
            add_group(c, w.factors[p][i], g, 0, all, scale, whole, V::load(acc[p][t])).store(acc[p][t]);
          }
        }
      }
    }
    for (int p = 0; p < panels; ++p)
      for (int64_t t = 0; t < tokens; ++t) V::load(acc[p][t]).store(part.out + t * to.ld + p * to.apart);
  }
}

}  // namespace
