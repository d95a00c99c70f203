// The kernels of one ISA level, included by each level's file after it defined MOESTRO_LEVEL and its name.
//
// Few tokens (thin): weights stream from memory once, several rows at a time, converted in registers.
// Many tokens: a tile of weights is converted to float32 once and used for all tokens of the item.

#include "experts.h"
#include "simd.h"

namespace {

using moestro::Activation;
using moestro::Format;
using moestro::Item;
using moestro::kBlock;
using moestro::Scratch;
using moestro::Shape;

constexpr int W = V::kWidth;

// out[r * ldo + t] = dot(w row r, x row t) over K, for R rows and N tokens; U independent sums a pair.
template <int R, int N, int U, class T>
inline void dots(const T* w, int64_t ldw, const float* x, int64_t ldx, int64_t K, float* out, int64_t ldo) {
  V acc[R][N][U];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < N; ++t)
      for (int u = 0; u < U; ++u) acc[r][t][u] = V::zero();
  int64_t k = 0;
  for (; k + W * U <= K; k += W * U) {
    for (int u = 0; u < U; ++u) {
      V xv[N];
      for (int t = 0; t < N; ++t) xv[t] = V::load(x + t * ldx + k + u * W);
      for (int r = 0; r < R; ++r) {
        const V wv = load_weights(w + r * ldw + k + u * W);
        for (int t = 0; t < N; ++t) acc[r][t][u] = fma(wv, xv[t], acc[r][t][u]);
      }
    }
  }
  for (; k + W <= K; k += W) {
    for (int r = 0; r < R; ++r) {
      const V wv = load_weights(w + r * ldw + k);
      for (int t = 0; t < N; ++t) acc[r][t][0] = fma(wv, V::load(x + t * ldx + k), acc[r][t][0]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < N; ++t) {
      V total = acc[r][t][0];
      for (int u = 1; u < U; ++u) total = total + acc[r][t][u];
      float value = sum(total);
      for (int64_t j = k; j < K; ++j) value += scalar_weight(w + r * ldw + j) * x[t * ldx + j];
      out[r * ldo + t] = value;
    }
  }
}

// dots for any number of tokens up to kThinTokens: rows four at a time, tokens four at a time.
template <class T>
inline void thin_rows(const T* w, int64_t rows, const float* x, int64_t tokens, int64_t D, float* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; r += 4) {  // blocks have 64 rows
    const T* wr = w + r * D;
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) dots<4, 4, 1>(wr, D, x + t * D, D, D, out + r * ldo + t, ldo);
    switch (tokens - t) {
      case 3: dots<4, 3, 1>(wr, D, x + t * D, D, D, out + r * ldo + t, ldo); break;
      case 2: dots<4, 2, 1>(wr, D, x + t * D, D, D, out + r * ldo + t, ldo); break;
      case 1: dots<4, 1, 2>(wr, D, x + t * D, D, D, out + r * ldo + t, ldo); break;
      default: break;
    }
  }
}

// y[t, d] += dot(down[d, 0:64], h[t, 0:64]); down of one block, h [tokens, ldh].
template <class T>
inline void thin_down(const T* down, int64_t D, const float* h, int64_t ldh, int64_t tokens, float* y) {
  constexpr int K = static_cast<int>(kBlock) / W;  // vectors a row
  int64_t d = 0;
  for (; d + W <= D; d += W) {
    if (tokens == 1) {
      V acc[W];
      for (int r = 0; r < W; ++r) {
        const T* row = down + (d + r) * kBlock;
        acc[r] = load_weights(row) * V::load(h);
        for (int k = 1; k < K; ++k) acc[r] = fma(load_weights(row + k * W), V::load(h + k * W), acc[r]);
      }
      (V::load(y + d) + sums(acc)).store(y + d);
      continue;
    }
    float tile[W * kBlock];  // converted once for all tokens
    for (int64_t j = 0; j < W * kBlock; j += W) load_weights(down + d * kBlock + j).store(tile + j);
    for (int64_t t = 0; t < tokens; ++t) {
      V acc[W];
      for (int r = 0; r < W; ++r) {
        acc[r] = V::load(tile + r * kBlock) * V::load(h + t * ldh);
        for (int k = 1; k < K; ++k) {
          acc[r] = fma(V::load(tile + r * kBlock + k * W), V::load(h + t * ldh + k * W), acc[r]);
        }
      }
      (V::load(y + t * D + d) + sums(acc)).store(y + t * D + d);
    }
  }
  for (; d < D; ++d) {
    for (int64_t t = 0; t < tokens; ++t) {
      float value = 0;
      for (int64_t k = 0; k < kBlock; ++k) value += scalar_weight(down + d * kBlock + k) * h[t * ldh + k];
      y[t * D + d] += value;
    }
  }
}

