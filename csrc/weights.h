// How a panel is read in the formats that have kernels of their own: floats for float formats, pairs of 16-bit integers
// for int8 and int4. All other formats are read as coded.inl says.
//
// An int8 or int4 weight is (q - zero) * scale, with the scale (and zero) of its row and group of 64 columns.
#pragma once

#include "experts.h"
#include "simd.h"

namespace {

using moestro::kGroup;
using moestro::kPanel;

constexpr int W = V::kWidth;
constexpr int VP = static_cast<int>(kPanel) / W;  // vectors a panel

#if defined(MOESTRO_BYTE_DOTS)
constexpr bool kHasByteDots = true;
#else
constexpr bool kHasByteDots = false;
#endif
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

// A group: fp16 scales [16], then int8 [32][16][2].
struct Int8 {
  static constexpr int kHeader = 32, kGroupBytes = 32 + 1024;
  static constexpr int kPairs = 2, kStepBytes = 64;  // pairs of columns at a time
  static constexpr bool kHasZero = false;
  static constexpr float kOddScale = 1;
  static void load(const uint8_t* at, I (&w)[2][VP]) {
    for (int v = 0; v < VP; ++v) {
      w[0][v] = I::load_int8(at + v * W * 2);
      w[1][v] = I::load_int8(at + 32 + v * W * 2);
    }
  }
  static void factors(const uint8_t* at, I (&w)[2][VP]) { load(at, w); }
  static void numbers(const uint8_t* at, I (&w)[2][VP]) { load(at, w); }
  static I dot(I w, I x, I sum) { return dot_pairs(w, x, sum); }
  static I total(I even, I odd) { return even + odd; }
};

// A group: fp16 scales [16], fp16 zeros [16], then 4-bit numbers as 32-bit words [8][16]. A word holds 8 columns
// of a row; bits 4j..4j+3 of its lower and upper half are columns 2j and 2j + 1. Odd pairs stay where they are,
// 16 times too large, which saves a shift each and comes off their sum.
struct Int4 {
  static constexpr int kHeader = 64, kGroupBytes = 64 + 512;
  static constexpr int kPairs = 4, kStepBytes = 64;
  static constexpr bool kHasZero = true;
  static constexpr float kOddScale = 1.0f / 16;
  static void load(const uint8_t* at, I (&w)[4][VP]) {
    const I low = I::set16(0x000F), high = I::set16(0x00F0);
    for (int v = 0; v < VP; ++v) {
      const I words = I::load(at + v * W * 4), upper = shift_right16<8>(words);
      w[0][v] = words & low;
      w[1][v] = words & high;
      w[2][v] = upper & low;
      w[3][v] = upper & high;
    }
  }
  // As they are, for a sum of all: one operation more.
  static void numbers(const uint8_t* at, I (&w)[4][VP]) {
    const I low = I::set16(0x000F);
    for (int v = 0; v < VP; ++v) {
      const I words = I::load(at + v * W * 4);
      w[0][v] = words & low;
      w[1][v] = shift_right16<4>(words) & low;
      w[2][v] = shift_right16<8>(words) & low;
      w[3][v] = shift_right16<12>(words);
    }
  }
#if defined(MOESTRO_BYTE_DOTS)
  // Four columns of a row at once, as bytes that meet the high and the low bytes of the activations: 7 operations for
  // 128 weights, where pairs of 16-bit integers take 9.
  static void factors(const uint8_t* at, I (&w)[4][VP]) {
    const I nibbles = I::set16(0x0F0F);
    for (int v = 0; v < VP; ++v) {
      const I words = I::load(at + v * W * 4);
      w[0][v] = w[1][v] = words & nibbles;
      w[2][v] = w[3][v] = shift_right16<4>(words) & nibbles;
    }
  }
  static I dot(I w, I x, I sum) { return dot_bytes(w, x, sum); }
  static I total(I high, I low) { return shift_left32<8>(high) + low; }
#else
  static void factors(const uint8_t* at, I (&w)[4][VP]) { load(at, w); }
  static I dot(I w, I x, I sum) { return dot_pairs(w, x, sum); }
  static I total(I even, I odd) { return even + shift_right32<4>(odd); }
#endif
};

template <class Q>
inline void load_scales(const uint8_t* group, V (&scale)[VP], V (&zero)[VP]) {
  for (int v = 0; v < VP; ++v) {
    scale[v] = V::load_fp16(group + v * W * 2);
    if (Q::kHasZero) zero[v] = V::load_fp16(group + 2 * kPanel + v * W * 2);
  }
}

template <class F>
struct IsQuantized { static constexpr bool value = false; };
template <>
struct IsQuantized<Int8> { static constexpr bool value = true; };
template <>
struct IsQuantized<Int4> { static constexpr bool value = true; };

// Columns [begin, begin + count) of a panel as float32 [count, 16]; begin is a multiple of 64. Asks for the columns
// behind them, which are wanted when the products with these are done.
template <class F>
inline void convert(F, const uint8_t* panel, int64_t begin, int64_t count, float* to) {
  if constexpr (!IsQuantized<F>::value) {
    for (int64_t s = begin / F::kStep; s * F::kStep < begin + count; ++s) {
      V w[F::kStep][VP];
      const uint8_t* at = panel + s * F::kStepBytes;
      prefetch(at + count / F::kStep * F::kStepBytes);
      F::load(at, w);
      for (int j = 0; j < F::kStep; ++j)
        for (int v = 0; v < VP; ++v, to += W) w[j][v].store(to);
    }
  } else {
    for (int64_t g = begin / kGroup; g * kGroup < begin + count; ++g) {
      const uint8_t* group = panel + g * F::kGroupBytes;
      V scale[VP], zero[VP];
      load_scales<F>(group, scale, zero);
      for (int i = 0; i < kGroup / (2 * F::kPairs); ++i) {
        I w[F::kPairs][VP];
        const uint8_t* at = group + F::kHeader + i * F::kStepBytes;
        prefetch(at + count / kGroup * F::kGroupBytes);
        F::load(at, w);
        for (int j = 0; j < F::kPairs; ++j, to += 2 * kPanel) {
          for (int v = 0; v < VP; ++v) {
            V even = even_half(w[j][v]), odd = odd_half(w[j][v]);
            if (F::kHasZero) {
              const V part = V::set(j % 2 ? F::kOddScale : 1.0f), less = V::zero() - zero[v];
              even = fma(even, part, less);
              odd = fma(odd, part, less);
            }
            (even * scale[v]).store(to + v * W);
            (odd * scale[v]).store(to + kPanel + v * W);
          }
        }
      }
    }
  }
}

}  // namespace
