// A stand-in for libcuda.so.1 on a machine with an H100 and a driver for CUDA 12.4: what is asked of a driver.
#include <cstring>

extern "C" {
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 12040, 0; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDeviceGet(int* device, int index) { return *device = index, 0; }
int cuDeviceGetName(char* name, int size, int) { return std::strncpy(name, "NVIDIA H100 80GB HBM3", size), 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) { return *value = attribute == 75 ? 9 : 0, 0; }
int cuGetProcAddress(const char*, void** function, int, unsigned long long) { return *function = nullptr, 500; }
}
