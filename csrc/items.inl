// What one item of a call computes: a share of an expert, some panels of a dense layer, or one row of a table.

namespace {

inline V gelu_tanh(V x) {
  const V inner = V::set(0.7978845608028654f) * fma(V::set(0.044715f) * x * x, x, x);
  return x * vsigmoid(inner + inner);
}

// h[i] = activation(gate[i], up[i]) for a block of neurons; gate is nullptr where the family has none.
inline void activate(const Shape& shape, const float* gate, const float* up, float* h) {
  if (shape.activation == Activation::kGeluErf) {  // no vector erf: few families, and F is small beside F * D
    for (int64_t i = 0; i < kBlock; ++i) {
      const float a = gate ? gate[i] : up[i];
      const float g = 0.5f * a * (1.0f + erff(a * 0.70710678118654752f));
      h[i] = gate ? g * up[i] : g;
    }
    return;
  }
  for (int64_t i = 0; i < kBlock; i += W) {
    const V u = V::load(up + i);
    const V a = gate ? V::load(gate + i) : u;
    V g;
    switch (shape.activation) {
      case Activation::kSilu: g = a * vsigmoid(a); break;
      case Activation::kGeluTanh: g = gelu_tanh(a); break;
      case Activation::kRelu2: g = vmax(V::zero(), a) * vmax(V::zero(), a); break;
      default: {
        const V limit = V::set(shape.limit);
        const V clamped = vmin(limit, a);
        const V up1 = vmax(V::zero() - limit, vmin(limit, u)) + V::set(shape.offset);
        (clamped * vsigmoid(V::set(shape.alpha) * clamped) * up1).store(h + i);
        continue;
      }
    }
    (gate ? g * u : g).store(h + i);
  }
}

inline void add_bias(const float* bias, float* rows, int64_t width, int64_t ld, int64_t n) {
  for (int64_t t = 0; t < n; ++t)
    for (int64_t i = 0; i < width; ++i) rows[t * ld + i] += bias[i];
}

// Where a thread keeps what, in its scratch memory.
struct Places {
  float *row, *x, *first, *h, *tile, *out;
  Places(const Scratch& scratch, int64_t K, int64_t n) {
    row = scratch.memory;
    x = row + moestro::round_up(K, kGroup);
    n = moestro::padded(n);
    first = x + n * moestro::round_up(K, kGroup);
    h = first + 2 * n * kBlock;
    tile = h + n * kBlock * (n <= moestro::kThinTokens ? 1 : moestro::kMostBlocks);
    out = tile + 4 * kPanel * kTileColumns;
  }
};

// One row of x as float32, with zeros behind it up to a whole group.
inline void read_row(const Input& x, int64_t row, float* to) {
  const int64_t n = x.width;
  if (x.type == Format::kFp32) {
    memcpy(to, static_cast<const float*>(x.data) + row * n, sizeof(float) * n);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(x.data) + row * n;
    if (x.type == Format::kBf16) for (int64_t i = 0; i < n; ++i) to[i] = scalar_from_bf16(from[i]);
    else for (int64_t i = 0; i < n; ++i) to[i] = scalar_from_fp16(from[i]);
  }
  for (int64_t i = n; i < moestro::round_up(n, kGroup); ++i) to[i] = 0;
}

// Packs the item's tokens, unless this thread did so for its last item.
inline Tokens pack_input(const Input& x, const int64_t* rows, int64_t n, Packing as, const Places& places, Scratch& scratch) {
  const Tokens tokens(n, x.width, as, places.x);
  const bool same = scratch.packed_as == static_cast<int>(as) && scratch.packed_tokens == n &&
                    memcmp(scratch.packed_rows, rows, n * sizeof(int64_t)) == 0;
  if (same) return tokens;
  pack(tokens, 0, tokens.columns, [&](int64_t t) {
    read_row(x, rows[t], places.row);
    return places.row;
  });
  scratch.packed_rows = rows;
  scratch.packed_tokens = n;
  scratch.packed_as = static_cast<int>(as);
  return tokens;
}

// Asks for the first bytes of each stream that a product of few tokens will read, while another one computes.
inline void ask_for(const uint8_t* w, int64_t stride, int64_t panels) {
  for (int64_t p = 0; p < 4; ++p)
    for (int64_t i = 0; i < kAhead; i += 64) prefetch(w + panels / 4 * p * stride + i);
}

template <class F>
inline void item_of(const Shape& shape, const Input& input, const Item& item, Scratch& scratch) {
  const int64_t D = shape.hidden, n = item.tokens, wide = moestro::round_up(D, kPanel);
  const bool thin = n <= moestro::kThinTokens;
  const Places at(scratch, D, n);
  const Tokens x = pack_input(input, item.rows, n, packing_of<F>(n, input.type), at, scratch);
  const Tokens h(n, thin ? kBlock : (item.block_end - item.block_begin) * kBlock, packing_of<F>(n, Format::kFp32), at.h);
  const TileRows configured(x.tile_rows());
  const int64_t row_panel = moestro::panel_bytes(shape.format, D), down_panel = moestro::panel_bytes(shape.format, kBlock);
  const int64_t first = shape.has_gate ? 2 * kBlock : kBlock;  // rows of gate and up, one behind the other
  const int64_t size = moestro::block_bytes(shape), down = first / kPanel * row_panel;
  const uint8_t* block = item.packed + item.block_begin * size;
  float* y = item.partial;
  for (int64_t b = item.block_begin; b < item.block_end; ++b, block += size) {
    if (thin) ask_for(block + down, down_panel, wide / kPanel);
    product<F>({block, row_panel, at.first, kPanel, first, false}, first / kPanel, D, x, at.tile);
    const float* bias = reinterpret_cast<const float*>(block + down + wide / kPanel * down_panel);
    if (shape.has_bias) add_bias(bias, at.first, first, first, n);
    for (int64_t t = 0; t < n; ++t) {
      float* up = at.first + t * first + first - kBlock;
      activate(shape, shape.has_gate ? at.first + t * first : nullptr, up, up);
    }
    pack(h, thin ? 0 : (b - item.block_begin) * kBlock, kBlock, [&](int64_t t) { return at.first + t * first + first - kBlock; });
    if (!thin) continue;
    const uint8_t* next = b + 1 < item.block_end ? block + size : item.likely_next;
    if (next) ask_for(next, row_panel, first / kPanel);
    product<F>({block + down, down_panel, y, kPanel, wide, b > item.block_begin}, wide / kPanel, kBlock, h, at.tile);
  }
  if (!thin && h.tiled()) {
    tile_product<F>({item.packed + item.block_begin * size + down, down_panel, y, kPanel, wide, false}, size, wide / kPanel,
                    h.columns, h, at.tile);
  } else if (!thin) {  // down of all blocks at once, so that y is read and written seldom
    const uint8_t* begin = item.packed + item.block_begin * size + down;
    many_product(y, wide, wide / kPanel, h.columns, h, at.tile, [&](int64_t panel, int64_t k, int64_t count, float* to) {
      for (int64_t j = k; j < k + count; j += kBlock, to += kBlock * kPanel)
        convert<F>(begin + j / kBlock * size + panel * down_panel, 0, kBlock, to);
    });
  }
  if (item.add_down_bias) {
    const int64_t blocks = (shape.neurons + kBlock - 1) / kBlock;
    add_bias(reinterpret_cast<const float*>(item.packed + blocks * size), y, D, wide, n);
  }
}

inline void write_row(const float* from, const float* bias, int64_t count, Format type, void* out, int64_t at) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = from[i] + (bias ? bias[i] : 0.0f);
    if (type == Format::kFp32) static_cast<float*>(out)[at + i] = value;
    else static_cast<uint16_t*>(out)[at + i] = type == Format::kBf16 ? bf16_of(value) : fp16_of(value);
  }
}

