// The Python module r1kernels._C: what was built and what this machine has. Importing it also registers the torch ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/isa.h"
#include "common/pages.h"

namespace py = pybind11;

extern "C" int r1kernels_cuda_probe(int device);
extern "C" const char* r1kernels_cuda_error(int code);

// Read out of the file by r1kernels/extension.py when the library cannot be loaded.
__attribute__((used)) static const char build_record[] =
    "r1kernels-build{torch=" R1KERNELS_TORCH_VERSION ",python=" PYBIND11_TOSTRING(PY_MAJOR_VERSION) "." PYBIND11_TOSTRING(
        PY_MINOR_VERSION) "}";

static py::dict build_info() {
    py::dict info;
    info["torch"] = R1KERNELS_TORCH_VERSION;
    info["python"] = PYBIND11_TOSTRING(PY_MAJOR_VERSION) "." PYBIND11_TOSTRING(PY_MINOR_VERSION);
    info["compiler"] = R1KERNELS_COMPILER;
    info["cpu_isas"] = R1KERNELS_ISAS;
    info["cuda"] = R1KERNELS_CUDA_VERSION;
    info["cuda_architectures"] = R1KERNELS_CUDA_ARCHITECTURES;
    return info;
}

static std::string cuda_problem([[maybe_unused]] int device) {
#ifdef R1KERNELS_CUDA
    const int code = r1kernels_cuda_probe(device);
    if (code != 0) return r1kernels_cuda_error(code);
#endif
    return "";
}

static std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (r1kernels::Isa isa : r1kernels::supported_isas()) names.emplace_back(r1kernels::name(isa));
    return names;
}

PYBIND11_MODULE(_C, module) {
    module.doc() = "Kernels of r1kernels in C++ and CUDA, registered as torch ops when this module is imported.";
    module.def("build_info", &build_info,
               "What the library was built with, as text: torch, python, compiler, cpu_isas and cuda_architectures "
               "(separated by spaces), cuda (empty without CUDA kernels).");
    module.def("cuda_problem", &cuda_problem, py::arg("device"),
               "What its driver says against running the CUDA kernels on a device; empty: nothing.");
    module.def("supported_isas", &supported_isas, "Instruction sets built and supported here, weakest first.");
    module.def("chosen_isa", [] { return r1kernels::name(r1kernels::chosen_isa()); },
               "The instruction set that the CPU kernels use (R1KERNELS_CPU_ISA overrides it).");
    module.def("cpu_features", &r1kernels::cpu_features, "Features of this processor that matter here.");
    py::class_<r1kernels::Pages>(module, "Pages", py::buffer_protocol(),
                                 "A large buffer of bytes, not initialised, that is given again to the next caller.")
        .def(py::init<size_t>())
        .def_static("release", &r1kernels::Pages::release, "Gives what is kept back to the system.")
        .def_buffer([](const r1kernels::Pages& pages) {
            return py::buffer_info(static_cast<unsigned char*>(pages.data()), static_cast<py::ssize_t>(pages.size()));
        });
}
