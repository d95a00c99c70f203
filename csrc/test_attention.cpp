// Norms, the rotary embedding and one token's attention against float64.
#include <algorithm>

#include "attention.h"
#include "test_help.h"

using namespace moestro;

namespace {

constexpr double kRoom = 2e-6;  // of float32 arithmetic

using Row = std::vector<double>;

Row row_of(const Numbers& x, int64_t begin, int64_t count) {
  Row row(count);
  for (int64_t i = 0; i < count; ++i) row[i] = x.at(begin + i);
  return row;
}

Row rounded(Type type, Row row) {
  for (double& v : row) v = round_to(type, v);
  return row;
}

// A norm's weight, offset and epsilon, over `width` numbers at a time.
struct NormCase {
  Numbers weight;
  float offset, epsilon;

  NormCase(Type type, int64_t width, float of, Rng& rng) : weight(type, width, rng), offset(of), epsilon(1e-3f) {}

  Norm norm() const { return {weight.bytes.data(), weight.type, weight.size(), offset, epsilon}; }

  // Not rounded to the type in the end. `shift` moves norm(x) a little where it is rounded before, since float32 may
  // find it on either side of where two numbers of the type meet.
  void apply(double* x, Type type, double shift = 0) const {
    double squares = 0;
    for (int64_t i = 0; i < weight.size(); ++i) squares += x[i] * x[i];
    const double inverse = 1 / std::sqrt(squares / weight.size() + epsilon);
    for (int64_t i = 0; i < weight.size(); ++i) {
      const bool rounds = offset == 0 && type != Type::kFp32;
      const double normal = x[i] * inverse;
      x[i] = (rounds ? round_to(type, normal * (1 + shift)) : normal) * (offset + weight.at(i));
    }
  }
};

void check_norm(Machine& machine, Type type, int64_t rows, int64_t width, float offset, bool spoilt, Rng& rng) {
  Numbers x(type, rows * width, rng, 3);
  if (spoilt) x.set(rng.below(x.size()), rng.below(2) ? NAN : INFINITY);
  NormCase norm(rng.below(2) ? type : Type::kFp32, width, offset, rng);
  Row low = row_of(x, 0, x.size()), high = low;
  for (int64_t i = 0; i < rows; ++i) {
    norm.apply(&low[i * width], type, -kRoom);
    norm.apply(&high[i * width], type, kRoom);
  }
  const auto run = [&](Runner& runner, const Level& level, Numbers& out) {
    runner.rms_norm(level, x.bytes.data(), type, rows, norm.norm(), out.bytes.data());
  };
  const auto error = [&](const Numbers& out) {
    Row want = low;
    for (int64_t i = 0; i < out.size(); ++i)
      if (out.at(i) == round_to(type, high[i])) want[i] = high[i];
    return relative_error(out, want);
  };
  machine.check(text("norm type=%d rows=%ld width=%ld offset=%g%s", static_cast<int>(type), (long)rows, (long)width, offset,
                     spoilt ? " spoilt" : ""),
                Numbers(type, x.size()), run, error, [](const Level&) { return kRoom; });
}

// As a plain torch family rotates: each product is rounded, and their sum.
void rotate(Row& x, int64_t head, const Row& cosine, const Row& sine, Type type) {
  const int64_t turned = cosine.size(), half = turned / 2;
  for (size_t begin = 0; begin < x.size(); begin += head) {
    const Row from(x.begin() + begin, x.begin() + begin + turned);
    for (int64_t i = 0; i < turned; ++i) {
      const double other = i < half ? -from[half + i] : from[i - half];
      x[begin + i] = round_to(type, round_to(type, from[i] * cosine[i]) + round_to(type, other * sine[i]));
    }
  }
}

void check_rotate(Machine& machine, Type type, int64_t heads, int64_t head, int64_t turned, Rng& rng) {
  Numbers x(type, heads * head, rng), cosine(type, turned, rng, 0.5), sine(type, turned, rng, 0.5);
  Row want = row_of(x, 0, x.size());
  rotate(want, head, row_of(cosine, 0, turned), row_of(sine, 0, turned), type);
  const auto run = [&](Runner& runner, const Level& level, Numbers& out) {
    const int64_t width = round_up(x.size(), kGroup), wide = round_up(turned, kGroup);
    runner.with_scratch(width + 2 * wide, [&](float* memory) {
      level.read({cosine.bytes.data(), type, turned}, memory);
      level.read({sine.bytes.data(), type, turned}, memory + wide);
      level.rotate_row({x.bytes.data(), type, x.size()}, out.bytes.data(), head, memory, memory + wide, turned, memory + 2 * wide);
    });
  };
  machine.check(text("rotate type=%d heads=%ld head=%ld turned=%ld", static_cast<int>(type), (long)heads, (long)head, (long)turned),
                Numbers(type, x.size()), run, [&](const Numbers& out) { return relative_error(out, want); },
                [](const Level&) { return kRoom; });
}

// One projection of an attention layer, and its twin.
struct Projection {
  std::vector<uint8_t> packed;
  Row w;
  Numbers bias;
  Linear linear;

