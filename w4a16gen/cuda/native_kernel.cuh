// The native kernel: C^T = W^T A^T with 4-bit weights as WGMMA's register operand.
//
// One producer warpgroup fills a ring of stages: a thread fetches weights, another activations. The consumer warpgroups
// divide the CTA's channels, and take stages in turn where there are more of them, which splits K within the CTA. The
// CTAs of a cluster share operands, each fetched once for two of them, or split K again.
#pragma once

#include "native_exchange.cuh"
#include "native_warp_mainloop.cuh"

namespace w4a16::native {

template <class S>
__device__ inline Sharers weight_sharers(int rank) {  // the token tiles of the cluster
  const int first = rank % S::ClusterChannels;
  const int receivers = S::ClusterTokens == 2 ? 1 << first | 1 << (first + S::ClusterChannels) : 1 << first;
  return {static_cast<uint16_t>(receivers), S::ClusterTokens, rank / S::ClusterChannels % S::ClusterTokens};
}

template <class S>
__device__ inline Sharers activation_sharers(int rank) {  // its channel tiles
  const int first = rank / S::ClusterChannels * S::ClusterChannels;
  return {static_cast<uint16_t>((S::ClusterChannels == 2 ? 3 : 1) << first), S::ClusterChannels,
          rank % S::ClusterChannels};
}

// Makes the barriers and fetches the first weights. The first bytes are a launch's longest wait: the warps of the
// producer warpgroup ask for them before anything else is ready, each for stages of its own. (Not where CTAs share
// operands: when each fetched its first stages for itself, they ran apart, which cost up to 8 %.) Activations, which L2
// tends to have, come later: whoever fetches them may have to wait for the kernel before, and would hold up the rest.
template <class S>
__device__ inline void start(const Parameters& p, const Shared<S>& shared, const Work& work, int warp) {
  constexpr int kProducerWarps = kWarpgroup / kWarp;
  if (warp < kProducerWarps && S::EarlyStages > 0) {
    const Tile tile = tile_at<S>(p.tiling, work, work.first_tile);
    const WeightRows<S> rows(p, tile);
    const int stages = min(S::EarlyStages, tile.blocks * S::StagesPerBlock);
    if (elected()) {
      for (int stage = warp; stage < S::EarlyStages; stage += kProducerWarps) {
        barrier_init(shared.full(stage), 2);
        async_proxy_fence();
        if (stage < stages) fetch_weights<S>(p, shared, rows, stage, stage, true, 0);
      }
    }
  } else {
    constexpr int kFirst = S::EarlyStages > 0 ? kProducerWarps : 0;
    if (warp == S::Threads / kWarp - 1 && elected()) prefetch_tensor_map(&p.activations);
    for (int slot = warp - kFirst; slot < S::Stages; slot += S::Threads / kWarp - kFirst) {
      if (elected()) {
        if (slot >= S::EarlyStages) barrier_init(shared.full(slot), 2);
        constexpr int kWarps = 4 * S::WarpgroupsM * (S::Multicasts ? S::ClusterSize : 1);
        barrier_init(shared.empty(slot), kWarps * kReleasingLanes);
        if (S::ClusterK > 1 && slot < 2) barrier_init(shared.arrived(slot), 1);
      }
    }
  }
  barrier_init_fence();
  __syncthreads();
  if constexpr (S::ClusterSize > 1) cluster_arrive_relaxed();
  if constexpr (S::Multicasts || (S::ClusterK > 1 && !kWaitsLate)) cluster_wait();
}

// Fetches one operand of all stages of all tiles but the first few, `skip` of them.
template <class S, class FetchTile>
__device__ inline void produce(const Parameters& p, const Shared<S>& shared, const Work& work, int skip,
                               const FetchTile& fetch_tile) {
  Position<S::Stages> at;
#pragma unroll 1
  for (int index = work.first_tile; index < work.end_tile; index += work.tile_step) {
    const Tile tile = tile_at<S>(p.tiling, work, index);
    const int stages = tile.blocks * S::StagesPerBlock;
    const auto fetch = fetch_tile(tile);
    int stage = min(skip, stages);
    skip = 0;
    at.advance(stage);
#pragma unroll 1
    for (; stage < stages; ++stage) {
      barrier_wait(shared.empty(at.slot), at.phase ^ 1);
      fetch(stage, at.slot);
      at.advance(1);
    }
  }
}

template <class S>
__device__ inline void produce_weights(const Parameters& p, const Shared<S>& shared, const Work& work) {
  const Sharers sharers = weight_sharers<S>(work.rank);
  const auto fetch_tile = [&](const Tile& tile) {
    const int trigger = tile.blocks * S::StagesPerBlock - S::LeftStages;
    if (S::CtasPerSm == 2 && trigger <= S::EarlyStages) launch_dependents();
    return [&, trigger, rows = WeightRows<S>(p, tile)](int stage, int slot) {
      if (S::CtasPerSm == 2 && stage == trigger) launch_dependents();
      fetch_weights<S>(p, shared, rows, stage, slot, sharers.is_turn(stage), sharers.receivers);
    };
  };
  int filled = S::EarlyStages;
  if (S::CtasPerSm == 2 && p.is_dependent) {  // the launch before comes first (`FillPause`)
    const Tile tile = tile_at<S>(p.tiling, work, work.first_tile);
    const auto fetch = fetch_tile(tile);
    const int stages = tile.blocks * S::StagesPerBlock;
    filled = min(S::Stages, stages);
#pragma unroll 1
    for (int stage = S::EarlyStages; stage < filled; ++stage) {
      pause(S::FillPause);
      fetch(stage, stage);
    }
    if (!p.dependents_start_early && stages <= S::Stages + S::PrefetchedStages) prefetch_weights<S>(p, tile, S::Stages);
  }
  produce<S>(p, shared, work, filled, fetch_tile);
}

template <class S>
__device__ inline void produce_activations(const Parameters& p, const Shared<S>& shared, const Work& work) {
  const Sharers sharers = activation_sharers<S>(work.rank);
  int skip = 0;
  if (S::CtasPerSm == 2 && p.is_dependent) {
    // The weights are there when the kernel before ends, and activations are what is waited for: then nothing is left
    // but to ask for them, as many as the ring holds. (To ask for 16 stages takes 0.5 us in place of 1.8: 4096x4096, m
    // = 1. An ordinary launch has weights to wait for, and gets activations as their stages come.)
    const Tile tile = tile_at<S>(p.tiling, work, work.first_tile);
    skip = min(S::Stages, tile.blocks * S::StagesPerBlock);
    for (int stage = 0; stage < skip; ++stage) expect_activations<S>(p, shared, stage);
    wait_for_prerequisites();
#pragma unroll 4
    for (int stage = 0; stage < skip; ++stage) copy_activations<S>(p, shared, tile, stage, stage, sharers);
  } else {
    wait_for_prerequisites();  // the kernel before may be writing them; it never writes weights
  }
  produce<S>(p, shared, work, skip, [&](const Tile& tile) {
    return [&, tile](int stage, int slot) {
      expect_activations<S>(p, shared, slot);
      copy_activations<S>(p, shared, tile, stage, slot, sharers);
    };
  });
}

template <class S, int Rows>
__device__ inline void consume(const Parameters& p, const Shared<S>& shared, const Work& work, const Consumer& me) {
  Position<S::Stages> at;
  at.advance(me.warpgroup_k);
  int skip = me.warpgroup_k;  // stages of the next tile that come before this warpgroup's first
  int turn = 0;
  if constexpr (S::ClusterK > 1 && kWaitsLate)
    cluster_wait();  // all CTAs of the cluster run, and their barriers are ready
#pragma unroll 1
  for (int index = work.first_tile; index < work.end_tile; index += work.tile_step, ++turn) {
    const Tile tile = tile_at<S>(p.tiling, work, index);
    ChannelFactors<S> factors;
    if constexpr (S::SpareRegisters) factors.load(p, tile, me);
    const int stages = tile.blocks * S::StagesPerBlock;
    const int mine = (stages - skip + S::WarpgroupsK - 1) / S::WarpgroupsK;
    skip += mine * S::WarpgroupsK - stages;
    Sums<S> sum;
#pragma unroll
    for (int f = 0; f < S::Fragments; ++f) {
#pragma unroll
      for (int i = 0; i < S::Tokens / 2; ++i) sum[f][i] = 0;
    }
    if constexpr (S::ByWarps) {
      consume_stages_by_warps<S, Rows>(shared, mine, me, at, sum);
    } else {
      consume_stages<S, Rows>(shared, mine, me, at, sum);
    }
    wait_for_prerequisites();  // the kernel before may read what is written now, or have written the bias
    // With four warpgroups and no spare registers, asked anew: what follows from it would otherwise occupy registers
    // during the main loop. (With two it is the other way round, unless two exchanges follow: compiled.)
    constexpr bool kExchangesTwice = S::WarpgroupsK > 1 && S::ClusterK > 1;
    constexpr bool kIsShort = S::Warpgroups == 4 || (S::Sums == 128 && kExchangesTwice);
    constexpr bool kAsks = S::Exchanges && !S::SpareRegisters && kIsShort;
    const Consumer here = kAsks ? consumer_at<S>(thread_index()) : me;
    if constexpr (S::Exchanges) {
      if (!exchange<S>(p, shared, tile, index, work, here, turn, sum)) continue;
    }
    if (is_repeat<S>(p.tiling, static_cast<int>(blockIdx.x))) continue;
    if constexpr (!S::SpareRegisters) factors.load(p, tile, here);
    store<S>(p, shared, tile, work.rank, here, factors, sum);
  }
  if constexpr (S::StoresThroughShared) {
    if (me.warp == 0 && me.lane == 0) wait_for_store_reads<0>();
  }
}

template <class S, int Rows>
__device__ inline void run(const Parameters& p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const Shared<S> shared(memory);
  const int rank = S::ClusterSize > 1 ? static_cast<int>(cluster_rank()) : 0;
  const Work work = work_of<S>(p.tiling, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x), rank);
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / kWarp, 0);
  start<S>(p, shared, work, warp);

  if (warp < kWarpgroup / kWarp) {
    give_registers<S::ProducerRegisters>();
    if (warp == 0 && elected()) {
      if (p.dependents_start_early) launch_dependents();
      produce_weights<S>(p, shared, work);
      launch_dependents();  // nothing is left to fetch: the next kernel may fetch its weights
    } else if (warp == 1 && elected()) {
      produce_activations<S>(p, shared, work);
    } else if (warp == 2) {
      if constexpr (S::StreamK) publish_handover<S>(p, work);
    }
    __syncwarp();
    if constexpr (S::ClusterK > 1 && kWaitsLate) cluster_wait();
  } else {
    take_registers<S::ConsumerRegisters>();
    consume<S, Rows>(p, shared, work, consumer_at<S>(threadIdx.x));
  }
  if constexpr (S::Multicasts) {
    // Nobody leaves while others tell it of free slots. Arriving must release: with relaxed arrivals a CTA left while
    // such a message was on its way, which is a fault.
    __syncwarp();
    cluster_arrive();
    cluster_wait();
  }
}

// Named is a type derived from the shape whose name is the kernel's, so that profilers and cuobjdump show it. Rows is
// the number of scale rows in a block: the group size is the problem's, and each number of rows has a function of its
// own.
template <class Named, int Rows>
__global__ void __launch_bounds__(Named::Threads, Named::CtasPerSm)
    kernel(const __grid_constant__ Parameters parameters) {
  run<Named, Rows>(parameters);
}

}  // namespace w4a16::native
