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
#define W4A16_TEXT_8 W4A16_TEXT_4 ", %4, %5, %6, %7"
#define W4A16_TEXT_12 W4A16_TEXT_8 ", %8, %9, %10, %11"
#define W4A16_TEXT_16 W4A16_TEXT_12 ", %12, %13, %14, %15"
#define W4A16_TEXT_20 W4A16_TEXT_16 ", %16, %17, %18, %19"
#define W4A16_TEXT_24 W4A16_TEXT_20 ", %20, %21, %22, %23"
#define W4A16_TEXT_28 W4A16_TEXT_24 ", %24, %25, %26, %27"
#define W4A16_TEXT_32 W4A16_TEXT_28 ", %28, %29, %30, %31"
#define W4A16_TEXT_36 W4A16_TEXT_32 ", %32, %33, %34, %35"
#define W4A16_TEXT_40 W4A16_TEXT_36 ", %36, %37, %38, %39"
#define W4A16_TEXT_44 W4A16_TEXT_40 ", %40, %41, %42, %43"
#define W4A16_TEXT_48 W4A16_TEXT_44 ", %44, %45, %46, %47"
#define W4A16_TEXT_52 W4A16_TEXT_48 ", %48, %49, %50, %51"
#define W4A16_TEXT_56 W4A16_TEXT_52 ", %52, %53, %54, %55"
#define W4A16_TEXT_60 W4A16_TEXT_56 ", %56, %57, %58, %59"
#define W4A16_TEXT_64 W4A16_TEXT_60 ", %60, %61, %62, %63"
#define W4A16_TEXT_68 W4A16_TEXT_64 ", %64, %65, %66, %67"
#define W4A16_TEXT_72 W4A16_TEXT_68 ", %68, %69, %70, %71"
#define W4A16_TEXT_76 W4A16_TEXT_72 ", %72, %73, %74, %75"
#define W4A16_TEXT_80 W4A16_TEXT_76 ", %76, %77, %78, %79"
#define W4A16_TEXT_84 W4A16_TEXT_80 ", %80, %81, %82, %83"
#define W4A16_TEXT_88 W4A16_TEXT_84 ", %84, %85, %86, %87"
#define W4A16_TEXT_92 W4A16_TEXT_88 ", %88, %89, %90, %91"
#define W4A16_TEXT_96 W4A16_TEXT_92 ", %92, %93, %94, %95"
#define W4A16_TEXT_100 W4A16_TEXT_96 ", %96, %97, %98, %99"
#define W4A16_TEXT_104 W4A16_TEXT_100 ", %100, %101, %102, %103"
#define W4A16_TEXT_108 W4A16_TEXT_104 ", %104, %105, %106, %107"
#define W4A16_TEXT_112 W4A16_TEXT_108 ", %108, %109, %110, %111"
#define W4A16_TEXT_116 W4A16_TEXT_112 ", %112, %113, %114, %115"
#define W4A16_TEXT_120 W4A16_TEXT_116 ", %116, %117, %118, %119"
#define W4A16_TEXT_124 W4A16_TEXT_120 ", %120, %121, %122, %123"
#define W4A16_TEXT_128 W4A16_TEXT_124 ", %124, %125, %126, %127"

