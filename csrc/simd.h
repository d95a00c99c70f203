// One vector type for all ISA levels, chosen by the flags that a level's file is compiled with.
//
// Everything lives in an anonymous namespace: the same names are compiled once a level, and a linker that
// merged them would run AVX-512 code on a CPU without it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

inline float scalar_from_bf16(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

inline float scalar_from_fp16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1Fu, mantissa = bits & 0x3FFu;
  float value;
  uint32_t wide;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    memcpy(&wide, &value, 4);
    wide |= sign;
  } else if (exponent == 31) {
    wide = sign | 0x7F800000u | (mantissa << 13);
  } else {
    wide = sign | ((exponent + 112) << 23) | (mantissa << 13);
  }
  memcpy(&value, &wide, 4);
  return value;
}

#if defined(__AVX512F__)

struct V {
  static constexpr int kWidth = 16;
  static constexpr int kRows = 4, kTokens = 6;  // register tile of the many-token kernel
  __m512 v;
  static V zero() { return {_mm512_setzero_ps()}; }
  static V set(float a) { return {_mm512_set1_ps(a)}; }
  static V load(const float* p) { return {_mm512_loadu_ps(p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
};
inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline V operator+(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
inline V operator-(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline V operator*(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline V operator/(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
inline V vmin(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
inline V vmax(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
inline V vround(V a) { return {_mm512_roundscale_ps(a.v, 0)}; }
inline V pow2i(V n) {  // 2^n for whole n
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}
inline V load_weights(const float* p) { return V::load(p); }
struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };
inline V load_weights(const Bf16* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
inline V load_weights(const Fp16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// Sums of 16 vectors, as the 16 elements of one.
inline V sums(const V* a) {
  __m512 t[16];
  for (int i = 0; i < 8; ++i) {
    t[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i].v, a[2 * i + 1].v), _mm512_unpackhi_ps(a[2 * i].v, a[2 * i + 1].v));
  }
  __m512 u[4];
  for (int i = 0; i < 4; ++i) {
    u[i] = _mm512_add_ps(_mm512_shuffle_ps(t[2 * i], t[2 * i + 1], 0x44), _mm512_shuffle_ps(t[2 * i], t[2 * i + 1], 0xEE));
  }
  const __m512 lo = _mm512_add_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x44), _mm512_shuffle_f32x4(u[0], u[1], 0xEE));
  const __m512 hi = _mm512_add_ps(_mm512_shuffle_f32x4(u[2], u[3], 0x44), _mm512_shuffle_f32x4(u[2], u[3], 0xEE));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(lo, hi, 0x88), _mm512_shuffle_f32x4(lo, hi, 0xDD))};
}
inline float sum(V a) { return _mm512_reduce_add_ps(a.v); }

#elif defined(__AVX2__)

struct V {
  static constexpr int kWidth = 8;
  static constexpr int kRows = 3, kTokens = 4;
  __m256 v;
  static V zero() { return {_mm256_setzero_ps()}; }
  static V set(float a) { return {_mm256_set1_ps(a)}; }
  static V load(const float* p) { return {_mm256_loadu_ps(p)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
};
inline V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline V operator+(V a, V b) { return {_mm256_add_ps(a.v, b.v)}; }
inline V operator-(V a, V b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline V operator*(V a, V b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline V operator/(V a, V b) { return {_mm256_div_ps(a.v, b.v)}; }
inline V vmin(V a, V b) { return {_mm256_min_ps(a.v, b.v)}; }
inline V vmax(V a, V b) { return {_mm256_max_ps(a.v, b.v)}; }
inline V vround(V a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline V pow2i(V n) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23))};
}
inline V load_weights(const float* p) { return V::load(p); }
struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };
inline V load_weights(const Bf16* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16))};
}
inline V load_weights(const Fp16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline V sums(const V* a) {
  const __m256 t0 = _mm256_hadd_ps(a[0].v, a[1].v), t1 = _mm256_hadd_ps(a[2].v, a[3].v);
  const __m256 t2 = _mm256_hadd_ps(a[4].v, a[5].v), t3 = _mm256_hadd_ps(a[6].v, a[7].v);
  const __m256 lo = _mm256_hadd_ps(t0, t1), hi = _mm256_hadd_ps(t2, t3);
  return {_mm256_add_ps(_mm256_permute2f128_ps(lo, hi, 0x20), _mm256_permute2f128_ps(lo, hi, 0x31))};
}
inline float sum(V a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

#elif defined(__ARM_NEON) && defined(__aarch64__)

struct V {
  static constexpr int kWidth = 4;
  static constexpr int kRows = 4, kTokens = 5;
  float32x4_t v;
  static V zero() { return {vdupq_n_f32(0)}; }
  static V set(float a) { return {vdupq_n_f32(a)}; }
  static V load(const float* p) { return {vld1q_f32(p)}; }
  void store(float* p) const { vst1q_f32(p, v); }
};
inline V fma(V a, V b, V c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline V operator+(V a, V b) { return {vaddq_f32(a.v, b.v)}; }
inline V operator-(V a, V b) { return {vsubq_f32(a.v, b.v)}; }
inline V operator*(V a, V b) { return {vmulq_f32(a.v, b.v)}; }
inline V operator/(V a, V b) { return {vdivq_f32(a.v, b.v)}; }
inline V vmin(V a, V b) { return {vminq_f32(a.v, b.v)}; }
inline V vmax(V a, V b) { return {vmaxq_f32(a.v, b.v)}; }
inline V vround(V a) { return {vrndnq_f32(a.v)}; }
inline V pow2i(V n) {
  return {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.v), vdupq_n_s32(127)), 23))};
}
inline V load_weights(const float* p) { return V::load(p); }
struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };
inline V load_weights(const Bf16* p) {
  return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16))};
}
inline V load_weights(const Fp16* p) {
  return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))))};
}
inline V sums(const V* a) { return {vpaddq_f32(vpaddq_f32(a[0].v, a[1].v), vpaddq_f32(a[2].v, a[3].v))}; }
inline float sum(V a) { return vaddvq_f32(a.v); }

