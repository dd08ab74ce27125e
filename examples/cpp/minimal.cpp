// A complete program to copy: multiplies 16 tokens by a layer of 512 x 1024 4-bit weights.
#include <w4a16/runner.h>

#include <cstdio>
#include <vector>

int main() try {
  const int m = 16, n = 512, k = 1024, group_size = 128;
  w4a16::FinegrainedRunner runner;
  const w4a16::GemmConfig config = runner.chooseConfig(m, n, k, group_size);
  const size_t workspace_bytes = runner.getWorkspaceSize(m, n, k, config);
  const std::vector<uint8_t> weights(n * k / 2, 0x11);  // two weights of 1 in a byte
  const std::vector<uint16_t> ones(m * k, 0x3c00);      // 1.0 in fp16
  void *a, *scales, *packed, *c, *workspace = nullptr;
  cudaMalloc(&a, m * k * 2);
  cudaMalloc(&scales, k / group_size * n * 2);
  cudaMalloc(&packed, runner.getPackedSize(n, k, group_size));
  cudaMalloc(&c, m * n * 2);
  if (workspace_bytes > 0) cudaMalloc(&workspace, workspace_bytes);
  cudaMemcpy(a, ones.data(), m * k * 2, cudaMemcpyHostToDevice);
  cudaMemcpy(scales, ones.data(), k / group_size * n * 2, cudaMemcpyHostToDevice);
  runner.preprocess(packed, weights.data(), scales, nullptr, n, k, group_size);
  runner.gemm(a, packed, scales, nullptr, nullptr, 1.0f, c, m, n, k, group_size, config, workspace, workspace_bytes, 0);
  std::vector<uint16_t> output(m * n);
  cudaMemcpy(output.data(), c, m * n * 2, cudaMemcpyDeviceToHost);
  std::printf("C[0, 0] is 0x%04x; expected 0x6400, which is 1024.0\n", output[0]);
  return output == std::vector<uint16_t>(m * n, 0x6400) ? 0 : 1;
} catch (const w4a16::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return error.status;
}
