// PTX instructions of the native kernels: barriers, copies, cluster and register control.
#pragma once

#include <cstdint>

namespace w4a16::native {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Whether this is the one thread that its warp elects. ptxas knows that no other thread is active in the branch. After
// `lane == 0` it would loop over the active threads, which takes 60 cycles per barrier and 100 per copy (H200,
// 2026-11).
__device__ inline bool elected() {
  uint32_t is_elected;
  asm volatile(
      "{\n"
      ".reg .pred elected;\n"
      "elect.sync _|elected, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, elected;\n"
      "}\n"
      : "=r"(is_elected));
  return is_elected != 0;
}

__device__ inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase with this parity is complete.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ inline void exit_thread() { asm volatile("exit;"); }

__device__ inline void pause(uint32_t cycles) {
  const uint32_t begin = clock();
  while (static_cast<uint32_t>(clock()) - begin < cycles) {
  }
}

// Bulk copies of the async proxy, which complete on a barrier. With Ctas > 1 the copy is multicast: it fills the same
// offsets of shared memory, and completes on the same barrier, in every CTA of the cluster whose bit is set in `mask`.
template <int Ctas>
__device__ inline void bulk_copy(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier,
                                 uint16_t mask) {
  if constexpr (Ctas == 1) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination),
        "l"(source), "r"(bytes), "r"(barrier)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
        "%4;" ::"r"(destination),
        "l"(source), "r"(bytes), "r"(barrier), "h"(mask)
        : "memory");
  }
}

// Fetches into L2 only.
__device__ inline void bulk_prefetch(const void* source, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
}

template <int Ctas>
__device__ inline void tensor_copy(uint32_t destination, const void* map, int k, int token, uint32_t barrier,
                                   uint16_t mask) {
  if constexpr (Ctas == 1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
        "[%4];" ::"r"(destination),
        "l"(map), "r"(k), "r"(token), "r"(barrier)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%2, %3}], [%4], %5;" ::"r"(destination),
        "l"(map), "r"(k), "r"(token), "r"(barrier), "h"(mask)
        : "memory");
  }
}

// Stores a box of shared memory to global memory. Elements outside the tensor are not written.
__device__ inline void tensor_store(const void* map, int channel, int token, uint32_t source) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
               "r"(channel), "r"(token), "r"(source)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;");
}

// Waits until at most `Pending` of this thread's stores still have to read their shared memory.
template <int Pending>
__device__ inline void wait_for_store_reads() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

// Orders this thread's writes to shared memory before later accesses by the async proxy.
__device__ inline void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// a * b + c. In C++ the compiler would combine products of constants, and multiply 64 bits by 64.
__device__ inline uint64_t multiply_add_wide(uint32_t a, uint32_t b, uint64_t c) {
  uint64_t result;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(result) : "r"(a), "r"(b), "l"(c));
  return result;
}

__device__ inline void prefetch_tensor_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Brings the line of an address to L1.
__device__ inline void prefetch_line(const void* address) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(address) : "memory");
}

template <int Registers>
__device__ inline void deallocate_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <int Registers>
__device__ inline void allocate_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// Programmatic dependent launch: lets the next kernel of the stream start; waits until the previous kernel has finished
// and its writes are visible. Both do nothing in an ordinary launch.
__device__ inline void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ inline void wait_for_prerequisites() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// threadIdx.x, read again instead of kept in a register.
__device__ inline int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

__device__ inline int block_index() {
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}

// Barrier among some warps of the CTA. Number 0 belongs to __syncthreads.
__device__ inline void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The two halves of the cluster's barrier. A relaxed arrival does not order memory.
__device__ inline void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Returns the address of the same offset in another CTA's shared memory.
__device__ inline uint32_t address_in_cluster(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

// Arrives at a barrier of another CTA, without `.release.cluster`: it signals that reads of shared memory are done,
// which needs no fence of all memory.
__device__ inline void barrier_arrive_in_cluster(uint32_t remote_barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote_barrier) : "memory");
}

// Stores 16 bytes to another CTA's shared memory and counts them on a barrier there.
__device__ inline void store_in_cluster(uint32_t remote_address, float4 value, uint32_t remote_barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   remote_address),
               "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(remote_barrier)
               : "memory");
}

// Loads from memory that no kernel of a chain of dependent launches writes.
__device__ inline float load_constant(const float* address) {
  float value;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(address));
  return value;
}

__device__ inline float4 load_shared_floats(uint32_t address) {
  float4 value;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

__device__ inline void store_shared_floats(uint32_t address, float4 value) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(value.x), "f"(value.y), "f"(value.z),
               "f"(value.w)
               : "memory");
}

__device__ inline uint4 load_shared(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

__device__ inline void store_shared_half(uint32_t address, int value) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(static_cast<uint16_t>(value)) : "memory");
}

__device__ inline uint16_t load_shared_half(uint32_t address) {
  uint16_t value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(address) : "memory");
  return value;
}

__device__ inline uint32_t load_shared_word(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

// Loads from global memory that this kernel may write afterwards.
__device__ inline void load_global(const void* address, uint32_t& word) {
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(word) : "l"(address) : "memory");
}

__device__ inline void load_global(const void* address, uint32_t& first, uint32_t& second) {
  asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(first), "=r"(second) : "l"(address) : "memory");
}

// 2^x and 1 / x to about 2^-22 of themselves.
__device__ inline float exp2_approximate(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

__device__ inline float reciprocal_approximate(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}

// Sets a flag after making the warp's earlier writes visible to the thread that waits for it.
__device__ inline void publish(uint64_t* flag, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

__device__ inline void wait_until_published(const uint64_t* flag, uint64_t value) {
  uint64_t seen;
  do {
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(flag) : "memory");
  } while (seen != value);
}

// Stores four 8x8 matrices of 16-bit values, transposed. Each group of eight lanes has the row addresses of one.
__device__ inline void store_transposed(uint32_t row, const uint32_t (&matrix)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(matrix[0]),
               "r"(matrix[1]), "r"(matrix[2]), "r"(matrix[3])
               : "memory");
}

__device__ inline void store_transposed(uint32_t row, const uint32_t (&matrix)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(matrix[0]),
               "r"(matrix[1])
               : "memory");
}

__device__ inline void store_transposed(uint32_t row, const uint32_t (&matrix)[1]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(row), "r"(matrix[0]) : "memory");
}

// Loads what store_transposed stored, as the same lanes had it.
__device__ inline void load_transposed(uint32_t row, uint32_t (&matrix)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(row)
               : "memory");
}

__device__ inline void load_transposed(uint32_t row, uint32_t (&matrix)[2]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(matrix[0]), "=r"(matrix[1])
               : "r"(row)
               : "memory");
}

__device__ inline void load_transposed(uint32_t row, uint32_t (&matrix)[1]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(matrix[0]) : "r"(row) : "memory");
}

// Transposes an 8x8 matrix of 16-bit values spread over a warp.
__device__ inline uint32_t transpose_8x8(uint32_t value) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(value));
  return transposed;
}

}  // namespace w4a16::native
