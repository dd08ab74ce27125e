// Where the rows of weights lie that a CTA fetches. The emulation has no memory for the largest weights.
#include "native/pipeline.cuh"

namespace native = w4a16::native;

namespace {

struct TwoBlocks {
  static constexpr int Blocks = 2;
  static constexpr bool Grouped = true;
};

}  // namespace

extern "C" __attribute__((visibility("default"))) void emulation_weight_rows(uint64_t weights, int64_t expert_bytes,
                                                                             int block_bytes, int k_blocks,
                                                                             int channel_blocks, int channel_block,
                                                                             int first_block, int expert,
                                                                             uint64_t* rows) {
  native::Parameters parameters{};
  parameters.weights = reinterpret_cast<const uint8_t*>(weights);
  parameters.expert_bytes = expert_bytes;
  parameters.block_bytes = block_bytes;
  parameters.channel_blocks = channel_blocks;
  parameters.tiling.k_blocks = k_blocks;
  native::Tile tile{};
  tile.channel_block = channel_block;
  tile.first_block = first_block;
  tile.expert = expert;
  const native::WeightRows<TwoBlocks> found(parameters, tile);
  for (int b = 0; b < TwoBlocks::Blocks; ++b) rows[b] = reinterpret_cast<uint64_t>(found.block[b]);
}
