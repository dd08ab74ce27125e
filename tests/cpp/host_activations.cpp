// Computes activations by the kernels' formula, on the CPU.
//
// host_activations NUMBER < fp32 values, one a line > the activated values
// host_activations > "NUMBER IS_GATED KIND", one line per activation
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "native/activation.h"

namespace native = w4a16::native;

int main(int count, char** arguments) {
  if (count < 2) {
    for (int number = W4A16_NO_ACTIVATION; number <= W4A16_GEGLU; ++number) {
      const native::Activation activation = native::activation_of(number);
      std::printf("%d %d %d\n", number, w4a16::is_gated(number) ? 1 : 0, static_cast<int>(activation.kind));
    }
    return 0;
  }
  const native::Activation activation = native::activation_of(std::atoi(arguments[1]));
  float x = 0;
  while (std::scanf("%f", &x) == 1) {
    const auto exp2 = [](float power) { return std::exp2(power); };
    const auto reciprocal = [](float value) { return 1.f / value; };
    const bool is_silu = activation.kind == native::EpilogueKind::kSilu;
    const float value = is_silu ? native::sigmoid_activation<true>(activation, x, exp2, reciprocal)
                                : native::sigmoid_activation<false>(activation, x, exp2, reciprocal);
    std::printf("%.9g\n", static_cast<double>(value));
  }
}
