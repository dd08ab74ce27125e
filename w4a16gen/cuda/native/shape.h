// The compile-time facts about a native kernel, by subject: its tile, its threads, its shared memory, its pipeline.
//
// w4a16gen/kernels/arrangement.py decides how many stages a kernel has, how many CTAs share an SM, and which tiles are
// tails. This header lays out shared memory for them and asserts that everything fits.
#pragma once

#include "library/experts.h"
#include "library/hopper.h"
#include "native/layout.h"

namespace w4a16::native {

constexpr int kWarpgroup = 128;
constexpr int kWarp = 32;

W4A16_HOST_DEVICE constexpr int min_of(int a, int b) { return a < b ? a : b; }
W4A16_HOST_DEVICE constexpr int max_of(int a, int b) { return a < b ? b : a; }

// Template arguments of a kernel, named as in kernel names.
template <int Channels_, int Tokens_, int K_>
struct Cta {
  static constexpr int Channels = Channels_;
  static constexpr int Tokens = Tokens_;
  static constexpr int K = K_;
};

template <int Channels_, int Tokens_, int K_>
struct Cluster {
  static constexpr int Channels = Channels_;
  static constexpr int Tokens = Tokens_;
  static constexpr int K = K_;
};

namespace schedule {
struct warpgroups2 {
  static constexpr int Warpgroups = 2;
  static constexpr bool ByWarps = false;
};
struct warpgroups4 {
  static constexpr int Warpgroups = 4;
  static constexpr bool ByWarps = false;
};
struct warps8 {
  static constexpr int Warpgroups = 2;
  static constexpr bool ByWarps = true;
};
}  // namespace schedule

// What a kernel does with alpha * A x W + bias. Each call chooses the activation and whether there is a residual.
namespace epilogue {
struct none {
  static constexpr bool Exists = false;
  static constexpr bool Gates = false;
};
struct elementwise {
  static constexpr bool Exists = true;
  static constexpr bool Gates = false;
};
struct gated {
  static constexpr bool Exists = true;
  static constexpr bool Gates = true;  // one half of the channels gates the other
};
}  // namespace epilogue

// The tile of a CTA, and how its consumer warpgroups and its cluster divide the work.
template <class Cta, class Cluster, class Schedule, class Scheduler, int Mode_>
struct TileShape {
  static constexpr int Channels = Cta::Channels;
  static constexpr int Tokens = Cta::Tokens;
  static constexpr int K = Cta::K;                          // of a stage: a packed block's 128, or half of it
  static constexpr int Warpgroups = Schedule::Warpgroups;   // of consumers
  static constexpr bool ByWarps = Schedule::ByWarps;        // warps multiply independently, with mma.sync
  static constexpr bool StreamK = Scheduler::kSplitsTiles;  // no CTA is idle in the last wave of tiles
  static constexpr bool Grouped = Scheduler::kGroups;       // the tokens belong to several experts
  static constexpr int ClusterChannels = Cluster::Channels;
  static constexpr int ClusterTokens = Cluster::Tokens;
  static constexpr int ClusterK = Cluster::K;
  static constexpr int ClusterSize = ClusterChannels * ClusterTokens * ClusterK;
  static constexpr bool Multicasts = ClusterChannels * ClusterTokens > 1;
  static_assert(!(Multicasts && ClusterK > 1), "a cluster multicasts operands or splits K, not both");
  static_assert(!(StreamK && ClusterK > 1), "stream-K splits K among clusters, not within them");
  static constexpr bool FindsExperts = Grouped && Tokens == kUnsortedTokens;  // it can: see choices.cuh
  static_assert(!(Grouped && ClusterTokens > 1), "the token tiles of a cluster would belong to different experts");

  static constexpr int Mode = Mode_;
  static constexpr bool Scales = Mode != W4A16_PER_COLUMN_SCALE_ONLY;
  static constexpr bool Zeros = Mode == W4A16_FINEGRAINED_SCALE_AND_ZEROS;

