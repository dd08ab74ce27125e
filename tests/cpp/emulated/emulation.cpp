// The scheduler of the emulation, and the CUDA functions that a kernel library calls.
#include "emulation.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <unordered_map>
#include <utility>
#include <vector>

#include "native/pipeline.cuh"

// The shared memory that kernels declare. Kernels of products use its address only, which stands for offset 0 of the
// CTA's own. Others use the memory itself. It is exchanged when another CTA runs, but for sizes that products have:
// among the kernels with more, only those that sort routes use it, and have as many threads as a CTA may have.
namespace w4a16::native {
alignas(1024) uint8_t memory[227 * 1024];
}
constexpr size_t kMostExchangedBytes = 64 * 1024;
constexpr unsigned kThreadsThatSort = 1024;
constexpr size_t kMostSharedBytes = 48 * 1024;  // dynamic ones of a kernel that asks for no more
constexpr int kSmsPerGpc = 6;                   // a cluster is within one GPC

namespace emulation {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kWarp = 32;

// Threads that do something together.
struct Group {
  std::vector<void*> given;
  size_t arrived = 0;
  int64_t round = 0;
  const char* what = "";
};

// Asynchronous work in groups that end in order.
struct Groups {
  std::vector<std::function<void()>> open;
  std::deque<std::vector<std::function<void()>>> committed;

  void end_first() {
    for (const auto& act : committed.front()) act();
    committed.pop_front();
  }
};

// An mbarrier.
struct Barrier {
  uint32_t expected = 0;
  int64_t arrivals = 0;  // that are missing
  int64_t bytes = 0;     // that are missing
  int64_t phases = 0;    // that are complete

