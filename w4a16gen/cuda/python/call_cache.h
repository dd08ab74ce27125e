// The fast path of `gemm`: repeats calls that have been validated.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <deque>
#include <unordered_map>
#include <utility>

#include "library/epilogue.h"
#include "python/dlpack.h"
#include "python/kernel_library.h"

namespace w4a16 {

namespace py = pybind11;

// A tensor type. Its table of functions is null if it has none.
struct TensorType {
  py::object type;
  const dlpack::ExchangeApi* api = nullptr;
  bool has_gradients = false;
};

inline const dlpack::ExchangeApi* exchange_api_of(py::handle type) {
  const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  const void* pointer = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  const auto* api = static_cast<const dlpack::ExchangeApi*>(pointer);
  while (api != nullptr && api->major_version > dlpack::kMajorVersion) api = api->older;
  return api == nullptr || api->describe == nullptr ? nullptr : api;
}

// Returns the entry of an object's type, which is inspected once. The caller holds the GIL.
inline const TensorType& tensor_type(py::handle object) {
  static auto& known = *new std::deque<TensorType>();  // never destroyed, since Python may be gone by then
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  for (const TensorType& found : known) {
    if (found.type.ptr() == type) return found;
  }
  const py::handle handle(type);
  known.push_back(
      {py::reinterpret_borrow<py::object>(handle), exchange_api_of(handle), py::hasattr(handle, "requires_grad")});
  return known.back();
}

// Validated calls with weights of one shape, group size, mode and layout on one GPU: the chosen kernel for each number
// of tokens and each epilogue that calls need. None of the kernels needs a workspace.
class CallCache {
 public:
  // packed is the address of a weight that cannot move; 0 reads it from the tensor at each call. columns are those of
  // the output. activations has the numbers of all activations that calls with the weights may name, by their names.
  CallCache(const KernelLibrary& library, int64_t n, int64_t k, int64_t group_size, size_t packed_bytes, int device,
            uintptr_t packed, int64_t columns, py::dict activations)
      : library_(library),
        n_(n),
        k_(k),
        group_size_(group_size),
        packed_bytes_(packed_bytes),
        device_(device),
        packed_(packed),
        columns_(columns),
        output_columns_(columns),
        activations_(std::move(activations)) {}

  // Adds a validated call: with m tokens, a w4a16_epilogue that it needs, and this kernel, only the tensors remain to
  // be checked.
  void add(int64_t m, int kernel, int epilogue) { kernels_[epilogue][m] = {kernel, py::int_(m)}; }

  // Launches on the current stream of the tensors' library and returns the output. Returns None, without a launch, if
  // anything differs from a cached call; the caller then takes the slow path, which reports the error.
  py::object try_launch(const py::object& activations, const py::object& packed, const py::object& bias,
                        py::object output, const py::object& alpha, const py::object& dependent_launch,
                        const py::object& activation, const py::object& residual) const {
    const TensorType& type = tensor_type(activations);
    dlpack::Tensor a{};
    if (!describe(activations, type, dlpack::kFloat, 16, 2, &a) || a.shape[1] != k_) return py::none();
    w4a16_gemm_arguments arguments{};
    if (!find_activation(activation, &arguments.activation)) return py::none();
    const auto& kernels = kernels_[needed_epilogue(arguments.activation, !residual.is_none())];
    const auto found = kernels.find(a.shape[0]);
    if (found == kernels.end()) return py::none();
    if (!find_packed(packed, &arguments)) return py::none();
    if (!read_alpha(alpha, &arguments.alpha)) return py::none();
    if (!read_launch(dependent_launch, &arguments.dependent_launch)) return py::none();
    arguments.activations = a.begin();
    if (!bias.is_none()) {
      dlpack::Tensor added{};
      if (!describe(bias, tensor_type(bias), dlpack::kFloat, 16, 1, &added) || added.shape[0] != n_) return py::none();
      arguments.bias = added.begin();
    }
    if (!residual.is_none()) {
      dlpack::Tensor added{};
      if (!describe(residual, tensor_type(residual), dlpack::kFloat, 16, 2, &added) || added.shape[0] != a.shape[0] ||
          added.shape[1] != columns_) {
        return py::none();
      }
      arguments.residual = added.begin();
    }
    const auto& [kernel, rows] = found->second;
    if (output.is_none()) {
      static PyObject* const name = PyUnicode_InternFromString("new_empty");
      PyObject* const operands[] = {activations.ptr(), rows.ptr(),
                                    output_columns_.ptr()};  // a call with a tuple takes 1 us longer
      output = py::reinterpret_steal<py::object>(PyObject_VectorcallMethod(name, operands, 3, nullptr));
      if (!output && !forget_error()) return py::none();
    }
    dlpack::Tensor out{};
    if (!describe(output, tensor_type(output), dlpack::kFloat, 16, 2, &out) || out.shape[0] != a.shape[0] ||
        out.shape[1] != columns_) {
      return py::none();
    }
    arguments.output = out.begin();
    if (type.api->current_stream(dlpack::kCuda, device_, &arguments.stream) != 0 && !forget_error()) return py::none();

    const w4a16_problem problem{a.shape[0], n_, k_, group_size_};
    w4a16_status status = W4A16_CUDA_ERROR;
    {
      const py::gil_scoped_release release;
      const DeviceGuard guard(device_);
      status = library_.gemm(kernel, &problem, &arguments, nullptr, 0);
    }
    return status == W4A16_OK ? output : py::none();
  }

