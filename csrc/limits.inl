// The loops that a machine's limits are measured with: nothing but reading, nothing but multiplying and adding.

namespace {

float sum_of(const float* x, int64_t n, int64_t prefetch) {
  V acc[8];
  for (V& a : acc) a = V::zero();
  constexpr int64_t kStep = 8 * W;
  int64_t i = 0;
  if (prefetch < 0) {  // as the kernels read, four rows at a time: hardware prefetchers like several streams
    const int64_t quarter = n / 4 / (2 * W) * (2 * W);
    for (int64_t k = 0; k < quarter; k += 2 * W)
      for (int j = 0; j < 8; ++j) acc[j] = acc[j] + V::load(x + (j / 2) * quarter + k + (j % 2) * W);
    i = 4 * quarter;
  }
  for (; i + kStep <= n; i += kStep) {
#if defined(__GNUC__)
    if (prefetch > 0) {
      for (int64_t j = 0; j < kStep; j += 16) __builtin_prefetch(x + i + prefetch + j);  // a cache line is 16 floats
    }
#endif
    for (int j = 0; j < 8; ++j) acc[j] = acc[j] + V::load(x + i + j * W);
  }
  (void)prefetch;
  V total = V::zero();
  for (const V& a : acc) total = total + a;
  float value = sum(total);
  for (; i < n; ++i) value += x[i];
  return value;
}

double fma_of(int64_t rounds) {
  constexpr int kChains = 12;  // more than latency x units of any core here, and few enough for 16 registers
  V acc[kChains];
  for (int j = 0; j < kChains; ++j) acc[j] = V::set(1.0f + 0.01f * static_cast<float>(j));
  const V a = V::set(0.999999f), b = V::set(1e-6f);
  for (int64_t i = 0; i < rounds; ++i)
    for (int j = 0; j < kChains; ++j) acc[j] = fma(acc[j], a, b);
  V total = V::zero();
  for (const V& v : acc) total = total + v;
  volatile float sink = sum(total);  // so that the loop is not taken out
  (void)sink;
  return 2.0 * kChains * W * static_cast<double>(rounds);
}

// The same with what codes meet, an activation's planes being one operand: by matrix tiles where there are some.
double dots_of(int64_t rounds) {
#if defined(MOESTRO_TILES)
  const TileRows configured(16, 64);
  alignas(64) uint8_t tile[1024] = {1};
  before_tile_loads();
  _tile_loadd(4, tile, 64);
  _tile_loadd(6, tile, 64);
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 6);
    _tile_dpbsud(2, 4, 6);
    _tile_dpbsud(3, 4, 6);
  }
  _tile_stored(0, tile, 64);
  volatile uint8_t sink = tile[0];
  constexpr double kProducts = 4 * 16 * 16 * kGroup;
#else
  constexpr int kChains = V::kRegisters >= 32 ? 12 : 6;  // latency x units, and few enough to stay in registers
  I acc[kChains], w = I::set32(0x01010101);
  const I x = I::set32(0x04030201);
  for (I& a : acc) a = I::zero();
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) {
      // Another operand each time, for all the compiler knows.
#if defined(__AVX512F__) && defined(__GNUC__)
      asm volatile("" : "+v"(w.v));
#elif defined(__AVX2__) && defined(__GNUC__)
      asm volatile("" : "+x"(w.v));
#endif
      acc[j] = dot(w, x, acc[j]);
    }
  }
  I total = I::zero();
  for (const I& a : acc) total = total + a;
  volatile float sink = sum(to_float(total));
  constexpr double kProducts = kChains * W * kOperandColumns;
#endif
  (void)sink;
  return 2.0 / kPlanes * kProducts * static_cast<double>(rounds);
}

}  // namespace