  void check() {
    if (arrivals < 0) fail("a barrier gets more arrivals than its count");
    if (arrivals > 0 || bytes != 0) return;
    ++phases;
    arrivals = expected;
    changed(&phases);
  }
};

struct NamedBarrier {
  int arrived = 0;
  int threads = 0;
  int64_t round = 0;
};

struct Failure {};  // ends a thread, or a step of the scheduler; the sentence is in Machine::error

struct Cta;

struct Thread {
  void* stack = nullptr;
  void* stack_pointer = nullptr;
  Cta* cta = nullptr;
  unsigned index = 0;
  bool ended = false;
  const char* waits_for = "";
  int64_t cluster_round = 0;
  Groups stores;
};

struct Cta {
  unsigned index = 0;
  unsigned first_of_cluster = 0;
  unsigned running = 0;
  std::vector<uint8_t> shared;
  std::vector<uint8_t> declared;  // what `memory` holds while another CTA runs
  std::vector<std::unique_ptr<Thread>> threads;
  std::map<int, std::vector<Group>> groups;  // by their size
  std::map<unsigned, Groups> warpgroups;
  std::map<uint32_t, Barrier> barriers;
  std::map<int, NamedBarrier> named;
};

struct Range {
  const uint8_t* begin;
  uint64_t bytes;
};

struct Written {
  void* to;
  const void* from;
  uint64_t bytes;
};

struct Machine {
  std::vector<std::unique_ptr<Cta>> ctas;
  unsigned grid = 0;
  unsigned threads = 0;
  unsigned cluster = 1;
  std::map<unsigned, std::pair<int64_t, unsigned>> clusters;  // barrier: complete rounds, arrivals in this one
  std::vector<std::function<void()>> pending;
  std::vector<Thread*> ready;
  std::unordered_map<const int64_t*, std::vector<Thread*>> waiting;  // by what they wait for
  int64_t previous_ended = 1;
  unsigned running = 0;       // threads that have not ended
  void* scheduler = nullptr;  // its stack pointer
  Thread* current = nullptr;
  Cta* in_memory = nullptr;  // whose shared memory `memory` holds
  std::mt19937 random;
  std::string error;
  const void* function = nullptr;
  void** arguments = nullptr;
};

// What tests set, and the result.
struct Settings {
  unsigned seed = 0;
  int sm_count = 4;
  std::vector<Range> buffers;
  std::vector<Written> previous;  // by the previous kernel
  bool is_captured = false;       // behind a kernel of another library
  int64_t slow_cta = -1;          // from the beginning to the end of the next launch
  cudaLaunchConfig_t launched{};
  int questions = 0;  // about occupancy
  std::string error;
  std::vector<void*> stacks;
  std::map<const void*, size_t> most_shared_bytes;  // dynamic ones, by function
};

Machine* machine = nullptr;

Settings& settings() {
  static Settings all;
  return all;
}

Thread& here() { return *machine->current; }

// Saves the registers that a call keeps, and goes on where another stack's were saved.
extern "C" void switch_stacks(void** from, void* to);
asm(R"(
.text
.local switch_stacks
.type switch_stacks, @function
switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size switch_stacks, .-switch_stacks
)");

void to_scheduler() { switch_stacks(&here().stack_pointer, machine->scheduler); }

std::string name_of(const Thread& thread) {
  return "thread " + std::to_string(thread.index) + " of CTA " + std::to_string(thread.cta->index);
}

// The CTA that an address belongs to, and the offset in its shared memory.
std::pair<Cta*, uint32_t> located(uint32_t address) {
  const uint32_t rank = address >> kAddressBits;
  const uint32_t offset = address & ((1u << kAddressBits) - 1);
  if (rank == 0) return {here().cta, offset};
  if (rank > machine->cluster) fail("an address outside the cluster");
  return {machine->ctas[here().cta->first_of_cluster + rank - 1].get(), offset};
}

Barrier& barrier_at(Cta& cta, uint32_t offset) {
  if (cta.running == 0) fail("an access to shared memory of a CTA that has ended");
  const auto found = cta.barriers.find(offset);
  if (found == cta.barriers.end()) fail("a barrier is used before it is initialised");
  return found->second;
}

void call_product(const void* function, const void* parameter) {
  using Parameters = w4a16::native::Parameters;
  reinterpret_cast<void (*)(Parameters)>(const_cast<void*>(function))(*static_cast<const Parameters*>(parameter));
}

std::map<const void*, Call>& calls() {
  static std::map<const void*, Call> all;
  return all;
}

void run_thread() {
  const auto found = calls().find(machine->function);
  const Call call = found == calls().end() ? &call_product : found->second;
  Thread& me = here();
  try {
    call(machine->function, machine->arguments[0]);
    if (!me.stores.open.empty() || !me.stores.committed.empty()) {
      fail("a thread ends while its stores still read shared memory");
    }
  } catch (const Failure&) {
  }
  me.ended = true;
  --me.cta->running;
  --machine->running;
  to_scheduler();
  abort();
}

void* new_stack() {
  auto& stacks = settings().stacks;
  if (!stacks.empty()) {
    void* const stack = stacks.back();
    stacks.pop_back();
    return stack;
  }
  void* const stack =
      mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) abort();
  return stack;
}

void start(Cta& cta, unsigned index) {
  auto thread = std::make_unique<Thread>();
  thread->cta = &cta;
  thread->index = index;
  thread->stack = new_stack();
  // The first switch pops six registers and returns to run_thread, whose frame must be as after a call.
  auto* const top = reinterpret_cast<void**>(static_cast<uint8_t*>(thread->stack) + kStackBytes);
  top[-2] = reinterpret_cast<void*>(&run_thread);
  thread->stack_pointer = top - 8;
  cta.threads.push_back(std::move(thread));
}

// Makes `memory` hold what a CTA has written there.
void load_memory(Cta& cta) {
  if (machine->in_memory == &cta) return;
  uint8_t* const memory = w4a16::native::memory;
  if (machine->in_memory != nullptr) {
    auto& declared = machine->in_memory->declared;
    std::memcpy(declared.data(), memory, declared.size());
  }
  std::memcpy(memory, cta.declared.data(), cta.declared.size());
  machine->in_memory = &cta;
}

bool chance(unsigned of) { return machine->random() % of == 0; }

// Takes a random one out.
template <class Item>
Item take(std::vector<Item>& items) {
  std::swap(items[machine->random() % items.size()], items.back());
  Item item = std::move(items.back());
  items.pop_back();
  return item;
}

