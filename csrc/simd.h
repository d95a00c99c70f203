// Two vector types for all ISA levels, chosen by the flags that a level's file is compiled with: V holds kWidth
// floats, I as many 32-bit integers or twice as many of 16 bits.
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

inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline float scalar_from_bf16(uint16_t bits) { return float_of_bits(static_cast<uint32_t>(bits) << 16); }

inline float scalar_from_fp16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1Fu, mantissa = bits & 0x3FFu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  if (exponent == 31) return float_of_bits(sign | 0x7F800000u | (mantissa << 13));
  return float_of_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// A float8_e4m3fn's bits as those of an fp16, 2^-8 times as large: its exponent, mantissa and, moved by one, its sign.
constexpr int16_t kHalfOfE4m3 = static_cast<int16_t>(0xBF80);
inline uint16_t half_of_e4m3(uint8_t bits) { return static_cast<uint16_t>((bits & 0x80) << 8 | (bits & 0x7F) << 7); }

inline uint16_t bf16_of(float value) {  // to nearest even
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 0x40u : rounded);
}

inline uint16_t fp16_of(float value) {  // to nearest even
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u, size = bits & 0x7FFFFFFFu;
  if (size > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (size >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // rounds to infinity
  if (size < 0x38800000u) {  // subnormal: adding 0.5 leaves the mantissa at the end, rounded
    const float shifted = float_of_bits(size) + 0.5f;
    memcpy(&bits, &shifted, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3F000000u));
  }
  return static_cast<uint16_t>(sign | ((size - 0x38000000u + 0xFFFu + ((size >> 13) & 1u)) >> 13));
}

#if defined(__AVX512F__)

struct V {
  static constexpr int kWidth = 16;
  static constexpr int kTokens = 12, kWholeTokens = 8;  // of a register tile of floats, and of integers
  static constexpr int kRegisters = 32;
  __m512 v;
  static V zero() { return {_mm512_setzero_ps()}; }
  static V set(float a) { return {_mm512_set1_ps(a)}; }
  static V load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static V load_bf16(const void* p) {
    const __m256i raw = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
  }
  static V load_fp16(const void* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)))}; }
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
inline float sum(V a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(V a) { return _mm512_reduce_max_ps(a.v); }
// Sums of the lanes of each of four vectors.
inline void store_sums(const V (&a)[4], float* to) {
  const __m512 x = _mm512_add_ps(_mm512_unpacklo_ps(a[0].v, a[1].v), _mm512_unpackhi_ps(a[0].v, a[1].v));
  const __m512 y = _mm512_add_ps(_mm512_unpacklo_ps(a[2].v, a[3].v), _mm512_unpackhi_ps(a[2].v, a[3].v));
  const __m512 low = _mm512_shuffle_ps(x, y, 0x44), high = _mm512_shuffle_ps(x, y, 0xEE), all = _mm512_add_ps(low, high);
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

struct I {
  __m512i v;
  static I zero() { return {_mm512_setzero_si512()}; }
  static I load(const void* p) { return {_mm512_loadu_si512(p)}; }
  static I load_int8(const void* p) { return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(p)))}; }
  static I set_lane(const void* p) { int32_t both; memcpy(&both, p, 4); return {_mm512_set1_epi32(both)}; }
  static I set16(int16_t a) { return {_mm512_set1_epi16(a)}; }
  static I set32(int32_t a) { return {_mm512_set1_epi32(a)}; }
  static I load_bytes(const void* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)))}; }
  static I load_signed_bytes(const void* p) { return {_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)))}; }
  static I load_uint8(const void* p) { return {_mm512_cvtepu8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(p)))}; }
  static I load_table(const uint8_t* p) { return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  void store(void* p) const { _mm512_storeu_si512(p, v); }
};
inline I operator&(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
inline I operator|(I a, I b) { return {_mm512_or_si512(a.v, b.v)}; }
inline I look_up_bytes(I table, I index) { return {_mm512_shuffle_epi8(table.v, index.v)}; }
template <int N> inline I shift_left16(I a) { return {_mm512_slli_epi16(a.v, N)}; }
inline void load_e4m3(const void* p, V& even, V& odd) {
  const __m256i both = _mm256_loadu_si256(static_cast<const __m256i*>(p)), mask = _mm256_set1_epi16(kHalfOfE4m3);
  even = {_mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(both, 8), 1), mask))};
  odd = {_mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(both, 1), mask))};
}
inline I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
template <int N> inline I shift_right32(I a) { return {_mm512_srai_epi32(a.v, N)}; }
template <int N> inline I shift_left32(I a) { return {_mm512_slli_epi32(a.v, N)}; }
template <int N> inline I shift_right16(I a) { return {_mm512_srli_epi16(a.v, N)}; }
inline I dot_pairs(I a, I b, I sum) {  // sum + a.even * b.even + a.odd * b.odd, of 16-bit halves
#if defined(__AVX512VNNI__)
  return {_mm512_dpwssd_epi32(sum.v, a.v, b.v)};
#else
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(a.v, b.v))};
#endif
}
#if defined(__AVX512VNNI__)
#define MOESTRO_BYTE_DOTS
inline I dot_bytes(I a, I b, I sum) { return {_mm512_dpbusd_epi32(sum.v, a.v, b.v)}; }  // bytes: a unsigned, b signed
// Two times 16 pairs of bytes as 16 times four: of each row of a panel those of four columns, with bits flipped.
inline I load_quads(const void* p, int32_t flip) {
  const __m512i places = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                          20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i quads = _mm512_permutexvar_epi16(places, _mm512_loadu_si512(p));
  return {flip ? _mm512_xor_si512(quads, _mm512_set1_epi32(flip)) : quads};
}
#else
#define MOESTRO_BYTE_PAIRS
// Sums of two products of bytes, a unsigned and b signed, as 16-bit integers: the caller sees that these suffice.
inline I multiply_bytes(I a, I b) { return {_mm512_maddubs_epi16(a.v, b.v)}; }
inline I add16(I a, I b) { return {_mm512_add_epi16(a.v, b.v)}; }
#endif
// 64 16-bit integers q, |q| at most 32639, as two planes of signed bytes, q = 256 high + low: 64 high bytes and then the
// low ones, in their own order or, within each eight, in that of quads: 0 4 1 5 2 6 3 7.
inline void to_byte_planes(const int16_t* q, bool quads, uint8_t* to) {
  const __m512i a = _mm512_loadu_si512(q), b = _mm512_loadu_si512(q + 32), half = _mm512_set1_epi16(128);
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15));
  const auto store = [&](__m512i x, __m512i y, uint8_t* at) {
    const __m512i bytes = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(x)), _mm512_cvtepi16_epi8(y), 1);
    _mm512_storeu_si512(at, quads ? _mm512_shuffle_epi8(bytes, order) : bytes);
  };
  store(_mm512_srai_epi16(_mm512_add_epi16(a, half), 8), _mm512_srai_epi16(_mm512_add_epi16(b, half), 8), to);
  store(a, b, to + 64);
}
inline I bits_of(V a) { return {_mm512_castps_si512(a.v)}; }
inline V to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline V even_half(I a) { return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(a.v, 16), 16))}; }
inline V odd_half(I a) { return {_mm512_cvtepi32_ps(_mm512_srai_epi32(a.v, 16))}; }
inline V even_bf16(I a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))}; }
inline V odd_bf16(I a) { return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(-65536)))}; }
inline V even_fp16(I a) { return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(a.v))}; }
inline V odd_fp16(I a) { return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(a.v, 16)))}; }
inline V float_of(I a) { return {_mm512_castsi512_ps(a.v)}; }
// Four columns of 32 bits from as many rows, so many bytes apart, as a vector has lanes. Rows are loaded where they end
// up, four of them side by side, so that a column needs two shuffles and not four.
inline void load_columns(const uint8_t* p, int64_t apart, I (&columns)[4]) {
  const auto row = [&](int j) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + j * apart)); };
  __m512i r[4];
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm512_castsi128_si512(row(j));
    r[j] = _mm512_mask_broadcast_i32x4(r[j], 0x00F0, row(j + 4));
    r[j] = _mm512_mask_broadcast_i32x4(r[j], 0x0F00, row(j + 8));
    r[j] = _mm512_mask_broadcast_i32x4(r[j], 0xF000, row(j + 12));
  }
  const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpacklo_epi32(r[2], r[3]);
  const __m512i c = _mm512_unpackhi_epi32(r[0], r[1]), d = _mm512_unpackhi_epi32(r[2], r[3]);
  columns[0] = {_mm512_unpacklo_epi64(a, b)}, columns[1] = {_mm512_unpackhi_epi64(a, b)};
  columns[2] = {_mm512_unpacklo_epi64(c, d)}, columns[3] = {_mm512_unpackhi_epi64(c, d)};
}
inline V pow2i(V n) {  // 2^n for whole n
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}
// Rounds each to an integer of 16 bits and returns the sum of those.
inline V store_int16(V a, int16_t* p) {
  const __m512i whole = _mm512_cvtps_epi32(a.v);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(whole));
  return {_mm512_cvtepi32_ps(whole)};
}

