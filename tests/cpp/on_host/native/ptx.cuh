// Stands in for native/ptx.cuh in programs for the CPU: each thread of a CTA is a thread of the host, and what a warp
// or a CTA does together meets at barriers. Copies of the copy engine happen at once. Shared memory is an array.
#pragma once

#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

// What the built-in variables of CUDA would be; the epilogues do not read them.
struct HostIndex {
  unsigned x;
};
inline constexpr HostIndex blockIdx{0}, gridDim{1};

namespace w4a16::native {

using std::min;

// A barrier that may be used again and again.
class Meeting {
 public:
  explicit Meeting(int threads) : threads_(threads) {}

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int64_t mine = round_;
    if (++arrived_ == threads_) {
      arrived_ = 0;
      ++round_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return round_ != mine; });
    }
  }

 private:
  int threads_;
  int arrived_ = 0;
  int64_t round_ = 0;
  std::mutex mutex_;
  std::condition_variable all_;
};

struct HostWarp {
  Meeting meeting{32};
  std::array<uint32_t, 32> words{};
};

// The memory and the barriers of a CTA.
struct HostCta {
  std::vector<uint8_t> shared = std::vector<uint8_t>(256 * 1024);
  std::vector<std::unique_ptr<HostWarp>> warps;
  std::mutex mutex;
  std::map<int, std::unique_ptr<Meeting>> barriers;
};

inline thread_local HostCta* this_cta = nullptr;
inline thread_local HostWarp* this_warp = nullptr;
inline thread_local int this_lane = 0;

// What a tensor map says here; it lies in the bytes of a CUtensorMap.
struct HostTensor {
  uint16_t* matrix;
  int64_t rows;
  int64_t columns;
  int box_rows;
  int box_columns;
};

inline HostTensor tensor_of(const void* map) {
  HostTensor tensor{};
  std::memcpy(&tensor, map, sizeof(tensor));
  return tensor;
}

// The address in shared memory of an element of a box. The swizzle depends on the address: rows of 128 bytes exchange
// pieces of 16 bytes by bits 7 to 9, rows of 64 bytes by bits 7 and 8.
inline uint32_t swizzled(const HostTensor& tensor, uint32_t box, int row, int column) {
  const uint32_t address = box + static_cast<uint32_t>((row * tensor.box_columns + column) * 2);
  return address ^ (address >> 7 & (tensor.box_columns == 64 ? 7 : 3)) << 4;
}

template <class Visit>
void for_box(const HostTensor& tensor, int column, int row, const Visit& visit) {
  for (int i = 0; i < tensor.box_rows; ++i) {
    for (int j = 0; j < tensor.box_columns; ++j) {
      const bool inside = row + i < tensor.rows && column + j < tensor.columns;
      visit(i, j, inside ? tensor.matrix + (row + i) * tensor.columns + column + j : nullptr);
    }
  }
}

// Publishes a word, lets `read` look at those of the whole warp, and waits until all have.
template <class Read>
auto with_warp(uint32_t word, const Read& read) {
  this_warp->words[static_cast<size_t>(this_lane)] = word;
  this_warp->meeting.wait();
  const auto result = read(this_warp->words);
  this_warp->meeting.wait();
  return result;
}

inline uint16_t& shared_half(uint32_t address) { return reinterpret_cast<uint16_t&>(this_cta->shared[address]); }

inline uint32_t shared_address(const void*) { return 0; }
inline void barrier_arrive_expecting(uint32_t, uint32_t) {}
inline void barrier_wait(uint32_t, uint32_t) {}
template <int Ctas>
void bulk_copy(uint32_t, const void*, uint32_t, uint32_t, uint16_t) {}
inline void bulk_prefetch(const void*, uint32_t) {}
template <int Pending>
void wait_for_store_reads() {}
inline void async_proxy_fence() {}
inline void wait_for_prerequisites() {}
inline float load_constant(const float* address) { return *address; }
inline void exit_thread() { std::abort(); }  // nobody calls it here
inline void load_global(const void* address, uint32_t& word) { std::memcpy(&word, address, 4); }
inline void load_global(const void* address, uint32_t& first, uint32_t& second) {
  std::memcpy(&first, address, 4);
  std::memcpy(&second, static_cast<const char*>(address) + 4, 4);
}
inline float exp2_approximate(float x) { return std::exp2(x); }
inline float reciprocal_approximate(float x) { return 1.f / x; }

