// The kernels for neon; its compiler flags are in CMakeLists.txt.
#define MOESTRO_LEVEL kNeon
#define MOESTRO_LEVEL_NAME "neon"
#include "level.inl"