// The sums as operands: sum[first] to sum[first + count - 1].
#define W4A16_SUMS_4(first) "+f"(sum[first]), "+f"(sum[first + 1]), "+f"(sum[first + 2]), "+f"(sum[first + 3])
#define W4A16_SUMS_8(first) W4A16_SUMS_4(first), W4A16_SUMS_4((first) + 4)
#define W4A16_SUMS_12(first) W4A16_SUMS_8(first), W4A16_SUMS_4((first) + 8)
#define W4A16_SUMS_16(first) W4A16_SUMS_12(first), W4A16_SUMS_4((first) + 12)
#define W4A16_SUMS_20(first) W4A16_SUMS_16(first), W4A16_SUMS_4((first) + 16)
#define W4A16_SUMS_24(first) W4A16_SUMS_20(first), W4A16_SUMS_4((first) + 20)
#define W4A16_SUMS_28(first) W4A16_SUMS_24(first), W4A16_SUMS_4((first) + 24)
#define W4A16_SUMS_32(first) W4A16_SUMS_28(first), W4A16_SUMS_4((first) + 28)
#define W4A16_SUMS_36(first) W4A16_SUMS_32(first), W4A16_SUMS_4((first) + 32)
#define W4A16_SUMS_40(first) W4A16_SUMS_36(first), W4A16_SUMS_4((first) + 36)
#define W4A16_SUMS_44(first) W4A16_SUMS_40(first), W4A16_SUMS_4((first) + 40)
#define W4A16_SUMS_48(first) W4A16_SUMS_44(first), W4A16_SUMS_4((first) + 44)
#define W4A16_SUMS_52(first) W4A16_SUMS_48(first), W4A16_SUMS_4((first) + 48)
#define W4A16_SUMS_56(first) W4A16_SUMS_52(first), W4A16_SUMS_4((first) + 52)
#define W4A16_SUMS_60(first) W4A16_SUMS_56(first), W4A16_SUMS_4((first) + 56)
#define W4A16_SUMS_64(first) W4A16_SUMS_60(first), W4A16_SUMS_4((first) + 60)
#define W4A16_SUMS_68(first) W4A16_SUMS_64(first), W4A16_SUMS_4((first) + 64)
#define W4A16_SUMS_72(first) W4A16_SUMS_68(first), W4A16_SUMS_4((first) + 68)
#define W4A16_SUMS_76(first) W4A16_SUMS_72(first), W4A16_SUMS_4((first) + 72)
#define W4A16_SUMS_80(first) W4A16_SUMS_76(first), W4A16_SUMS_4((first) + 76)
#define W4A16_SUMS_84(first) W4A16_SUMS_80(first), W4A16_SUMS_4((first) + 80)
#define W4A16_SUMS_88(first) W4A16_SUMS_84(first), W4A16_SUMS_4((first) + 84)
#define W4A16_SUMS_92(first) W4A16_SUMS_88(first), W4A16_SUMS_4((first) + 88)
#define W4A16_SUMS_96(first) W4A16_SUMS_92(first), W4A16_SUMS_4((first) + 92)
#define W4A16_SUMS_100(first) W4A16_SUMS_96(first), W4A16_SUMS_4((first) + 96)
#define W4A16_SUMS_104(first) W4A16_SUMS_100(first), W4A16_SUMS_4((first) + 100)
#define W4A16_SUMS_108(first) W4A16_SUMS_104(first), W4A16_SUMS_4((first) + 104)
#define W4A16_SUMS_112(first) W4A16_SUMS_108(first), W4A16_SUMS_4((first) + 108)
#define W4A16_SUMS_116(first) W4A16_SUMS_112(first), W4A16_SUMS_4((first) + 112)
#define W4A16_SUMS_120(first) W4A16_SUMS_116(first), W4A16_SUMS_4((first) + 116)
#define W4A16_SUMS_124(first) W4A16_SUMS_120(first), W4A16_SUMS_4((first) + 120)
#define W4A16_SUMS_128(first) W4A16_SUMS_124(first), W4A16_SUMS_4((first) + 124)

