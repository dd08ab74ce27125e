// What is known of a native kernel at compile time: its shape, how its threads divide the work, its shared memory.
#pragma once

#include "native/layout.h"

namespace w4a16::native {

constexpr int kWarpgroup = 128;
constexpr int kWarp = 32;
constexpr int kSharedBytesPerSm = 233472;  // 228 KiB, of which each CTA costs 1 KiB beside what it asks for
constexpr int kSharedBytesPerCta = 232448;

W4A16_HOST_DEVICE constexpr int min_of(int a, int b) { return a < b ? a : b; }
W4A16_HOST_DEVICE constexpr int max_of(int a, int b) { return a < b ? b : a; }

template <int Channels_, int Tokens_, int K_, int Warpgroups_, int ClusterChannels_, int ClusterTokens_, int ClusterK_,
          bool StreamK_, int Mode_, bool ByWarps_ = false>
struct Shape {
  static constexpr int Channels = Channels_;
  static constexpr int Tokens = Tokens_;
  static constexpr int K = K_;                    // of a stage: a packed block's 128, or half of it
  static constexpr int Warpgroups = Warpgroups_;  // of consumers
  static constexpr int ClusterChannels = ClusterChannels_;
  static constexpr int ClusterTokens = ClusterTokens_;
  static constexpr int ClusterK = ClusterK_;
  static constexpr bool StreamK = StreamK_;  // every CTA gets an equal share of all k blocks, which may split tiles
  static constexpr int Mode = Mode_;
  static constexpr bool ByWarps = ByWarps_;  // each warp multiplies by itself, instead of warpgroups together
  static constexpr bool Scales = Mode != W4A16_PER_COLUMN_SCALE_ONLY;
  static constexpr bool Zeros = Mode == W4A16_FINEGRAINED_SCALE_AND_ZEROS;
  static constexpr int ClusterSize = ClusterChannels * ClusterTokens * ClusterK;
  static constexpr bool Multicasts = ClusterChannels * ClusterTokens > 1;
  static_assert(!(Multicasts && ClusterK > 1), "a cluster shares operands or splits K, not both");
  static_assert(!(StreamK && ClusterSize > 1), "stream-K has no clusters");

  // Consumer warpgroups divide the channels; those beyond one per 64 channels divide K.
  static constexpr int Blocks = Channels / kBlockChannels;
  static constexpr int WarpgroupsM = min_of(Blocks, Warpgroups);
  static constexpr int WarpgroupsK = Warpgroups / WarpgroupsM;
  static constexpr int Fragments = Blocks / WarpgroupsM;  // of 64 channels, per warpgroup
  static constexpr int Consumers = kWarpgroup * Warpgroups;
  static constexpr int Threads = kWarpgroup + Consumers;
  static constexpr bool Reduces = WarpgroupsK > 1 || ClusterK > 1;
  static constexpr bool Exchanges = Reduces || StreamK;  // sums, before it stores
  // The CTAs of a cluster that split K store shares of the tokens where these are whole boxes, or else of the channels.
  static constexpr int BoxTokens = 32;
  static constexpr bool SharesTokens = ClusterK > 1 && Tokens / ClusterK >= BoxTokens;
  static constexpr bool StoresThroughShared = WarpgroupsK == 1 && Tokens >= 64 && (ClusterK == 1 || SharesTokens);
  static_assert(Warpgroups == 2 || Warpgroups == 4, "two or four consumer warpgroups");

  // fp32 sums of one thread. Two CTAs with few of them share an SM: one fetches while the other finishes, also across
  // dependent launches.
  static constexpr int Sums = Fragments * Tokens / 2;
  static constexpr int MostSharingSums = ClusterK == 4 && !ByWarps ? 4 : 8;
  static constexpr int CtasPerSm = Warpgroups == 2 && Sums <= MostSharingSums && K == kBlockK ? 2 : 1;
  static_assert(Sums <= (Warpgroups == 4 ? 32 : 128), "the sums must fit registers");
  static_assert(!ByWarps || CtasPerSm == 2, "warps multiply by themselves where two CTAs share an SM");
  // Whether CTAs beyond the work repeat others' (tiles.h, `filled`).
  static constexpr bool Repeats = CtasPerSm == 2 && !StreamK;

