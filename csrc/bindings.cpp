// What Python sees. Tensors come as addresses, so that nothing here links against torch.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <string>
#include <tuple>
#include <vector>

#include "layer.h"

namespace nb = nanobind;
using namespace moestro;

namespace {

using CacheTuple = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t>;
using WorkTuple = std::tuple<uintptr_t, int64_t, int64_t, uintptr_t, uintptr_t, int64_t>;

// The level that MOESTRO_LEVEL names, or the best: read once.
const std::string& process_level() {
  static const std::string name = [] {
    const char* named = std::getenv("MOESTRO_LEVEL");
    return std::string(named && *named ? named : best_level()->name);
  }();
  return name;
}

const Level& level_of(const std::string& given) {
  const std::string& name = given.empty() ? process_level() : given;
  const Level* level = find_level(name.c_str());
  if (level == nullptr) throw nb::value_error(("this CPU does not run the kernels for " + name).c_str());
  return *level;
}

void run(Runner& runner, const std::string& level_name, const Shape& shape, uintptr_t x, Format x_type, int64_t tokens,
         const std::vector<WorkTuple>& works, uintptr_t out) {
  const Level& level = level_of(level_name);
  std::vector<Work> list;
  list.reserve(works.size());
  for (const auto& [packed, begin, end, rows, weights, n] : works) {
    list.push_back({reinterpret_cast<const uint8_t*>(packed), begin, end, reinterpret_cast<const int64_t*>(rows),
                    reinterpret_cast<const float*>(weights), n});
  }
  nb::gil_scoped_release release;
  runner.run(level, shape, {reinterpret_cast<const void*>(x), x_type, shape.hidden}, tokens, list.data(),
             static_cast<int>(list.size()), reinterpret_cast<float*>(out));
}

void run_linear(Runner& runner, const std::string& level_name, Linear linear, uintptr_t x, Format x_type, int64_t tokens,
                uintptr_t out) {
  const Level& level = level_of(level_name);
  linear.out = reinterpret_cast<void*>(out);
  linear.out_type = x_type;
  nb::gil_scoped_release release;
  runner.run_linears(level, {reinterpret_cast<const void*>(x), x_type, linear.columns}, tokens, &linear, 1);
}

void rms_norm(Runner& runner, const std::string& level_name, uintptr_t x, Format x_type, int64_t rows, int64_t columns,
              uintptr_t weight, float offset, float epsilon, uintptr_t out) {
  const Level& level = level_of(level_name);
  nb::gil_scoped_release release;
  runner.rms_norm(level, {reinterpret_cast<const void*>(x), x_type, columns}, rows, reinterpret_cast<const float*>(weight),
                  offset, epsilon, reinterpret_cast<void*>(out));
}

Linear linear_of(uintptr_t packed, Format format, int64_t rows, int64_t columns, uintptr_t bias) {
  return {reinterpret_cast<const uint8_t*>(packed), rows, columns, format, reinterpret_cast<const float*>(bias), nullptr,
          Format::kFp32};
}

void project(const Attention& self, Runner& runner, const std::string& level_name, uintptr_t x, uintptr_t cosine,
             uintptr_t sine, int64_t turned, uintptr_t q, uintptr_t k, uintptr_t v) {
  const Level& level = level_of(level_name);
  nb::gil_scoped_release release;
  self.project(runner, level, reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(cosine),
               reinterpret_cast<const void*>(sine), turned, reinterpret_cast<void*>(q), reinterpret_cast<void*>(k),
               reinterpret_cast<void*>(v));
}

void attend(const Attention& self, Runner& runner, const std::string& level_name, uintptr_t query, uintptr_t keys,
            uintptr_t values, int64_t length, int64_t apart, uintptr_t out) {
  const Level& level = level_of(level_name);
  nb::gil_scoped_release release;
  self.attend(runner, level, reinterpret_cast<const void*>(query), reinterpret_cast<const void*>(keys),
              reinterpret_cast<const void*>(values), length, apart, reinterpret_cast<void*>(out));
}

CachePlace place_of(const CacheTuple& cache) {
  const auto [keys, values, length, apart] = cache;
  return {reinterpret_cast<void*>(keys), reinterpret_cast<void*>(values), length, apart};
}

void run_first_half(const FirstHalf& self, Runner& runner, const std::string& level_name, uintptr_t x, uintptr_t cosine,
                    uintptr_t sine, int64_t turned, const CacheTuple& cache, uintptr_t hidden, uintptr_t normed) {
  const Level& level = level_of(level_name);
  const CachePlace place = place_of(cache);
  nb::gil_scoped_release release;
  self.run(runner, level, reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(cosine),
           reinterpret_cast<const void*>(sine), turned, place, reinterpret_cast<void*>(hidden),
           reinterpret_cast<void*>(normed));
}

int64_t run_decoder_layers(const DecoderLayers& self, Runner& runner, const std::string& level_name, uintptr_t x,
                           uintptr_t cosine, uintptr_t sine, int64_t turned, const std::vector<CacheTuple>& caches,
                           uintptr_t hidden) {
  const Level& level = level_of(level_name);
  if (self.layers.empty() || caches.size() != self.layers.size()) throw nb::value_error("one cache for each layer");
  std::vector<CachePlace> places;
  for (const CacheTuple& cache : caches) places.push_back(place_of(cache));
  nb::gil_scoped_release release;
  return self.run(runner, level, reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(cosine),
                  reinterpret_cast<const void*>(sine), turned, places.data(), reinterpret_cast<void*>(hidden));
}

void look_up(Runner& runner, const std::string& level_name, Linear table, uintptr_t ids, int64_t n, uintptr_t out,
             Format out_type) {
  const Level& level = level_of(level_name);
  table.out = reinterpret_cast<void*>(out);
  table.out_type = out_type;
  nb::gil_scoped_release release;
  runner.look_up(level, table, reinterpret_cast<const int64_t*>(ids), n);
}

void route(const Router& self, Runner& runner, const std::string& level_name, uintptr_t x, uintptr_t logits,
           uintptr_t scores, uintptr_t chosen) {
  const Level& level = level_of(level_name);
  nb::gil_scoped_release release;
  self.run(runner, level, reinterpret_cast<const void*>(x), reinterpret_cast<void*>(logits), reinterpret_cast<void*>(scores),
           reinterpret_cast<int64_t*>(chosen));
}

double read_seconds(Runner& runner, const std::string& level_name, uintptr_t memory, int64_t bytes, int64_t prefetch) {
  const Level& level = level_of(level_name);
  nb::gil_scoped_release release;
  return runner.read_seconds(level, reinterpret_cast<const float*>(memory), bytes / 4, prefetch);
}

double fma_flops(Runner& runner, const std::string& level_name, int64_t rounds) {
  const Level& level = level_of(level_name);
  nb::gil_scoped_release release;
  return runner.fma_flops(level, rounds);
}

std::vector<std::pair<std::string, bool>> levels() {
  const char* names[8];
  bool usable[8];
  const int count = compiled_levels(names, usable, 8);
  std::vector<std::pair<std::string, bool>> result;
  for (int i = 0; i < count; ++i) result.emplace_back(names[i], usable[i]);
  return result;
}

}  // namespace

