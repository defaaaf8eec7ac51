// dalle2_fast._C: raw pointers, sizes and a stream handle in, no torch. Python allocates and checks.

#include <pybind11/pybind11.h>

#include "build_facts.h"  // written by setup.py

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
    module.def(
        "build_info",
        [] { return py::module_::import("json").attr("loads")(DALLE2_FAST_FACTS); },
        "How this module was built: compiler, cuda (nvcc's version or None), why_no_cuda, targets (of each .cu file).");
}
