// The native kernel: C^T = W^T A^T with 4-bit weights as WGMMA's register operand.
//
// A producer warpgroup fills a ring of stages: one thread fetches weights, another one activations. The consumer
// warpgroups divide the CTA's channels. If there are more warpgroups than blocks of 64 channels, they also split K by
// taking stages in turn. The CTAs of a cluster multicast operands to each other, or split K again.
#pragma once

#include "native/epilogue.cuh"
#include "native/producer.cuh"
#include "native/reduce.cuh"
#include "native/warp_mainloop.cuh"

namespace w4a16::native {

// The same work, with what a thread's special registers hold read again: kept in registers it makes ptxas spill.
template <class S>
__device__ inline Work renewed(const Tiling& tiling, const Work& work) {
  if constexpr (!S::StreamK) return work;
  Work again = work;
  if constexpr (S::Multicasts) again.rank = static_cast<int>(cluster_rank());
  again.unit = tiling.clusters - 1 - block_index() / S::ClusterSize;
  return again;
}

template <class S, int Rows>
__device__ inline void consume(const Parameters& p, const Shared<S>& shared, const Work& work, const Consumer& me) {
  Position<S::Stages> at;
  at.advance(me.warpgroup_k);
  int skip = me.warpgroup_k;  // stages of the next tile before this warpgroup's first one
  int turn = 0;
  // Without spare registers the factors are loaded while the last products of a tile are computed, or after a
  // reduction.
  constexpr bool kLoadsFactorsLate = !S::SpareRegisters && !S::ReducesOnChip && !S::ByWarps;
  if constexpr (S::ClusterK > 1 && kWaitsLate)
    cluster_wait();  // all CTAs of the cluster run and have initialised their barriers
  // The next tile is found while the last products of a tile are computed. Stream-K lacks registers for that. Kernels
  // that reduce have one tile a CTA, as a rule.
  constexpr bool kLooksAhead = !S::StreamK && !S::Grouped && !S::ReducesOnChip;
  Tile next{};
  if constexpr (kLooksAhead) next = tile_at<S>(p, shared, work, work.first_tile);
#pragma unroll 1
  for (int index = work.first_tile; index < work.end_tile; index = next_tile<S>(p.tiling, work, index), ++turn) {
    const Work now = renewed<S>(p.tiling, work);
    const Tile tile = kLooksAhead ? next : tile_at<S>(p, shared, now, index);
    ChannelFactors<S> factors;
    if constexpr (S::SpareRegisters) factors.load(p, tile, me);
    const int stages = tile.blocks * S::StagesPerBlock;
    const int mine = (stages - skip + S::WarpgroupsK - 1) / S::WarpgroupsK;
    skip += mine * S::WarpgroupsK - stages;
    Accumulators<S> sum;
    if (!kOverwritesSums<S> || (S::ReducesOnChip && mine == 0)) {  // a warpgroup may have no stage
#pragma unroll
      for (int f = 0; f < S::Fragments; ++f) {
#pragma unroll
        for (int i = 0; i < S::Tokens / 2; ++i) sum[f][i] = 0;
      }
    }
    if constexpr (S::ByWarps) {
      consume_stages_by_warps<S, Rows>(shared, mine, me, at, sum);
    } else {
      const auto before_drain = [&] {
        if constexpr (kLoadsFactorsLate) factors.load(p, tile, me);
        if constexpr (kLooksAhead) next = tile_at<S>(p, shared, work, next_tile<S>(p.tiling, work, index));
        if constexpr (S::StoresThroughShared) {
          if constexpr (S::HasEpilogue) {
            request_residual<S>(p, shared, tile, work.rank, me);
          } else if constexpr (!S::StreamK) {  // with stream-K ptxas would spill
            await_output_place<S>(me);
          }
        }
      };
      if (S::TailTokens < S::Tokens && tile.end_token - tile.token <= S::TailTokens) {
        consume_stages<S, Rows, S::TailTokens>(shared, mine, me, at, sum, before_drain);
      } else {
        consume_stages<S, Rows, S::Tokens>(shared, mine, me, at, sum, before_drain);
      }
    }
    wait_for_prerequisites();  // the previous kernel may read this output or write the bias
    // Without spare registers the thread's role is computed again, since values derived from it would occupy registers
    // during the main loop. With two warpgroups that pays only if two reductions follow (ptxas otherwise spills), or
    // an epilogue follows stream-K's with scales and stages of 128 k.
    constexpr bool kReducesTwice = S::WarpgroupsK > 1 && S::ClusterK > 1;
    constexpr bool kFinishesMuch = S::HasEpilogue && S::StreamK && S::Scales && S::K == kBlockK;
    constexpr bool kIsTight = S::Warpgroups == 4 || (S::Accumulators == 128 && (kReducesTwice || kFinishesMuch));
    constexpr bool kRecomputesRole = S::Reduces && !S::SpareRegisters && kIsTight;
    const Consumer here = kRecomputesRole ? consumer_at<S>(thread_index()) : me;
    // Also where another CTA stores the tile. After the reduction this wait would make ptxas take the ring's position
    // for different in each thread.
    if constexpr (S::HasEpilogue && S::StoresThroughShared) await_residual<S>(p, shared, turn);
    if constexpr (S::Reduces) {
      const Work then = renewed<S>(p.tiling, work);
      if (!reduce<S>(p, shared, tile, index, then, here, turn, sum)) continue;
    }
    if (is_redundant_cta<S>(p.tiling, static_cast<int>(blockIdx.x))) continue;
    if constexpr (!S::SpareRegisters && !kLoadsFactorsLate) factors.load(p, tile, here);
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
  const Work work = work_of<S>(p, shared, rank);
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / kWarp, 0);
  prologue<S>(p, shared, work, warp);

  if (warp < kWarpgroup / kWarp) {
    deallocate_registers<S::ProducerRegisters>();
    if (warp == 0 && elected()) {
      if (p.dependents_start_early) launch_dependents();
      produce_weights<S>(p, shared, work);
      launch_dependents();  // all weights are requested: the next kernel may fetch its own
    } else if (warp == 1 && elected()) {
      produce_activations<S>(p, shared, work);
    } else if (warp == 2) {
      if constexpr (S::StreamK) publish_fixup<S>(p, work);
    }
    __syncwarp();
    if constexpr (S::ClusterK > 1 && kWaitsLate) cluster_wait();
  } else {
    allocate_registers<S::ConsumerRegisters>();
    consume<S, Rows>(p, shared, work, consumer_at<S>(threadIdx.x));
  }
  if constexpr (S::Multicasts) {
    // No CTA exits while others may still arrive at its barriers. The arrival must release: with a relaxed one, a CTA
    // exited before a remote arrival had landed, which is a fault.
    __syncwarp();
    cluster_arrive();
    cluster_wait();
  }
}

// `Named` derives from the shape and has the kernel's name, which profilers and cuobjdump then show. `Rows` is the
// number of scale rows in a block, which follows from the problem's group size.
template <class Named, int Rows>
__global__ void __launch_bounds__(Named::Threads, Named::CtasPerSm)
    kernel(const __grid_constant__ Parameters parameters) {
  run<Named, Rows>(parameters);
}

}  // namespace w4a16::native
