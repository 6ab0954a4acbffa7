// Instruction sets, for each of which the loops are compiled.
#pragma once

#include "simd.h"

namespace carafe {

// How wide its vectors are and how many registers it has.
template <int Bytes, int Registers>
struct Isa {
  template <class A>
  using vector = Vector<A, Bytes>;
  static constexpr int bytes = Bytes;
  static constexpr bool many_registers = Registers >= 32;
};

// A member of an instruction set: calls `Loop`, which is inlined into a function of its own with the attribute
// `Target`.
#define CARAFE_LOOPS(Target)                                                         \
  template <auto Loop, class... Arguments>                                           \
  __attribute__((noinline)) Target static void call(const Arguments&... arguments) { \
    Loop(arguments...);                                                              \
  }

}  // namespace carafe