template <class F>
inline void linear_of(const Input& input, const LinearItem& item, Scratch& scratch) {
  const moestro::Linear& linear = *item.linear;
  const int64_t n = item.tokens, K = linear.columns, stride = moestro::panel_bytes(linear.format, K);
  const Places at(scratch, K, n);
  const Tokens x = pack_input(input, item.rows, n, packing_of<F>(n, input.type), at, scratch);
  const TileRows configured(x.tile_rows());
  for (int64_t p = item.panel_begin; p < item.panel_end; p += 4) {
    const int64_t panels = item.panel_end - p < 4 ? item.panel_end - p : 4, r = p * kPanel;
    product<F>({linear.packed + p * stride, stride, at.out, kPanel, 4 * kPanel, false}, panels, K, x, at.tile);
    const int64_t count = linear.rows - r < panels * kPanel ? linear.rows - r : panels * kPanel;
    for (int64_t t = 0; t < n; ++t) {
      write_row(at.out + t * 4 * kPanel, linear.bias ? linear.bias + r : nullptr, count, linear.out_type, linear.out,
                item.rows[t] * linear.rows + r);
    }
  }
}

void run_item(const Shape& shape, const Input& x, const Item& item, Scratch& scratch) {
  switch (shape.format) {
    case Format::kFp32: return item_of<Fp32>(shape, x, item, scratch);
    case Format::kFp16: return item_of<Fp16>(shape, x, item, scratch);
    case Format::kBf16: return item_of<Bf16>(shape, x, item, scratch);
    case Format::kInt8: return item_of<Int8>(shape, x, item, scratch);
    case Format::kInt4: return item_of<Int4>(shape, x, item, scratch);
  }
}

void run_linear(const Input& x, const LinearItem& item, Scratch& scratch) {
  switch (item.linear->format) {
    case Format::kFp32: return linear_of<Fp32>(x, item, scratch);
    case Format::kFp16: return linear_of<Fp16>(x, item, scratch);
    case Format::kBf16: return linear_of<Bf16>(x, item, scratch);
    case Format::kInt8: return linear_of<Int8>(x, item, scratch);
    case Format::kInt4: return linear_of<Int4>(x, item, scratch);
  }
}

// One row of a panel of K columns; `tile` has room for a tile of 512 columns.
template <class F>
inline void lane_of(const uint8_t* panel, int64_t lane, int64_t K, float* tile, float* to) {
  for (int64_t k = 0; k < K; k += kTileColumns) {
    const int64_t count = K - k < kTileColumns ? K - k : kTileColumns;
    convert<F>(panel, k, count, tile);
    for (int64_t i = 0; i < count; ++i) to[k + i] = tile[i * kPanel + lane];
  }
}

void unpack_row(Format format, const uint8_t* panel, int64_t lane, int64_t K, float* tile, float* to) {
  switch (format) {
    case Format::kFp32: return lane_of<Fp32>(panel, lane, K, tile, to);
    case Format::kFp16: return lane_of<Fp16>(panel, lane, K, tile, to);
    case Format::kBf16: return lane_of<Bf16>(panel, lane, K, tile, to);
    case Format::kInt8: return lane_of<Int8>(panel, lane, K, tile, to);
    case Format::kInt4: return lane_of<Int4>(panel, lane, K, tile, to);
  }
}

}  // namespace