  static constexpr int Halves = K / 64;
  static constexpr int StagesPerBlock = kBlockK / K;
  static_assert(K == 64 || K == 128, "a stage holds half a packed block or a whole one");

  // Consumer warpgroups divide the channels. Those beyond one per 64 channels split K.
  static constexpr int Blocks = Channels / kBlockChannels;
  static constexpr int WarpgroupsM = min_of(Blocks, Warpgroups);
  static constexpr int WarpgroupsK = Warpgroups / WarpgroupsM;
  static constexpr int Fragments = Blocks / WarpgroupsM;  // of 64 channels, per warpgroup
  static constexpr bool ReducesOnChip = WarpgroupsK > 1 || ClusterK > 1;
  static constexpr bool Reduces = ReducesOnChip || StreamK;

  // CTAs that split K divide the output among them: by tokens where each gets a multiple of 32, otherwise by channels.
  static constexpr bool DividesOutputByTokens = ClusterK > 1 && Tokens % (ClusterK * 32) == 0;
  // Tokens that a CTA stores of a tile.
  static constexpr int StoredTokens = DividesOutputByTokens ? Tokens / ClusterK : Tokens;

  // Whether a tile's copies leave out the rows past the last token. The copy engine is slow with out-of-bounds rows,
  // and CTAs of 64 channels wait for it: 200 tokens took 1.3 to 1.6 times as long as 256. Wider CTAs do not wait, and
  // the zeros in these rows save power: 4 to 8 % at the power limit (H100, 2026-11).
  static constexpr bool SkipsOutOfBoundsRows = Channels == kBlockChannels;
  // Whether the last token tile ends where the tokens end and so computes some of them twice, to the same bits. Wider
  // CTAs that split K do so only where every CTA has one tile. Otherwise 4096x4096 takes 23 us with 130 tokens, but
  // 15 us with 256 (H100, 2026-11). Stream-K cannot: its tiles split K differently.
  static constexpr bool OverlapsLastTile = (SkipsOutOfBoundsRows || ClusterK > 1) && !StreamK && !Grouped;
};

// The threads of a CTA and their registers.
template <class T, int CtasPerSm_>
struct ThreadShape {
  static constexpr int CtasPerSm = CtasPerSm_;
  static constexpr int Consumers = kWarpgroup * T::Warpgroups;
  static constexpr int Threads = kWarpgroup + Consumers;
  static_assert(T::Warpgroups == 2 || T::Warpgroups == 4, "a CTA has two or four consumer warpgroups");
  static_assert(!T::ByWarps || CtasPerSm == 2, "kernels whose warps multiply independently share an SM in pairs");
  // Whether a dependent launch sees to it that every SM gets one CTA: with redundant CTAs (padded_grid in tiles.h), or
  // with more shared memory (SharedBytesAlone).
  static constexpr bool PadsGrid = CtasPerSm == 2 && !T::StreamK && !T::Grouped;

  static constexpr int Accumulators = T::Fragments * T::Tokens / 2;  // fp32, of one thread
  static_assert(Accumulators <= (T::Warpgroups == 4 ? 32 : 128), "a thread's accumulators must fit into its registers");

  // Whether a thread has registers to load ahead into: ptxas has 168 for each of 384 threads and 96 for each of 640.
  // With more accumulators than these it spills.
  static constexpr int MaxSpareOfFour = T::K == 64 || (T::ClusterSize > 1 && T::Channels == 256) ? 8 : 16;
  static constexpr bool SpareRegisters = Accumulators <= (T::Warpgroups == 2 ? 64 : MaxSpareOfFour);
  // Pieces of four sums that a thread without spare registers loads at a time from the workspace.
  static constexpr int MaxPiecesOnTheWay = T::Warpgroups == 4 ? 4 : 8;

