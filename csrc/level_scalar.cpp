// The kernels for scalar; its compiler flags are in CMakeLists.txt.
#define MOESTRO_LEVEL kScalar
#define MOESTRO_LEVEL_NAME "scalar"
#include "level.inl"
