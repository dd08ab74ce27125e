// Stands in for the instructions of native/ptx.cuh, for the emulation.
#pragma once

#include <cuda.h>
#include <cuda_fp16.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "emulation.h"

#ifndef __grid_constant__
#define __grid_constant__
#endif
#define __launch_bounds__(...)

// The built-in variables of CUDA, which are read again each time.
struct BuiltIn {
  struct Axis {
    unsigned (*read)();
    operator unsigned() const { return read(); }
  } x;
};
inline const BuiltIn threadIdx{{[] { return emulation::thread_index(); }}};
inline const BuiltIn blockIdx{{[] { return emulation::block_index(); }}};
inline const BuiltIn blockDim{{[] { return emulation::block_size(); }}};
inline const BuiltIn gridDim{{[] { return emulation::grid_size(); }}};

namespace w4a16::native {

using std::max;
using std::min;

inline void __syncthreads() { emulation::sync_named(0, static_cast<int>(emulation::block_size())); }

inline void __syncwarp() {
  int nothing = 0;
  emulation::meet_as("__syncwarp", 32, nothing, [](int* const*) {});
}

// Every lane gets the value of lane `source(lane)`.
template <class Value, class Source>
Value shuffle(Value value, const char* what, const Source& source) {
  struct Lane {
    Value mine;
    Value got;
  } lane{value, value};
  emulation::meet_as(what, 32, lane, [&](Lane* const* all) {
    for (int i = 0; i < 32; ++i) all[i]->got = all[source(i)]->mine;
  });
  return lane.got;
}

template <class Value>
Value __shfl_sync(uint32_t, Value value, int source) {
  return shuffle(value, "__shfl_sync", [=](int) { return source; });
}

template <class Value>
Value __shfl_xor_sync(uint32_t, Value value, int mask) {
  return shuffle(value, "__shfl_xor_sync", [=](int lane) { return lane ^ mask; });
}

template <class Value>
Value __shfl_up_sync(uint32_t, Value value, int distance) {
  return shuffle(value, "__shfl_up_sync", [=](int lane) { return lane < distance ? lane : lane - distance; });
}

inline uint32_t __match_any_sync(uint32_t, int value) {
  struct Lane {
    int value;
    uint32_t same;
  } mine{value, 0};
  emulation::meet_as("__match_any_sync", 32, mine, [](Lane* const* all) {
    for (int i = 0; i < 32; ++i) {
      for (int j = 0; j < 32; ++j) all[i]->same |= static_cast<uint32_t>(all[i]->value == all[j]->value) << j;
    }
  });
  return mine.same;
}

inline uint32_t __ballot_sync(uint32_t, bool predicate) {
  struct Lane {
    bool predicate;
    uint32_t all;
  } mine{predicate, 0};
  emulation::meet_as("__ballot_sync", 32, mine, [](Lane* const* all) {
    uint32_t lanes = 0;
    for (int i = 0; i < 32; ++i) lanes |= static_cast<uint32_t>(all[i]->predicate) << i;
    for (int i = 0; i < 32; ++i) all[i]->all = lanes;
  });
  return mine.all;
}

inline int __popc(uint32_t word) { return __builtin_popcount(word); }
inline int __ffs(int word) { return __builtin_ffs(word); }

template <class Value>
Value __ldcg(const Value* address) {
  return *address;
}

// A matrix of which boxes are copied; it lies in the bytes of a CUtensorMap.
struct Tensor {
  uint16_t* matrix;
  int64_t rows;
  int64_t columns;
  int box_rows;
  int box_columns;  // 64, or 32 of gated outputs
};

inline Tensor tensor_of(const void* map) {
  Tensor tensor;
  std::memcpy(&tensor, map, sizeof(tensor));
  return tensor;
}

// The 128-byte swizzle: rows of 128 bytes exchange their pieces of 16 bytes.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// The swizzle of a box, whose rows have 128 or 64 bytes.
inline uint32_t swizzled(const Tensor& tensor, uint32_t address) {
  return tensor.box_columns == 64 ? swizzled(address) : address ^ (address >> 7 & 3) << 4;
}

template <class Value>
Value load_at(uint32_t address) {
  Value value;
  if (address % sizeof(value) != 0) emulation::fail("a misaligned load from shared memory");
  std::memcpy(&value, emulation::shared_memory(address, sizeof(value)), sizeof(value));
  return value;
}

template <class Value>
void store_at(uint32_t address, Value value) {
  if (address % sizeof(value) != 0) emulation::fail("a misaligned store to shared memory");
  std::memcpy(emulation::shared_memory(address, sizeof(value)), &value, sizeof(value));
}

inline uint32_t shared_address(const void*) { return 0; }
inline bool elected() { return emulation::thread_index() % 32 == 0; }
inline void barrier_init(uint32_t barrier, uint32_t arrivals) { emulation::init_barrier(barrier, arrivals); }
inline void barrier_init_fence() {}
inline void barrier_arrive(uint32_t barrier) { emulation::arrive(barrier); }

inline void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  emulation::expect_bytes(barrier, bytes);
  emulation::arrive(barrier);
}

