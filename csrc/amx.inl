// Products by AMX tiles, of 16 rows of 64 bytes each: included by level.inl where the compiler's flags have them.
//
// Float weights (bf16) lie packed as tiles are wanted: 32 columns of a panel are one. An activation is two bf16
// planes, x = high + low, which keep 16 of its 24 bits, or one where it is bf16 already. Quantized weights become tiles of int8, a group of
// 64 columns each; an activation is the 16-bit integer of the few-token product as two planes of bytes, x = 256 high
// + low, so that sums within a group are exact.
//
// Tokens lie in tiles of equally many rows (the last one filled up with zeros): [tile][columns][plane][row], each 64
// bytes, 32 columns of bf16 or a group of bytes. Results have room for the rows that fill up.

#include <atomic>

namespace {

// Tiles 0 to 3 hold sums, 4 and 5 tokens, 6 and 7 weights. A thread has no tiles configured outside of an item: it
// would pay for saving them.
class TileRows {
 public:
  explicit TileRows(int64_t tokens) {
    const int64_t tiles = (tokens + 15) / 16, rows = (tokens + tiles - 1) / tiles;
    Config config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : 16);
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

inline void pack_planes(const float* row, int64_t columns, int64_t rows, int64_t planes, uint8_t* to) {
  for (int64_t k = 0; k < columns; k += 32, to += planes * rows * 64) {
    const __m512 a = _mm512_loadu_ps(row + k), b = _mm512_loadu_ps(row + k + 16);
    const __m512i high = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    const auto float_of = [](__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); };
    const auto rest = [](__m512 x, __m512 of) {  // an infinity has none
      return _mm512_maskz_sub_ps(_knot_mask16(_mm512_fpclass_ps_mask(of, 0x08 | 0x10)), x, of);
    };
    const __m512 a_low = rest(a, float_of(_mm512_castsi512_si256(high)));
    const __m512 b_low = rest(b, float_of(_mm512_extracti64x4_epi64(high, 1)));
    _mm512_storeu_si512(to, high);
    if (planes == 1) continue;
    _mm512_storeu_si512(to + rows * 64, (__m512i)_mm512_cvtne2ps_pbh(b_low, a_low));
  }
}

inline void pack_bytes(const float* row, int64_t columns, int64_t rows, uint8_t* to, float* scales, float* sums) {
  for (int64_t g = 0; g < columns / kGroup; ++g, to += 2 * rows * 64) {
    int16_t whole[kGroup];
    int32_t sixteens[kSixteens];
    scales[g * rows] = whole_of(row + g * kGroup, whole, sixteens, &sums[g * rows]);
    for (int i = 0; i < 2; ++i) {
      const __m512i half = _mm512_loadu_si512(whole + 32 * i);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32 * i), _mm512_cvtepi16_epi8(_mm512_srai_epi16(half, 8)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + rows * 64 + 32 * i), _mm512_cvtepi16_epi8(half));
    }
  }
}

// Columns [begin, begin + count), both whole groups, of n tokens; row(t) gives those of the t-th.
template <class Row>
inline void pack_tiles(const Tokens& to, int64_t begin, int64_t count, Row row) {
  const int64_t rows = to.tile_rows(), bytes = to.column_bytes();
  const bool whole = to.as == Packing::kWholeTiles;
  for (int64_t t = 0; t < to.tiles() * rows; ++t) {
    const int64_t at = t / rows * rows * to.columns + begin * rows, group = at / kGroup + t % rows;
    uint8_t* planes = to.planes + at * bytes + t % rows * 64;
    if (t >= to.count) {  // fills up
      for (int64_t i = 0; i < count * bytes / 64; ++i) memset(planes + i * rows * 64, 0, 64);
      if (whole) for (int64_t g = 0; g < count / kGroup; ++g) to.scales[group + g * rows] = to.sums[group + g * rows] = 0;
    } else if (whole) {
      pack_bytes(row(t), count, rows, planes, to.scales + group, to.sums + group);
    } else {
      pack_planes(row(t), count, rows, bytes / 2, planes);
    }
  }
}

// How many tokens go to tiles: fewer are faster without.
template <class F> constexpr int64_t tiles_from() { return INT64_MAX; }
template <> constexpr int64_t tiles_from<Bf16>() { return 9; }
template <> constexpr int64_t tiles_from<Int8>() { return 12; }
template <> constexpr int64_t tiles_from<Int4>() { return 12; }

// Groups of columns [begin, end) of some panels, and the results of one or more tiles of tokens.
struct Strip {
  Panels to;
  int64_t piece;       // bytes from one group of columns to the next
  int64_t rows;        // of a tile of tokens
  int64_t tile_bytes;  // from one tile of tokens to the next
  int64_t begin, end;
  int64_t pass, passes;  // over the same weights: each asks for its part of the groups behind these
};

