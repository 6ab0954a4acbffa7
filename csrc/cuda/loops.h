#pragma once

// Loops over register arrays must be unrolled, or the arrays go to memory; others must not, or registers run out.
#ifdef __CUDACC__
#define CARAFE_UNROLL _Pragma("unroll")
#define CARAFE_ROLLED _Pragma("unroll 1")
#else
#define CARAFE_UNROLL
#define CARAFE_ROLLED
#endif