// out[t * ldo + r] = (or +=, where `add`) dot(w row r, x row t) over K, all float32.
template <int R, int N>
inline void tile_dots(const float* w, int64_t ldw, const float* x, int64_t ldx, int64_t K, float* out, int64_t ldo, bool add) {
  V acc[R][N];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < N; ++t) acc[r][t] = V::zero();
  int64_t k = 0;
  for (; k + W <= K; k += W) {
    V wv[R];
    for (int r = 0; r < R; ++r) wv[r] = V::load(w + r * ldw + k);
    for (int t = 0; t < N; ++t) {
      const V xv = V::load(x + t * ldx + k);
      for (int r = 0; r < R; ++r) acc[r][t] = fma(wv[r], xv, acc[r][t]);
    }
  }
  for (int t = 0; t < N; ++t) {
    for (int r = 0; r < R; ++r) {
      float value = sum(acc[r][t]);
      for (int64_t j = k; j < K; ++j) value += w[r * ldw + j] * x[t * ldx + j];
      float* at = out + t * ldo + r;
      *at = add ? *at + value : value;
    }
  }
}

// A tile of rows against all tokens: register tiles of kRows x kTokens, and single rows and tokens at the edges.
inline void many_rows(const float* w, int64_t ldw, int64_t rows, const float* x, int64_t ldx, int64_t tokens, int64_t K,
                      float* out, int64_t ldo, bool add) {
  constexpr int R = V::kRows, N = V::kTokens;
  for (int64_t t = 0; t < tokens;) {
    const bool full = t + N <= tokens;
    for (int64_t r = 0; r < rows;) {
      const bool all = r + R <= rows;
      const float* wr = w + r * ldw;
      const float* xt = x + t * ldx;
      float* at = out + t * ldo + r;
      if (full && all) tile_dots<R, N>(wr, ldw, xt, ldx, K, at, ldo, add);
      else if (full) tile_dots<1, N>(wr, ldw, xt, ldx, K, at, ldo, add);
      else if (all) tile_dots<R, 1>(wr, ldw, xt, ldx, K, at, ldo, add);
      else tile_dots<1, 1>(wr, ldw, xt, ldx, K, at, ldo, add);
      r += all ? R : 1;
    }
    t += full ? N : 1;
  }
}

template <class T>
inline void convert(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) load_weights(from + i).store(to + i);
  for (; i < n; ++i) to[i] = scalar_weight(from + i);
}

inline V gelu_tanh(V x) {
  const V inner = V::set(0.7978845608028654f) * fma(V::set(0.044715f) * x * x, x, x);
  return x * vsigmoid(inner + inner);
}

// h[i] = activation(gate[i], up[i]); gate is nullptr where the family has none. n is a multiple of 64.
inline void activate(const Shape& shape, const float* gate, const float* up, float* h, int64_t n) {
  if (shape.activation == Activation::kGeluErf) {  // no vector erf: few families, and F is small beside F * D
    for (int64_t i = 0; i < n; ++i) {
      const float a = gate ? gate[i] : up[i];
      const float g = 0.5f * a * (1.0f + erff(a * 0.70710678118654752f));
      h[i] = gate ? g * up[i] : g;
    }
    return;
  }
  for (int64_t i = 0; i < n; i += W) {
    const V u = V::load(up + i);
    const V a = gate ? V::load(gate + i) : u;
    V g;
    switch (shape.activation) {
      case Activation::kSilu: g = a * vsigmoid(a); break;
      case Activation::kGeluTanh: g = gelu_tanh(a); break;
      case Activation::kRelu2: g = vmax(a, V::zero()) * vmax(a, V::zero()); break;
      default: {
        const V limit = V::set(shape.limit);
        const V clamped = vmin(a, limit);
        const V up1 = vmax(vmin(u, limit), V::zero() - limit) + V::set(shape.offset);
        (clamped * vsigmoid(V::set(shape.alpha) * clamped) * up1).store(h + i);
        continue;
      }
    }
    (gate ? g * u : g).store(h + i);
  }
}