  // Registers of a thread after setmaxnreg has moved them from the producers to the consumers.
  static constexpr int LaunchRegisters = kRegistersPerSm / (Threads * CtasPerSm) / kRegisterUnit * kRegisterUnit;
  static constexpr int ProducerRegisters = T::Warpgroups == 4 ? 64 : CtasPerSm == 2 ? 48 : 56;
  static constexpr int ConsumerRegisters = T::Warpgroups == 4 ? 104 : CtasPerSm == 2 ? 96 : 224;
  static_assert(ProducerRegisters + T::Warpgroups * ConsumerRegisters <= (T::Warpgroups + 1) * LaunchRegisters,
                "setmaxnreg must not ask for more registers than the launch has, or the kernel hangs");
};

// Shared memory: the ring of stages, then partial sums, output and barriers.
template <class T, class Thread, int Stages_, bool StoresThroughShared_>
struct StorageShape {
  static constexpr bool StoresThroughShared = StoresThroughShared_;
  static_assert(!StoresThroughShared || T::ClusterK == 1 || T::DividesOutputByTokens,
                "the copy engine stores all channels of a tile");
  static_assert(!(StoresThroughShared && T::Grouped), "the copy engine would store tokens of the next expert");
  static constexpr int Stages = Stages_;
  static constexpr int MaxStages = 32;
  static_assert(Stages >= 2 * T::WarpgroupsK, "a warpgroup along K releases a stage while it works on its next one");
  static_assert(Stages % T::WarpgroupsK == 0,
                "a slot must always fall to the same warpgroup along K, which otherwise mistakes the barrier's phase");
  static_assert(Stages <= MaxStages, "the barriers have room for MaxStages");

  // A stage holds activations [K / 64][Tokens][64], swizzled, and for every 64 channels scales and nibbles.
  static constexpr int HeaderBytes = T::Scales ? kMaxScaleRows * kRowBytes * (T::Zeros ? 2 : 1) : 0;
  static constexpr int HalfNibbleBytes = kNibbleBytes / 2;
  static constexpr int BlockBytes = HeaderBytes + T::Halves * HalfNibbleBytes;
  static constexpr int WeightBytes = T::Blocks * BlockBytes;
  static constexpr int HalfActivationBytes = T::Tokens * 128;
  static constexpr int ActivationBytes = T::Halves * HalfActivationBytes;
  static constexpr int StageBytes = WeightBytes + ActivationBytes;

  // Partial sums of warpgroups along K, for this many tokens at a time.
  static constexpr int ReductionTokens = T::WarpgroupsK == 2 && T::Tokens == 64 ? 64
                                         : T::Tokens % 32 == 0                  ? 32
                                         : T::Tokens % 24 == 0                  ? 24
                                         : T::Tokens % 16 == 0                  ? 16
                                                                                : 8;
  static constexpr int PartialBytes = (T::WarpgroupsK - 1) * ReductionTokens * T::Channels * 4;
  // Partial sums that the other CTAs of a cluster send. There are two buffers: those of the next tile may arrive before
  // those of this one are read.
  static constexpr int ReceivedBytes = (T::ClusterK - 1) * T::Tokens * (T::Channels / T::ClusterK) * 4;
  // Output on its way to global memory: a box of the tile's tokens for every 64 channels.
  static constexpr int BoxBytes = T::StoredTokens * kBlockChannels * 2;
  static constexpr int OutputBytes = StoresThroughShared ? T::Blocks * BoxBytes : 0;
  static constexpr int BarrierBytes = (2 * MaxStages + 2) * 8;

  static constexpr int SharedBytes =
      BarrierBytes + PartialBytes + 2 * ReceivedBytes + OutputBytes + Stages * StageBytes;
  static_assert(Thread::CtasPerSm * (SharedBytes + kReservedSharedBytes) <= kSharedBytesPerSm,
                "the CTAs that share an SM must fit into its shared memory");

  // Global memory of a stream-K work unit that gives its partial sums to another one: a flag of each warp, then sums.
  static constexpr int FlagBytes = 128;
  static constexpr int FixupBytes = FlagBytes + T::Channels * T::Tokens * 4;
  static_assert(Thread::Consumers / kWarp * 8 <= FlagBytes, "a flag takes 8 bytes");

