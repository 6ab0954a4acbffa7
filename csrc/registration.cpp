// The module stub and every schema, nothing else. The kernels register themselves in cpu/carafe.cpp and
// cuda/carafe.cu; fake, autograd and autocast are Python (carafe_plugin/ops/_registration.py).
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(carafe_plugin, m) {
  m.def("carafe(Tensor features, Tensor masks, int kernel_size, int group_size, int up, int down) -> Tensor");
  m.def(
      "_carafe_grad_features(Tensor grad_output, Tensor masks, SymInt height, SymInt width, int kernel_size, "
      "int group_size, int up, int down) -> Tensor");
  m.def(
      "_carafe_grad_masks(Tensor grad_output, Tensor features, int kernel_size, int group_size, int up, int down) "
      "-> Tensor");
  // From the content encoder's raw output: pixel shuffle and kernel normaliser included (0 softmax, 1 sigmoid, 2
  // sigmoid over its sum).
  m.def(
      "_carafe_logits(Tensor features, Tensor logits, int kernel_size, int group_size, int up, int down, "
      "int normalizer) -> Tensor");
  m.def(
      "_carafe_logits_grad_features(Tensor grad_output, Tensor logits, SymInt height, SymInt width, int kernel_size, "
      "int group_size, int up, int down, int normalizer) -> Tensor");
  m.def(
      "_carafe_logits_grad_logits(Tensor grad_output, Tensor features, Tensor logits, int kernel_size, int group_size, "
      "int up, int down, int normalizer) -> Tensor");
}

// `import carafe_plugin._C` runs the static registrations of this library; the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
