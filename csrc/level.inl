// The kernels of one ISA level, included by each level's file after it defined MOESTRO_LEVEL and its name.
//
// A product is panels of weights times some tokens. Few tokens meet weights as they stream from memory, converted in
// registers; more meet a part of the weights that was converted once and lies in cache, or, where the level has them, the
// CPU's matrix tiles (amx.inl). Codes meet 16-bit integers, whose products are summed exactly within a group of columns.

#include <type_traits>

#include "experts.h"
#include "simd.h"
#include "weights.h"

namespace {

using moestro::Activation;
using moestro::Input;
using moestro::Item;
using moestro::kTileColumns;
using moestro::LinearItem;
using moestro::MatrixFormat;
using moestro::Scratch;
using moestro::Shape;

void axpy(float a, const float* x, float* y, int64_t n) {
  int64_t i = 0;
  const V av = V::set(a);
  for (; i + W <= n; i += W) fma(av, V::load(x + i), V::load(y + i)).store(y + i);
  for (; i < n; ++i) y[i] += a * x[i];
}

}  // namespace

#include "tokens.inl"

namespace {

struct Coded;
struct Decoded;

// How many tokens go to matrix tiles, of weights in a float format and in codes: fewer are faster without.
template <class F> constexpr int64_t tiles_from() { return INT64_MAX; }
#if defined(MOESTRO_TILES)
template <> constexpr int64_t tiles_from<Bf16>() { return 9; }
constexpr int64_t kCodeTilesFrom = 12;
template <class F> void tile_product(const Panels&, int64_t panels, int64_t K, const Tokens&, float* scratch);
void tiles_times(const Coded&, const Decoded&, int panels, const Panels&, const Tokens&, int64_t begin, int chunks);
#else
constexpr int64_t kCodeTilesFrom = INT64_MAX;
template <class F> void tile_product(const Panels&, int64_t, int64_t, const Tokens&, float*) {}
inline void tiles_times(const Coded&, const Decoded&, int, const Panels&, const Tokens&, int64_t, int) {}
#endif

}  // namespace

#include "floats.inl"
#include "codes.inl"
#include "strided.inl"
#include "coded.inl"
#if defined(MOESTRO_TILES)
#include "amx.inl"
#endif
#include "formats.inl"
#include "items.inl"
#include "limits.inl"
#include "norm.inl"
#include "dots.inl"
#include "attention.inl"
#include "solver.inl"

namespace moestro {
const Level MOESTRO_LEVEL = {MOESTRO_LEVEL_NAME, run_item, run_linear, unpack_row, rms_norm, read_first, write_plain, rotate_row, attend, dot_rows, axpy, sum_of, fma_of, dots_of,
                             fit_groups, code_groups};
}
