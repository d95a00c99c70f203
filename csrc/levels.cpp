// Which ISA levels are compiled in, and which of them this CPU runs.
#include <cstring>

#include "experts.h"

#if defined(_MSC_VER) && defined(MOESTRO_X86)
#include <intrin.h>
#endif
#if defined(MOESTRO_AMX) && !defined(MOESTRO_EMULATE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moestro {
namespace {

#if defined(MOESTRO_X86)
bool has_avx2() {
#if defined(_MSC_VER)
  int info[4];
  __cpuidex(info, 1, 0);
  const bool os = (info[2] >> 27 & 1) && (info[2] >> 12 & 1) && (info[2] >> 29 & 1) && (_xgetbv(0) & 6) == 6;
  __cpuidex(info, 7, 0);
  return os && (info[1] >> 5 & 1);
#else
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
}

bool has_avx512() {
#if defined(_MSC_VER)
  int info[4];
  __cpuidex(info, 7, 0);
  const bool all = (info[1] >> 16 & 1) && (info[1] >> 17 & 1) && (info[1] >> 30 & 1) && (info[1] >> 31 & 1);
  return has_avx2() && all && (_xgetbv(0) & 0xE6) == 0xE6;
#else
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
}
#endif

#if defined(MOESTRO_X86)
bool has_avx512_vnni() {
#if defined(_MSC_VER)
  int info[4];
  __cpuidex(info, 7, 0);
  return has_avx512() && (info[2] >> 11 & 1);
#else
  return has_avx512() && __builtin_cpu_supports("avx512vnni");
#endif
}
#endif

#if defined(MOESTRO_EMULATE_AMX)
bool has_amx() { return has_avx512_vnni(); }
#elif defined(MOESTRO_AMX)
bool has_amx() {
  unsigned a, b, c, d;
  if (!has_avx512_vnni() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1), vbmi = c >> 1 & 1;  // bf16, tiles, int8
  if (!tiles || !vbmi || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;  // AVX-512 bf16
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // Linux gives tiles to a process that asks, for good
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

struct Entry {
  const Level* level;
  bool usable;
};

const Entry* entries(int* count) {  // best first
  static const Entry all[] = {
#if defined(MOESTRO_AMX)
      {&kAmx, has_amx()},
#endif
#if defined(MOESTRO_X86)
      {&kAvx512Vnni, has_avx512_vnni()},
      {&kAvx512, has_avx512()},
      {&kAvx2, has_avx2()},
#endif
#if defined(MOESTRO_NEON)
      {&kNeon, true},
#endif
      {&kScalar, true},
  };
  *count = sizeof(all) / sizeof(all[0]);
  return all;
}

}  // namespace

const Level* best_level() {
  int count;
  const Entry* all = entries(&count);
  for (int i = 0; i < count; ++i)
    if (all[i].usable) return all[i].level;
  return &kScalar;
}

const Level* find_level(const char* name) {
  int count;
  const Entry* all = entries(&count);
  for (int i = 0; i < count; ++i)
    if (all[i].usable && strcmp(all[i].level->name, name) == 0) return all[i].level;
  return nullptr;
}

int compiled_levels(const char** names, bool* usable, int capacity) {
  int count;
  const Entry* all = entries(&count);
  for (int i = 0; i < count && i < capacity; ++i) {
    names[i] = all[i].level->name;
    usable[i] = all[i].usable;
  }
  return count;
}

}  // namespace moestro