  // Shared memory with which each SM takes one CTA only; see Launch::one_cta_per_sm.
  static constexpr int SharedBytesAlone = max_of(SharedBytes, kSharedBytesPerSm / 2);
  static_assert(2 * (SharedBytesAlone + kReservedSharedBytes) > kSharedBytesPerSm, "two CTAs must not share an SM");
  static_assert(SharedBytesAlone + kReservedSharedBytes <= kSharedBytesPerSm, "an SM must have room for one CTA");

  W4A16_HOST_DEVICE static constexpr int header_bytes(int rows) { return rows * kRowBytes * (T::Zeros ? 2 : 1); }
};

// When weights are fetched, in and around the ring. Each limit is in bytes of weights.
template <class T, class Storage>
struct PipelineShape {
  // Stages fetched in the prologue, which hide the memory's latency. With more, all arrive late, also the first:
  // 4096x4096 with one token takes 9 % longer with 34 KiB. Grouped kernels with larger tiles gain nothing.
  static constexpr int MaxPrologueWeights = 20 * 1024;
  static constexpr int PrologueStages =
      T::Multicasts || (T::Grouped && !T::FindsExperts)
          ? 0
          : min_of(Storage::Stages, max_of(MaxPrologueWeights / Storage::WeightBytes, 1));

  // Stages left to fetch when the next launch may start, where both grids fit at once. The next launch then fetches its
  // weights while this one computes its last stages. An earlier trigger makes the two compete for bandwidth; a later
  // one leaves memory idle: 4096x14336 with one token takes 11.1 us, with 74 or 37 KiB 11.2 and 11.4.
  static constexpr int MaxWeightsAtTrigger = 56 * 1024;
  static constexpr int StagesAtTrigger = max_of(MaxWeightsAtTrigger / Storage::WeightBytes, 1);

  // Cycles between the stages of a dependent launch's first ring. The previous launch is about to fetch its last stages
  // on the same SM, and everything waits for it. Without pauses chains take 3 to 5 % longer.
  static constexpr int FillPause = 100;

  // Stages beyond the first ring that a dependent launch prefetches into L2, if they are its last. 4096x5120 with 16
  // tokens takes 5 % less time; with 72 KiB the prefetches delay the previous launch by up to 16 %.
  static constexpr int MaxPrefetchedWeights = 36 * 1024;
  static constexpr int PrefetchedStages = MaxPrefetchedWeights / Storage::WeightBytes;
};

// A whole kernel.
template <class Cta, class Cluster, class Schedule, class Scheduler_, class Epilogue, int Mode, int Stages,
          int CtasPerSm, bool StoresThroughShared, int TailTokens_,
          class Tile = TileShape<Cta, Cluster, Schedule, Scheduler_, Mode>, class Thread = ThreadShape<Tile, CtasPerSm>,
          class Storage = StorageShape<Tile, Thread, Stages, StoresThroughShared>>
struct Shape : Tile, Thread, Storage, PipelineShape<Tile, Storage> {
  using Scheduler = Scheduler_;
  // A tile that has no more tokens of its expert than these multiplies only these.
  static constexpr int TailTokens = TailTokens_;
  static_assert(TailTokens % 8 == 0 && (Tile::Grouped ? TailTokens <= Tile::Tokens : TailTokens == Tile::Tokens),
                "WGMMA multiplies multiples of 8 tokens, and only tiles of grouped products are tails");
  static constexpr bool HasEpilogue = Epilogue::Exists;
  static constexpr bool Gates = Epilogue::Gates;
  static constexpr int ChannelsPerOutput = Gates ? 2 : 1;
  static_assert(!(HasEpilogue && StoresThroughShared) || Stages < Storage::MaxStages,
                "the barrier of a residual follows those of the stages");
};

}  // namespace w4a16::native
