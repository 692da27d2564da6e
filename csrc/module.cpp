// Build facts and counters. The ops themselves register with the dispatcher in their own files.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "counters.h"
#include "cpu/arena.h"
#include "cpu/dispatch.h"

#ifndef FASTNAS_MODULE
#define FASTNAS_MODULE _C
#endif
#define FASTNAS_STRING_(x) #x
#define FASTNAS_STRING(x) FASTNAS_STRING_(x)

namespace py = pybind11;

PYBIND11_MODULE(FASTNAS_MODULE, m) {
  m.doc() = "Native library of fastnas: build facts, launch and byte counters.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = __VERSION__;
        info["cxx_standard"] = static_cast<int64_t>(__cplusplus);
#ifdef FASTNAS_CUDA
        info["cuda"] = FASTNAS_STRING(FASTNAS_CUDA_VERSION);
        info["cuda_archs"] = FASTNAS_STRING(FASTNAS_CUDA_ARCHS);
#else
        info["cuda"] = py::none();
        info["cuda_archs"] = py::none();
#endif
        info["cpu_isa"] = fastnas::cpu::isa_name();
        info["cpu_isas"] = fastnas::cpu::isa_names();
        return info;
      },
      "Facts of this build: compiler, CUDA version and architectures, the CPU instruction set in use.");
  m.def(
      "counters",
      [] {
        py::dict out;
        for (const auto& [name, c] : fastnas::counters()) out[name.c_str()] = py::make_tuple(c.launches, c.bytes);
        return out;
      },
      "Kernel launches and bytes moved since the last reset: {name: (launches, bytes)}.");
  m.def(
      "arena",
      [] {
        const fastnas::cpu::ArenaState s = fastnas::cpu::arena_state();
        py::dict out;
        out["kept"] = s.kept, out["lent"] = s.lent, out["limit"] = s.limit;
        return out;
      },
      "Bytes of the CPU arena: kept for the next call, lent to tensors, and the limit of what is kept.");
  m.def("arena_set_limit", &fastnas::cpu::arena_set_limit, py::arg("bytes"),
        "Sets how many bytes the CPU arena may keep, and frees what is above it.");
  m.def("reset_counters", &fastnas::reset_counters, "Sets every counter to zero.");
}
