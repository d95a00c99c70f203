#include "checksum.h"

#include <cstring>

#if defined(MOESTRO_X86)
#include <nmmintrin.h>
#if defined(_MSC_VER)
#include <intrin.h>
#define MOESTRO_SSE42
#else
#define MOESTRO_SSE42 __attribute__((target("sse4.2")))
#endif
#elif defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

namespace moestro {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78;  // bits reversed: the highest bit is x^0
constexpr uint32_t kOne = 1u << 31;
constexpr int64_t kLane = 4096;  // bytes of each of three runs that are summed side by side

// The product of two polynomials modulo kPolynomial.
uint32_t multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t bit = kOne; bit != 0; bit >>= 1) {
    if (a & bit) product ^= b;
    b = b & 1 ? b >> 1 ^ kPolynomial : b >> 1;
  }
  return product;
}

// x^(8 * bytes), by which a checksum is multiplied when so many zero bytes follow.
uint32_t power(int64_t bytes) {
  uint32_t result = kOne, square = kOne >> 8;
  for (; bytes != 0; bytes >>= 1) {
    if (bytes & 1) result = multiply(result, square);
    square = multiply(square, square);
  }
  return result;
}

struct Tables {
  uint32_t byte[8][256];   // byte[i][b]: of byte b with i zero bytes behind it
  uint32_t shift[4][256];  // shift[i][b]: of byte i of a checksum, when kLane zero bytes follow

  Tables() {
    const uint32_t lane = power(kLane);
    for (uint32_t b = 0; b < 256; ++b) {
      uint32_t crc = b;
      for (int i = 0; i < 8; ++i) crc = crc & 1 ? crc >> 1 ^ kPolynomial : crc >> 1;
      byte[0][b] = crc;
      for (int i = 0; i < 4; ++i) shift[i][b] = multiply(lane, b << 8 * i);
    }
    for (int i = 1; i < 8; ++i)
      for (int b = 0; b < 256; ++b) byte[i][b] = byte[i - 1][b] >> 8 ^ byte[0][byte[i - 1][b] & 255];
  }
};

const Tables& tables() {
  static const Tables made;
  return made;
}

uint64_t word_at(const uint8_t* data) {  // the machines that this runs on are little-endian
  uint64_t word;
  std::memcpy(&word, data, 8);
  return word;
}

uint32_t by_tables(uint32_t crc, const uint8_t* data, int64_t size) {
  const auto& byte = tables().byte;
  for (; size >= 8; size -= 8, data += 8) {
    const uint64_t word = word_at(data) ^ crc;
    crc = 0;
    for (int i = 0; i < 8; ++i) crc ^= byte[7 - i][word >> 8 * i & 255];
  }
  for (; size > 0; --size) crc = crc >> 8 ^ byte[0][(crc ^ *data++) & 255];
  return crc;
}

#if defined(MOESTRO_X86) || defined(__ARM_FEATURE_CRC32)
uint32_t shift_lane(uint32_t crc) {
  const auto& shift = tables().shift;
  return shift[0][crc & 255] ^ shift[1][crc >> 8 & 255] ^ shift[2][crc >> 16 & 255] ^ shift[3][crc >> 24];
}
#endif

#if defined(MOESTRO_X86)
bool has_instruction() {
#if defined(_MSC_VER)
  int info[4];
  __cpuidex(info, 1, 0);
  return info[2] >> 20 & 1;
#else
  return __builtin_cpu_supports("sse4.2");
#endif
}

MOESTRO_SSE42 inline uint32_t add_word(uint32_t crc, uint64_t word) { return static_cast<uint32_t>(_mm_crc32_u64(crc, word)); }
MOESTRO_SSE42 inline uint32_t add_byte(uint32_t crc, uint8_t byte) { return _mm_crc32_u8(crc, byte); }
#elif defined(__ARM_FEATURE_CRC32)
#define MOESTRO_SSE42
bool has_instruction() { return true; }

inline uint32_t add_word(uint32_t crc, uint64_t word) { return __crc32cd(crc, word); }
inline uint32_t add_byte(uint32_t crc, uint8_t byte) { return __crc32cb(crc, byte); }
#endif

#if defined(MOESTRO_X86) || defined(__ARM_FEATURE_CRC32)
// The instruction takes a word a cycle but gives its result after three: three runs side by side keep it busy.
MOESTRO_SSE42 uint32_t by_instruction(uint32_t a, const uint8_t* data, int64_t size) {
  for (; size >= 3 * kLane; size -= 3 * kLane, data += 3 * kLane) {
    uint32_t b = 0, c = 0;
    for (int64_t i = 0; i < kLane; i += 8) {
      a = add_word(a, word_at(data + i));
      b = add_word(b, word_at(data + kLane + i));
      c = add_word(c, word_at(data + 2 * kLane + i));
    }
    a = shift_lane(shift_lane(a) ^ b) ^ c;
  }
  for (; size >= 8; size -= 8, data += 8) a = add_word(a, word_at(data));
  for (; size > 0; --size) a = add_byte(a, *data++);
  return a;
}
#else
bool has_instruction() { return false; }

uint32_t by_instruction(uint32_t crc, const uint8_t* data, int64_t size) { return by_tables(crc, data, size); }
#endif

}  // namespace

uint32_t crc32c(const uint8_t* data, int64_t size, uint32_t crc) {
  static const bool has = has_instruction();
  return ~(has ? by_instruction(~crc, data, size) : by_tables(~crc, data, size));
}

uint32_t crc32c_by_tables(const uint8_t* data, int64_t size, uint32_t crc) { return ~by_tables(~crc, data, size); }

uint32_t crc32c_combine(uint32_t first, uint32_t second, int64_t second_size) {
  return multiply(power(second_size), first) ^ second;
}

}  // namespace moestro
