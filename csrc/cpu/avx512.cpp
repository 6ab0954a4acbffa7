// The kernels for AVX-512.
#include "tiles.h"

#ifdef CARAFE_X86
CARAFE_TILES(avx512, 64, 32, __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c"))))
#endif
