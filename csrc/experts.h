// Matrix products with packed weights on the CPU: what the bindings call and what each ISA level implements.
//
// Legend: T tokens, D model width, F expert neurons, n tokens of one item, R rows and K columns of a matrix.
//
// A matrix [R, K] is packed in panels of 16 rows. A panel lies in the order of K, the 16 rows side by side, so
// one vector holds one column of 16 rows: it is multiplied with a broadcast activation, and nothing is ever
// summed across a vector. See formats.h for the bytes of each format.
//
// An expert is packed in blocks of B neurons: gate rows [B, D], up rows [B, D] and the matching down columns
// as a matrix [D, B], each in a format of its own, then float32 biases; after the last block the float32 down bias [D].
// Where the columns of gate and up are in an order of their own (act-order), the orders stand before the first block:
// int32 [D] each, filled up to a cache line. Column k of a matrix then meets number order[k] of a token. With kColumn the
// tables of gate, up and down stand there (formats.h), neurons are in the order of gate's classes of rows, and the
// outputs of down come in the order of its own, out of which the sum of all parts puts them.
//
// An expert's sum is taken in segments of some blocks, each from zero, which are added in their order: where they end
// depends on the shape alone, so a token's result has the same bits whatever is computed beside it. Work is cut into items
// of (expert, tile of tokens, one segment or all), each fills its own partial result, and these are added in the order of
// the items: so results are equal, bit for bit, with any number of threads.
#pragma once

#include <algorithm>

#include "formats.h"

namespace moestro {

constexpr int64_t kLineBytes = 64;  // of a cache line, on which packed weights begin
constexpr int64_t kMostBlock = 256;  // neurons of a block

enum class Type : int { kFp32 = 0, kFp16 = 1, kBf16 = 2 };  // of activations

enum class Activation : int {
  kSilu = 0,         // silu(gate) * up, or silu(up) without a gate
  kGeluErf = 1,      // by the error function
  kGeluTanh = 2,     // by the tanh approximation
  kRelu2 = 3,        // relu(.)^2
  kClampedSwiglu = 4,  // gate clamped above, up on both sides: gate * sigmoid(alpha gate) * (up + offset)
};

struct Shape {
  int64_t hidden = 0;   // D
  int64_t neurons = 0;  // F
  bool has_gate = true;
  bool has_bias = false;
  MatrixFormat gate, up, down;
  int64_t block = 64;   // B, neurons of a block
  Activation activation = Activation::kSilu;
  float alpha = 0;  // these three of kClampedSwiglu
  float limit = 0;
  float offset = 0;
  int64_t orders = 0;  // of columns: none, one of gate and up together, or gate's and then up's

