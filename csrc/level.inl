// The kernels of one ISA level, included by each level's file after it defined MOESTRO_LEVEL and its name.
//
// One product serves all: panels of weights times a tile of tokens. Few tokens (thin): weights stream from memory
// once and are converted in registers; quantized ones are multiplied as integers with 16-bit activations. Many
// tokens: a tile of weights is converted to float32 once and used for all tokens of the item, or, where the level has
// them, multiplied by the CPU's matrix tiles (amx.inl).

#include <type_traits>

#include "experts.h"
#include "simd.h"
#include "weights.h"

namespace {

using moestro::Activation;
using moestro::Type;
using moestro::Input;
using moestro::Item;
using moestro::kTileColumns;
using moestro::MatrixFormat;
using moestro::LinearItem;
using moestro::Scratch;
using moestro::Shape;
using moestro::ColumnTable;

enum class Packing : int { kFloats, kWhole, kBytePlanes, kBf16Tiles, kFloatTiles, kWholeTiles };

// Tokens packed for the products, in tiles: floats [K][N] of each tile, one tile after another, or 16-bit
// integers [K / 2][N][2], or their bytes in the order of to_byte_planes, with a scale and a sum [K / 64][N] of each
// group of columns, and the sums of each 16 integers [K / 16][N]; or as amx.inl says.
struct Tokens {
  int64_t count, columns;  // columns rounded up to groups
  Packing as;
  float* floats;
  int16_t* integers;
  uint8_t* planes;
  float *scales, *sums;
  int32_t* sixteens;
  Tokens(int64_t n, int64_t K, Packing packing, float* memory)
      : count(n), columns(moestro::round_up(K, kGroup)), as(packing), floats(memory),
        integers(reinterpret_cast<int16_t*>(memory)), planes(reinterpret_cast<uint8_t*>(memory)) {
    const int64_t rows = moestro::padded(n);
    scales = memory + rows * columns / 2;
    sums = scales + rows * columns / kGroup;
    sixteens = reinterpret_cast<int32_t*>(sums + rows * columns / kGroup);
  }
  bool tiled() const { return as >= Packing::kBf16Tiles; }
  int64_t column_bytes() const { return as == Packing::kFloatTiles ? 4 : 2; }  // of a token in matrix tiles
  int64_t tiles() const {
    const int64_t most = tiled() ? 16 : as == Packing::kFloats ? V::kTokens : V::kWholeTokens;
    return (count + most - 1) / most;
  }
  int64_t tile_rows() const { return (count + tiles() - 1) / tiles(); }  // of matrix tiles
};

// Calls do_tile(first token, tokens) for tiles of nearly equal size.
template <class Do>
inline void for_tiles(const Tokens& tokens, Do do_tile) {
  const int64_t n = tokens.count, tiles = tokens.tiles();
  for (int64_t i = 0, t = 0; i < tiles; ++i) {
    const int64_t size = n / tiles + (i < n % tiles);
    do_tile(t, size);
    t += size;
  }
}

// One row of x into its place among the tokens; `row` has zeros up to the columns of `tokens`.
inline void pack_floats(const float* row, int64_t columns, int64_t N, float* to) {
  for (int64_t k = 0; k < columns; ++k) to[k * N] = row[k];
}

constexpr int kSixteens = kGroup / 16;

// A group of x as 16-bit integers, near 15 bits and a sign of its largest: returns their scale, the sums of each 16 of
// them, and the group's sum. Scale and sum are NaN if there is one, or an infinity, among them, which integers and a
// maximum would hide.
inline float whole_of(const float* x, int16_t* whole, int32_t (&sixteens)[kSixteens], float* group_sum) {
  V most = V::zero(), nothing = V::zero();
  for (int64_t k = 0; k < kGroup; k += W) {
    const V xv = V::load(x + k);
    most = vmax(most, vabs(xv));
    nothing = fma(xv, V::zero(), nothing);
  }
  const float scale = largest(most) / 32639.0f + sum(nothing);  // two signed bytes: 127 * 256 + 127
  const V inverse = V::set(scale > 1e-35f ? 1.0f / scale : 0.0f);
  int32_t all = 0;
  for (int i = 0; i < kSixteens; ++i) {
    V total = V::zero();
    for (int k = 16 * i; k < 16 * i + 16; k += W) total = total + store_int16(V::load(x + k) * inverse, whole + k);
    const float found = sum(total);
    all += sixteens[i] = fabsf(found) < 1e6f ? static_cast<int32_t>(found) : 0;  // NaN is no integer
  }
  *group_sum = scale * static_cast<float>(all);
  return scale;
}

inline void pack_whole(const float* row, int64_t columns, int64_t N, Packing as, int16_t* to, float* scales, float* sums,
                       int32_t* sixteens) {
  for (int64_t g = 0; g < columns / kGroup; ++g) {
    int16_t whole[kGroup];
    int32_t of_group[kSixteens];
    scales[g * N] = whole_of(row + g * kGroup, whole, of_group, &sums[g * N]);
    for (int i = 0; i < kSixteens; ++i) sixteens[(g * kSixteens + i) * N] = of_group[i];
#if defined(MOESTRO_BYTE_DOTS) || defined(MOESTRO_BYTE_PAIRS)
    if (as == Packing::kBytePlanes) to_byte_planes(whole, kGroup);
#else
    (void)as;
#endif
    for (int64_t j = 0; j < kGroup / 2; ++j) memcpy(to + (g * kGroup / 2 + j) * 2 * N, whole + 2 * j, 4);
  }
}

// Where some panels stand in a matrix whose scales belong to columns: its table, and the first panel and column.
struct Place {
  ColumnTable table;
  int64_t panel = 0, column = 0;
};

// Where a product's panels are read from and its results go: panels are `stride` bytes apart, and their results
// `apart` floats; the rows of out, one a token, are ld floats apart.
struct Panels {
  const uint8_t* w;
  int64_t stride;
  float* out;
  int64_t apart, ld;
  bool add;  // to what is in out
  Place place = {};
};

// What the level has of matrix tiles: tiles_from<F>() tokens go to them.
#if defined(__AMX_TILE__)
}  // namespace
#include "amx.inl"
namespace {
#else
struct TileRows { explicit TileRows(int64_t) {} };
template <class F> constexpr int64_t tiles_from() { return INT64_MAX; }
template <class Row> void pack_tiles(const Tokens&, int64_t, int64_t, Row) {}
template <class F> void tile_product(const Panels&, int64_t, int64_t, int64_t, const Tokens&, float*) {}
#endif

// How n tokens of numbers of that type are packed for weights of a format with kernels of its own.
template <class F>
inline Packing packing_of(F, int64_t n, Type type) {
  if (n >= tiles_from<F>()) {
    if (IsQuantized<F>::value) return Packing::kWholeTiles;
    return type == Type::kBf16 ? Packing::kBf16Tiles : Packing::kFloatTiles;
  }
  if (!IsQuantized<F>::value || n > moestro::kThinTokens) return Packing::kFloats;
  return std::is_same_v<F, Int4> && kHasByteDots ? Packing::kBytePlanes : Packing::kWhole;
}

// Packs columns [begin, begin + count), both whole groups, of n rows; row(t) gives those of the t-th.
template <class Row>
inline void pack(const Tokens& to, int64_t begin, int64_t count, Row row) {
  if (to.tiled()) return pack_tiles(to, begin, count, row);
  for_tiles(to, [&](int64_t first, int64_t N) {
    const int64_t at = first * to.columns + begin * N, group = at / kGroup;
    for (int64_t t = 0; t < N; ++t) {
      const float* x = row(first + t);
      if (to.as == Packing::kFloats) pack_floats(x, count, N, to.floats + at + t);
      else pack_whole(x, count, N, to.as, to.integers + at + 2 * t, to.scales + group + t, to.sums + group + t,
                      to.sixteens + at / 16 + t);
    }
  });
}

template <int P, int N>
inline void finish(const Panels& to, V (&acc)[P][N][VP]) {
  if (to.add) {
    for (int p = 0; p < P; ++p)
      for (int t = 0; t < N; ++t)
        for (int v = 0; v < VP; ++v) acc[p][t][v] = acc[p][t][v] + V::load(to.out + t * to.ld + p * to.apart + v * W);
  }
  for (int p = 0; p < P; ++p)
    for (int t = 0; t < N; ++t)
      for (int v = 0; v < VP; ++v) acc[p][t][v].store(to.out + t * to.ld + p * to.apart + v * W);
}

// Whether one token's panels meet it one after another, since the registers do not hold the weights of all.
template <class F, int P, int N>
constexpr bool one_by_one() { return N == 1 && P * (1 + F::kStep) * VP >= V::kRegisters; }

// out[t, r] = (or +=) sum over K of w[r, k] * x[k, t], for P panels at once and N tokens.
template <class F, int P, int N>
inline void multiply_floats(const Panels& to, const float* x, int64_t K) {
  V acc[P][N][VP];
  for (int p = 0; p < P; ++p)
    for (int t = 0; t < N; ++t)
      for (int v = 0; v < VP; ++v) acc[p][t][v] = V::zero();
  const uint8_t* w = to.w;
  for (int64_t k = 0; k < K; k += F::kStep, w += F::kStepBytes, x += F::kStep * N) {
    if constexpr (one_by_one<F, P, N>()) {
      for (int p = 0; p < P; ++p) {
        V wv[F::kStep][VP];
        if (F::kFromMemory) prefetch(w + p * to.stride + kAhead);
        F::load(w + p * to.stride, wv);
        for (int j = 0; j < F::kStep; ++j)
          for (int v = 0; v < VP; ++v) acc[p][0][v] = fma(wv[j][v], V::set(x[j]), acc[p][0][v]);
      }
      continue;
    }
    V wv[P][F::kStep][VP];
    for (int p = 0; p < P; ++p) {
      if (F::kFromMemory) prefetch(w + p * to.stride + kAhead);
      F::load(w + p * to.stride, wv[p]);
    }
    for (int j = 0; j < F::kStep; ++j)
      for (int t = 0; t < N; ++t) {
        const V xv = V::set(x[j * N + t]);
        for (int p = 0; p < P; ++p)
          for (int v = 0; v < VP; ++v) acc[p][t][v] = fma(wv[p][j][v], xv, acc[p][t][v]);
      }
  }
  finish(to, acc);
}

// How many sums of integers a panel and token have: a single one where four panels leave no registers for two.
template <int P, int N>
constexpr int sums_of_panel() { return P == 4 && N == 1 && 8 * VP > V::kRegisters - 8 ? 1 : 2; }

// The same with quantized weights and activations as 16-bit integers: exact sums within a group of columns.
template <class Q, int P, int N>
inline void multiply_whole(const Panels& to, const int16_t* x, const float* scales, const float* sums, int64_t groups) {
  V acc[P][N][VP];
  for (int p = 0; p < P; ++p)
    for (int t = 0; t < N; ++t)
      for (int v = 0; v < VP; ++v) acc[p][t][v] = V::zero();
  constexpr int kSums = sums_of_panel<P, N>();
  const uint8_t* group = to.w;
  for (int64_t g = 0; g < groups; ++g, group += Q::kGroupBytes, x += kGroup * N, scales += N, sums += N) {
    I dots[P][kSums][N][VP];
    for (int p = 0; p < P; ++p)
      for (int t = 0; t < N; ++t)
        for (int v = 0; v < VP; ++v) dots[p][0][t][v] = dots[p][kSums - 1][t][v] = I::zero();
    for (int s = 0; s < kGroup / (2 * Q::kPairs); ++s) {
      for (int p = 0; p < P; ++p) {
        I w[Q::kPairs][VP];
        const uint8_t* at = group + p * to.stride + Q::kHeader + s * Q::kStepBytes;
        prefetch(at + kAhead);
        if constexpr (kSums == 1) Q::numbers(at, w);
        else Q::factors(at, w);
        for (int j = 0; j < Q::kPairs; ++j)
          for (int t = 0; t < N; ++t)
            for (int v = 0; v < VP; ++v) {
              I& sum = dots[p][j % kSums][t][v];
              sum = Q::dot(w[j][v], I::set_pair(x + 2 * ((s * Q::kPairs + j) * N + t)), sum);
            }
      }
    }
    for (int p = 0; p < P; ++p) {
      V scale[VP], zero[VP];
      load_scales<Q>(group + p * to.stride, scale, zero);
      for (int t = 0; t < N; ++t)
        for (int v = 0; v < VP; ++v) {
          const I dot = kSums == 1 ? dots[p][0][t][v] : Q::total(dots[p][0][t][v], dots[p][kSums - 1][t][v]);
          V sum = to_float(dot) * V::set(scales[t]);
          if (Q::kHasZero) sum = sum - zero[v] * V::set(sums[t]);
          acc[p][t][v] = fma(sum, scale[v], acc[p][t][v]);
        }
    }
  }
  finish(to, acc);
}

// How many panels fit in the registers with their sums for N tokens.
template <class F, int N>
constexpr int panels_at_once() {
  if constexpr (IsQuantized<F>::value && N == 1) return 4 * VP <= V::kRegisters / 2 ? 4 : 1;
  else if constexpr (IsQuantized<F>::value) return 8 * N * VP <= V::kRegisters - 8 ? 4 : 4 * N * VP <= V::kRegisters - 8 ? 2 : 1;
  else if constexpr (N == 1 && (4 + F::kStep) * VP < V::kRegisters) return 4;
  else return 4 * (N + F::kStep) * VP < V::kRegisters ? 4 : 2 * (N + F::kStep) * VP < V::kRegisters ? 2 : 1;
}

// All panels times one tile of N tokens, columns [begin, begin + count) of x; w points at column `begin`. A quarter
// of the panels is read beside the next, since memory is read faster in several streams than in one.
template <class F, int N>
inline void multiply(const Panels& to, int64_t panels, const Tokens& x, int64_t first, int64_t begin, int64_t count) {
  const auto part = [&](int64_t p, int64_t apart) {
    return Panels{to.w + p * to.stride, to.stride * apart, to.out + p * kPanel, kPanel * apart, to.ld, to.add};
  };
  constexpr int P = panels_at_once<F, N>();
  const int64_t apart = panels / P;
  if constexpr (!IsQuantized<F>::value) {
    const float* xt = x.floats + first * x.columns + begin * N;
    for (int64_t p = 0; p < apart; ++p) multiply_floats<F, P, N>(part(p, apart), xt, count);
    for (int64_t p = apart * P; p < panels; ++p) multiply_floats<F, 1, N>(part(p, 1), xt, count);
  } else {
    const int64_t all = x.columns / kGroup, g = begin / kGroup, groups = (count + kGroup - 1) / kGroup;
    const int16_t* xt = x.integers + first * x.columns + begin * N;
    const float *scales = x.scales + first * all + g * N, *sums = x.sums + first * all + g * N;
    for (int64_t p = 0; p < apart; ++p) multiply_whole<F, P, N>(part(p, apart), xt, scales, sums, groups);
    for (int64_t p = apart * P; p < panels; ++p) multiply_whole<F, 1, N>(part(p, 1), xt, scales, sums, groups);
  }
}

template <class F, int N = IsQuantized<F>::value ? V::kWholeTokens : V::kTokens>
inline void multiply_tile(const Panels& to, int64_t panels, const Tokens& x, int64_t first, int64_t tokens, int64_t begin,
                          int64_t count) {
  if (tokens == N) return multiply<F, N>(to, panels, x, first, begin, count);
  if constexpr (N > 1) multiply_tile<F, N - 1>(to, panels, x, first, tokens, begin, count);
}

// Of a panel's first k columns, which are whole groups.
template <class F>
constexpr int64_t bytes_of(int64_t k) {
  if constexpr (IsQuantized<F>::value) return k / kGroup * F::kGroupBytes;
  else return k / F::kStep * F::kStepBytes;
}

// out[t, r] = (or +=) a packed matrix of whole panels times few tokens, straight from memory.
template <class F>
inline void thin_product(const Panels& all, int64_t panels, int64_t K, const Tokens& x) {
  if (x.tiles() == 1) return multiply_tile<F>(all, panels, x, 0, x.count, 0, K);
  constexpr int64_t kColumns = 256;  // of weights that stay in cache for all tiles of tokens
  for (int64_t p = 0; p < panels; p += 4) {
    const int64_t height = panels - p < 4 ? panels - p : 4;
    for (int64_t k = 0; k < K; k += kColumns) {
      for_tiles(x, [&](int64_t first, int64_t tokens) {
        const Panels part{all.w + p * all.stride + bytes_of<F>(k), all.stride, all.out + first * all.ld + p * kPanel,
                          kPanel, all.ld, all.add || k > 0};
        multiply_tile<F>(part, height, x, first, tokens, k, K - k < kColumns ? K - k : kColumns);
      });
    }
  }
}

// The same for many tokens, over tiles of 4 panels that convert(panel, k, columns, to) makes.
template <class Convert>
inline void many_product(const Panels& to, int64_t panels, int64_t K, const Tokens& x, float* tile, Convert convert) {
  for (int64_t p = 0; p < panels; p += 4) {
    const int64_t height = panels - p < 4 ? panels - p : 4;
    for (int64_t k = 0; k < K; k += kTileColumns) {
      const int64_t count = K - k < kTileColumns ? K - k : kTileColumns;
      for (int64_t i = 0; i < height; ++i) convert(p + i, k, count, tile + i * kPanel * kTileColumns);
      for_tiles(x, [&](int64_t first, int64_t tokens) {
        const Panels part{reinterpret_cast<const uint8_t*>(tile), kPanel * kTileColumns * 4, to.out + first * to.ld + p * kPanel,
                          kPanel, to.ld, to.add || k > 0};
        multiply_tile<Converted>(part, height, x, first, tokens, k, count);
      });
    }
  }
}

// As weights.h has it, of one of some panels.
template <class F>
inline void convert(F, const Panels& all, int64_t panel, int64_t begin, int64_t count, float* to) {
  convert(F(), all.w + panel * all.stride, begin, count, to);
}

template <class F>
inline void product(F, const Panels& all, int64_t panels, int64_t K, const Tokens& x, float* tile) {
  if (x.tiled()) return tile_product<F>(all, bytes_of<F>(kGroup), panels, K, x, tile);
  if (x.count <= moestro::kThinTokens) return thin_product<F>(all, panels, K, x);
  many_product(all, panels, K, x, tile, [&](int64_t panel, int64_t k, int64_t count, float* to) {
    convert(F(), all, panel, k, count, to);
  });
}

void axpy(float a, const float* x, float* y, int64_t n) {
  int64_t i = 0;
  const V av = V::set(a);
  for (; i + W <= n; i += W) fma(av, V::load(x + i), V::load(y + i)).store(y + i);
  for (; i < n; ++i) y[i] += a * x[i];
}

}  // namespace

#include "coded.inl"
#include "strided.inl"
#include "items.inl"
#include "limits.inl"
#include "norm.inl"
#include "dots.inl"
#include "attention.inl"
#include "solver.inl"

namespace moestro {
const Level MOESTRO_LEVEL = {MOESTRO_LEVEL_NAME, run_item, run_linear, unpack_row, rms_norm, read_first, write_plain, rotate_row, attend, dot_rows, axpy, sum_of, fma_of,
                             fit_groups, code_groups};
}
