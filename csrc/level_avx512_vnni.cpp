// The kernels for avx512 with its integer dot products; its compiler flags are in CMakeLists.txt.
#define MOESTRO_LEVEL kAvx512Vnni
#define MOESTRO_LEVEL_NAME "avx512_vnni"
#include "level.inl"
