// One token through a decoder layer: all that stands before its experts, its router's choice of them, and the experts.
#pragma once

#include <vector>

#include "attention.h"

namespace moestro {

// Where the keys and values of one layer's cache are, [G, length, d]: heads `apart` elements apart, the last token the
// one that is on its way.
struct CachePlace {
  void *keys, *values;
  int64_t length, apart;
};

// hidden = x + attention(norm(x)); normed = norm(hidden).
struct FirstHalf {
  Attention attention;
  Linear output;  // of the attention
  Norm before, after;

  // x, hidden and normed [D], cosine and sine [turned], all of the attention's type, as is the cache, whose last token
  // is written here.
  void run(Runner& runner, const Level& level, const void* x, const void* cosine, const void* sine, int64_t turned,
           const CachePlace& cache, void* hidden, void* normed) const;
};

// Softmax over all experts, then the best k of them.
struct Router {
  const void* weight = nullptr;  // [E, D]
  Type type = Type::kBf16;   // of weight, activations and logits
  int64_t experts = 0, hidden = 0, top_k = 0;
  bool normalized = false;  // the k scores sum to 1
  Type score_type = Type::kBf16;

  // x [D] -> logits [E], scores [k], chosen [k], best first, equals as torch.topk orders them.
  void run(Runner& runner, const Level& level, const void* x, void* logits, void* scores, int64_t* chosen) const;
};

// A whole layer whose experts are all in RAM: hidden = x + attention(norm(x)), then hidden += experts(norm(hidden)).
struct DecoderLayer {
  FirstHalf first;
  Router router;  // of the attention's type
  Shape shape;
  std::vector<const uint8_t*> experts;  // packed, [E]

  // As FirstHalf's. Returns how many experts computed.
  int64_t run(Runner& runner, const Level& level, const void* x, const void* cosine, const void* sine, int64_t turned,
              const CachePlace& cache, void* hidden) const;
};

// Layers that follow one another, through all of which a token goes in one call.
struct DecoderLayers {
  std::vector<DecoderLayer> layers;

  // As a layer's, with a cache for each.
  int64_t run(Runner& runner, const Level& level, const void* x, const void* cosine, const void* sine, int64_t turned,
              const CachePlace* caches, void* hidden) const;
};

}  // namespace moestro