#elif defined(__AVX2__)

struct V {
  static constexpr int kWidth = 8;
  static constexpr int kTokens = 6, kWholeTokens = 2;
  static constexpr int kRegisters = 16;
  __m256 v;
  static V zero() { return {_mm256_setzero_ps()}; }
  static V set(float a) { return {_mm256_set1_ps(a)}; }
  static V load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static V load_bf16(const void* p) {
    const __m128i raw = _mm_loadu_si128(static_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16))};
  }
  static V load_fp16(const void* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)))}; }
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
inline float sum(V a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline void store_sums(const V (&a)[4], float* to) {
  const __m256 x = _mm256_add_ps(_mm256_unpacklo_ps(a[0].v, a[1].v), _mm256_unpackhi_ps(a[0].v, a[1].v));
  const __m256 y = _mm256_add_ps(_mm256_unpacklo_ps(a[2].v, a[3].v), _mm256_unpackhi_ps(a[2].v, a[3].v));
  const __m256 all = _mm256_add_ps(_mm256_shuffle_ps(x, y, 0x44), _mm256_shuffle_ps(x, y, 0xEE));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
inline float largest(V a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

struct I {
  __m256i v;
  static I zero() { return {_mm256_setzero_si256()}; }
  static I load(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
  static I load_int8(const void* p) { return {_mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)))}; }
  static I set_lane(const void* p) { int32_t both; memcpy(&both, p, 4); return {_mm256_set1_epi32(both)}; }
  static I set16(int16_t a) { return {_mm256_set1_epi16(a)}; }
  static I set32(int32_t a) { return {_mm256_set1_epi32(a)}; }
  static I load_bytes(const void* p) { return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)))}; }
  static I load_signed_bytes(const void* p) { return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)))}; }
  static I load_uint8(const void* p) { return {_mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)))}; }
  static I load_table(const uint8_t* p) { return {_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  void store(void* p) const { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
};
inline I operator&(I a, I b) { return {_mm256_and_si256(a.v, b.v)}; }
inline I operator|(I a, I b) { return {_mm256_or_si256(a.v, b.v)}; }
inline I look_up_bytes(I table, I index) { return {_mm256_shuffle_epi8(table.v, index.v)}; }
template <int N> inline I shift_left16(I a) { return {_mm256_slli_epi16(a.v, N)}; }
inline void load_e4m3(const void* p, V& even, V& odd) {
  const __m128i both = _mm_loadu_si128(static_cast<const __m128i*>(p)), mask = _mm_set1_epi16(kHalfOfE4m3);
  even = {_mm256_cvtph_ps(_mm_and_si128(_mm_srai_epi16(_mm_slli_epi16(both, 8), 1), mask))};
  odd = {_mm256_cvtph_ps(_mm_and_si128(_mm_srai_epi16(both, 1), mask))};
}
// A pair of columns of 16 rows, for which a shift serves both vectors.
#define MOESTRO_E4M3_ROWS
inline void load_e4m3_rows(const void* p, V (&even)[2], V (&odd)[2]) {
  const __m256i both = _mm256_loadu_si256(static_cast<const __m256i*>(p)), mask = _mm256_set1_epi16(kHalfOfE4m3);
  const __m256i e = _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(both, 8), 1), mask);
  const __m256i o = _mm256_and_si256(_mm256_srai_epi16(both, 1), mask);
  even[0] = {_mm256_cvtph_ps(_mm256_castsi256_si128(e))}, even[1] = {_mm256_cvtph_ps(_mm256_extracti128_si256(e, 1))};
  odd[0] = {_mm256_cvtph_ps(_mm256_castsi256_si128(o))}, odd[1] = {_mm256_cvtph_ps(_mm256_extracti128_si256(o, 1))};
}
inline I operator+(I a, I b) { return {_mm256_add_epi32(a.v, b.v)}; }
template <int N> inline I shift_right32(I a) { return {_mm256_srai_epi32(a.v, N)}; }
template <int N> inline I shift_left32(I a) { return {_mm256_slli_epi32(a.v, N)}; }
template <int N> inline I shift_right16(I a) { return {_mm256_srli_epi16(a.v, N)}; }
inline I dot_pairs(I a, I b, I sum) { return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(a.v, b.v))}; }
#define MOESTRO_BYTE_PAIRS
inline I multiply_bytes(I a, I b) { return {_mm256_maddubs_epi16(a.v, b.v)}; }
inline I add16(I a, I b) { return {_mm256_add_epi16(a.v, b.v)}; }
inline void to_byte_planes(const int16_t* q, bool quads, uint8_t* to) {
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15));
  const auto store = [&](__m256i x, __m256i y, uint8_t* at) {  // of 16-bit integers that are signed bytes
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(x, y), 0xD8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), quads ? _mm256_shuffle_epi8(bytes, order) : bytes);
  };
  for (int i = 0; i < 64; i += 32) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + i)), half = _mm256_set1_epi16(128);
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + i + 16));
    store(_mm256_srai_epi16(_mm256_add_epi16(a, half), 8), _mm256_srai_epi16(_mm256_add_epi16(b, half), 8), to + i);
    store(_mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8), to + 64 + i);
  }
}
inline I bits_of(V a) { return {_mm256_castps_si256(a.v)}; }
inline V to_float(I a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline V even_half(I a) { return {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(a.v, 16), 16))}; }
inline V odd_half(I a) { return {_mm256_cvtepi32_ps(_mm256_srai_epi32(a.v, 16))}; }
inline V even_bf16(I a) { return {_mm256_castsi256_ps(_mm256_slli_epi32(a.v, 16))}; }
inline V odd_bf16(I a) { return {_mm256_castsi256_ps(_mm256_and_si256(a.v, _mm256_set1_epi32(-65536)))}; }
inline V halves_of(__m256i a) {  // the low 16 bits of each lane
  return {_mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)))};
}
inline V even_fp16(I a) { return halves_of(_mm256_and_si256(a.v, _mm256_set1_epi32(0xFFFF))); }
inline V odd_fp16(I a) { return halves_of(_mm256_srli_epi32(a.v, 16)); }
inline V float_of(I a) { return {_mm256_castsi256_ps(a.v)}; }
inline void load_columns(const uint8_t* p, int64_t apart, I (&columns)[4]) {
  const auto row = [&](int j) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + j * apart)); };
  __m256i r[4];
  for (int j = 0; j < 4; ++j) r[j] = _mm256_inserti128_si256(_mm256_castsi128_si256(row(j)), row(j + 4), 1);
  const __m256i a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpacklo_epi32(r[2], r[3]);
  const __m256i c = _mm256_unpackhi_epi32(r[0], r[1]), d = _mm256_unpackhi_epi32(r[2], r[3]);
  columns[0] = {_mm256_unpacklo_epi64(a, b)}, columns[1] = {_mm256_unpackhi_epi64(a, b)};
  columns[2] = {_mm256_unpacklo_epi64(c, d)}, columns[3] = {_mm256_unpackhi_epi64(c, d)};
}
inline V pow2i(V n) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23))};
}
inline V store_int16(V a, int16_t* p) {
  const __m256i whole = _mm256_cvtps_epi32(a.v);
  const __m128i both = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), both);
  return {_mm256_cvtepi32_ps(whole)};
}

