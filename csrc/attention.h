// Tokens through an attention layer, few or a prompt's: what stands before its cache, and the cache itself.
#pragma once

#include "run.h"

namespace moestro {

// Where the keys and values of one layer's cache are, [B, G, length, d]: heads `apart` elements apart, sequences
// `between`.
struct CachePlace {
  void *keys, *values;
  int64_t sequences, length, apart, between;
};

// What a token sees of its sequence's cache: the tokens [begin, end), of which the last is itself. Padding sees none.
struct Seen {
  int64_t sequence, begin, end;
};

// The tokens of a step, T of them, and the rotary embedding of each: cosine and sine [T, turned] of the layers' type.
struct Step {
  int64_t tokens;
  const Seen* seen;  // [T], tokens of one sequence next to each other
  const void *cosine, *sine;
  int64_t turned;
};

// What does not change from token to token. Norms are over a head at a time, or over all of them.
struct Attention {
  Linear q, k, v;
  int64_t head = 0;  // d
  Type type = Type::kBf16;  // of activations and of the cache
  Norm q_norm, k_norm;  // or none
  float scaling = 0;

  // q, k, v of the tokens x [T, D], normed and rotated.
  void project(Runner& runner, const Level& level, const void* x, const Step& step, void* q_out, void* k_out,
               void* v_out) const;

  // Queries [T, H, d], each against what its token sees of the cache; out [T, H, d].
  void attend(Runner& runner, const Level& level, const void* query, const CachePlace& cache, const Step& step,
              void* out) const;
};

}  // namespace moestro
