// fused_attention._native says what was built and which instruction set is in force. Importing it
// also registers the operators of operators.cpp, which live in the same shared object.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../footprint.h"
#include "dispatch.h"

namespace py = pybind11;
using namespace fused_attention;

namespace {

std::vector<std::string> isa_names(bool usable_only) {
  const char* names[kMaxIsas];
  bool usable[kMaxIsas];
  const int count = list_isas(names, usable);
  std::vector<std::string> out;
  for (int i = 0; i < count; ++i) {
    if (usable[i] || !usable_only) out.push_back(names[i]);
  }
  return out;
}

std::string choices() {
  std::string text = "expected \"auto\"";
  for (const std::string& name : isa_names(true)) text += ", \"" + name + "\"";
  return text;
}

void set_isa_checked(const std::string& name) {
  if (!set_isa(name.c_str())) {
    throw py::value_error("isa: " + choices() + " on this machine, got \"" + name + "\"");
  }
}

DType dtype_named(const std::string& name) {
  const std::map<std::string, DType> dtypes = {{"float32", DType::kFloat32},
                                               {"bfloat16", DType::kBFloat16},
                                               {"float16", DType::kFloat16},
                                               {"float64", DType::kFloat64}};
  const auto found = dtypes.find(name);
  if (found == dtypes.end()) throw py::value_error("dtype: no kernel for " + name);
  return found->second;
}

// A tensor as (address, bytes of an element, sizes, strides).
using Place = std::tuple<uintptr_t, int64_t, std::vector<int64_t>, std::vector<int64_t>>;
Footprint footprint_of(const Place& place) {
  const auto& [address, width, sizes, strides] = place;
  if (sizes.size() != strides.size()) throw py::value_error("expected a stride for each size");
  return Footprint((const void*)address, width, sizes.data(), strides.data(), sizes.size());
}

// Takes buffers of float or double, as array.array, numpy or memoryview give them.
void apply_math(const std::string& function, const py::buffer& in, const py::buffer& out) {
  const py::buffer_info source = in.request(), target = out.request(/*writable=*/true);
  const bool wide = source.format == py::format_descriptor<double>::format();
  if (!(wide || source.format == py::format_descriptor<float>::format()) ||
      target.format != source.format || source.ndim != 1 || target.ndim != 1 ||
      source.size != target.size || source.strides[0] != source.itemsize ||
      target.strides[0] != target.itemsize) {
    throw py::value_error("in, out: expected contiguous 1-D buffers of one floating type and size");
  }
  const std::map<std::string, MathFunction> functions = {{"exp2", MathFunction::kExp2},
                                                         {"tanh", MathFunction::kTanh}};
  const auto found = functions.find(function);
  if (found == functions.end()) {
    throw py::value_error("function: expected exp2 or tanh, got " + function);
  }
  kernel_table().apply_math(found->second, wide ? DType::kFloat64 : DType::kFloat32, source.ptr,
                            target.ptr, source.size);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of fused_attention: instruction sets, tiles, build.";
  if (const char* rejected = rejected_isa_override()) {
    throw py::value_error("FUSED_ATTENTION_CPU_ISA: " + choices() + " on this machine, got \"" +
                          rejected + "\"");
  }
  m.def("isas", [] { return isa_names(true); }, "Instruction sets usable here, best first.");
  m.def("compiled_isas", [] { return isa_names(false); }, "Instruction sets built, best first.");
  m.def("active_isa", [] { return std::string(kernel_table().isa); });
  m.def("set_isa", &set_isa_checked, py::arg("name"),
        "Puts an instruction set in force for every later call; \"auto\" is the best.");
  m.def(
      "overlap",
      [](const Place& a, const Place& b) { return footprint_of(a).overlaps(footprint_of(b)); },
      "Whether two tensors, each (address, bytes of an element, sizes, strides), share memory.");
  m.def(
      "overlaps_itself", [](const Place& a) { return footprint_of(a).overlaps_itself(); },
      "Whether two elements of a tensor lie in one place.");
  m.def("apply_math", &apply_math, py::arg("function"), py::arg("input"), py::arg("out"),
        "out[i] = exp2 or tanh of input[i] as the kernels of the ISA in force compute it.");
  m.def(
      "multiply_registers",
      [](const std::string& dtype, int64_t rounds) {
        const KernelTable& kernels = kernel_table();
        const DType type = dtype_named(dtype);
        const py::gil_scoped_release others_may_run;
        return kernels.multiply_registers(type, rounds);
      },
      py::arg("dtype"), py::arg("rounds"),
      "Multiplies and adds on registers only; returns how many operations it did. Its rate is the "
      "ceiling of the kernels of that dtype on the ISA in force.");
  m.def("build_info", [] {
    return std::map<std::string, std::string>{
        {"version", FUSED_ATTENTION_VERSION},
        {"compiler", __VERSION__},
        {"torch_target_version", "2.10"},
    };
  });
}
