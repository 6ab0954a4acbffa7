// The module stub and every schema, nothing else. The kernels register themselves in cpu/carafe.cpp and
// cuda/carafe.cu; fake, autograd and autocast are Python (carafe_plugin/ops; _operators.py has these schemas too,
// for installations without this library).
#include <Python.h>

#include "torch_api.h"

// A C++ program that loads the library for its operators has no Python, and a linker may bind all names at once.
#pragma weak PyModule_Create2

CARAFE_LIBRARY(carafe_plugin, m) {
  m.def(
      "carafe(Tensor features, Tensor kernels, int kernel_size, int group_size, int up, int down, int normalizer=0, "
      "SymInt? out_height=None, SymInt? out_width=None) -> Tensor");
  m.def(
      "_carafe_grad_features(Tensor grad_output, Tensor kernels, SymInt height, SymInt width, int kernel_size, "
      "int group_size, int up, int down, int normalizer=0) -> Tensor");
  m.def(
      "_carafe_grad_kernels(Tensor grad_output, Tensor features, Tensor kernels, int kernel_size, int group_size, "
      "int up, int down, int normalizer=0) -> Tensor");
}

// `import carafe_plugin._C` runs the static registrations of this library; the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1};
  return PyModule_Create(&definition);
}