  Projection(MatrixFormat format, int64_t R, int64_t D, bool with_bias, Rng& rng)
      : packed(matrix_bytes(format, R, D)), w(random_matrix(format, packed.data(), R, D, 0.2, rng)),
        bias(Type::kFp32, R, rng), linear{packed.data(), R, D, format, with_bias ? bias.floats() : nullptr} {}

  Row of(const Row& x, Type type) const {
    Row y(linear.rows);
    for (int64_t r = 0; r < linear.rows; ++r) {
      y[r] = linear.bias ? bias.at(r) : 0;
      for (int64_t k = 0; k < linear.columns; ++k) y[r] += w[r * linear.columns + k] * x[k];
    }
    return rounded(type, y);
  }
};

enum class Norms { kNone, kHeads, kAll };  // over what q and k are normed

struct Layer {
  int64_t D, head, heads, key_heads, turned;
  MatrixFormat format;
  Type type;
  bool bias;
  Norms norms;
  float offset;
};

void check_project(Machine& machine, const Layer& l, Rng& rng) {
  Projection projections[3] = {{l.format, l.heads * l.head, l.D, l.bias, rng}, {l.format, l.key_heads * l.head, l.D, l.bias, rng},
                               {l.format, l.key_heads * l.head, l.D, l.bias, rng}};
  const int64_t T = 1 + rng.below(3);
  Numbers x(l.type, T * l.D, rng), cosine(l.type, T * l.turned), sine(l.type, T * l.turned);
  for (int64_t i = 0; i < T * l.turned; ++i) {
    const double angle = rng();
    cosine.set(i, std::cos(angle));
    sine.set(i, std::sin(angle));
  }
  Attention attention;
  attention.head = l.head;
  attention.type = l.type;
  std::vector<NormCase> norms;
  for (int i = 0; i < 2; ++i) {
    const int64_t width = l.norms == Norms::kAll ? projections[i].linear.rows : l.head;
    norms.emplace_back(rng.below(2) ? l.type : Type::kFp32, width, l.offset, rng);
  }
  if (l.norms != Norms::kNone) {
    attention.q_norm = norms[0].norm();
    attention.k_norm = norms[1].norm();
  }
  attention.q = projections[0].linear;
  attention.k = projections[1].linear;
  attention.v = projections[2].linear;
  Row want;
  for (int i = 0; i < 3; ++i)
    for (int64_t t = 0; t < T; ++t) {
      Row y = projections[i].of(row_of(x, t * l.D, l.D), l.type);
      if (i < 2 && l.norms != Norms::kNone) {
        for (size_t at = 0; at < y.size(); at += norms[i].weight.size()) norms[i].apply(&y[at], l.type);
        y = rounded(l.type, y);
      }
      if (i < 2) rotate(y, l.head, row_of(cosine, t * l.turned, l.turned), row_of(sine, t * l.turned, l.turned), l.type);
      want.insert(want.end(), y.begin(), y.end());
    }
  const auto run = [&](Runner& runner, const Level& level, Numbers& out) {
    Numbers parts[3] = {{l.type, T * attention.q.rows}, {l.type, T * attention.k.rows}, {l.type, T * attention.v.rows}};
    const Step step{T, nullptr, cosine.bytes.data(), sine.bytes.data(), l.turned};
    attention.project(runner, level, x.bytes.data(), step, parts[0].bytes.data(), parts[1].bytes.data(), parts[2].bytes.data());
    out.bytes.clear();
    for (const Numbers& part : parts) out.bytes.insert(out.bytes.end(), part.bytes.begin(), part.bytes.end());
  };
  // Where a rounding on the way falls to the other side, the result is a step off.
  const double roundings = l.type == Type::kFp32 ? 0 : step_of(l.type, 1) / 4;
  machine.check(text("project %s type=%d tokens=%ld D=%ld head=%ld heads=%ld/%ld turned=%ld norms=%d offset=%g bias=%d",
                     name_of(l.format).c_str(), static_cast<int>(l.type), (long)T, (long)l.D, (long)l.head, (long)l.heads,
                     (long)l.key_heads, (long)l.turned, static_cast<int>(l.norms), l.offset, l.bias),
                Numbers(l.type, want.size()), run, [&](const Numbers& out) { return relative_error(out, want); },
                [&](const Level& level) { return tolerance(level, l.format, 1) + roundings; });
}

Row softmax(Row scores) {
  double most = -INFINITY, total = 0;
  for (double s : scores) most = s > most ? s : most;
  for (double& s : scores) total += s = std::exp(s - most);
  for (double& s : scores) s /= total;
  return scores;
}

struct Attending {
  int64_t length, head, heads, key_heads, sequences, own;  // own: tokens of each sequence
};

void check_attend(Machine& machine, Type type, const Attending& z, double size, bool spoilt, Rng& rng) {
  const int64_t head = z.head, apart = (z.length + 3) * head, between = z.key_heads * apart + 5;  // room that is all NaN
  const int64_t T = z.sequences * z.own, shared = z.heads / z.key_heads;
  Numbers q(type, T * z.heads * head, rng, size), keys(type, z.sequences * between), values = keys;
  for (int64_t i = 0; i < keys.size(); ++i) keys.set(i, NAN), values.set(i, NAN);
  std::vector<Seen> seen;
  for (int64_t b = 0; b < z.sequences; ++b) {
    const int64_t begin = b == 0 ? 0 : rng.below(z.length - z.own + 1);  // what is before it stays NaN
    for (int64_t t = 0; t < z.own; ++t) seen.push_back({b, begin, z.length - z.own + t + 1});
    for (int64_t g = 0; g < z.key_heads; ++g)
      for (int64_t i = begin * head; i < z.length * head; ++i) {
        keys.set(b * between + g * apart + i, rng());
        values.set(b * between + g * apart + i, rng());
      }
  }
  if (spoilt) (rng.below(2) ? keys : values).set((z.length - 1) * head + rng.below(head), rng.below(2) ? NAN : INFINITY);
  Attention attention;
  attention.head = head;
  attention.type = type;
  attention.scaling = 1 / std::sqrt(static_cast<float>(head));
  attention.q.rows = z.heads * head;
  attention.k.rows = z.key_heads * head;
  Row want(T * z.heads * head, 0.0);
  double largest = 0;
  for (int64_t t = 0; t < T; ++t)
    for (int64_t h = 0; h < z.heads; ++h) {
      const Seen& one = seen[t];
      const int64_t cache = one.sequence * between + h / shared * apart, at = (t * z.heads + h) * head;
      Row scores(one.end - one.begin);
      for (int64_t s = one.begin; s < one.end; ++s) {
        double& score = scores[s - one.begin];
        for (int64_t i = 0; i < head; ++i) score += q.at(at + i) * keys.at(cache + s * head + i) * attention.scaling;
        if (std::isfinite(score)) largest = std::max(largest, std::fabs(score));
      }
      scores = softmax(scores);
      for (int64_t s = one.begin; s < one.end; ++s)
        for (int64_t i = 0; i < head; ++i) want[at + i] += scores[s - one.begin] * values.at(cache + s * head + i);
    }
  const auto run = [&](Runner& runner, const Level& level, Numbers& out) {
    const CachePlace cache{keys.bytes.data(), values.bytes.data(), z.sequences, z.length, apart, between};
    attention.attend(runner, level, q.bytes.data(), cache, {T, seen.data(), nullptr, nullptr, 0}, out.bytes.data());
  };
  // The exponential of a score has the error of the score, which grows with it.
  machine.check(text("attend type=%d length=%ld head=%ld heads=%ld/%ld tokens=%ldx%ld size=%g%s", static_cast<int>(type),
                     (long)z.length, (long)head, (long)z.heads, (long)z.key_heads, (long)z.sequences, (long)z.own, size,
                     spoilt ? " spoilt" : ""),
                Numbers(type, want.size()), run, [&](const Numbers& out) { return relative_error(out, want); },
                [&](const Level&) { return kRoom + 2e-7 * largest; });
}

// A token's result has the bits that it has alone, whatever else is in its step.
void check_attend_alone(Machine& machine, Type type, const Attending& z, Rng& rng) {
  const int64_t d = z.head, apart = z.length * d, between = z.key_heads * apart, T = z.sequences * z.own, row = z.heads * d;
  Numbers q(type, T * row, rng), keys(type, z.sequences * between, rng), values(type, z.sequences * between, rng);
  std::vector<Seen> seen;
  for (int64_t t = 0; t < T; ++t) seen.push_back({t / z.own, t / z.own % 3, z.length - z.own + t % z.own + 1});
  Attention attention;
  attention.head = d, attention.type = type, attention.scaling = 0.3f;
  attention.q.rows = row, attention.k.rows = z.key_heads * d;
  const int64_t size = type == Type::kFp32 ? 4 : 2;
  for (const Level* level : machine.levels) {
    Runner runner(2, {});
    const CachePlace cache{keys.bytes.data(), values.bytes.data(), z.sequences, z.length, apart, between};
    Numbers all(type, T * row);
    attention.attend(runner, *level, q.bytes.data(), cache, {T, seen.data(), nullptr, nullptr, 0}, all.bytes.data());
    bool equal = true;
    for (int64_t t = 0; t < T; ++t) {
      Numbers one(type, row);
      attention.attend(runner, *level, q.bytes.data() + t * row * size, cache, {1, &seen[t], nullptr, nullptr, 0}, one.bytes.data());
      equal = equal && memcmp(one.bytes.data(), all.bytes.data() + t * row * size, row * size) == 0;
    }
    machine.note(text("attend alone type=%d length=%ld head=%ld heads=%ld/%ld tokens=%ldx%ld", static_cast<int>(type), (long)z.length,
                      (long)d, (long)z.heads, (long)z.key_heads, (long)z.sequences, (long)z.own),
                 *level, equal);
  }
}

constexpr Type kTypes[] = {Type::kFp32, Type::kFp16, Type::kBf16};

}  // namespace

