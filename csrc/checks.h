// Whether parts fit each other. A kernel trusts sizes; these are asked before it has any.
//
// Each throws std::invalid_argument, ValueError in Python, whose line names what does not fit.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "layer.h"

namespace moestro {

constexpr int64_t kMostSize = int64_t{1} << 28;  // of a dimension, so that no product of two and a few bytes overflows
constexpr int64_t kMostThreads = 1024;
constexpr int64_t kMostStepTokens = 64;  // of what is computed by whole layers
constexpr int64_t kMostPromptTokens = int64_t{1} << 20;  // of attention

inline void require(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(what);
}

inline void check_size(int64_t size, const char* name) {
  if (size < 1 || size > kMostSize) throw std::invalid_argument(std::string(name) + ": no size is " + std::to_string(size));
}

inline void check(const MatrixFormat& format) {
  const char* fault = fault_of(format);
  if (fault != nullptr) throw std::invalid_argument(fault);
}

inline void check(const Shape& shape) {
  check_size(shape.hidden, "hidden");
  check_size(shape.neurons, "neurons");
  if (shape.has_gate) check(shape.gate);
  check(shape.up);
  check(shape.down);
  require(shape.block == 64 || shape.block == 128 || shape.block == kMostBlock, "block: expected 64, 128 or 256 neurons");
  require(shape.block % least_block(shape.down) == 0, "block: cuts the units of down");
  const bool strided = is_strided(shape.up);
  require(is_strided(shape.down) == strided && (!shape.has_gate || is_strided(shape.gate) == strided),
          "formats: scales of columns in some matrices");
  require(!strided || !shape.has_gate || shape.gate.group == shape.up.group, "formats: gate and up have other orders of neurons");
  require(!strided || shape.block % shape.up.group == 0, "block: cuts the classes of gate and up");
  require(!strided || (shape.neurons % shape.up.group == 0 && shape.hidden % shape.down.group == 0), "formats: no whole classes of rows");
  require(!strided || (shape.orders == 0 && !shape.has_bias), "formats: scales of columns beside orders or biases");
  require(shape.orders >= 0 && shape.orders <= (shape.has_gate ? 2 : 1), "orders: not one of each of gate and up at most");
  require(shape.has_gate || shape.activation != Activation::kClampedSwiglu, "activation: clamped_swiglu needs a gate");
}

// Bytes of a packed expert, up to a whole cache line.
inline int64_t expert_bytes(const Shape& shape) {
  return round_up(head_bytes(shape) + shape.blocks() * block_bytes(shape) + (shape.has_bias ? shape.hidden * 4 : 0), kLineBytes);
}

inline void check(const Attention& a) {
  check_size(a.head, "head");
  require(a.head % kPanel == 0, "head: not a multiple of 16");
  require(a.q.rows % a.head == 0, "q: not whole heads");
  require(a.k.rows % a.head == 0, "k: not whole heads");
  require(a.v.rows == a.k.rows, "v: other heads than k");
  require(a.q.rows % a.k.rows == 0, "q: not a multiple of k's heads");
  require(a.k.columns == a.q.columns && a.v.columns == a.q.columns, "q, k, v: of different widths");
  require(a.q_norm.weight == nullptr || a.q.rows % a.q_norm.width == 0, "q_norm: does not divide q");
  require(a.k_norm.weight == nullptr || a.k.rows % a.k_norm.width == 0, "k_norm: does not divide k");
}

// How many elements of each head are turned by cosines and sines.
inline void check_turned(const Attention& a, int64_t turned) {
  require(turned >= 2 && turned % 2 == 0 && turned <= a.head, "cosine: not an even number of up to the head's width");
}

inline void check(const FirstHalf& f) {
  require(f.output.columns == f.attention.q.rows, "output: does not take what the heads give");
  require(f.output.rows == f.attention.q.columns, "output: not as wide as the layer");
  require(f.before.width == f.attention.q.columns, "before: not as wide as the layer");
  require(f.after.width == f.attention.q.columns, "after: not as wide as the layer");
}

inline void check(const Router& r) {
  check_size(r.experts, "experts");
  check_size(r.hidden, "hidden");
  require(r.top_k >= 1 && r.top_k <= r.experts, "top_k: not in [1, experts]");
}

inline void check(const DecoderLayer& layer) {
  const int64_t width = layer.first.attention.q.columns;
  require(layer.router.hidden == width, "router: not as wide as the layer");
  require(layer.router.type == layer.first.attention.type, "router: of another type than the attention");
  require(layer.shape.hidden == width, "shape: not as wide as the layer");
  require(static_cast<int64_t>(layer.experts.size()) == layer.router.experts, "experts: not as many as the router's");
}

inline void check(const DecoderLayers& all) {
  require(!all.layers.empty(), "layers: none");
  for (const DecoderLayer& layer : all.layers) {
    require(layer.shape.hidden == all.layers[0].shape.hidden, "layers: of different widths");
    require(layer.first.attention.type == all.layers[0].first.attention.type, "layers: of different types");
  }
}

}  // namespace moestro
