// Older versions of what the compiler takes from the C library, so that the binary also loads with glibc 2.28
// (manylinux_2_28), wherever it was built. Nothing here has an effect with another C library.
#pragma once

#include <cmath>  // which defines __GLIBC__

#ifdef __GLIBC__

// exp@GLIBC_2.29 computes the same, but does not look for a handler of errors of its caller's.
#if defined(__x86_64__) && defined(__LP64__)
__asm__(".symver exp, exp@GLIBC_2.2.5");
#elif defined(__aarch64__) && defined(__LP64__)
__asm__(".symver exp, exp@GLIBC_2.17");
#endif

#if __has_include(<sys/single_threaded.h>)
#include <sys/single_threaded.h>

// libstdc++'s shared_ptr, in torch's headers, asks this variable of glibc 2.32 whether counting needs atomics. This
// library has one of its own, which says that it does. Each object that includes this may hold it: the linker takes
// one.
extern "C" __attribute__((weak, visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
#endif

#endif