void check_norms(Machine& machine, Rng& rng) {
  for (Type type : kTypes)
    for (float offset : {0.0f, 1.0f}) {
      for (int64_t width : {1, 2, 15, 16, 17, 63, 64, 65, 91, 128, 2881})
        for (bool spoilt : {false, true}) check_norm(machine, type, 3, width, offset, spoilt, rng);
      check_norm(machine, type, 700, 97, offset, false, rng);  // enough for the pool
    }
}

void check_attention(Machine& machine, Rng& rng) {
  for (Type type : kTypes) {
    for (int64_t heads : {1, 3}) {
      check_rotate(machine, type, heads, 16, 16, rng);
      check_rotate(machine, type, heads, 80, 80, rng);
      check_rotate(machine, type, heads, 33, 2, rng);
      check_rotate(machine, type, heads, 64, 30, rng);
    }
    for (int f = 0; f < 5; ++f)
      for (Norms norms : {Norms::kNone, Norms::kHeads, Norms::kAll})
        for (bool bias : {false, true}) {
          const float offset = bias ? 1.0f : 0.0f;
          check_project(machine, {91, 16, 6, 2, 16, formats()[f].format, type, bias, norms, offset}, rng);
          check_project(machine, {130, 48, 3, 3, 32, formats()[f].format, type, !bias, norms, offset}, rng);
        }
    for (int64_t length : {1, 2, 17, 129, 1100}) {  // 129: enough for the pool; 1100: several pieces
      for (double size : {1.0, 50.0}) {
        check_attend(machine, type, {length, 16, 1, 1, 1, 1}, size, false, rng);
        check_attend(machine, type, {length, 48, 6, 2, 1, 1}, size, false, rng);
        check_attend(machine, type, {length, 128, 8, 4, 1, 1}, size, false, rng);
      }
      check_attend(machine, type, {length, 64, 4, 2, 1, 1}, 1, true, rng);
      check_attend(machine, type, {length, 32, 4, 2, 5, 1}, 1, false, rng);
      if (length < 17) continue;
      check_attend(machine, type, {length, 16, 3, 1, 1, 7}, 1, false, rng);
      check_attend(machine, type, {length, 64, 8, 2, 3, 5}, 1, false, rng);
      if (length < 129) continue;  // a prompt: whole tiles of queries, of a chunk and of all that is there
      for (int64_t shared : {1, 2, 3, 4, 5, 8}) {
        check_attend_alone(machine, type, {length, 64, 2 * shared, 2, 1, 64}, rng);
        check_attend_alone(machine, type, {length, 48, shared, 1, 7, 3}, rng);
        check_attend_alone(machine, type, {length - 1, 16, shared, 1, 33, 1}, rng);
      }
      check_attend(machine, type, {length, 32, 6, 2, 2, 75}, 1, false, rng);
      check_attend(machine, type, {length, 16, 3, 3, 1, length}, 1, false, rng);
    }
  }
}
