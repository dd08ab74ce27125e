/* The C interface of a built kernel library: its kernels, the problems that each can run, and the launch.
 *
 * C[m, n] = activation(alpha * A[m, k] x W[k, n] + bias[n]) + residual[m, n], with W in 4 bits, all other arrays in
 * fp16, and fp32 up to the one rounding of the result. Activation and residual are optional.
 * The axes of every triple are channels (n), tokens (m), k.
 *
 * No call allocates, synchronises or copies. Every call may be made from several threads at once. Functions that can
 * fail return a status and write a sentence into `message`, which is always terminated and may be null. */
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

#define W4A16_ABI_VERSION 6

typedef enum {
  W4A16_OK = 0,
  W4A16_INVALID_ARGUMENT = 1, /* a null or misaligned pointer, a wrong size, an index out of range */
  W4A16_UNSUPPORTED = 2,      /* this kernel cannot run this problem */
  W4A16_NO_HOPPER_GPU = 3,    /* no CUDA device, or not one of compute capability 9.0 */
  W4A16_CUDA_ERROR = 4        /* a call of the CUDA runtime or driver failed */
} w4a16_status;

typedef enum {
  W4A16_PER_COLUMN_SCALE_ONLY = 0,      /* (q - 8) * scale[n] */
  W4A16_FINEGRAINED_SCALE_ONLY = 1,     /* (q - 8) * scale[g, n] */
  W4A16_FINEGRAINED_SCALE_AND_ZEROS = 2 /* (q - 8) * scale[g, n] + zero[g, n] */
} w4a16_mode;

/* What is done with x = alpha * A x W + bias, in fp32. The gated ones take the first n / 2 channels as gates of the
 * others: C and the residual have n / 2 channels, and n is a multiple of 16. The weight must be packed for them
 * (w4a16_pack_arguments.gated); its bytes do not show it. */
typedef enum {
  W4A16_NO_ACTIVATION = 0,
  W4A16_SILU = 1,       /* x / (1 + e^-x) */
  W4A16_GELU_TANH = 2,  /* GELU, approximated by tanh */
  W4A16_GELU = 3,       /* GELU: x * Phi(x) */
  W4A16_RELU2 = 4,      /* max(x, 0)^2 */
  W4A16_SWIGLU = 5,     /* silu(gate) * factor */
  W4A16_GEGLU_TANH = 6, /* gelu_tanh(gate) * factor */
  W4A16_GEGLU = 7       /* gelu(gate) * factor */
} w4a16_activation;

/* What a kernel can do behind a plain product. Each kernel has one of these epilogues. */
typedef enum {
  W4A16_NO_EPILOGUE = 0, /* nothing */
  W4A16_ELEMENTWISE = 1, /* an activation up to W4A16_RELU2, a residual, both or none */
  W4A16_GATED = 2        /* an activation from W4A16_SWIGLU on, and perhaps a residual */
} w4a16_epilogue;

/* How a launch follows earlier kernels of its stream. The bits of the result do not depend on it. */
typedef enum {
  W4A16_ORDINARY_LAUNCH = 0,  /* it starts when they have ended */
  W4A16_DEPENDENT_LAUNCH = 1, /* it may start and fetch weights while they still run. Those from the last ordinary
                                 launch on must not write its weights */
  W4A16_AUTO_LAUNCH = 2 /* the same in a stream capture, behind one kernel that is this library's own of target native
                           or a dependent launch itself: there it gains. Anywhere else ordinary */
} w4a16_launch;

typedef struct {
  int64_t m;          /* tokens */
  int64_t n;          /* output channels */
  int64_t k;          /* reduction */
  int64_t group_size; /* values of K that share a scale; k itself in per-column mode */
} w4a16_problem;

typedef struct {
  const char* name;   /* canonical kernel name */
  const char* target; /* kernel family */
  const char* layout; /* tag of the packed layout that it reads */
  int32_t mode;       /* w4a16_mode */
  int32_t cta[3];
  int32_t cluster[3];
  int32_t stages;
  int32_t threads;        /* per CTA */
  int32_t group_multiple; /* group sizes are multiples of this, or k */
  int64_t shared_memory_bytes;
  int32_t epilogue; /* w4a16_epilogue */
  int32_t grouped;  /* 1: multiplies each row by its expert's weight. Launch it with w4a16_grouped_gemm */
} w4a16_kernel_info;