// Asks for this pass's part of the bytes that the same columns of the next groups lie in.
inline void ask_ahead(const Strip& s, const uint8_t* at, int64_t bytes) {
  at += (s.end - s.begin) * s.piece;
  for (int64_t i = s.pass * 64; i < bytes; i += s.passes * 64) _mm_prefetch(at + i, _MM_HINT_T1);
}

// T tiles of tokens in L planes times P panels of bf16.
template <int L, int T, int P>
inline void multiply_planes(const Strip& s, const uint8_t* x) {
  float *out = s.to.out, *below = out + s.rows * s.to.ld;
  const int64_t ld = s.to.ld * 4, plane = s.rows * 64;
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
  x += s.begin * 2 * L * plane;
  for (int64_t g = s.begin; g < s.end; ++g) {
    const uint8_t* w = s.to.w + g * s.piece;
    for (int step = 0; step < 2; ++step, w += 1024) {
      _tile_loadd(6, w, 64);
      if constexpr (P > 1) _tile_loadd(7, w + s.to.stride, 64);
      for (int i = 0; i < L; ++i, x += plane) {
        _tile_loadd(4, x, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (P > 1) _tile_dpbf16ps(1, 4, 7);
        if constexpr (T > 1) _tile_loadd(5, x + s.tile_bytes, 64);
        if constexpr (T > 1) _tile_dpbf16ps(2, 5, 6);
        if constexpr (T > 1 && P > 1) _tile_dpbf16ps(3, 5, 7);
      }
      for (int p = 0; p < P; ++p) ask_ahead(s, w + p * s.to.stride, 1024);
    }
  }
  _tile_stored(0, out, ld);
  if constexpr (P > 1) _tile_stored(1, out + s.to.apart, ld);
  if constexpr (T > 1) _tile_stored(2, below, ld);
  if constexpr (T > 1 && P > 1) _tile_stored(3, below + s.to.apart, ld);
}

template <int L>
inline void multiply_some(const Strip& s, int tiles, int panels, const uint8_t* x) {
  if (tiles == 2) panels == 2 ? multiply_planes<L, 2, 2>(s, x) : multiply_planes<L, 2, 1>(s, x);
  else panels == 2 ? multiply_planes<L, 1, 2>(s, x) : multiply_planes<L, 1, 1>(s, x);
}

// A group's quantized numbers as a tile: [16][16 rows][4 columns].
inline void make_tile(Int8, const uint8_t* group, uint8_t* to) {
  alignas(64) static constexpr int16_t kPlaces[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i places = _mm512_load_si512(kPlaces);  // side by side, what lies one behind the other
  for (int i = 0; i < 16; ++i) {
    const __m512i two = _mm512_loadu_si512(group + Int8::kHeader + 64 * i);
    _mm512_store_si512(to + 64 * i, _mm512_permutexvar_epi16(places, two));
  }
}

inline void make_tile(Int4, const uint8_t* group, uint8_t* to) {
  const __m512i first = _mm512_set1_epi64(0x3424302014041000), mask = _mm512_set1_epi8(15);  // bits where each begins
  const __m512i second = _mm512_set1_epi64(0x3C2C38281C0C1808);
  for (int i = 0; i < 8; ++i, to += 128) {
    const __m512i words = _mm512_loadu_si512(group + Int4::kHeader + 64 * i);
    _mm512_store_si512(to, _mm512_and_si512(_mm512_multishift_epi64_epi8(first, words), mask));
    _mm512_store_si512(to + 64, _mm512_and_si512(_mm512_multishift_epi64_epi8(second, words), mask));
  }
}

// One tile of tokens times 4 panels, or fewer, of quantized weights; `tiles` are their numbers as [panel][group].
template <class Q>
inline void multiply_bytes(const Strip& s, int64_t panels, const uint8_t* tiles, const uint8_t* x, const float* scales,
                           const float* sums) {
  alignas(64) float acc[4][16][16];
  alignas(64) int32_t dots[2][2][16][16];
  memset(acc, 0, sizeof(acc));
  for (int64_t g = s.begin; g < s.end; ++g) {
    const uint8_t* at = x + g * 2 * s.rows * 64;
    _tile_loadd(4, at, 64);
    _tile_loadd(5, at + s.rows * 64, 64);
    for (int64_t p = 0; p < panels; ++p) {
      const uint8_t* group = s.to.w + p * s.to.stride + g * s.piece;
      auto& high = dots[p % 2][0];
      auto& low = dots[p % 2][1];
      _tile_loadd(6, tiles + (p * (s.end - s.begin) + g - s.begin) * 1024, 64);
      _tile_zero(0);
      _tile_zero(1);
      _tile_dpbssd(0, 4, 6);
      _tile_dpbusd(1, 5, 6);
      _tile_stored(0, high, 64);
      _tile_stored(1, low, 64);
      ask_ahead(s, group, Q::kGroupBytes);
      V scale[1], zero[1];
      load_scales<Q>(group, scale, zero);
      for (int64_t t = 0; t < s.rows; ++t) {
        const __m512i both = _mm512_slli_epi32(_mm512_load_si512(high[t]), 8);
        V sum = to_float(I{both} + I::load(low[t])) * V::set(scales[g * s.rows + t]);
        if (Q::kHasZero) sum = sum - zero[0] * V::set(sums[g * s.rows + t]);
        fma(sum, scale[0], V::load(acc[p][t])).store(acc[p][t]);
      }
    }
  }
  for (int64_t t = 0; t < s.rows; ++t)
    for (int64_t p = 0; p < panels; ++p) {
      float* out = s.to.out + t * s.to.ld + p * s.to.apart;
      (s.to.add ? V::load(acc[p][t]) + V::load(out) : V::load(acc[p][t])).store(out);
    }
}

// One chunk of columns of a few panels times all tokens.
template <class F>
inline void chunk_product(Strip s, int64_t panels, const Tokens& x, uint8_t* scratch) {
  const int64_t tiles = x.tiles(), groups = x.columns / kGroup;
  const Panels to = s.to;
  if constexpr (IsQuantized<F>::value) {
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t g = s.begin; g < s.end; ++g)
        make_tile(F(), to.w + p * to.stride + g * s.piece, scratch + (p * (s.end - s.begin) + g - s.begin) * 1024);
    before_tile_loads();
    s.passes = tiles;
    for (int64_t i = 0; i < tiles; ++i) {
      s.pass = i;
      s.to.out = to.out + i * s.rows * to.ld;
      const int64_t at = i * s.rows * groups;
      multiply_bytes<F>(s, panels, scratch, x.planes + i * s.tile_bytes, x.scales + at, x.sums + at);
    }
  } else {
    s.passes = (tiles + 1) / 2;
    for (int64_t i = 0; i < tiles; i += 2) {
      s.pass = i / 2;
      const uint8_t* planes = x.planes + i * s.tile_bytes;
      for (int64_t p = 0; p < panels; p += 2) {
        s.to.w = to.w + p * to.stride;
        s.to.out = to.out + i * s.rows * to.ld + p * to.apart;
        const int count = p + 1 < panels ? 2 : 1;
        if (x.as == Packing::kBf16Tiles) multiply_some<1>(s, i + 1 < tiles ? 2 : 1, count, planes);
        else multiply_some<2>(s, i + 1 < tiles ? 2 : 1, count, planes);
      }
    }
  }
}

// out[t, r] = (or +=) a packed matrix times tokens in tiles; its groups of columns lie `piece` bytes apart.
template <class F>
inline void tile_product(const Panels& to, int64_t piece, int64_t panels, int64_t K, const Tokens& x, float* scratch) {
  constexpr bool kWhole = IsQuantized<F>::value;
  constexpr int64_t kHeight = kWhole ? 4 : 8, kGroups = kWhole ? 8 : 4;  // of a chunk
  uint8_t* memory = reinterpret_cast<uint8_t*>(scratch);
  const int64_t groups = kWhole ? x.columns / kGroup : K / kGroup, rows = x.tile_rows();
  before_tile_loads();
  for (int64_t p = 0; p < panels; p += kHeight) {
    const int64_t height = panels - p < kHeight ? panels - p : kHeight;
    Strip s{to, piece, rows, rows * x.columns * x.column_bytes(), 0, 0, 0, 1};
    s.to.w += p * to.stride;
    s.to.out += p * to.apart;
    for (int64_t g = 0; g < groups; g += kGroups, s.to.add = true) {
      s.begin = g;
      s.end = groups - g < kGroups ? groups : g + kGroups;
      chunk_product<F>(s, height, x, memory);
    }
    if (kWhole || K == groups * kGroup) continue;
    const int64_t bytes = moestro::round_up(K - groups * kGroup, 2) * kPanel * 2;  // the last columns, filled up
    memset(memory, 0, height * piece);
    for (int64_t i = 0; i < height; ++i) memcpy(memory + i * piece, s.to.w + i * to.stride + groups * piece, bytes);
    before_tile_loads();
    s.to.w = memory - groups * piece;
    s.to.stride = piece;
    s.begin = groups;
    s.end = groups + 1;
    chunk_product<F>(s, height, x, memory);
  }
}

}  // namespace