inline void barrier_wait(uint32_t barrier, uint32_t parity) { emulation::wait_for_phase(barrier, parity); }
inline void pause(uint32_t) {}

// Calls copy(rank) for this CTA, with rank -1, or for all CTAs of a multicast.
template <int Ctas, class Copy>
void for_destinations(uint16_t mask, const Copy& copy) {
  if constexpr (Ctas == 1) {
    copy(-1);
  } else {
    for (int rank = 0; rank < 16; ++rank) {
      if (mask >> rank & 1) copy(rank);
    }
  }
}

inline uint32_t address_of(uint32_t address, int rank) {
  return rank < 0 ? address : emulation::in_cluster(address, rank);
}

template <int Ctas>
void bulk_copy(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier, uint16_t mask) {
  if (destination % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0 || bytes % 16 != 0) {
    emulation::fail("a misaligned bulk copy");
  }
  emulation::check_global(source, bytes);
  const auto* const from = static_cast<const uint8_t*>(source);
  const auto read = [=] { return std::vector<uint8_t>(from, from + bytes); };
  for_destinations<Ctas>(mask, [&](int rank) {
    emulation::copy_later(read, [=](const std::vector<uint8_t>& data) {
      std::memcpy(emulation::shared_memory(address_of(destination, rank), bytes), data.data(), bytes);
      emulation::complete_bytes(address_of(barrier, rank), bytes);
    });
  });
}

inline void bulk_prefetch(const void* source, uint32_t bytes) { emulation::check_global(source, bytes); }

template <int Ctas>
void tensor_copy(uint32_t destination, const void* map, int k, int token, uint32_t barrier, uint16_t mask) {
  const Tensor tensor = tensor_of(map);
  if (destination % 128 != 0) emulation::fail("a misaligned tensor copy");
  const auto read = [=] {
    std::vector<uint16_t> box(static_cast<size_t>(tensor.box_rows) * static_cast<size_t>(tensor.box_columns));
    for (int i = 0; i < tensor.box_rows * tensor.box_columns; ++i) {
      const int64_t row = token + i / tensor.box_columns;
      const int column = k + i % tensor.box_columns;
      const bool inside = row >= 0 && row < tensor.rows && column < tensor.columns;
      box[static_cast<size_t>(i)] = inside ? tensor.matrix[row * tensor.columns + column] : uint16_t{0};
    }
    return box;
  };
  for_destinations<Ctas>(mask, [&](int rank) {
    emulation::copy_later(read, [=](const std::vector<uint16_t>& box) {
      for (size_t i = 0; i < box.size(); ++i) {
        store_at(address_of(swizzled(tensor, destination + static_cast<uint32_t>(i * 2)), rank), box[i]);
      }
      emulation::complete_bytes(address_of(barrier, rank), static_cast<uint32_t>(box.size() * 2));
    });
  });
}

inline void tensor_store(const void* map, int channel, int token, uint32_t source) {
  const Tensor tensor = tensor_of(map);
  emulation::add_to_group(1, [=] {
    for (int row = 0; row < tensor.box_rows; ++row) {
      for (int column = 0; column < tensor.box_columns; ++column) {
        if (token + row >= tensor.rows || channel + column >= tensor.columns) continue;
        const uint32_t place = static_cast<uint32_t>((row * tensor.box_columns + column) * 2);
        const uint32_t from = swizzled(tensor, source + place);
        tensor.matrix[(token + row) * tensor.columns + channel + column] = load_at<uint16_t>(from);
      }
    }
  });
  emulation::commit_group(1);
}

template <int Pending>
void wait_for_store_reads() {
  emulation::wait_for_groups(1, Pending);
}

inline void async_proxy_fence() {}
inline void prefetch_tensor_map(const void*) {}
inline uint64_t multiply_add_wide(uint32_t a, uint32_t b, uint64_t c) { return uint64_t{a} * b + c; }
inline void prefetch_line(const void*) {}
template <int Registers>
void deallocate_registers() {}
template <int Registers>
void allocate_registers() {}
inline void launch_dependents() {}
inline void wait_for_prerequisites() { emulation::wait_for_previous_kernel(); }
inline int thread_index() { return static_cast<int>(emulation::thread_index()); }
inline int block_index() { return static_cast<int>(emulation::block_index()); }
inline void named_barrier(int id, int threads) { emulation::sync_named(id, threads); }
inline void named_barrier_arrive(int id, int threads) { emulation::arrive_named(id, threads); }
inline void cluster_arrive_relaxed() { emulation::arrive_at_cluster(); }
inline void cluster_arrive() { emulation::arrive_at_cluster(); }
inline void cluster_wait() { emulation::wait_for_cluster(); }
inline uint32_t cluster_rank() { return static_cast<uint32_t>(emulation::cluster_rank()); }

