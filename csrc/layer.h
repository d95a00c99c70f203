// Few tokens through a decoder layer: all that stands before its experts, its router's choice of them, and the experts.
#pragma once

#include <vector>

#include "attention.h"

namespace moestro {

// hidden = x + attention(norm(x)); normed = norm(hidden).
struct FirstHalf {
  Attention attention;
  Linear output;  // of the attention
  Norm before, after;

  // x, hidden and normed [T, D] of the attention's type, as is the cache, to which the step's own tokens are written.
  void run(Runner& runner, const Level& level, const void* x, const Step& step, const CachePlace& cache, void* hidden,
           void* normed) const;
};

// Softmax over all experts, then the best k of them.
struct Router {
  const void* weight = nullptr;  // [E, D]
  Type type = Type::kBf16;   // of weight, activations and logits
  int64_t experts = 0, hidden = 0, top_k = 0;
  bool normalized = false;  // the k scores sum to 1
  Type score_type = Type::kBf16;

  // x [T, D] -> logits [T, E], scores [T, k], chosen [T, k], best first, equals as torch.topk orders them.
  void run(Runner& runner, const Level& level, const void* x, int64_t tokens, void* logits, void* scores,
           int64_t* chosen) const;

 private:
  // One token's logits [E] -> scores [k], chosen [k].
  void choose(float* logits, float* scores, int64_t* chosen) const;
};

// How many experts computed, and for how many tokens in all: a token counts once for each of its experts.
struct Asked {
  int64_t experts = 0, tokens = 0;
};

// A whole layer whose experts are all in RAM: hidden = x + attention(norm(x)), then hidden += experts(norm(hidden)).
struct DecoderLayer {
  FirstHalf first;
  Router router;  // of the attention's type
  Shape shape;
  std::vector<const uint8_t*> experts;  // packed, [E]

  // As FirstHalf's. Returns what the experts were asked for.
  Asked run(Runner& runner, const Level& level, const void* x, const Step& step, const CachePlace& cache, void* hidden) const;
};

// Layers that follow one another, through all of which a step goes in one call.
struct DecoderLayers {
  std::vector<DecoderLayer> layers;

  // As a layer's, with a cache for each.
  Asked run(Runner& runner, const Level& level, const void* x, const Step& step, const CachePlace* caches, void* hidden) const;
};

}  // namespace moestro
