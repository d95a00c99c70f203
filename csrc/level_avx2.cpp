// The kernels for avx2; its compiler flags are in CMakeLists.txt.
#define MOESTRO_LEVEL kAvx2
#define MOESTRO_LEVEL_NAME "avx2"
#include "level.inl"
