// `w4a16gen doctor` compiles this file, which shows whether nvcc, g++ and the C library fit each other.
#include <cuda_fp16.h>

#include <cmath>

__global__ void trial(__half* value) { *value = hexp(*value); }
