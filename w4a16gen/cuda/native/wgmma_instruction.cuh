// The WGMMA instructions of the native kernels, m64nNk16 with fp16 inputs and fp32 sums, as inline PTX (PTX ISA,
// "wgmma.mma_async"). An operand of inline PTX is one register, so each N needs its own text with N / 2 of them.
#pragma once

#include <cstdint>

namespace w4a16::native {

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int Pending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

template <int Tokens>
struct WgmmaInstruction;

// The sums in the text: %0 to %(count - 1).
#define W4A16_TEXT_4 "%0, %1, %2, %3"
#define W4A16_TEXT_8 \
  W4A16_TEXT_4       \
  ", %4, %5, %6, %7"
#define W4A16_TEXT_16 \
  W4A16_TEXT_8        \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define W4A16_TEXT_32 \
  W4A16_TEXT_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define W4A16_TEXT_64                                                                \
  W4A16_TEXT_32                                                                      \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define W4A16_TEXT_128                                                                           \
  W4A16_TEXT_64                                                                                  \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define W4A16_TEXT_12 W4A16_TEXT_8 ", %8, %9, %10, %11"
#define W4A16_TEXT_20 W4A16_TEXT_16 ", %16, %17, %18, %19"
#define W4A16_TEXT_24 W4A16_TEXT_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define W4A16_TEXT_28 W4A16_TEXT_24 ", %24, %25, %26, %27"
#define W4A16_TEXT_40 W4A16_TEXT_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define W4A16_TEXT_48 W4A16_TEXT_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define W4A16_TEXT_56 W4A16_TEXT_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define W4A16_TEXT_80 W4A16_TEXT_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define W4A16_TEXT_96                                                                                           \
  W4A16_TEXT_64                                                                                                 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, " \
  "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define W4A16_TEXT_112 \
  W4A16_TEXT_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"

// The sums as operands: sum[first] to sum[first + count - 1].
#define W4A16_SUMS_4(first) "+f"(sum[first]), "+f"(sum[first + 1]), "+f"(sum[first + 2]), "+f"(sum[first + 3])
#define W4A16_SUMS_8(first) W4A16_SUMS_4(first), W4A16_SUMS_4((first) + 4)
#define W4A16_SUMS_16(first) W4A16_SUMS_8(first), W4A16_SUMS_8((first) + 8)
#define W4A16_SUMS_32(first) W4A16_SUMS_16(first), W4A16_SUMS_16((first) + 16)
#define W4A16_SUMS_64(first) W4A16_SUMS_32(first), W4A16_SUMS_32((first) + 32)
#define W4A16_SUMS_128(first) W4A16_SUMS_64(first), W4A16_SUMS_64((first) + 64)
#define W4A16_SUMS_12(first) W4A16_SUMS_8(first), W4A16_SUMS_4((first) + 8)
#define W4A16_SUMS_20(first) W4A16_SUMS_16(first), W4A16_SUMS_4((first) + 16)
#define W4A16_SUMS_24(first) W4A16_SUMS_16(first), W4A16_SUMS_8((first) + 16)
#define W4A16_SUMS_28(first) W4A16_SUMS_24(first), W4A16_SUMS_4((first) + 24)
#define W4A16_SUMS_40(first) W4A16_SUMS_32(first), W4A16_SUMS_8((first) + 32)
#define W4A16_SUMS_48(first) W4A16_SUMS_32(first), W4A16_SUMS_16((first) + 32)
#define W4A16_SUMS_56(first) W4A16_SUMS_48(first), W4A16_SUMS_8((first) + 48)
#define W4A16_SUMS_80(first) W4A16_SUMS_64(first), W4A16_SUMS_16((first) + 64)
#define W4A16_SUMS_96(first) W4A16_SUMS_64(first), W4A16_SUMS_32((first) + 64)
#define W4A16_SUMS_112(first) W4A16_SUMS_96(first), W4A16_SUMS_16((first) + 96)

// `count` sums; a0 to a3, b and add are the numbers of the operands after them. The flags are: no negation of either
// input, B not transposed.
#define W4A16_WGMMA(tokens, count, a0, a1, a2, a3, b, add)                                                     \
  template <>                                                                                                  \
  struct WgmmaInstruction<tokens> {                                                                            \
    static __device__ void run(float (&sum)[count], const uint32_t (&a)[4], uint64_t descriptor) {             \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #add ", 0;\nwgmma.mma_async.sync.aligned.m64n" #tokens \
                   "k16.f32.f16.f16 {" W4A16_TEXT_##count "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b  \
                                                          ", p, 1, 1, 0;\n}\n"                                 \
                   : W4A16_SUMS_##count(0)                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"(1));                     \
    }                                                                                                          \
  }
W4A16_WGMMA(8, 4, 4, 5, 6, 7, 8, 9);
W4A16_WGMMA(16, 8, 8, 9, 10, 11, 12, 13);
W4A16_WGMMA(24, 12, 12, 13, 14, 15, 16, 17);
W4A16_WGMMA(32, 16, 16, 17, 18, 19, 20, 21);
W4A16_WGMMA(40, 20, 20, 21, 22, 23, 24, 25);
W4A16_WGMMA(48, 24, 24, 25, 26, 27, 28, 29);
W4A16_WGMMA(56, 28, 28, 29, 30, 31, 32, 33);
W4A16_WGMMA(64, 32, 32, 33, 34, 35, 36, 37);
W4A16_WGMMA(80, 40, 40, 41, 42, 43, 44, 45);
W4A16_WGMMA(96, 48, 48, 49, 50, 51, 52, 53);
W4A16_WGMMA(112, 56, 56, 57, 58, 59, 60, 61);
W4A16_WGMMA(128, 64, 64, 65, 66, 67, 68, 69);
W4A16_WGMMA(160, 80, 80, 81, 82, 83, 84, 85);
W4A16_WGMMA(192, 96, 96, 97, 98, 99, 100, 101);
W4A16_WGMMA(224, 112, 112, 113, 114, 115, 116, 117);
W4A16_WGMMA(256, 128, 128, 129, 130, 131, 132, 133);

#undef W4A16_WGMMA
#undef W4A16_TEXT_12
#undef W4A16_SUMS_12
#undef W4A16_TEXT_20
#undef W4A16_SUMS_20
#undef W4A16_TEXT_24
#undef W4A16_SUMS_24
#undef W4A16_TEXT_28
#undef W4A16_SUMS_28
#undef W4A16_TEXT_40
#undef W4A16_SUMS_40
#undef W4A16_TEXT_48
#undef W4A16_SUMS_48
#undef W4A16_TEXT_56
#undef W4A16_SUMS_56
#undef W4A16_TEXT_80
#undef W4A16_SUMS_80
#undef W4A16_TEXT_96
#undef W4A16_SUMS_96
#undef W4A16_TEXT_112
#undef W4A16_SUMS_112
#undef W4A16_TEXT_4
#undef W4A16_SUMS_4
#undef W4A16_TEXT_8
#undef W4A16_SUMS_8
#undef W4A16_TEXT_16
#undef W4A16_SUMS_16
#undef W4A16_TEXT_32
#undef W4A16_SUMS_32
#undef W4A16_TEXT_64
#undef W4A16_SUMS_64
#undef W4A16_TEXT_128
#undef W4A16_SUMS_128

}  // namespace w4a16::native