// Ends a group of asynchronous work before anybody waits for it.
void end_a_group() {
  Cta& cta = *machine->ctas[machine->random() % machine->ctas.size()];
  Thread& thread = *cta.threads[machine->random() % cta.threads.size()];
  machine->current = &thread;
  Groups& of_warpgroup = cta.warpgroups[thread.index / 128];
  if (!of_warpgroup.committed.empty()) of_warpgroup.end_first();
  if (!thread.stores.committed.empty()) thread.stores.end_first();
}

void report_deadlock() {
  std::map<std::string, std::pair<int, std::string>> waiting;
  for (const auto& cta : machine->ctas) {
    for (const auto& thread : cta->threads) {
      if (thread->ended) continue;
      auto& [count, first] = waiting[thread->waits_for];
      if (count++ == 0) first = name_of(*thread);
    }
  }
  std::string text = "deadlock:";
  for (const auto& [what, found] : waiting) {
    text += " " + std::to_string(found.first) + " threads wait for " + what + ", the first is " + found.second + ";";
  }
  machine->error = text;
}

void end_previous_kernel() {
  for (const auto& one : settings().previous) std::memcpy(one.to, one.from, one.bytes);
  machine->previous_ended = 1;
  changed(&machine->previous_ended);
}

// Runs all threads to their end, or until the first error. Now and then other warps are slow, and copies.
void run_all() {
  for (const auto& cta : machine->ctas) {
    for (const auto& thread : cta->threads) machine->ready.push_back(thread.get());
  }
  machine->running = static_cast<unsigned>(machine->ready.size());
  unsigned slow = 0;
  unsigned steps_per_copy = 1;
  const uint64_t end_of_previous = machine->random() % 40000;
  for (uint64_t step = 0; machine->error.empty(); ++step) {
    if (step % 4096 == 0) {
      slow = static_cast<unsigned>(machine->random());
      steps_per_copy = 16u << machine->random() % 10;
    }
    auto& ready = machine->ready;
    if (machine->running == 0 && machine->pending.empty()) return;
    const bool is_stuck = ready.empty() && machine->pending.empty();
    if (machine->previous_ended == 0 && (is_stuck || step >= end_of_previous)) end_previous_kernel();
    if (ready.empty() && machine->pending.empty()) return report_deadlock();
    if (!machine->pending.empty() && (ready.empty() || chance(steps_per_copy))) take(machine->pending)();
    if (ready.empty()) continue;
    if (step % 256 == 0) end_a_group();
    Thread* const thread = take(ready);
    const unsigned warp = thread->cta->index * 64 + thread->index / kWarp;
    const bool is_slow = (warp * 2654435761u ^ slow) % 4 == 0 || thread->cta->index == settings().slow_cta;
    if (is_slow && ready.size() > kWarp && !chance(16)) {
      ready.push_back(thread);
      continue;
    }
    machine->current = thread;
    load_memory(*thread->cta);
    switch_stacks(&machine->scheduler, thread->stack_pointer);
  }
}

}  // namespace

unsigned thread_index() { return here().index; }
unsigned block_index() { return here().cta->index; }
unsigned block_size() { return machine->threads; }
unsigned grid_size() { return machine->grid; }
int cluster_rank() { return static_cast<int>(here().cta->index - here().cta->first_of_cluster); }

void fail(const std::string& what) {
  if (machine->error.empty()) machine->error = name_of(here()) + ": " + what;
  throw Failure();
}

void wait_while(const char* what, const int64_t* number, int64_t old) {
  Thread& me = here();
  while (*number == old) {
    me.waits_for = what;
    machine->waiting[number].push_back(&me);
    to_scheduler();
  }
}

void changed(const int64_t* number) {
  const auto found = machine->waiting.find(number);
  if (found == machine->waiting.end()) return;
  machine->ready.insert(machine->ready.end(), found->second.begin(), found->second.end());
  machine->waiting.erase(found);
}

void meet(const char* what, int threads, void* mine, const std::function<void(void* const*)>& act) {
  Thread& me = here();
  auto& groups = me.cta->groups[threads];
  if (groups.empty()) groups.resize(machine->threads / static_cast<unsigned>(threads));
  Group& group = groups[me.index / static_cast<unsigned>(threads)];
  group.given.resize(static_cast<size_t>(threads));
  if (group.arrived == 0) group.what = what;
  if (group.what != what) fail(std::string("lanes diverge: ") + group.what + " and " + what);
  group.given[me.index % static_cast<unsigned>(threads)] = mine;
  const int64_t round = group.round;
  if (++group.arrived == group.given.size()) {
    act(group.given.data());
    group.arrived = 0;
    ++group.round;
    changed(&group.round);
    return;
  }
  wait_while(what, &group.round, round);
}

