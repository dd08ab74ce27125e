// The pybind11 module: a kernel library opened by path, and the CUDA objects that Python needs without torch.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <exception>
#include <stdexcept>
#include <string>
#include <utility>

#include "python/call_cache.h"
#include "python/device_objects.h"
#include "python/dlpack.h"
#include "python/experts.h"
#include "python/kernel_library.h"
#include "python/outcome.h"
#include "python/workspaces.h"
#include "w4a16.h"

namespace w4a16 {
namespace {

py::list kernels(const KernelLibrary& library) {
  py::list kernels;
  for (int index = 0; index < library.kernel_count(); ++index) {
    w4a16_kernel_info info{};
    library.get_kernel_info(index, &info);
    py::dict kernel;
    kernel["name"] = info.name;
    kernel["layout"] = info.layout;
    kernel["stages"] = info.stages;
    kernel["threads"] = info.threads;
    kernel["shared_memory_bytes"] = info.shared_memory_bytes;
    kernel["grouped"] = info.grouped != 0;
    kernels.append(kernel);
  }
  return kernels;
}

Outcome can_implement(const KernelLibrary& library, int kernel, int64_t m, int64_t n, int64_t k, int64_t group_size) {
  const w4a16_problem problem{m, n, k, group_size};
  Message message;
  const w4a16_status status = library.can_implement(kernel, &problem, message.data(), message.size());
  return py::make_tuple(static_cast<int>(status), message.data());
}

Outcome packed_bytes(const KernelLibrary& library, int kernel, int64_t n, int64_t k, int64_t group_size) {
  const w4a16_problem problem{0, n, k, group_size};
  Message message;
  size_t bytes = 0;
  const w4a16_status status = library.packed_bytes(kernel, &problem, &bytes, message.data(), message.size());
  return py::make_tuple(static_cast<int>(status), message.data(), bytes);
}

Outcome workspace_bytes(const KernelLibrary& library, int kernel, int64_t m, int64_t n, int64_t k, int64_t group_size,
                        int sm_count, int device) {
  const w4a16_problem problem{m, n, k, group_size};
  Message message;
  size_t bytes = 0;
  w4a16_status status;
  if (sm_count > 0) {
    status = library.workspace_bytes(kernel, &problem, sm_count, &bytes, message.data(), message.size());
  } else {
    const DeviceGuard guard(device);
    status = library.workspace_bytes(kernel, &problem, 0, &bytes, message.data(), message.size());
  }
  return py::make_tuple(static_cast<int>(status), message.data(), bytes);
}

Outcome gemm(const KernelLibrary& library, int kernel, int64_t m, int64_t n, int64_t k, int64_t group_size,
             uintptr_t activations, uintptr_t packed, size_t packed_bytes, uintptr_t bias, uintptr_t output,
             float alpha, int activation, uintptr_t residual, uintptr_t workspace, size_t workspace_bytes,
             uintptr_t stream, int dependent_launch, int device) {
  const w4a16_problem problem{m, n, k, group_size};
  w4a16_gemm_arguments arguments{};
  arguments.activations = pointer(activations);
  arguments.packed = pointer(packed);
  arguments.packed_bytes = packed_bytes;
  arguments.bias = pointer(bias);
  arguments.output = pointer(output);
  arguments.workspace = pointer(workspace);
  arguments.workspace_bytes = workspace_bytes;
  arguments.stream = pointer(stream);
  arguments.alpha = alpha;
  arguments.activation = activation;
  arguments.residual = pointer(residual);
  arguments.dependent_launch = dependent_launch;
  Message message;
  w4a16_status status = W4A16_OK;
  cudaError_t error = cudaSuccess;
  {
    const py::gil_scoped_release release;
    const DeviceGuard guard(device);
    const bool allocates = workspace == 0 && workspace_bytes > 0;
    bool in_graph = false;
    auto* const stream_handle = static_cast<cudaStream_t>(arguments.stream);
    if (allocates) {
      error = Workspaces::instance().allocate(workspace_bytes, device, stream_handle, &arguments.workspace, &in_graph);
    }
    if (error == cudaSuccess) {
      status = library.gemm(kernel, &problem, &arguments, message.data(), message.size());
      if (allocates && !in_graph) error = Workspaces::instance().release(arguments.workspace, stream_handle);
    }
  }
  if (error != cudaSuccess) return cuda_failure("allocating or releasing the workspace", error);
  static auto& success = *new py::tuple(py::make_tuple(static_cast<int>(W4A16_OK), ""));  // outlives Python
  return status == W4A16_OK ? success : py::make_tuple(static_cast<int>(status), message.data());
}

Outcome pack(const KernelLibrary& library, int kernel, int64_t n, int64_t k, int64_t group_size, uintptr_t q,
             uintptr_t scales, uintptr_t zeros, uintptr_t packed, size_t packed_bytes, uintptr_t faults,
             uintptr_t stream, bool gated, int device) {
  const w4a16_problem problem{0, n, k, group_size};
  const w4a16_pack_arguments arguments{pointer(q),   pointer(scales), pointer(zeros),  pointer(packed),
                                       packed_bytes, pointer(faults), pointer(stream), gated ? 1 : 0};
  Message message;
  w4a16_status status;
  cudaError_t error = cudaSuccess;
  {
    const py::gil_scoped_release release;
    const DeviceGuard guard(device);
    status = library.pack(kernel, &problem, &arguments, message.data(), message.size());
    if (status == W4A16_OK) error = cudaStreamSynchronize(static_cast<cudaStream_t>(arguments.stream));
  }
  if (error != cudaSuccess) return cuda_failure("packing on the GPU", error);
  return py::make_tuple(static_cast<int>(status), message.data());
}

Outcome probe_read(const KernelLibrary& library, uintptr_t data, size_t bytes, bool dependent_launch, uintptr_t stream,
                   int device) {
  Message message;
  const DeviceGuard guard(device);
  const w4a16_status status = library.probe_read(pointer(data), bytes, dependent_launch ? 1 : 0, pointer(stream),
                                                 message.data(), message.size());
  return py::make_tuple(static_cast<int>(status), message.data());
}

Outcome probe_multiply(const KernelLibrary& library, int rounds, uintptr_t stream, int device) {
  Message message;
  int64_t flops = 0;
  const DeviceGuard guard(device);
  const w4a16_status status = library.probe_multiply(rounds, pointer(stream), &flops, message.data(), message.size());
  return py::make_tuple(static_cast<int>(status), message.data(), flops);
}

py::list devices() {
  int count = 0;
  py::list found;
  if (cudaGetDeviceCount(&count) != cudaSuccess) return found;
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
    py::dict device;
    device["index"] = index;
    device["name"] = properties.name;
    device["compute_capability"] = py::make_tuple(properties.major, properties.minor);
    device["sm_count"] = properties.multiProcessorCount;
    found.append(device);
  }
  return found;
}

// Returns the device of a pointer, or -1 for host memory.
int pointer_device(uintptr_t pointer) {
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, reinterpret_cast<const void*>(pointer)) != cudaSuccess) {
    cudaGetLastError();
    return -1;
  }
  const bool on_device = attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
  return on_device ? attributes.device : -1;
}