inline uint32_t address_in_cluster(uint32_t address, uint32_t rank) {
  return emulation::in_cluster(address, static_cast<int>(rank));
}

inline void barrier_arrive_in_cluster(uint32_t remote_barrier) { emulation::arrive(remote_barrier); }

inline void store_in_cluster(uint32_t remote_address, float4 value, uint32_t remote_barrier) {
  emulation::later([=] {
    store_at(remote_address, value);
    emulation::complete_bytes(remote_barrier, 16);
  });
}

inline float load_constant(const float* address) {
  emulation::check_global(address, sizeof(float));
  return *address;
}

inline void load_global(const void* address, uint32_t& word) {
  emulation::check_global(address, sizeof(word));
  std::memcpy(&word, address, sizeof(word));
}

inline void load_global(const void* address, uint32_t& first, uint32_t& second) {
  load_global(address, first);
  load_global(static_cast<const char*>(address) + sizeof(first), second);
}

inline float exp2_approximate(float x) { return std::exp2(x); }
inline float reciprocal_approximate(float x) { return 1.f / x; }

inline float4 load_shared_floats(uint32_t address) { return load_at<float4>(address); }
inline void store_shared_floats(uint32_t address, float4 value) { store_at(address, value); }
inline uint4 load_shared(uint32_t address) { return load_at<uint4>(address); }
inline void store_shared_half(uint32_t address, int value) { store_at(address, static_cast<uint16_t>(value)); }
inline uint16_t load_shared_half(uint32_t address) { return load_at<uint16_t>(address); }
inline uint32_t load_shared_word(uint32_t address) { return load_at<uint32_t>(address); }

inline void publish(uint64_t* flag, uint64_t value) {
  *flag = value;
  emulation::changed(reinterpret_cast<const int64_t*>(flag));
}

inline void wait_until_published(const uint64_t* flag, uint64_t value) {
  while (*flag != value) {
    const auto* const number = reinterpret_cast<const int64_t*>(flag);
    emulation::wait_while("the flag of a work unit", number, *number);
  }
}

// One lane's part of an instruction on 8x8 matrices of 16-bit values: the address of a row, and two values of each.
template <int Matrices>
struct MatrixLane {
  uint32_t row;
  uint32_t values[Matrices];
};

inline uint32_t replaced(uint32_t word, int upper, uint16_t value) {
  return upper ? (word & 0xffffu) | static_cast<uint32_t>(value) << 16 : (word & 0xffff0000u) | value;
}

template <int Matrices>
void store_transposed(uint32_t row, const uint32_t (&matrix)[Matrices]) {
  MatrixLane<Matrices> lane{row, {}};
  std::copy(matrix, matrix + Matrices, lane.values);
  emulation::meet_as("stmatrix", 32, lane, [](MatrixLane<Matrices>* const* all) {
    for (int m = 0; m < Matrices; ++m) {
      for (int i = 0; i < 64; ++i) {  // element [i / 8][i % 8] of the fragment is stored at row i % 8, column i / 8
        const uint32_t word = all[i / 2]->values[m];
        const auto value = static_cast<uint16_t>(i % 2 ? word >> 16 : word);
        store_at(all[m * 8 + i % 8]->row + static_cast<uint32_t>(i / 8 * 2), value);
      }
    }
  });
}

template <int Matrices>
void load_transposed(uint32_t row, uint32_t (&matrix)[Matrices]) {
  MatrixLane<Matrices> lane{row, {}};
  emulation::meet_as("ldmatrix", 32, lane, [](MatrixLane<Matrices>* const* all) {
    for (int m = 0; m < Matrices; ++m) {
      for (int i = 0; i < 64; ++i) {
        const auto value = load_at<uint16_t>(all[m * 8 + i % 8]->row + static_cast<uint32_t>(i / 8 * 2));
        all[i / 2]->values[m] = replaced(all[i / 2]->values[m], i % 2, value);
      }
    }
  });
  std::copy(lane.values, lane.values + Matrices, matrix);
}

inline uint32_t transpose_8x8(uint32_t value) {
  MatrixLane<2> lane{0, {value, 0}};
  emulation::meet_as("movmatrix", 32, lane, [](MatrixLane<2>* const* all) {
    for (int i = 0; i < 64; ++i) {
      const uint32_t word = all[i / 2]->values[0];
      const auto element = static_cast<uint16_t>(i % 2 ? word >> 16 : word);
      const int to = i % 8 * 8 + i / 8;
      all[to / 2]->values[1] = replaced(all[to / 2]->values[1], to % 2, element);
    }
  });
  return lane.values[1];
}

}  // namespace w4a16::native