void wait_for_previous_kernel() { wait_while("the previous kernel", &machine->previous_ended, 0); }

void add_kernel(const void* function, Call call) { calls()[function] = call; }

bool coin() { return chance(2); }

void later(std::function<void()> act) {
  Thread* const me = &here();
  machine->pending.push_back([me, act = std::move(act)] {
    machine->current = me;
    act();
  });
}

uint8_t* shared_memory(uint32_t address, uint32_t bytes) {
  const auto [cta, offset] = located(address);
  if (cta->running == 0) fail("an access to shared memory of a CTA that has ended");
  if (offset + bytes > cta->shared.size()) fail("an access outside shared memory, at " + std::to_string(offset));
  return cta->shared.data() + offset;
}

uint32_t in_cluster(uint32_t address, int rank) {
  return (address & ((1u << kAddressBits) - 1)) | static_cast<uint32_t>(rank + 1) << kAddressBits;
}

void init_barrier(uint32_t address, uint32_t arrivals) {
  const auto [cta, offset] = located(address);
  shared_memory(address, 8);
  if (offset % 8 != 0) fail("a barrier is not aligned to 8 bytes");
  if (!cta->barriers.emplace(offset, Barrier{arrivals, arrivals, 0, 0}).second) {
    fail("a barrier is initialised twice");
  }
}

void expect_bytes(uint32_t address, uint32_t bytes) {
  const auto [cta, offset] = located(address);
  barrier_at(*cta, offset).bytes += bytes;
}

void arrive(uint32_t address) {
  const auto [cta, offset] = located(address);
  Barrier& barrier = barrier_at(*cta, offset);
  --barrier.arrivals;
  barrier.check();
}

void complete_bytes(uint32_t address, uint32_t bytes) {
  const auto [cta, offset] = located(address);
  Barrier& barrier = barrier_at(*cta, offset);
  barrier.bytes -= bytes;
  barrier.check();
}

void wait_for_phase(uint32_t address, uint32_t parity) {
  const auto [cta, offset] = located(address);
  const Barrier& barrier = barrier_at(*cta, offset);
  if ((barrier.phases & 1) == parity) wait_while("a barrier in shared memory", &barrier.phases, barrier.phases);
}

namespace {

NamedBarrier& arrive_at(int id, int threads) {
  NamedBarrier& barrier = here().cta->named[id];
  if (barrier.arrived == 0) barrier.threads = threads;
  if (barrier.threads != threads) fail("a named barrier is used with two counts of threads");
  if (++barrier.arrived == barrier.threads) {
    barrier.arrived = 0;
    ++barrier.round;
    changed(&barrier.round);
  }
  return barrier;
}

}  // namespace

void sync_named(int id, int threads) {
  const int64_t before = here().cta->named[id].round;
  const NamedBarrier& barrier = arrive_at(id, threads);
  wait_while("a named barrier", &barrier.round, before);
}

void arrive_named(int id, int threads) { arrive_at(id, threads); }

void arrive_at_cluster() {
  auto& [rounds, arrived] = machine->clusters[here().cta->first_of_cluster];
  here().cluster_round = rounds;
  if (++arrived == machine->cluster * machine->threads) {
    arrived = 0;
    ++rounds;
    changed(&rounds);
  }
}

void wait_for_cluster() {
  const auto& state = machine->clusters[here().cta->first_of_cluster];
  const int64_t mine = here().cluster_round;
  wait_while("the cluster's barrier", &state.first, mine);
}

void check_global(const void* address, uint64_t bytes) {
  const auto* const begin = static_cast<const uint8_t*>(address);
  const auto& buffers = settings().buffers;
  const bool inside = std::any_of(buffers.begin(), buffers.end(), [&](const Range& range) {
    return begin >= range.begin && begin + bytes <= range.begin + range.bytes;
  });
  if (!buffers.empty() && !inside) fail("an access outside the buffers of the launch");
}

