/* The C interface of a built kernel library: which kernels it holds, what each can run, and the launch.
 *
 * C[m, n] = alpha * A[m, k] x W[k, n] + bias[n], with A, C and bias in fp16, W in 4 bits, accumulation in fp32.
 * Axis order of every triple is channels (n), tokens (m), k. No call allocates, synchronises or copies; every call may
 * be made from several threads at once. Functions that can fail write a sentence into `message` (always terminated;
 * may be null) and return a status. */
#ifndef W4A16_H
#define W4A16_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define W4A16_API __attribute__((visibility("default")))
#else
#define W4A16_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define W4A16_ABI_VERSION 3

typedef enum {
  W4A16_OK = 0,
  W4A16_INVALID_ARGUMENT = 1, /* a null or misaligned pointer, a wrong size, an index out of range */
  W4A16_UNSUPPORTED = 2,      /* this kernel cannot run this problem */
  W4A16_NO_HOPPER_GPU = 3,    /* no CUDA device, or not one of compute capability 9.0 */
  W4A16_CUDA_ERROR = 4        /* the CUDA runtime refused the launch */
} w4a16_status;

typedef enum {
  W4A16_PER_COLUMN_SCALE_ONLY = 0,      /* (q - 8) * scale[n] */
  W4A16_FINEGRAINED_SCALE_ONLY = 1,     /* (q - 8) * scale[g, n] */
  W4A16_FINEGRAINED_SCALE_AND_ZEROS = 2 /* (q - 8) * scale[g, n] + zero[g, n] */
} w4a16_mode;

typedef struct {
  int64_t m;          /* tokens */
  int64_t n;          /* output channels */
  int64_t k;          /* reduction */
  int64_t group_size; /* values of K that share a scale; k itself in per-column mode */
} w4a16_problem;

typedef struct {
  const char* name;   /* canonical kernel name */
  const char* target; /* which kernel family */
  const char* layout; /* tag of the packed weight layout that it reads */
  int32_t mode;       /* w4a16_mode */
  int32_t cta[3];
  int32_t cluster[3];
  int32_t stages;
  int32_t threads;        /* per CTA */
  int32_t group_multiple; /* group sizes are multiples of this, or k */
  int64_t shared_memory_bytes;
} w4a16_kernel_info;

typedef struct {
  const void* activations; /* fp16 [m, k], row-major, 16-byte aligned */
  const void* packed;      /* packed weight, 128-byte aligned */
  size_t packed_bytes;     /* must equal w4a16_packed_bytes */
  const void* bias;        /* fp16 [n], or null */
  void* output;            /* fp16 [m, n], row-major, 16-byte aligned */
  void* workspace; /* 128-byte aligned, of any content, of no other launch under way; null where none is needed */
  size_t workspace_bytes;
  void* stream; /* cudaStream_t of the current device */
  float alpha;
  int32_t dependent_launch; /* 1: may start, and fetch weights, while kernels before on the stream still run: the
                               one before the first of successive dependent launches, and those, write no weights */
} w4a16_gemm_arguments;

/* What packing finds wrong, as bits. */
#define W4A16_FAULT_VALUE 1u /* a value of q above 15 */
#define W4A16_FAULT_RANGE 2u /* a scale or zero that lost bits: too small beside the largest scale of its channel */
#define W4A16_FAULT_NOT_FINITE 4u /* a scale or zero that is infinite or NaN */

typedef struct {
  const void* q;       /* uint8 [n, k], values 0 to 15, row-major, 8-byte aligned */
  const void* scales;  /* fp16 [k / group_size, n], or [n] in per-column mode */
  const void* zeros;   /* fp16 [k / group_size, n], in the mode that has them */
  void* packed;        /* written; 128-byte aligned */
  size_t packed_bytes; /* must equal w4a16_packed_bytes */
  void* faults;        /* uint32 on the device to which W4A16_FAULT_ bits are added, or null */
  void* stream;        /* cudaStream_t of the current device */
} w4a16_pack_arguments;

W4A16_API int w4a16_abi_version(void);
W4A16_API int w4a16_kernel_count(void);

/* Index of the kernel with this canonical name, or -1. */
W4A16_API int w4a16_find_kernel(const char* name);
W4A16_API w4a16_status w4a16_get_kernel_info(int kernel, w4a16_kernel_info* info);

/* Whether the kernel can run the problem, judged from the numbers alone: needs no GPU. */
W4A16_API w4a16_status w4a16_can_implement(int kernel, const w4a16_problem* problem, char* message,
                                           size_t message_bytes);

/* Bytes of the packed weight that the kernel reads; m does not matter. Needs no GPU. */
W4A16_API w4a16_status w4a16_packed_bytes(int kernel, const w4a16_problem* problem, size_t* bytes, char* message,
                                          size_t message_bytes);

/* Exact bytes of workspace for the problem on a GPU of sm_count multiprocessors; 0 asks the current device. */
W4A16_API w4a16_status w4a16_workspace_bytes(int kernel, const w4a16_problem* problem, int sm_count, size_t* bytes,
                                             char* message, size_t message_bytes);

/* Checks everything, then launches on the given stream of the current device. m = 0 returns at once. */
W4A16_API w4a16_status w4a16_gemm(int kernel, const w4a16_problem* problem, const w4a16_gemm_arguments* arguments,
                                  char* message, size_t message_bytes);

/* Packs a canonical weight for the kernel, on the given stream of the current device; m does not matter. */
W4A16_API w4a16_status w4a16_pack(int kernel, const w4a16_problem* problem, const w4a16_pack_arguments* arguments,
                                  char* message, size_t message_bytes);

/* Reads bytes on the given stream of the current device and does nothing with them: a floor for kernels that need these
 * bytes. Of dependent launches two read at a time, and each ends after the one before. data is 16-byte aligned, bytes a
 * positive multiple of 16. In libraries with native kernels only. */
W4A16_API w4a16_status w4a16_probe_read(const void* data, size_t bytes, int32_t dependent_launch, void* stream,
                                        char* message, size_t message_bytes);

/* Multiplies fp16 numbers on all tensor cores, for as many rounds, and says how many operations that is. */
W4A16_API w4a16_status w4a16_probe_multiply(int32_t rounds, void* stream, int64_t* flops, char* message,
                                            size_t message_bytes);

#ifdef __cplusplus
}
#endif
#endif
