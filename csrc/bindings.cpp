// What Python sees. Each argument is checked (arrays.h, checks.h) before a kernel has its address; objects that hold
// addresses cannot change and keep their tensors alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "checks.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace moestro;

namespace {

// The level that MOESTRO_LEVEL names, or the best: read once.
const std::string& process_level() {
  static const std::string name = [] {
    const char* named = std::getenv("MOESTRO_LEVEL");
    return std::string(named && *named ? named : best_level()->name);
  }();
  return name;
}

}  // namespace

const Level& level_of(const std::string& given) {
  const std::string& name = given.empty() ? process_level() : given;
  const Level* level = find_level(name.c_str());
  if (level == nullptr) throw nb::value_error(("this CPU does not run the kernels for " + name).c_str());
  return *level;
}

namespace {

struct Range {
  int64_t begin, end;
  Range(nb::handle range, const char* name) {
    if (!PyRange_Check(range.ptr()) || !nb::try_cast(range.attr("start"), begin) || !nb::try_cast(range.attr("stop"), end))
      throw nb::type_error((std::string(name) + ": expected a range").c_str());
  }
};

nb::tuple tuple_of(nb::handle value, size_t least, const char* wanted) {
  if (!PyTuple_Check(value.ptr()) || nb::len(value) < least) throw nb::type_error(wanted);
  return nb::borrow<nb::tuple>(value);
}

// A layer step's work, each an ExpertWork of compute/experts.py: packed, neurons, rows, weights, span, expert.
std::vector<Work> works_of(const nb::object& works, const Shape& shape, int64_t tokens) {
  std::vector<Work> list;
  list.reserve(nb::len(works));
  nb::object rows, weights;  // mostly those of the work before, read once
  const int64_t *all_rows = nullptr, size = expert_bytes(shape);
  const float* all_weights = nullptr;
  int64_t count = 0;
  for (const nb::handle item : works) {
    const nb::tuple work = tuple_of(item, 5, "works: expected packed, neurons, rows, weights and span");
    const auto [begin, end] = Range(work[1], "neurons");
    require(0 <= begin && begin <= end && end <= shape.neurons, "neurons: not a range of the expert's");
    require(begin % shape.block == 0 && (end % shape.block == 0 || end == shape.neurons), "neurons: not whole blocks");
    if (!rows.is(work[2]) || !weights.is(work[3])) {
      rows = work[2], weights = work[3];
      const Array row_array(rows, "rows"), weight_array(weights, "weights");
      count = row_array.count();
      all_rows = row_array.integers(count);
      all_weights = weight_array.floats(count);
    }
    int64_t first = 0, stop = count;
    if (const nb::object span = work[4]; !span.is_none()) {
      const Range some(span, "span");
      first = some.begin, stop = some.end;
    }
    require(0 <= first && first <= stop && stop <= count, "span: not a range of rows");
    for (int64_t i = first; i < stop; ++i) {
      if (all_rows[i] < 0 || all_rows[i] >= tokens) throw std::out_of_range("rows: no token " + std::to_string(all_rows[i]));
    }
    const uint8_t* packed = Array(work[0], "packed").packed(size);
    list.push_back({packed, begin, end, all_rows + first, all_weights + first, stop - first});
  }
  return list;
}

void run(Runner& runner, const std::string& level_name, const Shape& shape, nb::handle x, const nb::object& works, nb::handle out) {
  const Level& level = level_of(level_name);
  const Array from(x, "x");
  const Type type = from.number_type();
  const int64_t tokens = from.rows_of(shape.hidden);
  const void* data = from.numbers(type, from.count());
  float* to = Array(out, "out").floats(from.count());
  const std::vector<Work> list = works_of(works, shape, tokens);
  nb::gil_scoped_release release;
  runner.run(level, shape, {data, type, shape.hidden}, tokens, list.data(), static_cast<int>(list.size()), to);
}

void run_linear(Runner& runner, const std::string& level_name, Linear linear, nb::handle x, nb::handle out) {
  const Level& level = level_of(level_name);
  const Array from(x, "x");
  const Type type = from.number_type();
  const int64_t tokens = from.rows_of(linear.columns);
  const void* data = from.numbers(type, from.count());
  linear.out = Array(out, "out").numbers(type, tokens * linear.rows);
  linear.out_type = type;
  nb::gil_scoped_release release;
  runner.run_linears(level, {data, type, linear.columns}, tokens, &linear, 1);
}

void look_up(Runner& runner, const std::string& level_name, Linear table, nb::handle ids, nb::handle out) {
  const Level& level = level_of(level_name);
  const Array from(ids, "ids"), to(out, "out");
  const int64_t *data = from.integers(from.count()), n = from.count();
  table.out_type = to.number_type();
  table.out = to.numbers(table.out_type, n * table.columns);
  nb::gil_scoped_release release;
  runner.look_up(level, table, data, n);
}

Norm norm_of(nb::handle weight, float offset, float epsilon) {
  const Array array(weight, "weight");
  check_size(array.count(), "weight");
  const Type type = array.number_type();
  return {array.numbers(type, array.count()), type, array.count(), offset, epsilon};
}

void rms_norm(Runner& runner, const std::string& level_name, nb::handle x, nb::handle weight, float offset,
              float epsilon, nb::handle out) {
  const Level& level = level_of(level_name);
  const Array from(x, "x");
  const Norm norm = norm_of(weight, offset, epsilon);
  const Type type = from.number_type();
  const int64_t rows = from.rows_of(norm.width);
  const void* data = from.numbers(type, from.count());
  void* to = Array(out, "out").numbers(type, from.count());
  nb::gil_scoped_release release;
  runner.rms_norm(level, data, type, rows, norm, to);
}

void make_format(MatrixFormat* self, Code code, int64_t group, Scale scale, Zero zero, int32_t constant, int64_t super_group) {
  const MatrixFormat made{code, group, scale, zero, constant, super_group};
  check(made);
  new (self) MatrixFormat(made);
}

int64_t bytes_of_panel(const MatrixFormat& format, int64_t columns) {
  check_size(columns, "columns");
  return panel_bytes(format, columns);
}

void make_linear(Linear* self, nb::handle packed, const MatrixFormat& format, int64_t rows, int64_t columns, nb::handle bias) {
  check_size(rows, "rows");
  check_size(columns, "columns");
  require(!is_strided(format) || rows % format.group == 0, "rows: no whole classes");
  const uint8_t* bytes = Array(packed, "packed").packed(matrix_bytes(format, rows, columns));
  const float* added = bias.is_none() ? nullptr : Array(bias, "bias").floats(rows);
  new (self) Linear{bytes, rows, columns, format, added, nullptr, Type::kFp32};
}

void make_norm(Norm* self, nb::handle weight, float offset, float epsilon) {
  new (self) Norm(norm_of(weight, offset, epsilon));
}

void make_attention(Attention* self, const Linear& q, const Linear& k, const Linear& v, const Norm* q_norm,
                    const Norm* k_norm, int64_t head, Type type, float scaling) {
  Attention made;
  made.q = q, made.k = k, made.v = v;
  made.head = head, made.type = type, made.scaling = scaling;
  if (q_norm) made.q_norm = *q_norm;
  if (k_norm) made.k_norm = *k_norm;
  check(made);
  new (self) Attention(made);
}

// The tokens of a step and their rotary embedding, [T, turned].
struct GivenStep {
  Step step;
  std::vector<Seen> seen;
  explicit GivenStep(int64_t tokens, int64_t most = kMostStepTokens) : step{tokens, nullptr, nullptr, nullptr, 0} {
    if (tokens < 1 || tokens > most) throw std::invalid_argument("not 1 to " + std::to_string(most) + " tokens");
  }
  GivenStep(const Attention& attention, int64_t tokens, nb::handle cosine_of, nb::handle sine_of, int64_t most = kMostStepTokens)
      : GivenStep(tokens, most) {
    const Array from(cosine_of, "cosine");
    require(from.count() % tokens == 0, "cosine: not as many for each token");
    const int64_t turned = from.count() / tokens;
    check_turned(attention, turned);
    step = {tokens, nullptr, from.numbers(attention.type, from.count()),
            Array(sine_of, "sine").numbers(attention.type, from.count()), turned};
  }