// Copies device memory into a writable buffer, in the order of a stream.
Outcome copy_to_host(uintptr_t source, const py::buffer& destination, uintptr_t stream, int device) {
  const py::buffer_info info = destination.request(true);
  const size_t bytes = static_cast<size_t>(info.size) * static_cast<size_t>(info.itemsize);
  auto* const handle = static_cast<cudaStream_t>(pointer(stream));
  cudaError_t error = cudaSuccess;
  {
    const py::gil_scoped_release release;
    const DeviceGuard guard(device);
    error = cudaMemcpyAsync(info.ptr, pointer(source), bytes, cudaMemcpyDeviceToHost, handle);
    if (error == cudaSuccess) error = cudaStreamSynchronize(handle);
  }
  return error == cudaSuccess ? py::make_tuple(static_cast<int>(W4A16_OK), "") : cuda_failure("copying", error);
}

bool is_capturing(uintptr_t stream, int device) {
  const DeviceGuard guard(device);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(pointer(stream)), &status) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return status == cudaStreamCaptureStatusActive;
}

// Raises w4a16gen.errors.CudaError for CUDA calls that fail. pybind11 translates the rest.
void translate(std::exception_ptr thrown) {
  try {
    std::rethrow_exception(std::move(thrown));
  } catch (const CudaFailure& failure) {
    py::set_error(py::module_::import("w4a16gen.errors").attr("CudaError"), failure.what());
  }
}

