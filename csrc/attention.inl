// One token's attention: rotary embedding, and a query against all keys and values of its cache.

namespace {

// Rotates the first `turned` elements of a head in place, the first half of them against the second. Rounds where
// the families' own code does: after each product and after the sum.
void rotate(float* head, const float* cosine, const float* sine, int64_t turned, Type type) {
  const int64_t half = turned / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[half + i];
    head[i] = rounded(rounded(a * cosine[i], type) + rounded(-b * sine[i], type), type);
    head[half + i] = rounded(rounded(b * cosine[half + i], type) + rounded(a * sine[half + i], type), type);
  }
}

void read_first(const Input& x, float* to) { read_row(x, 0, nullptr, to); }
void write_plain(const float* from, int64_t count, Type type, void* to) { write_row(from, nullptr, count, type, to, 0); }

// All heads of a row of x, read and written in its type.
void rotate_row(const Input& x, void* out, int64_t head, const float* cosine, const float* sine, int64_t turned, float* row) {
  read_row(x, 0, nullptr, row);
  for (int64_t h = 0; h < x.width; h += head) rotate(row + h, cosine, sine, turned, x.type);
  write_row(row, nullptr, x.width, x.type, out, 0);
}

// out = softmax(q K^T * scaling) V for one head: q float32 [d], keys and values [length, d]; scores [length].
void attend(const float* q, const uint8_t* keys, const uint8_t* values, Type type, int64_t length, int64_t d, float scaling,
            float* scores, float* out) {
  dot_rows(q, keys, type, length, d, scores);
  float most = -INFINITY, total = 0;
  for (int64_t s = 0; s < length; ++s) most = scores[s] * scaling > most ? scores[s] * scaling : most;
  for (int64_t s = 0; s < length; ++s) total += scores[s] = expf(scores[s] * scaling - most);
  with_reader(type, [&](auto read) {
    for (int64_t i = 0; i < d; i += W) V::zero().store(out + i);
    for (int64_t s = 0; s < length; ++s) {
      const V weight = V::set(scores[s] / total);
      for (int64_t i = 0; i < d; i += W) fma(weight, read.load(values + s * d * read.kBytes, i), V::load(out + i)).store(out + i);
    }
  });
}

}  // namespace
