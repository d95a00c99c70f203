// Products with weights in a float format (weights.h): few tokens meet them straight from memory, many a tile that was
// converted to float32 once, or the CPU's matrix tiles (amx.inl).

namespace {

// Whether one token's panels meet it one after another, since the registers do not hold the weights of all.
template <class F, int P, int N>
constexpr bool one_by_one() { return N == 1 && P * (1 + F::kStep) * VP >= V::kRegisters; }

// out[t, r] = (or +=) sum over K of w[r, k] * x[k, t], for P panels at once and N tokens from `first` on; w begins at
// column `begin` of x, a whole chunk.
template <class F, int P, int N>
inline void multiply_floats(const Panels& to, const Tokens& tokens, int64_t first, int64_t begin, int64_t K) {
  V acc[P][N][VP];
  begin_sums(to, acc);
  const uint8_t* w = to.w;
  for (int64_t chunk = 0; chunk * kGroup < K; ++chunk) {
    const float* x = tokens.floats(begin / kGroup + chunk, first);
    const int64_t columns = K - chunk * kGroup < kGroup ? K - chunk * kGroup : kGroup;
    for (int64_t k = 0; k < columns; k += F::kStep, w += F::kStepBytes) {
      if constexpr (one_by_one<F, P, N>()) {
        for (int p = 0; p < P; ++p) {
          V wv[F::kStep][VP];
          if (F::kFromMemory) prefetch(w + p * to.stride + kAhead);
          F::load(w + p * to.stride, wv);
          for (int j = 0; j < F::kStep; ++j)
            for (int v = 0; v < VP; ++v) acc[p][0][v] = fma(wv[j][v], V::set(x[k + j]), acc[p][0][v]);
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
          const V xv = V::set(x[t * kGroup + k + j]);
          for (int p = 0; p < P; ++p)
            for (int v = 0; v < VP; ++v) acc[p][t][v] = fma(wv[p][j][v], xv, acc[p][t][v]);
        }
    }
  }
  store_sums(to, acc);
}

// How many panels fit in the registers with their sums for N tokens.
template <class F, int N>
constexpr int float_panels() {
  if constexpr (N == 1 && (4 + F::kStep) * VP < V::kRegisters) return 4;
  else return 4 * (N + F::kStep) * VP < V::kRegisters ? 4 : 2 * (N + F::kStep) * VP < V::kRegisters ? 2 : 1;
}

// All panels times some tokens, columns [begin, begin + count) of x; w points at column `begin`.
template <class F>
inline void multiply_tile(const Panels& to, int64_t panels, const Tokens& x, int64_t first, int64_t tokens, int64_t begin,
                          int64_t count) {
  with_tokens<V::kTokens>(tokens, [&](auto n) {
    in_streams<float_panels<F, n>()>(to, panels, [&](auto p, const Panels& part) {
      multiply_floats<F, p, n>(part, x, first, begin, count);
    });
  });
}

// out[t, r] = (or +=) a packed matrix of whole panels times few tokens, straight from memory.
template <class F>
inline void thin_product(const Panels& all, int64_t panels, int64_t K, const Tokens& x) {
  if (x.count <= V::kTokens) return multiply_tile<F>(all, panels, x, 0, x.count, 0, K);
  constexpr int64_t kColumns = 256;  // of weights that stay in cache for all tiles of tokens
  for (int64_t p = 0; p < panels; p += 4) {
    const int64_t height = panels - p < 4 ? panels - p : 4;
    for (int64_t k = 0; k < K; k += kColumns) {
      for_tiles(x.count, V::kTokens, [&](int64_t first, int64_t tokens) {
        Panels part = all.results(p, first, all.add || k > 0);
        part.w += p * all.stride + k / F::kStep * F::kStepBytes;
        multiply_tile<F>(part, height, x, first, tokens, k, K - k < kColumns ? K - k : kColumns);
      });
    }
  }
}

// The same for many tokens, over tiles of 4 panels that convert(panel, k, columns, to) makes.
template <class Convert>
inline void many_product(const Panels& all, int64_t panels, int64_t K, const Tokens& x, float* tile, Convert convert) {
  for (int64_t p = 0; p < panels; p += 4) {
    const int64_t height = panels - p < 4 ? panels - p : 4;
    for (int64_t k = 0; k < K; k += kTileColumns) {
      const int64_t count = K - k < kTileColumns ? K - k : kTileColumns;
      for (int64_t i = 0; i < height; ++i) convert(p + i, k, count, tile + i * kPanel * kTileColumns);
      for_tiles(x.count, V::kTokens, [&](int64_t first, int64_t tokens) {
        Panels part = all.results(p, first, all.add || k > 0);
        part.w = reinterpret_cast<const uint8_t*>(tile);
        part.stride = kPanel * kTileColumns * 4;
        multiply_tile<Converted>(part, height, x, first, tokens, k, count);
      });
    }
  }
}

template <class F>
inline Packing packing_of(F, int64_t n, Type type) {
  if (n < tiles_from<F>()) return {};
  return {type == Type::kBf16 ? Form::kBf16 : Form::kFloatPlanes, 1, 0, true};
}

// Columns [begin, begin + count) of one of some panels as float32 [count, 16]: within one block of columns, or whole ones.
template <class F>
inline void convert(F, const Panels& all, int64_t panel, int64_t begin, int64_t count, float* to) {
  const int64_t of_block = all.block_chunks < INT64_MAX ? all.block_chunks * kGroup : INT64_MAX;
  for (int64_t k = begin; k < begin + count;) {
    const int64_t rest = of_block - k % of_block, columns = begin + count - k < rest ? begin + count - k : rest;
    convert(F(), all.panel_of(panel, k / kGroup), k % of_block, columns, to);
    to += columns * kPanel;
    k += columns;
  }
}

template <class F>
inline void product(F, const Panels& all, int64_t panels, int64_t K, const Tokens& x, float* scratch) {
  if (x.as.tiled) return tile_product<F>(all, panels, K, x, scratch);
  if (x.count <= moestro::kThinTokens && all.block_chunks == INT64_MAX) return thin_product<F>(all, panels, K, x);
  many_product(all, panels, K, x, scratch, [&](int64_t panel, int64_t k, int64_t count, float* to) {
    convert(F(), all, panel, k, count, to);
  });
}

}  // namespace