typedef struct {
  const void* activations; /* fp16 [m, k], row-major, 16-byte aligned */
  const void* packed;      /* packed weight, 128-byte aligned */
  size_t packed_bytes;     /* must equal w4a16_packed_bytes */
  const void* bias;        /* fp16 [n], or null */
  void* output;            /* fp16 [m, n], of gated activations [m, n / 2], row-major, 16-byte aligned */
  void* workspace; /* 128-byte aligned, of any content, not used by a concurrent launch; null if none is needed */
  size_t workspace_bytes;
  void* stream; /* cudaStream_t of the current device */
  float alpha;
  int32_t dependent_launch; /* w4a16_launch */
  int32_t activation;       /* w4a16_activation, of those that the kernel's epilogue computes */
  const void* residual; /* fp16, of the output's shape, 16-byte aligned, or null. It may be the output itself, but must
                           not overlap it otherwise. Only with kernels that have an epilogue */
} w4a16_gemm_arguments;

/* Faults that packing reports, as bits. */
#define W4A16_FAULT_VALUE 1u      /* a value of q above 15 */
#define W4A16_FAULT_RANGE 2u      /* a scale or zero too small beside its channel's largest scale: it lost bits */
#define W4A16_FAULT_NOT_FINITE 4u /* a scale or zero that is infinite or NaN */

typedef struct {
  const void* q;       /* uint8 [n, k], values 0 to 15, row-major, 8-byte aligned */
  const void* scales;  /* fp16 [k / group_size, n], or [n] in per-column mode */
  const void* zeros;   /* fp16 [k / group_size, n], in the mode that has them; otherwise ignored */
  void* packed;        /* written; 128-byte aligned */
  size_t packed_bytes; /* must equal w4a16_packed_bytes */
  void* faults;        /* uint32 on the device in which W4A16_FAULT_ bits are set, or null */
  void* stream;        /* cudaStream_t of the current device */
  int32_t gated;       /* 1: for gated activations; channels 8 i to 8 i + 7 of each half are packed side by side */
} w4a16_pack_arguments;

/* Mixtures of experts. A route is a token's choice of one expert; route token * slots + slot is entry [token, slot] of
 * ids. Rows are routes in the order of their experts, and within an expert in their own order. The list of token tiles
 * says which rows each expert has; only the functions here read and write it.
 *
 * Sizes are at most 2^30, experts at most 1024. Arrays that are written must overlap no other array of the call.
 * dependent_launch is as in w4a16_gemm_arguments. What arrays hold is not checked: wrong numbers give wrong results. */
typedef struct {
  const void* ids; /* int32 or int64 [tokens, slots], aligned to their size; no expert has a number outside the range */
  int32_t id_bytes; /* 4 or 8 */
  int32_t dependent_launch;
  const void* expert_map;   /* int32 [global_experts]: the expert of each id, -1 for none; null if ids are experts */
  int64_t global_experts;   /* entries of expert_map; without it ignored */
  int64_t experts;          /* that get rows */
  int64_t tokens;           /* 0: offsets and the length of the list are set to 0, and no other array is needed */
  int64_t slots;            /* experts of a token */
  int64_t tile_tokens;      /* cta[1] of the grouped kernels that read the list */
  void* offsets;            /* int32 [experts + 1], written: the first row of each expert, then the number of rows */
  void* routes_of_rows;     /* int32 [tokens * slots], written as far as there are rows */
  void* rows_of_routes;     /* int32 [tokens * slots], written; -1 for routes without a row */
  void* token_tiles;        /* the list, written; 16-byte aligned */
  size_t token_tiles_bytes; /* at least w4a16_token_tiles_bytes of tokens * slots rows */
  void* stream;             /* cudaStream_t of the current device */
  const void* hidden;       /* to gather the rows as well: fp16 [tokens, columns], 16-byte aligned; or null */
  const void* weights;      /* float [tokens, slots], by which gathered rows are multiplied, or null */
  void* rows;               /* fp16 [tokens * slots, columns], written as far as there are rows; 16-byte aligned */
  int64_t columns;          /* a multiple of 8 */
} w4a16_route_arguments;

/* The rows of each expert: rows offsets[e] to offsets[e + 1] - 1, or counts[e] rows from row e * stride on, or the rows
 * whose index is e, which follow one another. One of the three is given, and the others are null. */