  // What each token sees of a cache: `given`, int64 [T, 2], or all up to itself, the step's own being the last there.
  // least: how many it sees at least.
  void see(const CachePlace& cache, nb::handle given, int64_t least = 1) {
    const int64_t T = step.tokens, B = cache.sequences, S = cache.length;
    require(T % B == 0, "x: not as many tokens of each of the cache's sequences");
    const int64_t own = T / B;
    require(own <= S, "keys: fewer tokens than the step's own");
    const int64_t* ranges = given.is_none() ? nullptr : Array(given, "seen").integers(2 * T);
    seen.clear();
    for (int64_t t = 0; t < T; ++t) {
      Seen one{t / own, 0, S - own + t % own + 1};
      if (ranges != nullptr) one.begin = ranges[2 * t], one.end = ranges[2 * t + 1];
      require(0 <= one.begin && one.begin <= S && one.begin + least <= one.end && one.end <= S, "seen: not a range of the cache");
      seen.push_back(one);
    }
    step.seen = seen.data();
  }
};

// One layer's cache: keys and values [B, G, S, d], each head one piece, heads and sequences equally far apart in both.
CachePlace place_of(const Attention& attention, nb::handle keys_of, nb::handle values_of) {
  const Array keys(keys_of, "keys"), values(values_of, "values");
  const int64_t heads = attention.k.rows / attention.head, head = attention.head;
  for (const Array& part : {keys, values}) {
    if (part.dims() != 4 || part.size(0) < 1 || part.size(1) != heads || part.size(2) < 1 || part.size(3) != head)
      part.refuse("[B, " + std::to_string(heads) + ", S, " + std::to_string(head) + "], B and S at least 1");
    if (part.stride(3) != 1 || (part.size(2) > 1 && part.stride(2) != head)) part.refuse("heads that are one piece each");
    if (heads > 1 && part.stride(1) < part.size(2) * head) part.refuse("heads that do not overlap");
  }
  const int64_t sequences = keys.size(0), length = keys.size(2), apart = heads > 1 ? keys.stride(1) : length * head;
  const int64_t between = sequences > 1 ? keys.stride(0) : heads * apart;
  if (values.size(0) != sequences) values.refuse("as many sequences as keys");
  if (values.size(2) != length) values.refuse("as many tokens as keys");
  if (heads > 1 && values.stride(1) != apart) values.refuse("heads as far apart as keys");
  if (sequences > 1 && values.stride(0) != between) values.refuse("sequences as far apart as keys");
  if (between < (heads - 1) * apart + length * head) keys.refuse("sequences that do not overlap");
  return {keys.data_of(attention.type), values.data_of(attention.type), sequences, length, apart, between};
}

void project(const Attention& self, Runner& runner, const std::string& level_name, nb::handle x, nb::handle cosine,
             nb::handle sine, nb::handle q, nb::handle k, nb::handle v) {
  const Level& level = level_of(level_name);
  const Array given(x, "x");
  const int64_t T = given.rows_of(self.q.columns);
  const void* from = given.numbers(self.type, given.count());
  const GivenStep of(self, T, cosine, sine, kMostPromptTokens);
  void* q_out = Array(q, "q").numbers(self.type, T * self.q.rows);
  void* k_out = Array(k, "k").numbers(self.type, T * self.k.rows);
  void* v_out = Array(v, "v").numbers(self.type, T * self.v.rows);
  nb::gil_scoped_release release;
  self.project(runner, level, from, of.step, q_out, k_out, v_out);
}

void attend(const Attention& self, Runner& runner, const std::string& level_name, nb::handle query, nb::handle keys,
            nb::handle values, nb::handle seen, nb::handle out) {
  const Level& level = level_of(level_name);
  const Array given(query, "query");
  const int64_t T = given.rows_of(self.q.rows);
  const void* from = given.numbers(self.type, given.count());
  const CachePlace cache = place_of(self, keys, values);
  GivenStep of(T, kMostPromptTokens);
  of.see(cache, seen, 0);
  void* to = Array(out, "out").numbers(self.type, T * self.q.rows);
  nb::gil_scoped_release release;
  self.attend(runner, level, from, cache, of.step, to);
}

void make_first_half(FirstHalf* self, const Attention& attention, const Linear& output, const Norm& before, const Norm& after) {
  const FirstHalf made{attention, output, before, after};
  check(made);
  new (self) FirstHalf(made);
}

void run_first_half(const FirstHalf& self, Runner& runner, const std::string& level_name, nb::handle x, nb::handle cosine,
                    nb::handle sine, nb::handle keys, nb::handle values, nb::handle seen, nb::handle hidden, nb::handle normed) {
  const Level& level = level_of(level_name);
  const Type type = self.attention.type;
  const Array given(x, "x");
  const int64_t count = given.count();
  const void* from = given.numbers(type, count);
  GivenStep of(self.attention, given.rows_of(self.attention.q.columns), cosine, sine);
  const CachePlace cache = place_of(self.attention, keys, values);
  of.see(cache, seen);
  void *hidden_out = Array(hidden, "hidden").numbers(type, count), *normed_out = Array(normed, "normed").numbers(type, count);
  nb::gil_scoped_release release;
  self.run(runner, level, from, of.step, cache, hidden_out, normed_out);
}

void make_router(Router* self, nb::handle weight, int64_t top_k, bool normalized, Type score_type) {
  const Array array(weight, "weight");
  if (array.dims() != 2) array.refuse("[E, D]");
  const Router made{array.numbers(array.number_type(), array.count()), array.number_type(), array.size(0), array.size(1), top_k,
                    normalized, score_type};
  check(made);
  new (self) Router(made);
}

void route(const Router& self, Runner& runner, const std::string& level_name, nb::handle x, nb::handle logits,
           nb::handle scores, nb::handle chosen) {
  const Level& level = level_of(level_name);
  const Array given(x, "x");
  const int64_t T = given.rows_of(self.hidden);
  const void* from = given.numbers(self.type, given.count());
  void* logits_out = Array(logits, "logits").numbers(self.type, T * self.experts);
  void* scores_out = Array(scores, "scores").numbers(self.score_type, T * self.top_k);
  int64_t* chosen_out = Array(chosen, "chosen").integers(T * self.top_k);
  nb::gil_scoped_release release;
  self.run(runner, level, from, T, logits_out, scores_out, chosen_out);
}

void make_decoder_layer(DecoderLayer* self, const FirstHalf& first, const Router& router, const Shape& shape, const nb::tuple& experts) {
  DecoderLayer made{first, router, shape, {}};
  for (const nb::handle packed : experts) made.experts.push_back(Array(packed, "experts").packed(expert_bytes(shape)));
  check(made);
  new (self) DecoderLayer(made);
}

void make_decoder_layers(DecoderLayers* self, const std::vector<const DecoderLayer*>& layers) {
  DecoderLayers made;
  for (const DecoderLayer* layer : layers) {
    require(layer != nullptr, "layers: None");
    made.layers.push_back(*layer);
  }
  check(made);
  new (self) DecoderLayers(made);
}

std::pair<int64_t, int64_t> run_decoder_layers(const DecoderLayers& self, Runner& runner, const std::string& level_name,
                                               nb::handle x, nb::handle cosine, nb::handle sine, const nb::object& caches,
                                               nb::handle seen, nb::handle hidden) {
  const Level& level = level_of(level_name);
  const Attention& first = self.layers[0].first.attention;
  const Array given(x, "x");
  const void* from = given.numbers(first.type, given.count());
  GivenStep of(first, given.rows_of(first.q.columns), cosine, sine);
  require(nb::len(caches) == self.layers.size(), "caches: not one for each layer");
  std::vector<CachePlace> places;
  for (const nb::handle cache : caches) {
    require(places.size() < self.layers.size(), "caches: more than layers");
    const Attention& attention = self.layers[places.size()].first.attention;
    check_turned(attention, of.step.turned);
    const nb::tuple pair = tuple_of(cache, 2, "caches: expected keys and values");
    places.push_back(place_of(attention, pair[0], pair[1]));
    require(places.back().sequences == places[0].sequences && places.back().length == places[0].length,
            "caches: of other sequences or lengths than the first");
  }
  require(places.size() == self.layers.size(), "caches: fewer than layers");
  of.see(places[0], seen);
  void* to = Array(hidden, "hidden").numbers(first.type, given.count());
  nb::gil_scoped_release release;
  const Asked asked = self.run(runner, level, from, of.step, places.data(), to);
  return {asked.experts, asked.tokens};
}

void make_shape(Shape* self, int64_t hidden, int64_t neurons, bool has_gate, bool has_bias, const MatrixFormat& gate,
                const MatrixFormat& up, const MatrixFormat& down, int64_t block, Activation activation, float alpha, float limit,
                float offset, int64_t orders) {
  const Shape made{hidden, neurons, has_gate, has_bias, gate, up, down, block, activation, alpha, limit, offset, orders};
  check(made);
  new (self) Shape(made);
}

void make_runner(Runner* self, int threads, const std::vector<int>& cpus) {
  require(threads >= 1 && threads <= kMostThreads, "threads: not in [1, 1024]");
  for (int cpu : cpus) require(cpu >= 0, "cpus: no number of a processor");
  new (self) Runner(threads, cpus);
}

void touch(Runner& runner, nb::handle memory) {
  const Array array(memory, "memory");
  uint8_t* data = array.bytes(array.count());
  nb::gil_scoped_release release;
  runner.touch(data, array.count());
}

double read_seconds(Runner& runner, const std::string& level_name, nb::handle memory, int64_t prefetch) {
  const Level& level = level_of(level_name);
  const Array array(memory, "memory");
  const float* data = array.floats(array.count());
  require(prefetch >= -1 && prefetch <= 1 << 20, "prefetch: not in [-1, 2^20]");
  nb::gil_scoped_release release;
  return runner.read_seconds(level, data, array.count(), prefetch);
}

template <double (Runner::*Flops)(const Level&, int64_t)>
double flops(Runner& runner, const std::string& level_name, int64_t rounds) {
  const Level& level = level_of(level_name);
  require(rounds >= 1, "rounds: not at least 1");
  nb::gil_scoped_release release;
  return (runner.*Flops)(level, rounds);
}

std::vector<std::pair<std::string, bool>> levels() {
  const char* names[8];
  bool usable[8];
  const int count = compiled_levels(names, usable, 8);
  std::vector<std::pair<std::string, bool>> result;
  for (int i = 0; i < count; ++i) result.emplace_back(names[i], usable[i]);
  return result;
}

// Runs what Python has to do for signals, on its main thread alone; whether one raised, as Ctrl-C does.
bool python_says_stop() {
  nb::gil_scoped_acquire held;
  return PyErr_CheckSignals() != 0;
}

}  // namespace