namespace {

Groups& groups_of(int threads) {
  Thread& me = here();
  return threads == 1 ? me.stores : me.cta->warpgroups[me.index / static_cast<unsigned>(threads)];
}

}  // namespace

void add_to_group(int threads, std::function<void()> act) { groups_of(threads).open.push_back(std::move(act)); }

void commit_group(int threads) {
  Groups& groups = groups_of(threads);
  groups.committed.push_back(std::move(groups.open));
  groups.open.clear();
}

void wait_for_groups(int threads, int pending) {
  Groups& groups = groups_of(threads);
  while (groups.committed.size() > static_cast<size_t>(pending)) groups.end_first();
}

}  // namespace emulation

using emulation::machine;
using emulation::settings;

extern "C" {

#define EMULATION_API __attribute__((visibility("default")))

EMULATION_API void emulation_set(unsigned seed, int sm_count) {
  settings().seed = seed;
  settings().sm_count = sm_count;
  settings().buffers.clear();
  settings().previous.clear();
  settings().is_captured = false;
  settings().slow_cta = -1;
}

EMULATION_API void emulation_add_buffer(const void* begin, uint64_t bytes) {
  settings().buffers.push_back({static_cast<const uint8_t*>(begin), bytes});
}

// The next launch's predecessor, which is still running when it begins, copies these bytes.
EMULATION_API void emulation_add_previous(void* to, const void* from, uint64_t bytes) {
  settings().previous.push_back({to, from, bytes});
}

// The next launch is captured, and follows a kernel of another library only.
EMULATION_API void emulation_capture(void) { settings().is_captured = true; }

// A CTA is slow in the next launch: all that wait for it have long done so when it goes on.
EMULATION_API void emulation_slow_down(unsigned cta) { settings().slow_cta = cta; }

EMULATION_API unsigned emulation_grid(void) { return settings().launched.gridDim.x; }

EMULATION_API int emulation_questions(void) { return settings().questions; }

EMULATION_API size_t emulation_shared_bytes(void) { return settings().launched.dynamicSmemBytes; }

EMULATION_API const char* emulation_error(void) { return settings().error.c_str(); }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* configuration, const void* function, void** arguments) {
  settings().launched = *configuration;
  const auto limit = settings().most_shared_bytes.find(function);
  const size_t most = limit == settings().most_shared_bytes.end() ? kMostSharedBytes : limit->second;
  if (configuration->dynamicSmemBytes > most) return cudaErrorInvalidValue;
  emulation::Machine all;
  machine = &all;
  all.grid = configuration->gridDim.x;
  all.threads = configuration->blockDim.x;
  all.random.seed(settings().seed);
  all.function = function;
  all.arguments = arguments;
  for (unsigned i = 0; i < configuration->numAttrs; ++i) {
    if (configuration->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      all.cluster = configuration->attrs[i].val.clusterDim.x;
    }
  }
  for (unsigned i = 0; i < all.grid; ++i) {
    auto cta = std::make_unique<emulation::Cta>();
    cta->index = i;
    cta->first_of_cluster = i / all.cluster * all.cluster;
    cta->running = all.threads;
    cta->shared.assign(configuration->dynamicSmemBytes, 0xff);
    const bool uses_memory = cta->shared.size() <= kMostExchangedBytes || all.threads == kThreadsThatSort;
    if (all.grid > 1 && uses_memory) cta->declared = cta->shared;
    for (unsigned t = 0; t < all.threads; ++t) emulation::start(*cta, t);
    all.ctas.push_back(std::move(cta));
  }
  if (!settings().previous.empty()) all.previous_ended = 0;
  if (all.grid % all.cluster != 0) {
    all.error = "the grid is no multiple of the cluster";
  } else {
    try {
      emulation::run_all();
    } catch (const emulation::Failure&) {  // in asynchronous work
    }
  }
  for (const auto& cta : all.ctas) {
    for (const auto& thread : cta->threads) settings().stacks.push_back(thread->stack);
  }
  machine = nullptr;
  settings().error = all.error;
  return all.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    settings().most_shared_bytes[function] = static_cast<size_t>(value);
  }
  return cudaSuccess;
}

