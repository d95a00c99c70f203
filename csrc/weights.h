// How a panel is read in the float formats. All others are formats of codes: codes.inl.
#pragma once

#include "experts.h"
#include "simd.h"

namespace {

using moestro::kGroup;
using moestro::kPanel;

constexpr int W = V::kWidth;
constexpr int VP = static_cast<int>(kPanel) / W;  // vectors a panel

constexpr int64_t kAhead = 1024;  // bytes: how far ahead of each stream few tokens ask for memory

inline void prefetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p);
#else
  (void)p;
#endif
}

// [K][16]
struct Fp32 {
  static constexpr int kStep = 1, kStepBytes = 64;  // columns at a time
  static constexpr bool kFromMemory = true;
  static void load(const uint8_t* at, V (&w)[1][VP]) {
    for (int v = 0; v < VP; ++v) w[0][v] = V::load(reinterpret_cast<const float*>(at) + v * W);
  }
};

// A tile that was converted to float32 and lies in cache.
struct Converted : Fp32 {
  static constexpr bool kFromMemory = false;
};

struct Fp16 {
  static constexpr int kStep = 1, kStepBytes = 32;
  static constexpr bool kFromMemory = true;
  static void load(const uint8_t* at, V (&w)[1][VP]) {
    for (int v = 0; v < VP; ++v) w[0][v] = V::load_fp16(at + v * W * 2);
  }
};

// [K / 2][16][2]: a 32-bit lane holds an even and an odd column, each one operation away from a float.
struct Bf16 {
  static constexpr int kStep = 2, kStepBytes = 64;
  static constexpr bool kFromMemory = true;
  static void load(const uint8_t* at, V (&w)[2][VP]) {
    for (int v = 0; v < VP; ++v) {
      const I both = I::load(at + v * W * 4);
      w[0][v] = even_bf16(both);
      w[1][v] = odd_bf16(both);
    }
  }
};

// Columns [begin, begin + count) of a panel as float32 [count, 16]; begin is a multiple of 64. Asks for the columns
// behind them, which are wanted when the products with these are done.
template <class F>
inline void convert(F, const uint8_t* panel, int64_t begin, int64_t count, float* to) {
  for (int64_t s = begin / F::kStep; s * F::kStep < begin + count; ++s) {
    V w[F::kStep][VP];
    const uint8_t* at = panel + s * F::kStepBytes;
    prefetch(at + count / F::kStep * F::kStepBytes);
    F::load(at, w);
    for (int j = 0; j < F::kStep; ++j)
      for (int v = 0; v < VP; ++v, to += W) w[j][v].store(to);
  }
}

}  // namespace
