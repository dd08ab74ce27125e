// The producer warpgroup: it initialises the barriers and fetches weights and activations into the ring.
#pragma once

#include "native/pipeline.cuh"

namespace w4a16::native {

template <class S>
__device__ inline Multicast weight_multicast(int rank) {  // among the cluster's token tiles
  const int first = rank % S::ClusterChannels;
  const int mask = S::ClusterTokens == 2 ? 1 << first | 1 << (first + S::ClusterChannels) : 1 << first;
  return {static_cast<uint16_t>(mask), S::ClusterTokens, rank / S::ClusterChannels % S::ClusterTokens};
}

template <class S>
__device__ inline Multicast activation_multicast(int rank) {  // among its channel tiles
  const int first = rank / S::ClusterChannels * S::ClusterChannels;
  return {static_cast<uint16_t>((S::ClusterChannels == 2 ? 3 : 1) << first), S::ClusterChannels,
          rank % S::ClusterChannels};
}

// The stages whose activations the prologue fetches: none where the previous kernel may still write them. A grouped
// product has waited for that one if it made the list.
template <class S>
__device__ inline int activation_stages_of_prologue(const Parameters& p) {
  const bool may_be_written = p.is_dependent && !(S::Grouped && !p.list_is_complete);
  return may_be_written ? 0 : S::PrologueStages;
}

// Initialises the barriers and fetches the first stages. The first bytes are a launch's longest wait, so the warps of
// the producer warpgroup request them before anything else is ready, each for its own stages. CTAs that multicast do
// not: they would drift apart, which takes up to 8 % longer. Loops are not unrolled: the first copies wait for their
// instructions too.
template <class S>
__device__ inline void prologue(const Parameters& p, const Shared<S>& shared, const Work& work, int warp) {
  constexpr int kProducerWarps = kWarpgroup / kWarp;
  // Behind the weights, activations that are not in L2 come last. Stages of 64 k have more copies, which would all wait
  // for the tensor map.
  constexpr bool kActivationsFirst = S::K == kBlockK && S::ActivationBytes > S::WeightBytes;
  if (warp < kProducerWarps && S::PrologueStages > 0) {
    // Only of grouped products the number of tiles is not known when the grid is.
    const bool has_work = !S::Grouped || work.first_tile < work.end_tile;
    const Tile tile = has_work ? tile_at<S>(p, shared, work, work.first_tile) : Tile{};
    const WeightRows<S> rows(p, tile);
    const int stages = min(S::PrologueStages, tile.blocks * S::StagesPerBlock);
    const int with_activations = min(activation_stages_of_prologue<S>(p), stages);
    if (elected()) {
#pragma unroll 1
      for (int stage = warp; stage < S::PrologueStages; stage += kProducerWarps) {
        const auto fetch_first_activations = [&] {
          if (stage >= with_activations) return;
          expect_activations<S>(p, shared, stage);
          copy_activations<S>(p, shared, tile, stage, stage, Multicast{0, 1, 0});
        };
        barrier_init(shared.full(stage), 2);
        barrier_init_fence();
        if (kActivationsFirst) fetch_first_activations();
        if (stage < stages) fetch_weights<S>(p, shared, rows, stage, stage, true, 0);
        if (!kActivationsFirst) fetch_first_activations();
      }
    }
  } else {
    constexpr int kFirst = S::PrologueStages > 0 ? kProducerWarps : 0;
    if (S::PrologueStages == 0 && warp == S::Threads / kWarp - 1 && elected()) prefetch_tensor_map(&p.activations);
#pragma unroll 1
    for (int slot = warp - kFirst; slot < S::Stages; slot += S::Threads / kWarp - kFirst) {
      if (elected()) {
        if (slot >= S::PrologueStages) barrier_init(shared.full(slot), 2);
        constexpr int kWarps = 4 * S::WarpgroupsM * (S::Multicasts ? S::ClusterSize : 1);
        barrier_init(shared.empty(slot), kWarps * kReleasingLanes);
        if (S::ClusterK > 1 && slot < 2) barrier_init(shared.arrived(slot), 1);
        if constexpr (S::HasEpilogue && S::StoresThroughShared) {
          if (slot == 0) barrier_init(shared.residual(), S::WarpgroupsM);
        }
      }
    }
  }
  barrier_init_fence();
  __syncthreads();
  if constexpr (S::ClusterSize > 1) cluster_arrive_relaxed();
  if constexpr (S::Multicasts || (S::ClusterK > 1 && !kWaitsLate)) cluster_wait();
}

// Fetches one operand of every stage of every tile, except the first `skip` stages.
template <class S, class FetchTile>
__device__ inline void produce(const Parameters& p, const Shared<S>& shared, const Work& work, int skip,
                               const FetchTile& fetch_tile) {
  Position<S::Stages> at;
#pragma unroll 1
  for (int index = work.first_tile; index < work.end_tile; index = next_tile<S>(p.tiling, work, index)) {
    const Tile tile = tile_at<S>(p, shared, work, index);
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
  const Multicast multicast = weight_multicast<S>(work.rank);
  const auto fetch_tile = [&](const Tile& tile) {
    const int trigger = tile.blocks * S::StagesPerBlock - S::StagesAtTrigger;
    if (S::CtasPerSm == 2 && trigger <= S::PrologueStages) launch_dependents();
    return [&, trigger, rows = WeightRows<S>(p, tile)](int stage, int slot) {
      if (S::CtasPerSm == 2 && stage == trigger) launch_dependents();
      fetch_weights<S>(p, shared, rows, stage, slot, multicast.is_turn(stage), multicast.mask);
    };
  };
  int filled = S::PrologueStages;
  if (S::CtasPerSm == 2 && !S::Grouped && p.is_dependent) {  // the previous launch has priority (FillPause)
    const Tile tile = tile_at<S>(p, shared, work, work.first_tile);
    const auto fetch = fetch_tile(tile);
    const int stages = tile.blocks * S::StagesPerBlock;
    filled = min(S::Stages, stages);
#pragma unroll 1
    for (int stage = S::PrologueStages; stage < filled; ++stage) {
      pause(S::FillPause);
      fetch(stage, stage);
    }
    if (!p.dependents_start_early && stages <= S::Stages + S::PrefetchedStages) prefetch_weights<S>(p, tile, S::Stages);
  }
  produce<S>(p, shared, work, filled, fetch_tile);
}

template <class S>
__device__ inline void produce_activations(const Parameters& p, const Shared<S>& shared, const Work& work) {
  const Multicast multicast = activation_multicast<S>(work.rank);
  int skip = activation_stages_of_prologue<S>(p);
  if (S::CtasPerSm == 2 && !S::Grouped && p.is_dependent) {
    // The weights are there when the previous kernel ends. The barriers already expect all activations of the ring, so
    // that only their copies remain: requesting 16 stages takes 0.5 us instead of 1.8 (4096x4096, one token).
    const Tile tile = tile_at<S>(p, shared, work, work.first_tile);
    skip = min(S::Stages, tile.blocks * S::StagesPerBlock);
    for (int stage = 0; stage < skip; ++stage) expect_activations<S>(p, shared, stage);
    wait_for_prerequisites();
#pragma unroll 4
    for (int stage = 0; stage < skip; ++stage) copy_activations<S>(p, shared, tile, stage, stage, multicast);
  } else {
    wait_for_prerequisites();  // the previous kernel may write activations; it never writes weights
  }
  produce<S>(p, shared, work, skip, [&](const Tile& tile) {
    return [&, tile](int stage, int slot) {
      expect_activations<S>(p, shared, slot);
      copy_activations<S>(p, shared, tile, stage, slot, multicast);
    };
  });
}

}  // namespace w4a16::native