  // Whether there are registers to fetch ahead into: ptxas has 168 for each of 384 threads, 96 for each of 640.
  // Compiled: with more sums than these it spills.
  static constexpr int SparingSums = K == 64 || (ClusterSize > 1 && Channels == 256) ? 8 : 16;
  static constexpr bool SpareRegisters = Sums <= (Warpgroups == 2 ? 64 : SparingSums);

  // setmaxnreg: what a thread has once the warpgroups have divided anew what the CTA was launched with. Asking for more
  // than that waits for ever.
  static constexpr int LaunchRegisters = 65536 / (Threads * CtasPerSm) / 8 * 8;
  static constexpr int ProducerRegisters = Warpgroups == 4 ? 64 : CtasPerSm == 2 ? 48 : 56;
  static constexpr int ConsumerRegisters = Warpgroups == 4 ? 104 : CtasPerSm == 2 ? 96 : 224;
  static_assert(ProducerRegisters + Warpgroups * ConsumerRegisters <= (Warpgroups + 1) * LaunchRegisters,
                "the warpgroups must not ask for more registers than the CTA was launched with");

  // A stage: the CTA's activations [K / 64][Tokens][64], swizzled, and per 64 channels its rows of scales and nibbles.
  static constexpr int Halves = K / 64;
  static constexpr int StagesPerBlock = kBlockK / K;
  static_assert(K == 64 || K == 128, "a stage holds half a packed block or a whole one");
  static constexpr int HeaderBytes = Scales ? kMaxScaleRows * kRowBytes * (Zeros ? 2 : 1) : 0;
  static constexpr int HalfNibbleBytes = kNibbleBytes / 2;
  static constexpr int BlockBytes = HeaderBytes + Halves * HalfNibbleBytes;
  static constexpr int WeightBytes = Blocks * BlockBytes;
  static constexpr int HalfActivationBytes = Tokens * 128;
  static constexpr int ActivationBytes = Halves * HalfActivationBytes;
  static constexpr int StageBytes = WeightBytes + ActivationBytes;

  // The copy engine is slow with rows that are not there, which CTAs of 64 channels, that fetch as many activations as
  // the wider ones for fewer weights, wait for: with 200 tokens they took 1.3 to 1.6 times as long as with 256. So they
  // fetch none: the last token tile ends where the tokens do, and computes some that the one before computes too, to
  // the same bits; except of stream-K, where tiles divide K differently. (Wider ones do not wait, and at the power
  // limit gain 4 to 8 % by zeros in their place; H100, 2026-11.)
  static constexpr bool AvoidsAbsentTokens = Channels == kBlockChannels;
  // Wider ones that split K wait for them where every CTA has one tile, and overlap tiles there alone: 4096x4096 with
  // 130 tokens takes 23 us otherwise, with 256 it takes 15.
  static constexpr bool OverlapsTokens = (AvoidsAbsentTokens || ClusterK > 1) && !StreamK;

  // Partial sums that warpgroups along K hand over to one of them, of so many tokens at a time.
  static constexpr int PhaseTokens = WarpgroupsK == 2 && Tokens == 64 ? 64 : min_of(Tokens, 32);
  static constexpr int PartialBytes = (WarpgroupsK - 1) * PhaseTokens * Channels * 4;
  // Sums that the other CTAs of a cluster send for the share of a tile that this one stores, twice: those of the next
  // tile may arrive before this one's are read.
  static constexpr int ReceivedBytes = (ClusterK - 1) * Tokens * (Channels / ClusterK) * 4;
  // What a CTA hands over to another through global memory (stream-K): a flag of each warp, then sums.
  static constexpr int FlagBytes = 128;
  static constexpr int HandoverBytes = FlagBytes + Channels * Tokens * 4;
  static_assert(Consumers / kWarp * 8 <= FlagBytes, "a flag has 8 bytes");
  // Output on its way, per warpgroup two boxes of 32 tokens x 64 channels.
  static constexpr int BoxBytes = BoxTokens * kBlockChannels * 2;
  static constexpr int OutputBytes = StoresThroughShared ? Warpgroups * 2 * BoxBytes : 0;