typedef struct {
  const void* offsets; /* int32 [experts + 1], not decreasing */
  const void* counts;  /* int32 [experts] */
  int64_t stride;      /* of counts, which are at most this */
  const void* indices; /* int32 [rows]: the expert of each row; others than 0 to experts - 1 are no expert */
  int64_t experts;
  int64_t rows;             /* of the activations; others are left out. 0: the length of the list is set to 0 */
  int64_t tile_tokens;      /* cta[1] of the grouped kernels that read the list */
  void* token_tiles;        /* the list, written; 16-byte aligned */
  size_t token_tiles_bytes; /* at least w4a16_token_tiles_bytes */
  void* stream;             /* cudaStream_t of the current device */
  int32_t dependent_launch;
} w4a16_listing_arguments;

/* The experts that few tokens chose: what grouped products read instead of a list of token tiles. Then nothing sorts
 * routes and gathers rows before. Each expert that is chosen multiplies all tokens. The e-th one, in the order of the
 * first routes that choose them, has rows 8 * e to 8 * e + tokens - 1 of the output, one for each token. So the output
 * has 8 * min(tokens * slots, experts) rows; others are not written. */
#define W4A16_MAX_UNSORTED_TOKENS 8
#define W4A16_MAX_UNSORTED_ROUTES 64
typedef struct {
  const void* ids;        /* as in w4a16_route_arguments; null: routes are sorted */
  const void* expert_map; /* the same, or null */
  int64_t global_experts;
  int32_t id_bytes;
} w4a16_ids;

/* The experts of a grouped product. */
typedef struct {
  int64_t count;
  size_t packed_stride;     /* bytes from one expert's packed weight to the next: a multiple of 128 */
  const void* token_tiles;  /* the list, of as many rows as the activations have */
  size_t token_tiles_bytes; /* at least w4a16_token_tiles_bytes of m rows */
  int64_t tile_tokens;      /* that the list was made for: cta[1] of the kernel */
  int32_t list_is_complete; /* 1: the previous kernel of the stream waited for what wrote the list or the ids, as
                               grouped products and the functions below do. A dependent launch then fetches weights
                               before that kernel has ended */
  int32_t rows_are_shared;  /* with ids: 1: activations are [m, k], the same for all experts; 0: they have the rows that
                               outputs have */
  w4a16_ids unsorted; /* instead of the list, if m is at most 8, m * slots at most 64, and cta[1] of the kernel 8 */
  int64_t slots;      /* of ids: experts of a token */
} w4a16_experts;

/* rows[row] = hidden[token of the row] */
typedef struct {
  const void* hidden;         /* fp16 [tokens, columns], 16-byte aligned */
  const void* row_count;      /* int32: how many rows there are, such as the last one of offsets */
  const void* routes_of_rows; /* int32 [tokens * slots] */
  const void* weights;        /* float [tokens, slots], by which rows are multiplied, or null */
  void* rows;                 /* fp16 [tokens * slots, columns], written as far as there are rows; 16-byte aligned */
  int64_t tokens;             /* 0: nothing is launched */
  int64_t slots;
  int64_t columns; /* a multiple of 8 */
  void* stream;    /* cudaStream_t of the current device */
  int32_t dependent_launch;
} w4a16_gather_arguments;

/* rows[row] = activation of the gates and factors of the row */
typedef struct {
  const void* gates_and_factors; /* fp16 [rows, 2 * columns]: all gates, then all factors; 16-byte aligned */
  const void* row_count;         /* int32: how many rows there are, or null for all */
  void* output;                  /* fp16 [rows, columns], written as far as there are rows; 16-byte aligned */
  int64_t rows;                  /* 0: nothing is launched */
  int64_t columns;               /* a multiple of 8 */
  void* stream;                  /* cudaStream_t of the current device */
  int32_t activation;            /* w4a16_activation: W4A16_SWIGLU, W4A16_GEGLU_TANH or W4A16_GEGLU */
  int32_t dependent_launch;
} w4a16_activate_arguments;

/* output[token] = the sum of the rows of its routes, times their weights, in the order of its slots and in fp32 */
typedef struct {
  const void* rows;           /* fp16 [tokens * slots, columns], 16-byte aligned; of unsorted routes, see w4a16_ids */
  const void* rows_of_routes; /* int32 [tokens, slots]; -1 for routes without a row. Null if routes are unsorted */
  const void* weights;        /* float [tokens, slots], or null for 1 */
  void* output;               /* fp16 [tokens, columns], written; 16-byte aligned; 0 for tokens without rows */
  int64_t tokens;             /* 0: nothing is launched */
  int64_t slots;
  int64_t columns; /* a multiple of 8 */
  void* stream;    /* cudaStream_t of the current device */
  int32_t dependent_launch;
  w4a16_ids unsorted; /* instead of the rows of routes. A dependent launch reads ids before the previous kernel has
                         ended: that one must have waited for what wrote them, as grouped products do */
  int64_t experts;    /* of ids */
} w4a16_combine_arguments;

