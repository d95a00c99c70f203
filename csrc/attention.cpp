#include "attention.h"

#include <vector>

namespace moestro {
namespace {

constexpr int64_t kPoolBytes = 1 << 17;  // of a cache that is worth waking other threads

const uint8_t* bytes(const void* p) { return static_cast<const uint8_t*>(p); }

}  // namespace

void Attention::project(Runner& runner, const Level& level, const void* x, const void* cosine, const void* sine,
                        int64_t turned, void* q_out, void* k_out, void* v_out) const {
  Linear linears[3] = {q, k, v};
  void* outs[3] = {q_out, k_out, v_out};
  for (int i = 0; i < 3; ++i) {
    linears[i].out = outs[i];
    linears[i].out_type = type;
  }
  runner.run_linears(level, {x, type, q.columns}, 1, linears, 3);
  if (q_norm.weight) runner.rms_norm(level, q_out, type, q.rows / q_norm.width, q_norm, q_out);
  if (k_norm.weight) runner.rms_norm(level, k_out, type, k.rows / k_norm.width, k_norm, k_out);
  runner.with_scratch(2 * round_up(turned, kGroup) + round_up(q.rows > k.rows ? q.rows : k.rows, kGroup), [&](float* memory) {
    float *c = memory, *s = c + round_up(turned, kGroup), *row = s + round_up(turned, kGroup);
    level.read({cosine, type, turned}, c);
    level.read({sine, type, turned}, s);
    level.rotate_row({q_out, type, q.rows}, q_out, head, c, s, turned, row);
    level.rotate_row({k_out, type, k.rows}, k_out, head, c, s, turned, row);
  });
}

void Attention::attend(Runner& runner, const Level& level, const void* query, const void* keys, const void* values,
                       int64_t length, int64_t apart, void* out) const {
  const int64_t heads = q.rows / head, shared = heads / (k.rows / head);  // query heads that share a key head
  const int64_t size = size_of(type), cache = apart * size;
  const auto one = [&](int h, float* memory) {
    float *from = memory, *to = from + round_up(head, kGroup), *scores = to + round_up(head, kGroup);
    level.read({bytes(query) + h * head * size, type, head}, from);
    level.attend(from, bytes(keys) + h / shared * cache, bytes(values) + h / shared * cache, type, length, head, scaling, scores, to);
    level.write(to, head, type, static_cast<uint8_t*>(out) + h * head * size);
  };
  runner.each(static_cast<int>(heads), 2 * round_up(head, kGroup) + length, k.rows * length * size >= kPoolBytes, one);
}

}  // namespace moestro