#elif defined(__ARM_NEON) && defined(__aarch64__)

struct V {
  static constexpr int kWidth = 4;
  static constexpr int kTokens = 6, kWholeTokens = 4;
  static constexpr int kRegisters = 32;
  float32x4_t v;
  static V zero() { return {vdupq_n_f32(0)}; }
  static V set(float a) { return {vdupq_n_f32(a)}; }
  static V load(const float* p) { return {vld1q_f32(p)}; }
  static V load_bf16(const void* p) { return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(static_cast<const uint16_t*>(p)), 16))}; }
  static V load_fp16(const void* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(static_cast<const uint16_t*>(p))))}; }
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
inline float sum(V a) { return vaddvq_f32(a.v); }
inline float largest(V a) { return vmaxvq_f32(a.v); }
inline void store_sums(const V (&a)[4], float* to) {
  vst1q_f32(to, vpaddq_f32(vpaddq_f32(a[0].v, a[1].v), vpaddq_f32(a[2].v, a[3].v)));
}

struct I {
  int32x4_t v;
  static I zero() { return {vdupq_n_s32(0)}; }
  static I load(const void* p) { return {vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p)))}; }
  static I load_int8(const void* p) { return {vreinterpretq_s32_s16(vmovl_s8(vld1_s8(static_cast<const int8_t*>(p))))}; }
  static I set_lane(const void* p) { int32_t both; memcpy(&both, p, 4); return {vdupq_n_s32(both)}; }
  static I set16(int16_t a) { return {vreinterpretq_s32_s16(vdupq_n_s16(a))}; }
  static I set32(int32_t a) { return {vdupq_n_s32(a)}; }
  static uint8x8_t four_bytes(const void* p) { uint32_t four; memcpy(&four, p, 4); return vcreate_u8(four); }
  static I load_bytes(const void* p) { return {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(four_bytes(p)))))}; }
  static I load_signed_bytes(const void* p) { return {vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(four_bytes(p)))))}; }
  static I load_uint8(const void* p) { return {vreinterpretq_s32_u16(vmovl_u8(vld1_u8(static_cast<const uint8_t*>(p))))}; }
  static I load_table(const uint8_t* p) { return load(p); }
  void store(void* p) const { vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_s32(v)); }
};
inline I operator&(I a, I b) { return {vandq_s32(a.v, b.v)}; }
inline I operator|(I a, I b) { return {vorrq_s32(a.v, b.v)}; }
inline I look_up_bytes(I table, I index) {
  return {vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(table.v), vreinterpretq_u8_s32(index.v)))};
}
template <int N> inline I shift_left16(I a) { return {vreinterpretq_s32_u16(vshlq_n_u16(vreinterpretq_u16_s32(a.v), N))}; }
inline void load_e4m3(const void* p, V& even, V& odd) {
  const int16x4_t both = vreinterpret_s16_u8(vld1_u8(static_cast<const uint8_t*>(p))), mask = vdup_n_s16(kHalfOfE4m3);
  even = {vcvt_f32_f16(vreinterpret_f16_s16(vand_s16(vshr_n_s16(vshl_n_s16(both, 8), 1), mask)))};
  odd = {vcvt_f32_f16(vreinterpret_f16_s16(vand_s16(vshr_n_s16(both, 1), mask)))};
}
inline I operator+(I a, I b) { return {vaddq_s32(a.v, b.v)}; }
template <int N> inline I shift_right32(I a) { return {vshrq_n_s32(a.v, N)}; }
template <int N> inline I shift_left32(I a) { return {vshlq_n_s32(a.v, N)}; }
template <int N> inline I shift_right16(I a) {
  return {vreinterpretq_s32_u16(vshrq_n_u16(vreinterpretq_u16_s32(a.v), N))};
}
inline I dot_pairs(I a, I b, I sum) {
  const int16x8_t x = vreinterpretq_s16_s32(a.v), y = vreinterpretq_s16_s32(b.v);
  return {vaddq_s32(sum.v, vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y)))};
}
inline I bits_of(V a) { return {vreinterpretq_s32_f32(a.v)}; }
inline V to_float(I a) { return {vcvtq_f32_s32(a.v)}; }
inline V even_half(I a) { return {vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(a.v, 16), 16))}; }
inline V odd_half(I a) { return {vcvtq_f32_s32(vshrq_n_s32(a.v, 16))}; }
inline V even_bf16(I a) { return {vreinterpretq_f32_s32(vshlq_n_s32(a.v, 16))}; }
inline V odd_bf16(I a) { return {vreinterpretq_f32_s32(vandq_s32(a.v, vdupq_n_s32(-65536)))}; }
inline V halves_of(uint32x4_t a) { return {vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(a)))}; }  // low 16 bits of each lane
inline V even_fp16(I a) { return halves_of(vreinterpretq_u32_s32(a.v)); }
inline V odd_fp16(I a) { return halves_of(vshrq_n_u32(vreinterpretq_u32_s32(a.v), 16)); }
inline V float_of(I a) { return {vreinterpretq_f32_s32(a.v)}; }
inline void load_columns(const uint8_t* p, int64_t apart, I (&columns)[4]) {
  const auto row = [&](int j) { return I::load(p + j * apart).v; };
  const int32x4x2_t a = vtrnq_s32(row(0), row(1)), b = vtrnq_s32(row(2), row(3));
  for (int i = 0; i < 2; ++i) {
    columns[i] = {vcombine_s32(vget_low_s32(a.val[i]), vget_low_s32(b.val[i]))};
    columns[i + 2] = {vcombine_s32(vget_high_s32(a.val[i]), vget_high_s32(b.val[i]))};
  }
}
inline V pow2i(V n) {
  return {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.v), vdupq_n_s32(127)), 23))};
}
inline V store_int16(V a, int16_t* p) {
  const int32x4_t whole = vcvtnq_s32_f32(a.v);
  vst1_s16(p, vqmovn_s32(whole));
  return {vcvtq_f32_s32(whole)};
}