  static constexpr int Budget = CtasPerSm == 2 ? kSharedBytesPerSm / 2 - 1024 : kSharedBytesPerCta;
  static constexpr int MaxStages = 32;
  static constexpr int BarrierBytes = (2 * MaxStages + 2) * 8;
  static constexpr int BesideRing = BarrierBytes + PartialBytes + 2 * ReceivedBytes + OutputBytes;
  // More weights in flight than this gained nothing and lost up to 8 % (H200, 64 to 200 KiB tried), less lost up to
  // half.
  static constexpr int MaxWeightsInFlight = 100 * 1024;
  static constexpr int Fitting = min_of((Budget - BesideRing) / StageBytes, MaxStages);
  static constexpr int Useful = max_of(MaxWeightsInFlight / WeightBytes, 2 * WarpgroupsK);
  // A slot of the ring must always fall to the same warpgroup along K, which otherwise mistakes the barrier's phase.
  static constexpr int Stages = min_of(Fitting, Useful) / WarpgroupsK * WarpgroupsK;
  // A warpgroup releases a stage while it works on its next one.
  static_assert(Stages >= 2 * WarpgroupsK, "the ring must hold two stages of every warpgroup along K");
  // Stages that are fetched before anything else is ready: what the memory's latency hides. With more, all of them
  // arrive late, the first one too (4096x4096, m = 1: 34 KiB cost 9 %).
  static constexpr int MaxEarlyWeights = 20 * 1024;
  static constexpr int EarlyStages = Multicasts ? 0 : min_of(Stages, max_of(MaxEarlyWeights / WeightBytes, 1));
  // Stages that are left to fetch when the next launch's CTAs may take their places, where both grids fit at once. Its
  // own weights then come while this one works on its last: with more left they are in the way of this one's, with
  // fewer nothing is fetched meanwhile (4096x14336, m = 1: 11.1 us, with 74 or 37 KiB left 11.2 and 11.4, at
  // once 11.7).
  static constexpr int MaxLeftWeights = 56 * 1024;
  static constexpr int LeftStages = max_of(MaxLeftWeights / WeightBytes, 1);
  // Cycles that a dependent launch's CTA waits before each other stage of its first ring. The CTA of the launch before,
  // on the same SM, is about to fetch its activations and its last weights, and all wait for it; presumably both queue
  // at one copy engine. Without pauses chains took 3 to 5 % more time (eight layers; 25 to 130 cycles make no
  // difference, 450 cost 3 to 6 %).
  static constexpr int FillPause = 100;
  // Weights that the first ring has no place for, where they are the last: L2 can have them when the launch before
  // ends. (4096x4096 and 4096x5120, 16 tokens: 2 and 5 % less time; 4096x6144 and 4096x5120, one token: 3 % less, 4 %
  // more. Of 72 KB, or where each SM has two CTAs of one launch, they are in the way of that launch's: up to 16 %
  // more.)
  static constexpr int MaxPrefetchedWeights = 36 * 1024;
  static constexpr int PrefetchedStages = MaxPrefetchedWeights / WeightBytes;
  static constexpr int SharedBytes = BesideRing + Stages * StageBytes;

  W4A16_HOST_DEVICE static constexpr int header_bytes(int rows) { return rows * kRowBytes * (Zeros ? 2 : 1); }
};

}  // namespace w4a16::native