W4A16_API int w4a16_abi_version(void);
W4A16_API int w4a16_kernel_count(void);

/* Returns the index of the kernel with this canonical name, or -1. */
W4A16_API int w4a16_find_kernel(const char* name);
W4A16_API w4a16_status w4a16_get_kernel_info(int kernel, w4a16_kernel_info* info);

/* Returns W4A16_OK if the kernel can run the problem. Needs no GPU. */
W4A16_API w4a16_status w4a16_can_implement(int kernel, const w4a16_problem* problem, char* message,
                                           size_t message_bytes);

/* Sets the bytes of the packed weight that the kernel reads; m is ignored. Needs no GPU. */
W4A16_API w4a16_status w4a16_packed_bytes(int kernel, const w4a16_problem* problem, size_t* bytes, char* message,
                                          size_t message_bytes);

/* Sets the exact bytes of workspace on a GPU with sm_count multiprocessors. 0 stands for the current device's number.
 */
W4A16_API w4a16_status w4a16_workspace_bytes(int kernel, const w4a16_problem* problem, int sm_count, size_t* bytes,
                                             char* message, size_t message_bytes);

/* Checks everything, then launches on a stream of the current device. With m = 0 it launches nothing. */
W4A16_API w4a16_status w4a16_gemm(int kernel, const w4a16_problem* problem, const w4a16_gemm_arguments* arguments,
                                  char* message, size_t message_bytes);

/* Multiplies each row by the weight of its expert, with a grouped kernel: as w4a16_gemm, for m rows. Of the arguments,
 * packed is the first expert's weight, packed_bytes the size of each, and bias fp16 [experts, n]. Rows that no expert
 * has are not written. */
W4A16_API w4a16_status w4a16_grouped_gemm(int kernel, const w4a16_problem* problem,
                                          const w4a16_gemm_arguments* arguments, const w4a16_experts* experts,
                                          char* message, size_t message_bytes);

/* Sets the bytes that a list of token tiles may need. Needs no GPU. */
W4A16_API w4a16_status w4a16_token_tiles_bytes(int64_t rows, int64_t experts, int64_t tile_tokens, size_t* bytes,
                                               char* message, size_t message_bytes);

/* These launch what a mixture of experts does around its products: from the experts that tokens chose to rows and the
 * list of token tiles, in several launches if there are more than 2048 routes; from the rows of each expert to the
 * list; and the work on rows. They need a library with a grouped kernel. */
W4A16_API w4a16_status w4a16_route(const w4a16_route_arguments* arguments, char* message, size_t message_bytes);
W4A16_API w4a16_status w4a16_list_token_tiles(const w4a16_listing_arguments* arguments, char* message,
                                              size_t message_bytes);
W4A16_API w4a16_status w4a16_gather_rows(const w4a16_gather_arguments* arguments, char* message, size_t message_bytes);
W4A16_API w4a16_status w4a16_activate_rows(const w4a16_activate_arguments* arguments, char* message,
                                           size_t message_bytes);
W4A16_API w4a16_status w4a16_combine_rows(const w4a16_combine_arguments* arguments, char* message,
                                          size_t message_bytes);

/* Launches the packing of a canonical weight on a stream of the current device; m is ignored. */
W4A16_API w4a16_status w4a16_pack(int kernel, const w4a16_problem* problem, const w4a16_pack_arguments* arguments,
                                  char* message, size_t message_bytes);

/* Launches a kernel that reads bytes and discards them: its time is a lower bound for kernels that need these bytes. Of
 * dependent launches two read at a time, and each ends after the previous one. data is 16-byte aligned, and bytes is a
 * positive multiple of 16. Needs a library with a native kernel. */
W4A16_API w4a16_status w4a16_probe_read(const void* data, size_t bytes, int32_t dependent_launch, void* stream,
                                        char* message, size_t message_bytes);

/* Launches a kernel that multiplies fp16 numbers on all tensor cores, and sets the number of its operations. */
W4A16_API w4a16_status w4a16_probe_multiply(int32_t rounds, void* stream, int64_t* flops, char* message,
                                            size_t message_bytes);

#ifdef __cplusplus
}
#endif
#endif
