// Runs kernels on the CPU: every CUDA thread is a fiber, and all CTAs of a grid run at once.
//
// The scheduler picks fibers in random order, and copies of the copy engine happen at a random time. So a run with
// another seed is another interleaving. What the hardware forbids is an error here: a deadlock, a barrier that gets too
// many arrivals, lanes that diverge at an instruction of the whole warp, an access outside shared memory, a copy into a
// CTA that has ended. Shared memory begins as NaN.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace emulation {

unsigned thread_index();
unsigned block_index();
unsigned block_size();
unsigned grid_size();
int cluster_rank();

// Ends the launch with an error.
[[noreturn]] void fail(const std::string& what);

// Waits while a number is `old`; `what` is for the report of a deadlock. Whoever changes it calls `changed`.
void wait_while(const char* what, const int64_t* number, int64_t old);
void changed(const int64_t* number);

// Waits until all of the warp's or warpgroup's threads are here. The last one then calls `act` with what all gave.
void meet(const char* what, int threads, void* mine, const std::function<void(void* const* all)>& act);

template <class Mine, class Act>
void meet_as(const char* what, int threads, Mine& mine, const Act& act) {
  meet(what, threads, &mine, [&](void* const* all) { act(reinterpret_cast<Mine* const*>(all)); });
}

bool coin();

// Waits until the previous kernel of the stream, if the test has named one, has written its output.
void wait_for_previous_kernel();

// Does something later, at a random time.
void later(std::function<void()> act);

// Copies later: calls `read` now or then, and then `write` with what it returned.
template <class Read, class Write>
void copy_later(const Read& read, const Write& write) {
  if (coin()) {
    later([write, data = read()] { write(data); });
  } else {
    later([write, read] { write(read()); });
  }
}

// An address in the shared memory of this CTA, or of another one of the cluster.
constexpr uint32_t kAddressBits = 20;
uint8_t* shared_memory(uint32_t address, uint32_t bytes);
uint32_t in_cluster(uint32_t address, int rank);

// Barriers in shared memory (mbarrier).
void init_barrier(uint32_t address, uint32_t arrivals);
void expect_bytes(uint32_t address, uint32_t bytes);
void arrive(uint32_t address);
void complete_bytes(uint32_t address, uint32_t bytes);
void wait_for_phase(uint32_t address, uint32_t parity);

// Barriers of the CTA, by number, and of the cluster.
void sync_named(int id, int threads);
void arrive_named(int id, int threads);
void arrive_at_cluster();
void wait_for_cluster();

// Fails if the bytes are outside every buffer that the test has named.
void check_global(const void* address, uint64_t bytes);

// How a kernel with one parameter, given by value, is called. All kernels but those of products are registered.
using Call = void (*)(const void* function, const void* parameter);
void add_kernel(const void* function, Call call);

template <class Parameter>
void add_kernel(void (*kernel)(Parameter)) {
  add_kernel(reinterpret_cast<const void*>(kernel), [](const void* function, const void* parameter) {
    reinterpret_cast<void (*)(Parameter)>(const_cast<void*>(function))(*static_cast<const Parameter*>(parameter));
  });
}

// Asynchronous work of a thread (stores of the copy engine) or of a warpgroup (WGMMAs), in groups that end in order.
void add_to_group(int threads, std::function<void()> act);
void commit_group(int threads);
void wait_for_groups(int threads, int pending);

}  // namespace emulation
