// The kernel normalisers, the one enumeration of them: carafe_plugin.ops.reference has the same numbers and the
// definition.
#pragma once

namespace carafe {

// none: the kernels are masks, normalised already and in the layout of the output. Otherwise they are logits, as the
// content encoder leaves them.
enum class Normalizer { none, softmax, sigmoid, sigmoid_normalized };

}  // namespace carafe
