// What is read of DLPack (dmlc.github.io/dlpack): a tensor's description, and the table of functions through which a
// library of tensors (torch from 2.10 on) describes them without making Python objects.
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
  int64_t* strides;  // counted in values; null for row-major
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

// DLPackExchangeAPI, from version 1.3 on. Functions return 0, or -1 with a Python exception set.
struct ExchangeApi {
  uint32_t major_version;
  uint32_t minor_version;
  const ExchangeApi* older;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*describe)(void* object, Tensor* tensor);  // may be null; the description holds while the object lives
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

}  // namespace w4a16::dlpack
