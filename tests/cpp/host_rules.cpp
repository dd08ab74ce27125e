// Prints the constants of the headers, and the packed bytes of weights, for comparison with Python.
//
// host_rules > "NAME VALUE", one line per constant
// host_rules LAYOUT MODE < "N K GROUP" lines > bytes of the packed weight, one line each
#include <cstdio>
#include <cstdlib>
#include <string>

#include "cutlass/layout.h"
#include "library/epilogue.h"
#include "library/kernel.h"
#include "library/problem.h"
#include "native/shape.h"

namespace native = w4a16::native;
namespace cutlass_target = w4a16::cutlass_target;

namespace {

void print(const char* name, int64_t value) { std::printf("%s %lld\n", name, static_cast<long long>(value)); }

void print_constants() {
  print("OK", W4A16_OK);
  print("INVALID_ARGUMENT", W4A16_INVALID_ARGUMENT);
  print("UNSUPPORTED", W4A16_UNSUPPORTED);
  print("NO_HOPPER_GPU", W4A16_NO_HOPPER_GPU);
  print("CUDA_ERROR", W4A16_CUDA_ERROR);
  print("mode cs", w4a16::mode::cs);
  print("mode fgs", w4a16::mode::fgs);
  print("mode fgsz", w4a16::mode::fgsz);
  print("DIMENSION_MULTIPLE", w4a16::kDimensionMultiple);
  print("ALIGNMENT", w4a16::kPackedAlignment);
  print("MAX_DIMENSION", w4a16::kMaxDimension);
  print("GATED_MULTIPLE", w4a16::kGatedMultiple);
  print("NATIVE_GROUP_MULTIPLE", native::kGroupMultiple);
  print("WARPGROUP_THREADS", native::kWarpgroup);
  print("WARPGROUP_CHANNELS", native::kBlockChannels);
  print("PACKED_BLOCK_K", native::kBlockK);
  print("SCALE_ROW_BYTES", native::kRowBytes);
  print("MAX_SCALE_ROWS", native::kMaxScaleRows);
  print("SHARED_BYTES_PER_SM", w4a16::kSharedBytesPerSm);
  print("RESERVED_SHARED_BYTES", w4a16::kReservedSharedBytes);
  std::printf("layout native %s\nlayout cutlass %s\n", native::kLayout, cutlass_target::kLayout);
  std::printf("layout gated %s\ngated order", native::kGatedLayout);
  for (int channel = 0; channel < 48; ++channel)
    std::printf("%c%d", channel == 0 ? ' ' : ',', native::gated_source(channel, 48));
  std::printf("\n");
}

size_t packed_bytes(const std::string& layout, int mode, const w4a16_problem& problem) {
  if (layout == native::kLayout || layout == native::kGatedLayout) return native::PackedLayout(problem, mode).bytes;
  return cutlass_target::PackedLayout(problem, mode == W4A16_FINEGRAINED_SCALE_AND_ZEROS).bytes;
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 1) print_constants();
  if (count != 3) return count == 1 ? 0 : 2;
  long long n, k, group;
  while (std::scanf("%lld %lld %lld", &n, &k, &group) == 3) {
    std::printf("%zu\n", packed_bytes(arguments[1], std::atoi(arguments[2]), {0, n, k, group}));
  }
}