// Describes the tensor of a DLPack capsule (DLManagedTensor) without consuming it. The capsule keeps the memory alive.
py::tuple dlpack_view(const py::capsule& capsule) {
  const auto* tensor = static_cast<const dlpack::Tensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (tensor == nullptr) throw py::error_already_set();
  py::tuple shape(tensor->dimensions);
  py::tuple strides(tensor->strides == nullptr ? 0 : tensor->dimensions);
  for (int32_t axis = 0; axis < tensor->dimensions; ++axis) {
    shape[static_cast<size_t>(axis)] = tensor->shape[axis];
    if (tensor->strides != nullptr) strides[static_cast<size_t>(axis)] = tensor->strides[axis];
  }
  return py::make_tuple(reinterpret_cast<uintptr_t>(tensor->begin()), shape,
                        tensor->strides == nullptr ? py::object(py::none()) : py::object(strides),
                        py::make_tuple(tensor->type_code, tensor->type_bits, tensor->type_lanes), tensor->device_id);
}

}  // namespace
}  // namespace w4a16

PYBIND11_MODULE(_w4a16, module) {
  namespace py = pybind11;
  using namespace w4a16;  // NOLINT: the bindings' names are the functions'
  module.attr("ABI_VERSION") = W4A16_ABI_VERSION;
  module.attr("INVALID_ARGUMENT") = static_cast<int>(W4A16_INVALID_ARGUMENT);
  module.attr("UNSUPPORTED") = static_cast<int>(W4A16_UNSUPPORTED);
  module.attr("NO_HOPPER_GPU") = static_cast<int>(W4A16_NO_HOPPER_GPU);
  module.attr("CUDA_ERROR") = static_cast<int>(W4A16_CUDA_ERROR);
  module.attr("FAULT_VALUE") = W4A16_FAULT_VALUE;
  module.attr("FAULT_RANGE") = W4A16_FAULT_RANGE;
  module.def("devices", &devices);
  module.def("pointer_device", &pointer_device);
  module.def("copy_to_host", &copy_to_host);
  module.def("is_capturing", &is_capturing);
  module.def("dlpack_view", &dlpack_view);
  py::register_local_exception_translator(&translate);
  py::class_<KernelLibrary>(module, "KernelLibrary")
      .def(py::init<const std::string&>())
      .def("kernels", &kernels)
      .def("can_implement", &can_implement)
      .def("packed_bytes", &packed_bytes)
      .def("workspace_bytes", &workspace_bytes)
      .def("gemm", &gemm)
      .def("pack", &pack)
      .def("grouped_gemm", &grouped_gemm)
      .def("token_tiles_bytes", &token_tiles_bytes)
      .def("route", &route)
      .def("list_token_tiles", &list_token_tiles)
      .def("gather_rows", &gather_rows)
      .def("activate_rows", &activate_rows)
      .def("combine_rows", &combine_rows)
      .def("probe_read", &probe_read)
      .def("probe_multiply", &probe_multiply);
  py::class_<CallCache>(module, "CallCache")
      .def(py::init<const KernelLibrary&, int64_t, int64_t, int64_t, size_t, int, uintptr_t, int64_t, py::dict>(),
           py::keep_alive<1, 2>())
      .def("add", &CallCache::add)
      .def("try_launch", &CallCache::try_launch);
  py::class_<DeviceBuffer>(module, "DeviceBuffer")
      .def(py::init<size_t, int>())
      .def_property_readonly("pointer", &DeviceBuffer::pointer)
      .def_property_readonly("bytes", &DeviceBuffer::bytes)
      .def_property_readonly("device", &DeviceBuffer::device)
      .def("upload", &DeviceBuffer::upload, py::arg("source"), py::arg("offset") = 0)
      .def("download", &DeviceBuffer::download, py::arg("destination"), py::arg("offset") = 0);
  py::class_<Stream>(module, "Stream")
      .def(py::init<int>())
      .def_property_readonly("pointer", &Stream::pointer)
      .def("synchronize", &Stream::synchronize)
      .def("begin_capture", &Stream::begin_capture)
      .def("end_capture", &Stream::end_capture)
      .def("replay", &Stream::replay)
      .def("start_timer", &Stream::start_timer)
      .def("stop_timer", &Stream::stop_timer);
}