NB_MODULE(_kernels, m) {
  nb::set_leak_warnings(false);  // pools live as long as the process
  nb::enum_<Format>(m, "Format")
      .value("fp32", Format::kFp32)
      .value("fp16", Format::kFp16)
      .value("bf16", Format::kBf16)
      .value("int8", Format::kInt8)
      .value("int4", Format::kInt4);
  nb::enum_<Activation>(m, "Activation")
      .value("silu", Activation::kSilu)
      .value("gelu", Activation::kGeluErf)
      .value("gelu_tanh", Activation::kGeluTanh)
      .value("relu2", Activation::kRelu2)
      .value("clamped_swiglu", Activation::kClampedSwiglu);
  nb::class_<Shape>(m, "Shape")
      .def(nb::init<>())
      .def_rw("hidden", &Shape::hidden)
      .def_rw("neurons", &Shape::neurons)
      .def_rw("has_gate", &Shape::has_gate)
      .def_rw("has_bias", &Shape::has_bias)
      .def_rw("format", &Shape::format)
      .def_rw("activation", &Shape::activation)
      .def_rw("alpha", &Shape::alpha)
      .def_rw("limit", &Shape::limit)
      .def_rw("offset", &Shape::offset);
  nb::class_<Linear>(m, "Linear");
  m.def("linear", &linear_of, nb::arg("packed"), nb::arg("format"), nb::arg("rows"), nb::arg("columns"), nb::arg("bias"));
  nb::class_<Attention>(m, "Attention")
      .def(nb::init<>())
      .def_rw("q", &Attention::q)
      .def_rw("k", &Attention::k)
      .def_rw("v", &Attention::v)
      .def_rw("head", &Attention::head)
      .def_rw("type", &Attention::type)
      .def_rw("scaling", &Attention::scaling)
      .def("set_norms",
           [](Attention& self, uintptr_t q, int64_t q_width, float q_offset, float q_epsilon, uintptr_t k, int64_t k_width,
              float k_offset, float k_epsilon) {
             self.q_norm = reinterpret_cast<const float*>(q);
             self.k_norm = reinterpret_cast<const float*>(k);
             self.q_norm_width = q_width;
             self.k_norm_width = k_width;
             self.q_offset = q_offset;
             self.k_offset = k_offset;
             self.q_epsilon = q_epsilon;
             self.k_epsilon = k_epsilon;
           })
      .def("project", &project)
      .def("attend", &attend);
  nb::class_<Norm>(m, "Norm").def("__init__", [](Norm* self, uintptr_t weight, float offset, float epsilon) {
    new (self) Norm{reinterpret_cast<const float*>(weight), offset, epsilon};
  });
  nb::class_<FirstHalf>(m, "FirstHalf")
      .def(nb::init<>())
      .def_rw("attention", &FirstHalf::attention)
      .def_rw("output", &FirstHalf::output)
      .def_rw("before", &FirstHalf::before)
      .def_rw("after", &FirstHalf::after)
      .def("run", &run_first_half);
  nb::class_<Router>(m, "Router")
      .def("__init__", [](Router* self, uintptr_t weight, Format type, int64_t experts, int64_t hidden, int64_t top_k,
                          bool normalized, Format score_type) {
        new (self) Router{reinterpret_cast<const void*>(weight), type, experts, hidden, top_k, normalized, score_type};
      })
      .def("run", &route);
  nb::class_<DecoderLayer>(m, "DecoderLayer")
      .def("__init__", [](DecoderLayer* self, const FirstHalf& first, const Router& router, const Shape& shape,
                          const std::vector<uintptr_t>& experts) {
        new (self) DecoderLayer{first, router, shape, {}};
        for (uintptr_t packed : experts) self->experts.push_back(reinterpret_cast<const uint8_t*>(packed));
      });
  nb::class_<DecoderLayers>(m, "DecoderLayers")
      .def("__init__", [](DecoderLayers* self, const std::vector<const DecoderLayer*>& layers) {
        new (self) DecoderLayers;
        for (const DecoderLayer* layer : layers) self->layers.push_back(*layer);
      })
      .def("run", &run_decoder_layers);
  nb::class_<Runner>(m, "Runner")
      .def(nb::init<int, const std::vector<int>&>(), nb::arg("threads"), nb::arg("cpus"))
      .def_prop_ro("threads", &Runner::threads)
      .def_prop_ro("busy_s", &Runner::busy_s)
      .def("run", &run, nb::arg("level"), nb::arg("shape"), nb::arg("x"), nb::arg("x_type"), nb::arg("tokens"),
           nb::arg("works"), nb::arg("out"))
      .def("run_linear", &run_linear, nb::arg("level"), nb::arg("linear"), nb::arg("x"), nb::arg("x_type"),
           nb::arg("tokens"), nb::arg("out"))
      .def("look_up", &look_up, nb::arg("level"), nb::arg("table"), nb::arg("ids"), nb::arg("count"), nb::arg("out"),
           nb::arg("out_type"))
      .def("rms_norm", &rms_norm, nb::arg("level"), nb::arg("x"), nb::arg("x_type"), nb::arg("rows"), nb::arg("columns"),
           nb::arg("weight"), nb::arg("offset"), nb::arg("epsilon"), nb::arg("out"))
      .def("touch", [](Runner& self, uintptr_t memory, int64_t bytes) {
        nb::gil_scoped_release release;
        self.touch(reinterpret_cast<uint8_t*>(memory), bytes);
      })
      .def("read_seconds", &read_seconds, nb::arg("level"), nb::arg("memory"), nb::arg("bytes"), nb::arg("prefetch"))
      .def("fma_flops", &fma_flops, nb::arg("level"), nb::arg("rounds"));
  m.def("best_level", [] { return level_of("").name; }, "Of this process, by name; ValueError if this CPU does not run it.");
  m.def("levels", &levels, "Names of the compiled ISA levels, best first, and whether this CPU runs them.");
}