 private:
  static bool forget_error() {
    PyErr_Clear();
    return false;
  }

  bool find_activation(const py::object& name, int32_t* number) const {
    PyObject* const found = PyDict_GetItemWithError(activations_.ptr(), name.ptr());
    if (found == nullptr) return forget_error();
    *number = static_cast<int32_t>(PyLong_AsLong(found));
    return true;
  }

  bool find_packed(const py::object& packed, w4a16_gemm_arguments* arguments) const {
    arguments->packed = reinterpret_cast<const void*>(packed_);
    arguments->packed_bytes = packed_bytes_;
    if (packed_ != 0) return true;
    dlpack::Tensor weight{};
    if (!describe(packed, tensor_type(packed), dlpack::kUint, 8, 1, &weight)) return false;
    arguments->packed = weight.begin();
    return static_cast<size_t>(weight.shape[0]) == packed_bytes_;
  }

  // Reads False, True or "auto". The slow path converts or refuses everything else.
  static bool read_launch(const py::object& object, int32_t* launch) {
    static PyObject* const automatic = PyUnicode_InternFromString("auto");
    *launch = object.ptr() == Py_True     ? W4A16_DEPENDENT_LAUNCH
              : object.ptr() == automatic ? W4A16_AUTO_LAUNCH
                                          : W4A16_ORDINARY_LAUNCH;
    return *launch != W4A16_ORDINARY_LAUNCH || object.ptr() == Py_False;
  }

  // Reads a float or an int that fp32 can represent, also infinity. The slow path converts or refuses everything else.
  static bool read_alpha(const py::object& object, float* alpha) {
    if (!PyFloat_Check(object.ptr()) && !PyLong_CheckExact(object.ptr())) return false;
    const double value = PyFloat_AsDouble(object.ptr());
    if (value == -1.0 && PyErr_Occurred() != nullptr) return forget_error();
    *alpha = static_cast<float>(value);
    return !std::isnan(value) && std::isinf(*alpha) == std::isinf(value);
  }

  // Describes an object. Returns false unless it is a row-major tensor on the GPU with this type and number of
  // dimensions, and without gradients.
  bool describe(const py::object& object, const TensorType& type, uint8_t code, uint8_t bits, int32_t dimensions,
                dlpack::Tensor* tensor) const {
    if (type.api == nullptr) return false;
    if (type.has_gradients && code == dlpack::kFloat) {
      static PyObject* const name = PyUnicode_InternFromString("requires_grad");
      PyObject* const answer = PyObject_GetAttr(object.ptr(), name);
      Py_XDECREF(answer);  // Py_False outlives this reference
      if (answer != Py_False) return forget_error();
    }
    if (type.api->describe(object.ptr(), tensor) != 0) return forget_error();
    return tensor->device_type == dlpack::kCuda && tensor->device_id == device_ && tensor->type_code == code &&
           tensor->type_bits == bits && tensor->type_lanes == 1 && tensor->dimensions == dimensions &&
           tensor->is_row_major();
  }

  const KernelLibrary& library_;
  int64_t n_;
  int64_t k_;
  int64_t group_size_;
  size_t packed_bytes_;
  int device_;
  uintptr_t packed_;
  int64_t columns_;
  py::int_ output_columns_;
  py::dict activations_;
  std::unordered_map<int64_t, std::pair<int, py::int_>> kernels_[W4A16_GATED + 1];  // by epilogue
};

}  // namespace w4a16
