// The kernels for avx512; its compiler flags are in CMakeLists.txt.
#define MOESTRO_LEVEL kAvx512
#define MOESTRO_LEVEL_NAME "avx512"
#include "level.inl"
