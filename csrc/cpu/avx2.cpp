// The kernels for AVX2.
#include "tiles.h"

#ifdef CARAFE_X86
CARAFE_TILES(avx2, 32, 16, __attribute__((target("avx2,fma,f16c"))))
#endif
