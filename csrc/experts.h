// The expert FFN of one layer step on the CPU: what the bindings call and what each ISA level implements.
//
// Legend: T tokens, D model width, F expert neurons, B = 64 neurons a block, n tokens of one expert.
//
// An expert is packed in blocks of neurons: gate rows [B, D], up rows [B, D], the matching down columns as
// [D, B], then float32 biases; after the last block the float32 down bias [D]. See memory/formats in Python.
//
// Work is cut into items of (expert, tile of tokens, chunk of blocks). The cut depends on the work alone and
// never on the number of threads, each item fills its own partial result, and partial results are added in
// the order of the items: so results are equal, bit for bit, with any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moestro {

constexpr int64_t kBlock = 64;

enum class Format : int { kFp32 = 0, kFp16 = 1, kBf16 = 2 };

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
  Format format = Format::kBf16;
  Activation activation = Activation::kSilu;
  float alpha = 0;  // these three of kClampedSwiglu
  float limit = 0;
  float offset = 0;
};

// Bytes of one weight, and of one block of neurons.
int64_t weight_bytes(Format format);
int64_t block_bytes(const Shape& shape);

// One expert's share of a step: the neurons [neuron_begin, neuron_end) for n tokens.
struct Work {
  const uint8_t* packed = nullptr;
  int64_t neuron_begin = 0;
  int64_t neuron_end = 0;
  const int64_t* rows = nullptr;    // [n]: which tokens of x
  const float* weights = nullptr;   // [n]: their routing weights
  int64_t tokens = 0;               // n
};

// What one item computes: `tokens` rows of x through some whole blocks of one expert, into partial [tokens, D].
struct Item {
  const uint8_t* packed;
  int64_t block_begin, block_end;  // blocks of the expert
  const int64_t* rows;             // [tokens]
  int64_t tokens;
  bool add_down_bias;
  float* partial;                  // [tokens, D], written and not read
};

// Per thread scratch memory, sized for the largest item of a call.
struct Scratch {
  float* x;        // [tokens, D] gathered rows
  float* h;        // [tokens, neurons of a chunk]
  float* weights;  // converted tile
};

// One level of instruction sets. All levels compute the same mathematics in float32.
struct Level {
  const char* name;
  void (*run_item)(const Shape& shape, const float* x, const Item& item, const Scratch& scratch);
  void (*axpy)(float a, const float* x, float* y, int64_t n);  // y += a * x
  // Of n floats: one stream, prefetching so many floats ahead (0: not), or four streams at once (-1).
  float (*sum)(const float* x, int64_t n, int64_t prefetch);
  double (*fma)(int64_t rounds);                               // floating-point operations of a register-only loop
};

extern const Level kScalar;
#if defined(MOESTRO_X86)
extern const Level kAvx2;
extern const Level kAvx512;
#endif
#if defined(MOESTRO_NEON)
extern const Level kNeon;
#endif

// The best level that this CPU runs, or the one of that name; nullptr when it cannot run here.
const Level* best_level();
const Level* find_level(const char* name);
// Names of the levels compiled in, best first, and whether this CPU runs each.
int compiled_levels(const char** names, bool* usable, int capacity);

// How an item is cut: tokens of a tile and blocks of a chunk, from the work alone.
constexpr int64_t kThinTokens = 16;   // up to here each weight is read once and used for all tokens
constexpr int64_t kTileTokens = 96;   // of an item with more
constexpr int64_t kChunkBlocks = 16;  // 1,024 neurons: what a tile's H keeps in cache
inline int64_t chunk_blocks(int64_t blocks) {
  // Enough chunks for the cores of large machines, few enough that partial results stay small.
  int64_t chunk = (blocks + 15) / 16;
  return chunk < 2 ? 2 : chunk > kChunkBlocks ? kChunkBlocks : chunk;
}

}  // namespace moestro
