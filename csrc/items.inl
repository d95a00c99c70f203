// What one item of a call computes: a share of an expert, some panels of a dense layer, or one row of a table.

namespace {

inline V gelu_tanh(V x) {
  const V inner = V::set(0.7978845608028654f) * fma(V::set(0.044715f) * x * x, x, x);
  return x * vsigmoid(inner + inner);
}

// h[i] = activation(gate[i], up[i]) for a block of neurons; gate is nullptr where the family has none.
inline void activate(const Shape& shape, const float* gate, const float* up, float* h) {
  if (shape.activation == Activation::kGeluErf) {  // no vector erf: few families, and F is small beside F * D
    for (int64_t i = 0; i < shape.block; ++i) {
      const float a = gate ? gate[i] : up[i];
      const float g = 0.5f * a * (1.0f + erff(a * 0.70710678118654752f));
      h[i] = gate ? g * up[i] : g;
    }
    return;
  }
  for (int64_t i = 0; i < shape.block; i += W) {
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
  float *row, *x[2], *first, *h, *tile, *out;
  Places(const Scratch& scratch, int64_t K, int64_t n, int64_t block) {
    const int64_t wide = moestro::round_up(K, kGroup), neurons = n <= moestro::kThinTokens ? block : moestro::kMostNeurons;
    const int64_t rows = moestro::packed_rows(n);
    row = scratch.memory;
    x[0] = row + wide;
    x[1] = x[0] + rows * wide;
    first = x[1] + rows * wide;
    h = first + 2 * moestro::padded(n) * block;
    tile = h + rows * neurons;
    out = tile + moestro::kTileBytes / 4;
  }
};

// One row of x as float32, in that order or in its own, with zeros behind it up to a whole group.
inline void read_row(const Input& x, int64_t row, const int32_t* order, float* to) {
  const int64_t n = x.width;
  if (order != nullptr) {
    const float* floats = static_cast<const float*>(x.data) + row * n;
    const uint16_t* from = static_cast<const uint16_t*>(x.data) + row * n;
    if (x.type == Type::kFp32) for (int64_t i = 0; i < n; ++i) to[i] = floats[order[i]];
    else if (x.type == Type::kBf16) for (int64_t i = 0; i < n; ++i) to[i] = scalar_from_bf16(from[order[i]]);
    else for (int64_t i = 0; i < n; ++i) to[i] = scalar_from_fp16(from[order[i]]);
  } else if (x.type == Type::kFp32) {
    memcpy(to, static_cast<const float*>(x.data) + row * n, sizeof(float) * n);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(x.data) + row * n;
    if (x.type == Type::kBf16) for (int64_t i = 0; i < n; ++i) to[i] = scalar_from_bf16(from[i]);
    else for (int64_t i = 0; i < n; ++i) to[i] = scalar_from_fp16(from[i]);
  }
  for (int64_t i = n; i < moestro::round_up(n, kGroup); ++i) to[i] = 0;
}

// Packs the item's tokens into one of two places, unless this thread did so for its last item.
inline Tokens pack_input(const Input& x, const int64_t* rows, int64_t n, const int32_t* order, Packing as,
                         const Places& places, int place, Scratch& scratch) {
  const Tokens tokens(n, x.width, as, places.x[place]);
  moestro::PackedTokens& packed = scratch.packed[place];
  const int key = static_cast<int>(as.form) | as.groups << 4 | as.less << 8;
  const bool same = packed.as == key && packed.count == n && packed.order == order && memcmp(packed.rows, rows, n * sizeof(int64_t)) == 0;
  if (same) return tokens;
  pack(tokens, 0, tokens.columns, [&](int64_t t) {
    read_row(x, rows[t], order, places.row);
    return places.row;
  });
  packed = {rows, order, n, key};
  return tokens;
}

// Asks for the first bytes of each stream that a product of few tokens will read, while another one computes.
inline void ask_for(const uint8_t* w, int64_t stride, int64_t panels) {
  for (int64_t p = 0; p < 4; ++p)
    for (int64_t i = 0; i < kAhead; i += 64) prefetch(w + panels / 4 * p * stride + i);
}

// An item while it runs: what all its segments share.
struct Run {
  const Shape& shape;
  const Item& item;
  const Places& at;
  const Tokens &x, &up_x;  // what gate and up meet
  // Gate and up as one matrix, unless they have a table each.
  bool joined;
  int64_t gate_panel, up_panel, down_panel;  // bytes
  int64_t gate_bytes, down_at, block_bytes;  // within a block: of gate, where down begins, and in all
  int64_t panels, wide;                      // of a block, and D rounded up to panels

  Run(const Shape& s, const Item& i, const Places& places, const Tokens& tokens, const Tokens& up_tokens, bool as_one)
      : shape(s), item(i), at(places), x(tokens), up_x(up_tokens), joined(as_one),
        gate_panel(moestro::panel_bytes(s.has_gate ? s.gate : s.up, s.hidden)), up_panel(moestro::panel_bytes(s.up, s.hidden)),
        down_panel(moestro::panel_bytes(s.down, s.block)), gate_bytes(s.has_gate ? s.block / kPanel * gate_panel : 0),
        down_at(gate_bytes + s.block / kPanel * up_panel), block_bytes(moestro::block_bytes(s)), panels(s.block / kPanel),
        wide(moestro::round_up(s.hidden, kPanel)) {}

  const uint8_t* block(int64_t b) const { return item.packed + b * block_bytes; }
  Panels downs(int64_t b, int64_t p, float* out, int64_t ld, bool add) const {
    return {block(b) + down_at + p * down_panel, down_panel, out, kPanel, ld, add, {item.tables.down, p, b * shape.block}};
  }

  // Block b's neurons of all tokens: gate, up, activation.
  const float* neurons(int64_t b) const {
    const int64_t B = shape.block, first = shape.has_gate ? 2 * B : B, n = item.tokens;
    float* up_out = at.first + first - B;
    if (shape.has_gate) {
      const Panels gates{block(b), gate_panel, at.first, kPanel, first, false, {item.tables.gate, b * panels, 0}};
      product(shape.gate, gates, joined ? 2 * panels : panels, shape.hidden, x, at.tile);
    }
    const Panels ups{block(b) + gate_bytes, up_panel, up_out, kPanel, first, false, {item.tables.up, b * panels, 0}};
    if (!joined) product(shape.up, ups, panels, shape.hidden, up_x, at.tile);
    const float* bias = reinterpret_cast<const float*>(block(b) + down_at + wide / kPanel * down_panel);
    if (shape.has_bias) add_bias(bias, at.first, first, first, n);
    for (int64_t t = 0; t < n; ++t) {
      activate(shape, shape.has_gate ? at.first + t * first : nullptr, up_out + t * first, up_out + t * first);
    }
    return up_out;
  }

  // Down's outputs of blocks [begin, end), for few tokens: each block's as soon as its neurons are there.
  void few_tokens(int64_t begin, int64_t end, const Tokens& h, float* out) const {
    const int64_t B = shape.block, first = shape.has_gate ? 2 * B : B;
    for (int64_t b = begin; b < end; ++b) {
      ask_for(block(b) + down_at, down_panel, wide / kPanel);
      const float* of_block = neurons(b);
      pack(h, 0, B, [&](int64_t t) { return of_block + t * first; });
      const uint8_t* next = b + 1 < item.block_end ? block(b + 1) : item.likely_next;
      if (next) ask_for(next, gate_panel, joined ? 2 * panels : panels);
      product(shape.down, downs(b, 0, out, wide, b > begin), wide / kPanel, B, h, at.tile);
    }
  }

  // And for many: of all blocks at once, so that outputs are read and written seldom. Later segments are added to those
  // that are there, some panels at a time.
  void many_tokens(int64_t begin, int64_t end, const Tokens& h, const float* bias) const {
    const int64_t B = shape.block, first = shape.has_gate ? 2 * B : B, n = item.tokens, all = wide / kPanel;
    for (int64_t b = begin; b < end; ++b) {
      const float* of_block = neurons(b);
      pack(h, (b - begin) * B, B, [&](int64_t t) { return of_block + t * first; });
    }
    const auto multiply = [&](int64_t p, int64_t height, float* out, int64_t ld) {
      Panels to = downs(begin, p, out, ld, false);
      to.block_chunks = B / kGroup;
      to.block_apart = block_bytes;
      product(shape.down, to, height, (end - begin) * B, h, at.tile);
      const int64_t rows = shape.hidden - p * kPanel < height * kPanel ? shape.hidden - p * kPanel : height * kPanel;
      if (bias) add_bias(bias + p * kPanel, out, rows, ld, n);
    };
    if (begin == item.block_begin) return multiply(0, all, item.partial, wide);
    for (int64_t p = 0; p < all; p += 4) {
      const int64_t height = all - p < 4 ? all - p : 4;
      multiply(p, height, at.out, 4 * kPanel);
      for (int64_t t = 0; t < n; ++t) axpy(1, at.out + t * 4 * kPanel, item.partial + t * wide + p * kPanel, height * kPanel);
    }
  }
};

void run_item(const Shape& shape, const Input& input, const Item& item, Scratch& scratch) {
  const int64_t D = shape.hidden, B = shape.block, n = item.tokens;
  const bool thin = n <= moestro::kThinTokens, same_order = item.gate_order == item.up_order;
  const bool joined = shape.has_gate && shape.gate == shape.up && same_order && !moestro::is_strided(shape.up);
  const Places at(scratch, D, n, B);
  const Packing gate_as = packing_of(shape.has_gate ? shape.gate : shape.up, n, input.type), up_as = packing_of(shape.up, n, input.type);
  const Tokens x = pack_input(input, item.rows, n, item.gate_order, gate_as, at, 0, scratch);
  const Tokens up_x = up_as == gate_as && same_order ? x : pack_input(input, item.rows, n, item.up_order, up_as, at, 1, scratch);
  const Run run(shape, item, at, x, up_x, joined);
  const Packing down_as = packing_of(shape.down, n, Type::kFp32);
  for (int64_t b = item.block_begin; b < item.block_end; b += item.segment) {
    const int64_t end = b + item.segment < item.block_end ? b + item.segment : item.block_end;
    const bool has_bias = item.add_down_bias && end == item.block_end;
    const float* bias = has_bias ? reinterpret_cast<const float*>(run.block(shape.blocks())) : nullptr;
    const Tokens h(n, thin ? B : (end - b) * B, down_as, at.h);
    if (!thin) {
      run.many_tokens(b, end, h, bias);
      continue;
    }
    float* out = b == item.block_begin ? item.partial : at.out;
    run.few_tokens(b, end, h, out);
    if (bias) add_bias(bias, out, D, run.wide, n);
    if (out != item.partial) axpy(1, out, item.partial, n * run.wide);
  }
}

inline void write_number(float value, Type type, void* out, int64_t at) {
  if (type == Type::kFp32) static_cast<float*>(out)[at] = value;
  else static_cast<uint16_t*>(out)[at] = type == Type::kBf16 ? bf16_of(value) : fp16_of(value);
}

template <Type kType>
void write_row_of(const float* __restrict from, const float* __restrict bias, int64_t count, void* out, int64_t at) {
  if (bias) for (int64_t i = 0; i < count; ++i) write_number(from[i] + bias[i], kType, out, at + i);
  else for (int64_t i = 0; i < count; ++i) write_number(from[i], kType, out, at + i);
}

// A loop for each type: compilers then use vectors.
inline void write_row(const float* from, const float* bias, int64_t count, Type type, void* out, int64_t at) {
  if (type == Type::kFp32) write_row_of<Type::kFp32>(from, bias, count, out, at);
  else if (type == Type::kBf16) write_row_of<Type::kBf16>(from, bias, count, out, at);
  else write_row_of<Type::kFp16>(from, bias, count, out, at);
}

// Outputs of a dense layer from the place `first` on, one token's, which begin at `at` of its out.
inline void write_outputs(const moestro::Linear& linear, const float* from, int64_t first, int64_t count, int64_t at) {
  if (!moestro::is_strided(linear.format))
    return write_row(from, linear.bias ? linear.bias + first : nullptr, count, linear.out_type, linear.out, at + first);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = moestro::own_row(linear.format, linear.rows, first + i);
    write_number(from[i] + (linear.bias ? linear.bias[row] : 0.0f), linear.out_type, linear.out, at + row);
  }
}

inline ColumnTable table_of(const moestro::Linear& m) {
  if (!moestro::is_strided(m.format)) return {};
  const uint8_t* at = m.packed + moestro::panels_bytes(m.format, m.rows, m.columns);
  return {at, moestro::table_rows(m.format, m.rows), moestro::table_columns(m.columns)};
}

void run_linear(const Input& input, const LinearItem& item, Scratch& scratch) {
  const moestro::Linear& linear = *item.linear;
  const int64_t n = item.tokens, K = linear.columns, stride = moestro::panel_bytes(linear.format, K);
  const Places at(scratch, K, n, 0);
  const Tokens x = pack_input(input, item.rows, n, nullptr, packing_of(linear.format, n, input.type), at, 0, scratch);
  const ColumnTable table = table_of(linear);
  for (int64_t p = item.panel_begin; p < item.panel_end; p += 4) {
    const int64_t panels = item.panel_end - p < 4 ? item.panel_end - p : 4, r = p * kPanel;
    const Panels some{linear.packed + p * stride, stride, at.out, kPanel, 4 * kPanel, false, {table, p, 0}};
    product(linear.format, some, panels, K, x, at.tile);
    const int64_t count = linear.rows - r < panels * kPanel ? linear.rows - r : panels * kPanel;
    for (int64_t t = 0; t < n; ++t) write_outputs(linear, at.out + t * 4 * kPanel, r, count, item.rows[t] * linear.rows);
  }
}

// One row of a matrix; `tile` has room for a tile of 512 columns.
void unpack_row(const moestro::Linear& matrix, int64_t row, float* tile, float* to) {
  const int64_t K = matrix.columns, stride = moestro::panel_bytes(matrix.format, K);
  const int64_t place = moestro::place_of_row(matrix.format, matrix.rows, row), lane = place % kPanel;
  const Panels all{matrix.packed, stride, nullptr, 0, 0, false, {table_of(matrix), 0, 0}};
  for (int64_t k = 0; k < K; k += kTileColumns) {
    const int64_t count = K - k < kTileColumns ? K - k : kTileColumns;
    convert(matrix.format, all, place / kPanel, k, count, tile);
    for (int64_t i = 0; i < count; ++i) to[k + i] = tile[i * kPanel + lane];
  }
}

}  // namespace