cudaError_t cudaGetFuncBySymbol(cudaFunction_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }

// Launches are done when they return, so this one is in order too.
cudaError_t cudaMemsetAsync(void* written, int value, size_t bytes, cudaStream_t) {
  std::memset(written, value, bytes);
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidConfiguration) return "invalid configuration argument";
  return error == cudaErrorLaunchFailure ? settings().error.c_str() : "an error of the emulation";
}

// Device N is a GPU of N multiprocessors: the library remembers what it has asked of each device.
cudaError_t cudaGetDevice(int* device) {
  *device = settings().sm_count;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  *properties = {};
  std::strcpy(properties->name, "emulated H100");
  properties->major = 9;
  properties->multiProcessorCount = device;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* configuration) {
  ++settings().questions;
  const auto size = static_cast<int>(configuration->attrs[0].val.clusterDim.x);
  const int ctas_per_sm = configuration->dynamicSmemBytes > 113 * 1024 ? 1 : 2;
  const int sms = settings().sm_count;
  const int of_whole_gpcs = sms / kSmsPerGpc * (kSmsPerGpc * ctas_per_sm / size);
  *clusters = of_whole_gpcs + sms % kSmsPerGpc * ctas_per_sm / size;
  return cudaSuccess;
}

static CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t, void* matrix, const cuuint64_t* sizes,
                             const cuuint64_t*, const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave,
                             CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const w4a16::native::Tensor tensor{static_cast<uint16_t*>(matrix), static_cast<int64_t>(sizes[1]),
                                     static_cast<int64_t>(sizes[0]), static_cast<int>(box[1]),
                                     static_cast<int>(box[0])};
  static_assert(sizeof(tensor) <= sizeof(*map), "a tensor map has room for it");
  std::memcpy(map, &tensor, sizeof(tensor));
  return CUDA_SUCCESS;
}

static CUresult capture_info(CUstream, CUstreamCaptureStatus* status, cuuint64_t*, CUgraph*, const CUgraphNode** nodes,
                             const CUgraphEdgeData** edges, size_t* count) {
  static const CUgraphNode node = nullptr;
  static const CUgraphEdgeData full{};
  *status = settings().is_captured ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
  *nodes = &node;
  *edges = &full;
  *count = 1;
  return CUDA_SUCCESS;
}

static CUresult node_type(CUgraphNode, CUgraphNodeType* type) {
  *type = CU_GRAPH_NODE_TYPE_KERNEL;
  return CUDA_SUCCESS;
}

static CUresult node_parameters(CUgraphNode, CUDA_KERNEL_NODE_PARAMS* parameters) {
  parameters->func = reinterpret_cast<CUfunction>(uintptr_t{1});
  return CUDA_SUCCESS;
}

static CUresult node_dependencies(CUgraphNode, CUgraphNode*, CUgraphEdgeData*, size_t* count) {
  *count = 0;
  return CUDA_SUCCESS;
}

static CUresult function_name(const char** name, CUfunction) {
  *name = "_Z5otherPf";
  return CUDA_SUCCESS;
}

static CUresult unknown() { return CUDA_ERROR_NOT_SUPPORTED; }

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult*) {
  const std::map<std::string, void*> functions = {
      {"cuTensorMapEncodeTiled", reinterpret_cast<void*>(&encode_tiled)},
      {"cuStreamGetCaptureInfo", reinterpret_cast<void*>(&capture_info)},
      {"cuGraphNodeGetType", reinterpret_cast<void*>(&node_type)},
      {"cuGraphKernelNodeGetParams", reinterpret_cast<void*>(&node_parameters)},
      {"cuGraphNodeGetDependencies", reinterpret_cast<void*>(&node_dependencies)},
      {"cuFuncGetName", reinterpret_cast<void*>(&function_name)},
      {"cuKernelGetName", reinterpret_cast<void*>(&unknown)},
      {"cuFuncGetAttribute", reinterpret_cast<void*>(&unknown)},
      {"cuKernelGetFunction", reinterpret_cast<void*>(&unknown)},
  };
  const auto found = functions.find(name);
  if (found == functions.end()) return cudaErrorNotSupported;
  *function = found->second;
  return cudaSuccess;
}

}  // extern "C"
