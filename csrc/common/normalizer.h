// What makes masks of logits, over the taps of each kernel.
#pragma once

namespace carafe {

// `none`: the masks are normalised already.
enum class Normalizer { none, softmax, sigmoid, sigmoid_normalized };

}  // namespace carafe