NB_MODULE(_kernels, m) {
  nb::set_leak_warnings(false);  // pools live as long as the process
  ask_whether_to_stop(python_says_stop);
  nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
    try {
      std::rethrow_exception(thrown);
    } catch (const Interrupted&) {  // Python's own exception is set already
    }
  });
  nb::enum_<Type>(m, "Type").value("fp32", Type::kFp32).value("fp16", Type::kFp16).value("bf16", Type::kBf16);
  nb::enum_<Code>(m, "Code")
      .value("FP32", Code::kFp32).value("FP16", Code::kFp16).value("BF16", Code::kBf16).value("S8", Code::kS8)
      .value("U2", Code::kU2).value("U3", Code::kU3).value("U4", Code::kU4).value("U5", Code::kU5).value("U6", Code::kU6)
      .value("U8", Code::kU8).value("E2M1", Code::kE2m1).value("IQ4NL", Code::kIq4nl).value("E4M3", Code::kE4m3);
  nb::enum_<Scale>(m, "Scale")
      .value("NONE", Scale::kNone).value("FP16", Scale::kFp16).value("BF16", Scale::kBf16).value("FP32", Scale::kFp32)
      .value("E8M0", Scale::kE8m0).value("E4M3", Scale::kE4m3).value("BLOCK", Scale::kBlock).value("K4", Scale::kK4)
      .value("K2", Scale::kK2).value("K6", Scale::kK6).value("K3", Scale::kK3).value("IQ4XS", Scale::kIq4xs)
      .value("SHIFTED", Scale::kShifted).value("COLUMN", Scale::kColumn);
  nb::enum_<Zero>(m, "Zero")
      .value("NONE", Zero::kNone).value("CONSTANT", Zero::kConstant).value("FP16", Zero::kFp16).value("INT", Zero::kInt)
      .value("ADD", Zero::kAdd).value("MIN", Zero::kMin).value("FIXED", Zero::kFixed)
      .value("COLUMN", Zero::kColumn);
  nb::class_<MatrixFormat>(m, "MatrixFormat")
      .def("__init__", &make_format, nb::kw_only(), "code"_a, "group"_a, "scale"_a, "zero"_a, "constant"_a, "super_group"_a)
      .def("panel_bytes", &bytes_of_panel, "columns"_a)
      .def_prop_ro("least_block", &least_block);
  nb::enum_<Activation>(m, "Activation")
      .value("silu", Activation::kSilu)
      .value("gelu", Activation::kGeluErf)
      .value("gelu_tanh", Activation::kGeluTanh)
      .value("relu2", Activation::kRelu2)
      .value("clamped_swiglu", Activation::kClampedSwiglu);
  nb::class_<Shape>(m, "Shape")
      .def("__init__", &make_shape, nb::kw_only(), "hidden"_a, "neurons"_a, "has_gate"_a, "has_bias"_a, "gate"_a, "up"_a,
           "down"_a, "block"_a, "activation"_a, "alpha"_a, "limit"_a, "offset"_a, "orders"_a);
  // The numbers of keep_alive count from the object itself, which is 1.
  nb::class_<Linear>(m, "Linear")
      .def("__init__", &make_linear, "packed"_a, "format"_a, "rows"_a, "columns"_a, "bias"_a.none(), nb::keep_alive<1, 2>(),
           nb::keep_alive<1, 6>());
  nb::class_<Norm>(m, "Norm")
      .def("__init__", &make_norm, "weight"_a, "offset"_a, "epsilon"_a, nb::keep_alive<1, 2>());
  nb::class_<Attention>(m, "Attention")
      .def("__init__", &make_attention, "q"_a, "k"_a, "v"_a, "q_norm"_a.none(), "k_norm"_a.none(), "head"_a, "type"_a, "scaling"_a,
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>())
      .def("project", &project, "runner"_a, "level"_a, "x"_a, "cosine"_a, "sine"_a, "q"_a, "k"_a, "v"_a)
      .def("attend", &attend, "runner"_a, "level"_a, "query"_a, "keys"_a, "values"_a, "seen"_a.none(), "out"_a);
  nb::class_<FirstHalf>(m, "FirstHalf")
      .def("__init__", &make_first_half, "attention"_a, "output"_a, "before"_a, "after"_a, nb::keep_alive<1, 2>(),
           nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>())
      .def("run", &run_first_half, "runner"_a, "level"_a, "x"_a, "cosine"_a, "sine"_a, "keys"_a, "values"_a,
           "seen"_a.none(), "hidden"_a, "normed"_a);
  nb::class_<Router>(m, "Router")
      .def("__init__", &make_router, "weight"_a, "top_k"_a, "normalized"_a, "score_type"_a, nb::keep_alive<1, 2>())
      .def("run", &route, "runner"_a, "level"_a, "x"_a, "logits"_a, "scores"_a, "chosen"_a);
  nb::class_<DecoderLayer>(m, "DecoderLayer")
      .def("__init__", &make_decoder_layer, "first"_a, "router"_a, "shape"_a, "experts"_a, nb::keep_alive<1, 2>(),
           nb::keep_alive<1, 3>(), nb::keep_alive<1, 5>());
  nb::class_<DecoderLayers>(m, "DecoderLayers")
      .def("__init__", &make_decoder_layers, "layers"_a, nb::keep_alive<1, 2>())
      .def("run", &run_decoder_layers, "runner"_a, "level"_a, "x"_a, "cosine"_a, "sine"_a, "caches"_a, "seen"_a.none(), "hidden"_a);
  nb::class_<Runner>(m, "Runner")
      .def("__init__", &make_runner, "threads"_a, "cpus"_a)
      .def_prop_ro("threads", &Runner::threads)
      .def_prop_ro("busy_s", &Runner::busy_s)
      .def("run", &run, "level"_a, "shape"_a, "x"_a, "works"_a, "out"_a)
      .def("run_linear", &run_linear, "level"_a, "linear"_a, "x"_a, "out"_a)
      .def("look_up", &look_up, "level"_a, "table"_a, "ids"_a, "out"_a)
      .def("rms_norm", &rms_norm, "level"_a, "x"_a, "weight"_a, "offset"_a, "epsilon"_a, "out"_a)
      .def("touch", &touch, "memory"_a)
      .def("read_seconds", &read_seconds, "level"_a, "memory"_a, "prefetch"_a)
      .def("fma_flops", &flops<&Runner::fma_flops>, "level"_a, "rounds"_a)
      .def("dot_flops", &flops<&Runner::dot_flops>, "level"_a, "rounds"_a);
  bind_checksum(m);
  bind_repack(m);
  bind_solver(m);
  m.def("best_level", [] { return level_of("").name; }, "Of this process, by name; ValueError if this CPU does not run it.");
  m.def("levels", &levels, "Names of the compiled ISA levels, best first, and whether this CPU runs them.");
}