// `count` sums; a0 to a3, b and add are the numbers of the operands after them. The first products of a tile overwrite
// the sums: adds is 0. The flags are: no negation of either input, B not transposed.
#define W4A16_WGMMA(tokens, count, a0, a1, a2, a3, b, add)                                                     \
  template <>                                                                                                  \
  struct WgmmaInstruction<tokens> {                                                                            \
    static __device__ void run(float (&sum)[count], const uint32_t (&a)[4], uint64_t descriptor, int adds) {   \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #add ", 0;\nwgmma.mma_async.sync.aligned.m64n" #tokens \
                   "k16.f32.f16.f16 {" W4A16_TEXT_##count "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b  \
                                                          ", p, 1, 1, 0;\n}\n"                                 \
                   : W4A16_SUMS_##count(0)                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"(adds));                  \
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
W4A16_WGMMA(72, 36, 36, 37, 38, 39, 40, 41);
W4A16_WGMMA(80, 40, 40, 41, 42, 43, 44, 45);
W4A16_WGMMA(88, 44, 44, 45, 46, 47, 48, 49);
W4A16_WGMMA(96, 48, 48, 49, 50, 51, 52, 53);
W4A16_WGMMA(104, 52, 52, 53, 54, 55, 56, 57);
W4A16_WGMMA(112, 56, 56, 57, 58, 59, 60, 61);
W4A16_WGMMA(120, 60, 60, 61, 62, 63, 64, 65);
W4A16_WGMMA(128, 64, 64, 65, 66, 67, 68, 69);
W4A16_WGMMA(136, 68, 68, 69, 70, 71, 72, 73);
W4A16_WGMMA(144, 72, 72, 73, 74, 75, 76, 77);
W4A16_WGMMA(152, 76, 76, 77, 78, 79, 80, 81);
W4A16_WGMMA(160, 80, 80, 81, 82, 83, 84, 85);
W4A16_WGMMA(168, 84, 84, 85, 86, 87, 88, 89);
W4A16_WGMMA(176, 88, 88, 89, 90, 91, 92, 93);
W4A16_WGMMA(184, 92, 92, 93, 94, 95, 96, 97);
W4A16_WGMMA(192, 96, 96, 97, 98, 99, 100, 101);
W4A16_WGMMA(200, 100, 100, 101, 102, 103, 104, 105);
W4A16_WGMMA(208, 104, 104, 105, 106, 107, 108, 109);
W4A16_WGMMA(216, 108, 108, 109, 110, 111, 112, 113);
W4A16_WGMMA(224, 112, 112, 113, 114, 115, 116, 117);
W4A16_WGMMA(232, 116, 116, 117, 118, 119, 120, 121);
W4A16_WGMMA(240, 120, 120, 121, 122, 123, 124, 125);
W4A16_WGMMA(248, 124, 124, 125, 126, 127, 128, 129);
W4A16_WGMMA(256, 128, 128, 129, 130, 131, 132, 133);

#undef W4A16_WGMMA
#undef W4A16_TEXT_4
#undef W4A16_SUMS_4
#undef W4A16_TEXT_8
#undef W4A16_SUMS_8
#undef W4A16_TEXT_12
#undef W4A16_SUMS_12
#undef W4A16_TEXT_16
#undef W4A16_SUMS_16
#undef W4A16_TEXT_20
#undef W4A16_SUMS_20
#undef W4A16_TEXT_24
#undef W4A16_SUMS_24
#undef W4A16_TEXT_28
#undef W4A16_SUMS_28
#undef W4A16_TEXT_32
#undef W4A16_SUMS_32
#undef W4A16_TEXT_36
#undef W4A16_SUMS_36
#undef W4A16_TEXT_40
#undef W4A16_SUMS_40
#undef W4A16_TEXT_44
#undef W4A16_SUMS_44
#undef W4A16_TEXT_48
#undef W4A16_SUMS_48
#undef W4A16_TEXT_52
#undef W4A16_SUMS_52
#undef W4A16_TEXT_56
#undef W4A16_SUMS_56
#undef W4A16_TEXT_60
#undef W4A16_SUMS_60
#undef W4A16_TEXT_64
#undef W4A16_SUMS_64
#undef W4A16_TEXT_68
#undef W4A16_SUMS_68
#undef W4A16_TEXT_72
#undef W4A16_SUMS_72
#undef W4A16_TEXT_76
#undef W4A16_SUMS_76
#undef W4A16_TEXT_80
#undef W4A16_SUMS_80
#undef W4A16_TEXT_84
#undef W4A16_SUMS_84
#undef W4A16_TEXT_88
#undef W4A16_SUMS_88
#undef W4A16_TEXT_92
#undef W4A16_SUMS_92
#undef W4A16_TEXT_96
#undef W4A16_SUMS_96
#undef W4A16_TEXT_100
#undef W4A16_SUMS_100
#undef W4A16_TEXT_104
#undef W4A16_SUMS_104
#undef W4A16_TEXT_108
#undef W4A16_SUMS_108
#undef W4A16_TEXT_112
#undef W4A16_SUMS_112
#undef W4A16_TEXT_116
#undef W4A16_SUMS_116
#undef W4A16_TEXT_120
#undef W4A16_SUMS_120
#undef W4A16_TEXT_124
#undef W4A16_SUMS_124
#undef W4A16_TEXT_128
#undef W4A16_SUMS_128

}  // namespace w4a16::native