// Adds a bias of one value a neuron to [64, tokens] or, transposed, to [tokens, 64].
inline void add_bias(const float* bias, float* a, int64_t neuron_stride, int64_t token_stride, int64_t tokens) {
  for (int64_t i = 0; i < kBlock; ++i)
    for (int64_t t = 0; t < tokens; ++t) a[i * neuron_stride + t * token_stride] += bias[i];
}

template <class T>
struct Blocks {  // where the parts of a block are
  const Shape& shape;
  const uint8_t* packed;
  int64_t size;
  Blocks(const Shape& s, const uint8_t* p) : shape(s), packed(p), size(moestro::block_bytes(s)) {}
  const T* matrix(int64_t block, int i) const {
    return reinterpret_cast<const T*>(packed + block * size) + i * kBlock * shape.hidden;
  }
  const T* gate(int64_t block) const { return shape.has_gate ? matrix(block, 0) : nullptr; }
  const T* up(int64_t block) const { return matrix(block, shape.has_gate ? 1 : 0); }
  const T* down(int64_t block) const { return matrix(block, shape.has_gate ? 2 : 1); }
  const float* biases(int64_t block) const { return reinterpret_cast<const float*>(matrix(block, shape.has_gate ? 3 : 2)); }
  const float* gate_bias(int64_t block) const { return biases(block); }
  const float* up_bias(int64_t block) const { return biases(block) + (shape.has_gate ? kBlock : 0); }
};

template <class T>
inline void thin_item(const Shape& shape, const Item& item, const Scratch& scratch, float* y) {
  const Blocks<T> blocks(shape, item.packed);
  const int64_t D = shape.hidden, n = item.tokens;
  float gate[kBlock * moestro::kThinTokens], up[kBlock * moestro::kThinTokens], h[kBlock * moestro::kThinTokens];
  float wide[kBlock * moestro::kThinTokens];
  for (int64_t b = item.block_begin; b < item.block_end; ++b) {
    if (shape.has_gate) thin_rows(blocks.gate(b), kBlock, scratch.x, n, D, gate, n);  // [64, n]
    thin_rows(blocks.up(b), kBlock, scratch.x, n, D, up, n);
    if (shape.has_bias) {
      if (shape.has_gate) add_bias(blocks.gate_bias(b), gate, n, 1, n);
      add_bias(blocks.up_bias(b), up, n, 1, n);
    }
    activate(shape, shape.has_gate ? gate : nullptr, up, h, kBlock * n);
    const float* rows = h;
    if (n > 1) {  // [64, n] -> [n, 64]
      for (int64_t i = 0; i < kBlock; ++i)
        for (int64_t t = 0; t < n; ++t) wide[t * kBlock + i] = h[i * n + t];
      rows = wide;
    }
    thin_down(blocks.down(b), D, rows, kBlock, n, y);
  }
}

template <class T>
inline void many_item(const Shape& shape, const Item& item, const Scratch& scratch, float* y) {
  const Blocks<T> blocks(shape, item.packed);
  constexpr int64_t KC = 1024;  // of D at once: six rows of x stay in the first cache
  const int64_t D = shape.hidden, n = item.tokens, count = item.block_end - item.block_begin, F = count * kBlock;
  float gate[kBlock * moestro::kTileTokens], up[kBlock * moestro::kTileTokens];  // [n, 64]
  for (int64_t b = 0; b < count; ++b) {
    for (int part = shape.has_gate ? 0 : 1; part < 2; ++part) {
      const T* w = part == 0 ? blocks.gate(item.block_begin + b) : blocks.up(item.block_begin + b);
      float* out = part == 0 ? gate : up;
      for (int64_t k = 0; k < D; k += KC) {
        const int64_t width = D - k < KC ? D - k : KC;
        for (int64_t r = 0; r < kBlock; ++r) convert(w + r * D + k, width, scratch.weights + r * KC);
        many_rows(scratch.weights, KC, kBlock, scratch.x + k, D, n, width, out, kBlock, k > 0);
      }
      if (shape.has_bias) {
        const int64_t block = item.block_begin + b;
        add_bias(part == 0 ? blocks.gate_bias(block) : blocks.up_bias(block), out, 1, kBlock, n);
      }
    }
    activate(shape, shape.has_gate ? gate : nullptr, up, up, kBlock * n);
    for (int64_t t = 0; t < n; ++t) memcpy(scratch.h + t * F + b * kBlock, up + t * kBlock, kBlock * sizeof(float));
  }
  constexpr int64_t DT = 64;  // rows of down at once
  for (int64_t d = 0; d < D; d += DT) {
    const int64_t rows = D - d < DT ? D - d : DT;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t b = 0; b < count; ++b)
        convert(blocks.down(item.block_begin + b) + (d + r) * kBlock, kBlock, scratch.weights + r * F + b * kBlock);
    many_rows(scratch.weights, F, rows, scratch.h, F, n, F, y + d, D, true);
  }
}

