// The twins of AMX's instructions against figures that were worked out from Intel's manual by hand, and what they refuse.
#include "emulated_amx.h"

#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <thread>
#include <utility>

#include "experts.h"
#include "test_help.h"

namespace {

using Config = std::array<uint8_t, 64>;

// All eight tiles of so many rows and bytes.
Config config_of(int rows, int row_bytes) {
  Config config{};
  config[0] = 1;
  for (int t = 0; t < 8; ++t) config[16 + 2 * t] = static_cast<uint8_t>(row_bytes), config[48 + t] = static_cast<uint8_t>(rows);
  return config;
}

uint32_t bits_of(float v) { uint32_t bits; memcpy(&bits, &v, 4); return bits; }
float float_of(uint32_t bits) { float v; memcpy(&v, &bits, 4); return v; }
uint32_t pair_of(double first, double second) {  // of numbers that bf16 has
  return bits_of(static_cast<float>(first)) >> 16 | (bits_of(static_cast<float>(second)) & 0xFFFF0000u);
}

bool rounds_to_bf16() {
  const uint32_t from[] = {0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x00400000, 0x807FFFFF, 0x00800000,
                           0x7F7FFFFF, 0xFF800000, 0x7F800001};
  const uint16_t want[] = {0x3F80, 0x3F80, 0x3F82, 0x3F81, 0, 0x8000, 0x0080, 0x7F80, 0xFF80, 0x7FC0};
  bool right = true;
  for (int i = 0; i < 10; ++i) {
    uint16_t got[32];
    _mm512_storeu_si512(got, _mm512_cvtne2ps_pbh(_mm512_set1_ps(1), _mm512_set1_ps(float_of(from[i]))));
    right = right && got[0] == want[i] && got[15] == want[i] && got[16] == 0x3F80;  // the second operand comes first
  }
  return right;
}

struct BfCase { double a[4], b[4], start, want; };  // two pairs: even, odd, even, odd

bool dots_bf16() {
  const double big = 1 << 24, tiny = std::ldexp(1.0, -70), subnormal = std::ldexp(1.0, -130);
  const BfCase cases[] = {
      {{1, 2, 3, 4}, {5, 6, 7, 8}, 0.5, 70.5},
      {{big, -big, 1, 0}, {1, 1, 1, 0}, 0, 0},                // even ones are summed apart: 2^24 + 1 is 2^24
      {{1, -1, 0, 0}, {1, 1, 0, 0}, big, big},                // and what was there comes last
      {{1, 1, 0, 0}, {1, 1, 0, 0}, big, big + 2},             // to which their sum is added, not each
      {{tiny, 0, 0, 0}, {tiny, 0, 0, 0}, 0, 0},               // a subnormal product
      {{subnormal, 0, 0, 0}, {std::ldexp(1.0, 100), 0, 0, 0}, 0, 0},
      {{0, 0, 0, 0}, {0, 0, 0, 0}, subnormal, 0},
  };
  bool right = true;
  for (const BfCase& c : cases) {
    const Config config = config_of(2, 8);
    _tile_loadconfig(config.data());
    const uint32_t a[2][2] = {{pair_of(c.a[0], c.a[1]), pair_of(c.a[2], c.a[3])}, {pair_of(1, 0), 0}};
    const uint32_t b[2][2] = {{pair_of(c.b[0], c.b[1]), pair_of(3, 0)}, {pair_of(c.b[2], c.b[3]), 0}};
    float out[2][2] = {{static_cast<float>(c.start), 0}, {0, 100}};
    _tile_loadd(0, out, 8);
    _tile_loadd(1, a, 8);
    _tile_loadd(2, b, 8);
    _tile_dpbf16ps(0, 1, 2);
    _tile_stored(0, out, 8);
    _tile_release();
    right = right && out[0][0] == static_cast<float>(c.want) && out[1][1] == 103;
  }
  return right;
}

bool dots_bytes() {
  const Config config = config_of(1, 4);
  _tile_loadconfig(config.data());
  bool right = true;
  const auto dot = [&](std::array<int8_t, 4> a, std::array<uint8_t, 4> b, int32_t start, int32_t want) {
    _tile_loadd(0, &start, 4);
    _tile_loadd(1, a.data(), 4);
    _tile_loadd(2, b.data(), 4);
    _tile_dpbsud(0, 1, 2);
    _tile_stored(0, &start, 4);
    right = right && start == want;
  };
  dot({-128, -128, -128, -128}, {255, 255, 255, 255}, 0, -130560);
  dot({1, 2, 3, 4}, {128, 1, 2, 255}, -7, 1149);
  dot({1, 0, 0, 0}, {1, 0, 0, 0}, INT32_MAX, INT32_MIN);  // it does not saturate
  _tile_release();
  return right;
}

// A tile of 3 rows of 12 bytes reads and writes these alone, and is zero at first and when it is made so.
bool keeps_to_its_shape() {
  const Config config = config_of(3, 12);
  std::vector<uint8_t> from(2 * 32 + 12), to(3 * 32, 0xEE);
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<uint8_t>(i + 1);
  bool right = true;
  const auto stored = [&](bool zeros) {
    _tile_stored(5, to.data(), 32);
    for (size_t i = 0; i < to.size(); ++i) right = right && to[i] == (i % 32 >= 12 ? 0xEE : zeros ? 0 : from[i]);
  };
  _tile_loadconfig(config.data());
  stored(true);
  _tile_loadd(5, from.data(), 32);
  stored(false);
  _tile_zero(5);
  stored(true);
  _tile_release();
  return right;
}

// Whether a process of its own, with these tiles configured, ends by abort().
template <class Do>
bool refuses(const Config& config, Do use) {
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    if (freopen("/dev/null", "w", stderr) == nullptr) _exit(1);
    _tile_loadconfig(config.data());
    use();
    _exit(0);
  }
  int status = 0;
  return waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

bool refuses_wrong_use() {
  const Config good = config_of(16, 64);
  const auto nothing = [] {};
  const auto changed = [&](std::initializer_list<std::pair<int, int>> bytes) {
    Config config = good;
    for (const auto& [at, value] : bytes) config[at] = static_cast<uint8_t>(value);
    return config;
  };
  const auto bf16 = [] { _tile_dpbf16ps(0, 1, 2); };
  const auto bytes = [] { _tile_dpbsud(0, 1, 2); };
  bool right = !refuses(good, bf16) && !refuses(good, bytes);
  for (const Config& config : {changed({{0, 2}}), changed({{0, 0}}), changed({{1, 1}}), changed({{2, 1}}), changed({{48, 17}}),
                               changed({{16, 65}}), changed({{17, 1}}), changed({{48, 0}}), changed({{16, 0}}), changed({{56, 1}}), changed({{32, 4}})})
    right = right && refuses(config, nothing);
  for (const Config& config : {changed({{48, 8}}), changed({{49, 8}}), changed({{50, 8}}), changed({{16, 32}}), changed({{18, 32}}),
                               changed({{20, 32}}), changed({{16, 63}, {20, 63}}), changed({{18, 62}, {50, 15}}), changed({{50, 0}, {20, 0}})})
    right = right && refuses(config, bf16) && refuses(config, bytes);
  right = right && refuses(good, [] { _tile_dpbf16ps(0, 0, 2); }) && refuses(good, [] { _tile_dpbsud(0, 1, 1); });
  right = right && refuses(good, [] { _tile_release(); _tile_zero(0); });
  right = right && refuses(changed({{48, 0}, {16, 0}}), [] { _tile_zero(0); });
  right = right && refuses(good, [&] { _tile_loadconfig(good.data()); });
  return right && refuses(good, [&] {
           _tile_release();
           std::thread([&] { _tile_loadconfig(good.data()); }).join();
         });
}

}  // namespace

void check_emulated_amx(Machine& machine) {
  const moestro::Level* level = moestro::find_level("amx");
  if (level == nullptr) return;
  machine.note("rounding to bf16", *level, rounds_to_bf16());
  machine.note("products of bf16 in tiles", *level, dots_bf16());
  machine.note("products of bytes in tiles", *level, dots_bytes());
  machine.note("the shape of a tile", *level, keeps_to_its_shape());
  machine.note("wrong use of tiles", *level, refuses_wrong_use());
  machine.note("the limit of products in tiles", *level, level->dots(3) > 0);
}
