// The kernels of a call: masks, or logits with their kernel normaliser. carafe_plugin.ops.reference has the definition,
// carafe_plugin.ops._derivatives the same numbers.
#pragma once

#include "shape.h"

namespace carafe {

// none: the kernels are masks, normalised already and in the layout of the output. Otherwise they are logits, as the
// content encoder leaves them.
enum class Normalizer { none, softmax, sigmoid, sigmoid_normalized };

template <class T>
struct Kernels {
  Map<const T> map;
  Normalizer normalizer = Normalizer::none;
};

}  // namespace carafe
