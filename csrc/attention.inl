// One token's attention: rotary embedding, and a query against all keys and values of its cache.

namespace {

struct ReadFp32 { static V load(const uint8_t* p, int64_t i) { return V::load(reinterpret_cast<const float*>(p) + i); } static constexpr int kBytes = 4; };
struct ReadFp16 { static V load(const uint8_t* p, int64_t i) { return V::load_fp16(p + 2 * i); } static constexpr int kBytes = 2; };
struct ReadBf16 { static V load(const uint8_t* p, int64_t i) { return V::load_bf16(p + 2 * i); } static constexpr int kBytes = 2; };

// Rotates the first `turned` elements of a head in place, the first half of them against the second. Rounds where
// the families' own code does: after each product and after the sum.
void rotate(float* head, const float* cosine, const float* sine, int64_t turned, Format type) {
  const int64_t half = turned / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[half + i];
    head[i] = rounded(rounded(a * cosine[i], type) + rounded(-b * sine[i], type), type);
    head[half + i] = rounded(rounded(b * cosine[half + i], type) + rounded(a * sine[half + i], type), type);
  }
}

void read_first(const Input& x, float* to) { read_row(x, 0, to); }
void write_plain(const float* from, int64_t count, Format type, void* to) { write_row(from, nullptr, count, type, to, 0); }

// All heads of a row of x, read and written in its type.
void rotate_row(const Input& x, void* out, int64_t head, const float* cosine, const float* sine, int64_t turned, float* row) {
  read_row(x, 0, row);
  for (int64_t h = 0; h < x.width; h += head) rotate(row + h, cosine, sine, turned, x.type);
  write_row(row, nullptr, x.width, x.type, out, 0);
}

// out = softmax(q K^T * scaling) V for one head: q float32 [d], keys and values [length, d]; scores [length].
template <class R>
void attend_with(const float* q, const uint8_t* keys, const uint8_t* values, int64_t length, int64_t d, float scaling,
                 float* scores, float* out) {
  float most = -INFINITY;
  for (int64_t s = 0; s < length; ++s) {
    V acc = V::zero();
    for (int64_t i = 0; i < d; i += W) acc = fma(V::load(q + i), R::load(keys + s * d * R::kBytes, i), acc);
    scores[s] = sum(acc) * scaling;
    if (scores[s] > most) most = scores[s];
  }
  float total = 0;
  for (int64_t s = 0; s < length; ++s) total += scores[s] = expf(scores[s] - most);
  for (int64_t i = 0; i < d; i += W) V::zero().store(out + i);
  for (int64_t s = 0; s < length; ++s) {
    const V weight = V::set(scores[s] / total);
    for (int64_t i = 0; i < d; i += W) fma(weight, R::load(values + s * d * R::kBytes, i), V::load(out + i)).store(out + i);
  }
}

void attend(const float* q, const uint8_t* keys, const uint8_t* values, Format type, int64_t length, int64_t d, float scaling,
            float* scores, float* out) {
  if (type == Format::kFp32) attend_with<ReadFp32>(q, keys, values, length, d, scaling, scores, out);
  else if (type == Format::kFp16) attend_with<ReadFp16>(q, keys, values, length, d, scaling, scores, out);
  else attend_with<ReadBf16>(q, keys, values, length, d, scaling, scores, out);
}

}  // namespace