  int64_t blocks() const { return (neurons + block - 1) / block; }
};

int64_t block_bytes(const Shape& shape);  // of one block of neurons
inline int64_t order_bytes(const Shape& shape) { return round_up(shape.hidden * 4, kLineBytes); }
int64_t head_bytes(const Shape& shape);  // before the first block

// An expert's tables, of an address that begins an expert; empty ones of other formats.
struct Tables {
  ColumnTable gate, up, down;
};
Tables tables_of(const Shape& shape, const uint8_t* packed);

inline int64_t size_of(Type type) { return type == Type::kFp32 ? 4 : 2; }  // of an activation's types

// Activations as they come: rows of fp32, fp16 or bf16.
struct Input {
  const void* data;
  Type type;
  int64_t width;  // elements of a row
};

// One expert's share of a step: the neurons [neuron_begin, neuron_end) for n tokens.
struct Work {
  const uint8_t* packed = nullptr;  // with its orders, if it has any
  int64_t neuron_begin = 0;
  int64_t neuron_end = 0;
  const int64_t* rows = nullptr;   // [n]: which tokens of x
  const float* weights = nullptr;  // [n]: their routing weights
  int64_t tokens = 0;              // n
};

// What one item computes: n rows of x through some whole blocks of one expert, into its partial result.
struct Item {
  const uint8_t* packed;           // from the first block on
  const int32_t *gate_order, *up_order;  // [D], or none
  Tables tables;
  int64_t block_begin, block_end;  // blocks of the expert: one segment, or all
  int64_t segment;                 // blocks
  const int64_t* rows;             // [n]
  int64_t tokens;                  // n
  bool add_down_bias;
  float* partial;                  // [n padded, D rounded up to panels], written and not read
  const uint8_t* likely_next;      // where the thread will probably read next, or none
};

// A dense layer: out = x W^T + bias.
struct Linear {
  const uint8_t* packed = nullptr;
  int64_t rows = 0, columns = 0;  // R, K
  MatrixFormat format;
  const float* bias = nullptr;    // [R] or none
  void* out = nullptr;            // [T, R]
  Type out_type = Type::kFp32;
};

// n rows of x through the panels [panel_begin, panel_end) of a linear layer.
struct LinearItem {
  const Linear* linear;
  int64_t panel_begin, panel_end;
  const int64_t* rows;
  int64_t tokens;
};

// Tokens that a thread has packed, and how.
struct PackedTokens {
  const int64_t* rows = nullptr;
  const int32_t* order = nullptr;
  int64_t count = 0;
  int as = -1;  // of no tokens
};

// Scratch memory of a thread, and which tokens it has already packed.
struct Scratch {
  float* memory = nullptr;  // scratch_floats() of the call's widest item
  PackedTokens packed[2];
};

constexpr int64_t kThinTokens = 16;   // up to here weights are bound by memory, and go block by block
constexpr int64_t kAloneTokens = 64;  // up to here a token's result has the bits that it has alone
constexpr int64_t kTileTokens[] = {256, 128, 96};  // of an item with more: the largest that leaves all threads enough items
constexpr int64_t kThinItemPanels = 8, kItemPanels = 32;  // of a linear layer's item
constexpr int64_t kTileColumns = 512;  // of a tile of converted weights, 4 panels high
constexpr int64_t kTileBytes = 4 * kPanel * kTileColumns * 4;
constexpr int64_t kLeastNeurons = 128, kMostNeurons = 1024;  // of a segment, in whole blocks
// Rows of results that there is room for: matrix tiles fill up the last of several tiles.
inline int64_t padded(int64_t n) { return n <= 16 ? n : round_up(n, 16); }
// Rows of packed tokens: many have some more, so that their chunks do not lie on the same sets of the cache.
inline int64_t packed_rows(int64_t n) { return n <= 32 ? padded(n) : padded(n) + 5; }
inline int64_t scratch_floats(int64_t K, int64_t n, int64_t block) {
  const bool thin = n <= kThinTokens;
  const int64_t rows = packed_rows(n), wide = round_up(K, kGroup), neurons = thin ? block : kMostNeurons;
  n = padded(n);
  return wide + 2 * rows * wide + 2 * n * block + rows * neurons + kTileBytes / 4 + n * std::max(thin ? wide : 0, 4 * kPanel);
}
// Blocks of a segment: enough segments for the cores of large machines, few enough that partial results stay small.
inline int64_t segment_blocks(const Shape& shape, int64_t n) {
  const int64_t segments = n <= kAloneTokens ? 16 : 4, blocks = (shape.blocks() + segments - 1) / segments;
  const int64_t least = (kLeastNeurons + shape.block - 1) / shape.block, most = kMostNeurons / shape.block;
  return blocks < least ? least : blocks > most ? most : blocks;
}

constexpr int64_t kNearTokens = 64;  // whose keys, and then values, stay in a core's first caches while all queries take them

// Some queries against keys and values that they share.
struct Attend {
  const float* queries;          // [n, d]
  int64_t n, d;
  const uint8_t *keys, *values;  // [count, d] of `type`
  Type type;
  int64_t count;
  const int64_t* seen;           // [n]: how many of the tokens, from the first on, a query sees
  float scaling;
  float* scores;                 // [n, count rounded up to kNearTokens], scratch
  float* near;                   // [2, kNearTokens, d], scratch
  const uint8_t* likely_next;    // keys that the thread will probably read next, or none
  int64_t shared;                // query heads of a key head; 0 for more tokens than results must be the same bits for
  float *out, *most, *total;     // [n, d]: sums of values times exp(score - most), and [n] each: most, and these weights' sum
};

struct Fit;  // solver.h

// One level of instruction sets. All levels compute the same mathematics.
struct Level {
  const char* name;
  void (*run_item)(const Shape& shape, const Input& x, const Item& item, Scratch& scratch);
  void (*run_linear)(const Input& x, const LinearItem& item, Scratch& scratch);
  // A row of a matrix as float32; `tile` has room for 16 rows of kTileColumns.
  void (*unpack_row)(const Linear& matrix, int64_t row, float* tile, float* to);
  void (*rms_norm)(const Input& x, int64_t at, const float* weight, float offset, float epsilon, void* out, float* row);
  void (*read)(const Input& x, float* to);  // the first row, with zeros up to a whole group
  void (*write)(const float* from, int64_t count, Type type, void* to);
  void (*rotate_row)(const Input& x, void* out, int64_t head, const float* cosine, const float* sine, int64_t turned,
                     float* row);
  void (*attend)(const Attend& some);
  void (*dot_rows)(const float* x, const uint8_t* rows, Type type, int64_t count, int64_t K, float* out);
  void (*axpy)(float a, const float* x, float* y, int64_t n);  // y += a * x
  // Of n floats: one stream, prefetching so many floats ahead (0: not), or four streams at once (-1).
  float (*sum)(const float* x, int64_t n, int64_t prefetch);
  double (*fma)(int64_t rounds);  // operations of a register-only loop, of floats
  double (*dots)(int64_t rounds);  // and of what codes meet
  // Half-quadratic quantization of groups [begin, end): the errors of each iteration, and the codes after some. Both
  // return the number of the first group with a weight that is not finite, or -1.
  int64_t (*fit_groups)(const Fit& matrix, int64_t begin, int64_t end, double* errors);
  int64_t (*code_groups)(const Fit& matrix, int64_t begin, int64_t end, int iterations);
};

extern const Level kScalar;
#if defined(MOESTRO_X86)
extern const Level kAvx2;
extern const Level kAvx512;
extern const Level kAvx512Vnni;
#endif
#if defined(MOESTRO_AMX)
extern const Level kAmx;
#endif
#if defined(MOESTRO_NEON)
extern const Level kNeon;
#endif

// The best level that this CPU runs, or the one of that name; nullptr when it cannot run here.
const Level* best_level();
const Level* find_level(const char* name);
// Names of the levels compiled in, best first, and whether this CPU runs each.
int compiled_levels(const char** names, bool* usable, int capacity);

}  // namespace moestro