template <class T>
inline void item_of(const Shape& shape, const Item& item, const Scratch& scratch) {
  float* y = item.partial;
  memset(y, 0, sizeof(float) * item.tokens * shape.hidden);
  if (item.tokens <= moestro::kThinTokens) thin_item<T>(shape, item, scratch, y);
  else many_item<T>(shape, item, scratch, y);
  if (item.add_down_bias) {
    const int64_t blocks = (shape.neurons + kBlock - 1) / kBlock;
    const float* bias = reinterpret_cast<const float*>(item.packed + blocks * moestro::block_bytes(shape));
    for (int64_t t = 0; t < item.tokens; ++t)
      for (int64_t d = 0; d < shape.hidden; ++d) y[t * shape.hidden + d] += bias[d];
  }
}

void run_item(const Shape& shape, const float* x, const Item& item, const Scratch& scratch) {
  for (int64_t t = 0; t < item.tokens; ++t) {
    memcpy(scratch.x + t * shape.hidden, x + item.rows[t] * shape.hidden, sizeof(float) * shape.hidden);
  }
  switch (shape.format) {
    case Format::kFp32: item_of<float>(shape, item, scratch); break;
    case Format::kFp16: item_of<Fp16>(shape, item, scratch); break;
    case Format::kBf16: item_of<Bf16>(shape, item, scratch); break;
  }
}

void axpy(float a, const float* x, float* y, int64_t n) {
  int64_t i = 0;
  const V av = V::set(a);
  for (; i + W <= n; i += W) fma(av, V::load(x + i), V::load(y + i)).store(y + i);
  for (; i < n; ++i) y[i] += a * x[i];
}

// The two loops that limits are measured with: nothing but reading, nothing but multiplying and adding.
float sum_of(const float* x, int64_t n, int64_t prefetch) {
  V acc[8];
  for (V& a : acc) a = V::zero();
  constexpr int64_t kStep = 8 * W;
  int64_t i = 0;
  if (prefetch < 0) {  // as the kernels read, four rows at a time: hardware prefetchers like several streams
    const int64_t quarter = n / 4 / (2 * W) * (2 * W);
    for (int64_t k = 0; k < quarter; k += 2 * W)
      for (int j = 0; j < 8; ++j) acc[j] = acc[j] + V::load(x + (j / 2) * quarter + k + (j % 2) * W);
    i = 4 * quarter;
  }
  for (; i + kStep <= n; i += kStep) {
#if defined(__GNUC__)
    if (prefetch > 0) {
      for (int64_t j = 0; j < kStep; j += 16) __builtin_prefetch(x + i + prefetch + j);  // a cache line is 16 floats
    }
#endif
    for (int j = 0; j < 8; ++j) acc[j] = acc[j] + V::load(x + i + j * W);
  }
  (void)prefetch;
  V total = V::zero();
  for (const V& a : acc) total = total + a;
  float value = sum(total);
  for (; i < n; ++i) value += x[i];
  return value;
}

double fma_of(int64_t rounds) {
  constexpr int kChains = 12;  // more than latency x units of any core here, and few enough for 16 registers
  V acc[kChains];
  for (int j = 0; j < kChains; ++j) acc[j] = V::set(1.0f + 0.01f * static_cast<float>(j));
  const V a = V::set(0.999999f), b = V::set(1e-6f);
  for (int64_t i = 0; i < rounds; ++i)
    for (int j = 0; j < kChains; ++j) acc[j] = fma(acc[j], a, b);
  V total = V::zero();
  for (const V& v : acc) total = total + v;
  volatile float sink = sum(total);  // so that the loop is not taken out
  (void)sink;
  return 2.0 * kChains * W * static_cast<double>(rounds);
}

}  // namespace

namespace moestro {
const Level MOESTRO_LEVEL = {MOESTRO_LEVEL_NAME, run_item, axpy, sum_of, fma_of};
}
