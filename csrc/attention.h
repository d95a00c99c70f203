// One token through an attention layer: what stands before its cache, and the cache itself.
#pragma once

#include "run.h"

namespace moestro {

// What does not change from token to token. Norms are over a head at a time, or over all of them.
struct Attention {
  Linear q, k, v;
  int64_t head = 0;  // d
  Type type = Type::kBf16;  // of activations and of the cache
  Norm q_norm, k_norm;  // or none
  float scaling = 0;

  // q, k, v of one token x [D], normed and rotated by cosine and sine [turned] of the same type.
  void project(Runner& runner, const Level& level, const void* x, const void* cosine, const void* sine, int64_t turned,
               void* q_out, void* k_out, void* v_out) const;

  // The query [H, d] against keys and values [G, length, d], whose heads are `apart` elements apart; out [H, d].
  void attend(Runner& runner, const Level& level, const void* query, const void* keys, const void* values, int64_t length,
              int64_t apart, void* out) const;
};

}  // namespace moestro
