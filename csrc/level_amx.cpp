// The kernels for avx512_vnni with products of many tokens by AMX tiles; its compiler flags are in CMakeLists.txt.
#define MOESTRO_LEVEL kAmx
#define MOESTRO_LEVEL_NAME "amx"
#if defined(MOESTRO_EMULATE_AMX)
#include "emulated_amx.h"
#else
#define MOESTRO_TILES
#endif
#include "level.inl"