#else  // scalar

struct V {
  static constexpr int kWidth = 1;
  static constexpr int kRows = 4, kTokens = 2;
  float v;
  static V zero() { return {0.0f}; }
  static V set(float a) { return {a}; }
  static V load(const float* p) { return {*p}; }
  void store(float* p) const { *p = v; }
};
inline V fma(V a, V b, V c) { return {a.v * b.v + c.v}; }
inline V operator+(V a, V b) { return {a.v + b.v}; }
inline V operator-(V a, V b) { return {a.v - b.v}; }
inline V operator*(V a, V b) { return {a.v * b.v}; }
inline V operator/(V a, V b) { return {a.v / b.v}; }
inline V vmin(V a, V b) { return {a.v < b.v ? a.v : b.v}; }
inline V vmax(V a, V b) { return {a.v > b.v ? a.v : b.v}; }
inline V vround(V a) { return {nearbyintf(a.v)}; }
inline V pow2i(V n) { return {ldexpf(1.0f, static_cast<int>(n.v))}; }
inline V load_weights(const float* p) { return V::load(p); }
struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };
inline V load_weights(const Bf16* p) { return {scalar_from_bf16(p->bits)}; }
inline V load_weights(const Fp16* p) { return {scalar_from_fp16(p->bits)}; }
inline V sums(const V* a) { return a[0]; }
inline float sum(V a) { return a.v; }

#endif

inline float scalar_weight(const float* p) { return *p; }
inline float scalar_weight(const Bf16* p) { return scalar_from_bf16(p->bits); }
inline float scalar_weight(const Fp16* p) { return scalar_from_fp16(p->bits); }

// e^x to 2 units in the last place, 0 far below and finite far above: Cephes' polynomial on |r| <= ln(2) / 2.
inline V vexp(V x) {
  x = vmin(vmax(x, V::set(-87.3f)), V::set(88.0f));
  const V n = vround(x * V::set(1.44269504088896341f));
  V r = fma(n, V::set(-0.693359375f), x);
  r = fma(n, V::set(2.12194440e-4f), r);
  V p = V::set(1.9875691500e-4f);
  p = fma(p, r, V::set(1.3981999507e-3f));
  p = fma(p, r, V::set(8.3334519073e-3f));
  p = fma(p, r, V::set(4.1665795894e-2f));
  p = fma(p, r, V::set(1.6666665459e-1f));
  p = fma(p, r, V::set(5.0000001201e-1f));
  p = fma(p, r * r, r) + V::set(1.0f);
  return p * pow2i(n);
}

inline V vsigmoid(V x) { return V::set(1.0f) / (V::set(1.0f) + vexp(V::zero() - x)); }

}  // namespace