#else  // scalar

struct V {
  static constexpr int kWidth = 1;
  static constexpr int kTokens = 2, kWholeTokens = 2;
  static constexpr int kRegisters = 64;
  float v;
  static V zero() { return {0.0f}; }
  static V set(float a) { return {a}; }
  static V load(const float* p) { return {*p}; }
  static V load_bf16(const void* p) { uint16_t bits; memcpy(&bits, p, 2); return {scalar_from_bf16(bits)}; }
  static V load_fp16(const void* p) { uint16_t bits; memcpy(&bits, p, 2); return {scalar_from_fp16(bits)}; }
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
inline float sum(V a) { return a.v; }
inline float largest(V a) { return a.v; }
inline void store_sums(const V (&a)[4], float* to) {
  for (int i = 0; i < 4; ++i) to[i] = a[i].v;
}

struct I {
  int32_t v;
  int32_t even() const { return static_cast<int16_t>(v & 0xFFFF); }
  int32_t odd() const { return static_cast<int16_t>(static_cast<uint32_t>(v) >> 16); }
  static I of(int32_t even, int32_t odd) {
    return {static_cast<int32_t>((static_cast<uint32_t>(odd) << 16) | (static_cast<uint32_t>(even) & 0xFFFFu))};
  }
  static I zero() { return {0}; }
  static I load(const void* p) { I a; memcpy(&a.v, p, 4); return a; }
  static I load_int8(const void* p) { const int8_t* q = static_cast<const int8_t*>(p); return of(q[0], q[1]); }
  static I set_lane(const void* p) { return load(p); }
  static I set16(int16_t a) { return of(a, a); }
  static I set32(int32_t a) { return {a}; }
  static I load_bytes(const void* p) { return {*static_cast<const uint8_t*>(p)}; }
  static I load_signed_bytes(const void* p) { return {*static_cast<const int8_t*>(p)}; }
  static I load_uint8(const void* p) { const uint8_t* q = static_cast<const uint8_t*>(p); return of(q[0], q[1]); }
  struct Table { const uint8_t* of; };
  static Table load_table(const uint8_t* p) { return {p}; }
  void store(void* p) const { memcpy(p, &v, 4); }
};
inline I operator&(I a, I b) { return {a.v & b.v}; }
inline I operator|(I a, I b) { return {a.v | b.v}; }
inline I look_up_bytes(I::Table table, I index) {
  uint8_t bytes[4];
  memcpy(bytes, &index.v, 4);
  for (uint8_t& b : bytes) b = table.of[b];
  return I::load(bytes);
}
template <int N> inline I shift_left16(I a) { return I::of(a.even() * (1 << N), a.odd() * (1 << N)); }
inline void load_e4m3(const void* p, V& even, V& odd) {
  const uint8_t* q = static_cast<const uint8_t*>(p);
  even = {scalar_from_fp16(half_of_e4m3(q[0]))};
  odd = {scalar_from_fp16(half_of_e4m3(q[1]))};
}
inline I operator+(I a, I b) { return {a.v + b.v}; }
template <int N> inline I shift_right32(I a) { return {a.v >> N}; }
template <int N> inline I shift_left32(I a) { return {static_cast<int32_t>(static_cast<uint32_t>(a.v) << N)}; }
template <int N> inline I shift_right16(I a) { return I::of((a.even() & 0xFFFF) >> N, (a.odd() & 0xFFFF) >> N); }
inline I dot_pairs(I a, I b, I sum) { return {sum.v + a.even() * b.even() + a.odd() * b.odd()}; }
inline I bits_of(V a) { I b; memcpy(&b.v, &a.v, 4); return b; }
inline V to_float(I a) { return {static_cast<float>(a.v)}; }
inline V even_half(I a) { return {static_cast<float>(a.even())}; }
inline V odd_half(I a) { return {static_cast<float>(a.odd())}; }
inline V even_bf16(I a) { return {float_of_bits(static_cast<uint32_t>(a.v) << 16)}; }
inline V odd_bf16(I a) { return {float_of_bits(static_cast<uint32_t>(a.v) & 0xFFFF0000u)}; }
inline V even_fp16(I a) { return {scalar_from_fp16(static_cast<uint16_t>(a.v))}; }
inline V odd_fp16(I a) { return {scalar_from_fp16(static_cast<uint16_t>(static_cast<uint32_t>(a.v) >> 16))}; }
inline V float_of(I a) { return {float_of_bits(static_cast<uint32_t>(a.v))}; }
inline void load_columns(const uint8_t* p, int64_t, I (&columns)[4]) {
  for (int j = 0; j < 4; ++j) columns[j] = I::load(p + 4 * j);
}
inline V pow2i(V n) { return {ldexpf(1.0f, static_cast<int>(n.v))}; }
inline V store_int16(V a, int16_t* p) {
  *p = fabsf(a.v) < 32767.5f ? static_cast<int16_t>(nearbyintf(a.v)) : 0;  // NaN is no integer
  return {static_cast<float>(*p)};
}

#endif

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

// The natural logarithm of numbers in [1e-37, 1e38], to 2 units in the last place: Cephes' polynomial, on x / 2^n within
// [sqrt(1/2), sqrt(2)).
inline V vlog(V x) {
  const V n = to_float(shift_right32<23>(bits_of(x) + I::set32(-0x3F3504F3)));
  const V r = x * pow2i(V::zero() - n) - V::set(1.0f);
  V p = V::set(7.0376836292e-2f);
  p = fma(p, r, V::set(-1.1514610310e-1f));
  p = fma(p, r, V::set(1.1676998740e-1f));
  p = fma(p, r, V::set(-1.2420140846e-1f));
  p = fma(p, r, V::set(1.4249322787e-1f));
  p = fma(p, r, V::set(-1.6668057665e-1f));
  p = fma(p, r, V::set(2.0000714765e-1f));
  p = fma(p, r, V::set(-2.4999993993e-1f));
  p = fma(p, r, V::set(3.3333331174e-1f));
  p = fma(p * r, r * r, fma(n, V::set(-2.12194440e-4f), r * r * V::set(-0.5f)));
  return fma(n, V::set(0.693359375f), p + r);
}

inline V vsigmoid(V x) { return V::set(1.0f) / (V::set(1.0f) + vexp(V::zero() - x)); }
inline V vabs(V x) { return vmax(x, V::zero() - x); }

}  // namespace
