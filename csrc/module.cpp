// The Python module mvat._C. It is empty: importing it loads the library, and loading it registers the operators.
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "mvat's compiled operators.", -1, nullptr};
  return PyModule_Create(&module);
}