template <int Ctas>
void tensor_copy(uint32_t box, const void* map, int column, int row, uint32_t, uint16_t) {
  const HostTensor tensor = tensor_of(map);
  for_box(tensor, column, row, [&](int i, int j, const uint16_t* element) {
    shared_half(swizzled(tensor, box, i, j)) = element == nullptr ? 0 : *element;
  });
}

inline void tensor_store(const void* map, int column, int row, uint32_t box) {
  const HostTensor tensor = tensor_of(map);
  for_box(tensor, column, row, [&](int i, int j, uint16_t* element) {
    if (element != nullptr) *element = shared_half(swizzled(tensor, box, i, j));
  });
}

inline void named_barrier(int id, int threads) {
  Meeting* meeting = nullptr;
  {
    const std::lock_guard<std::mutex> lock(this_cta->mutex);
    std::unique_ptr<Meeting>& slot = this_cta->barriers[id];
    if (slot == nullptr) slot = std::make_unique<Meeting>(threads);
    meeting = slot.get();
  }
  meeting->wait();
}

// Each lane has two neighbouring columns of row lane / 4 of an 8x8 matrix.
inline uint32_t transpose_8x8(uint32_t value) {
  return with_warp(value, [](const std::array<uint32_t, 32>& words) {
    uint32_t result = 0;
    for (int i = 0; i < 2; ++i) {
      const int row = this_lane % 4 * 2 + i;  // of the source; its column is this lane's row
      const uint32_t word = words[static_cast<size_t>(row * 4 + this_lane / 8)];
      result |= (word >> (this_lane / 4 % 2 * 16) & 0xffff) << (i * 16);
    }
    return result;
  });
}

// The addresses in shared memory of this lane's two elements of matrix `index`, transposed: lanes 8 * index and after
// have the rows' addresses.
inline std::array<uint32_t, 2> transposed_places(const std::array<uint32_t, 32>& rows, int index) {
  const auto row = static_cast<size_t>(8 * index + this_lane % 4 * 2);
  const auto offset = static_cast<uint32_t>(this_lane / 4 * 2);
  return {rows[row] + offset, rows[row + 1] + offset};
}

template <size_t Count>
void store_transposed(uint32_t row, const uint32_t (&matrix)[Count]) {
  with_warp(row, [&](const std::array<uint32_t, 32>& rows) {
    for (size_t index = 0; index < Count; ++index) {
      const auto places = transposed_places(rows, static_cast<int>(index));
      shared_half(places[0]) = static_cast<uint16_t>(matrix[index]);
      shared_half(places[1]) = static_cast<uint16_t>(matrix[index] >> 16);
    }
    return 0;
  });
}

template <size_t Count>
void load_transposed(uint32_t row, uint32_t (&matrix)[Count]) {
  with_warp(row, [&](const std::array<uint32_t, 32>& rows) {
    for (size_t index = 0; index < Count; ++index) {
      const auto places = transposed_places(rows, static_cast<int>(index));
      matrix[index] = shared_half(places[0]) | static_cast<uint32_t>(shared_half(places[1])) << 16;
    }
    return 0;
  });
}

}  // namespace w4a16::native

inline uint32_t __shfl_xor_sync(uint32_t, uint32_t value, int lane_mask) {
  return w4a16::native::with_warp(value, [&](const std::array<uint32_t, 32>& words) {
    return words[static_cast<size_t>(w4a16::native::this_lane ^ lane_mask)];
  });
}

inline int __shfl_sync(uint32_t, int value, int) { return value; }
