// The parts of DLPack (dmlc.github.io/dlpack) that are read: a tensor's description, and the table of functions with
// which a tensor library (torch from 2.10 on) describes tensors without creating Python objects.
#pragma once

#include <cstdint>

namespace w4a16::dlpack {

constexpr int32_t kCuda = 2;
constexpr uint8_t kUint = 1;
constexpr uint8_t kFloat = 2;
constexpr uint32_t kMajorVersion = 1;

// DLTensor.
struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t dimensions;
  uint8_t type_code;
  uint8_t type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; null for row-major
  uint64_t byte_offset;

  void* begin() const { return static_cast<char*>(data) + byte_offset; }
  bool is_row_major() const {
    int64_t expected = 1;
    for (int32_t axis = dimensions; strides != nullptr && axis-- > 0;) {
      if (shape[axis] != 1 && strides[axis] != expected) return false;
      expected *= shape[axis];
    }
    return true;
  }
};

// DLPackExchangeAPI of version 1.3. Functions return 0, or -1 with a Python exception set.
struct ExchangeApi {
  uint32_t major_version;
  uint32_t minor_version;
  const ExchangeApi* older;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*describe)(void* object, Tensor* tensor);  // may be null; the description is valid while the object lives
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

}  // namespace w4a16::dlpack
