// The activations of an epilogue, as one formula with numbers that the host chooses.
//
// silu(x) = x * sigmoid(x), gelu_tanh(x) = x * sigmoid(2 u(x)), and gelu(x) = x * Phi(x), where the logarithm of
// Phi(x) / Phi(-x) is an odd function. So each is x / (1 + 2^(x * P(x^2))), with a polynomial P. P of SiLU is a
// constant: kernels have a second piece of code for it, since the polynomial takes as long as the rest.
#pragma once

#include "library/epilogue.h"
#include "native/layout.h"

namespace w4a16::native {

constexpr int kActivationCoefficients = 7;

enum class EpilogueKind : int {
  kLinear,   // x
  kSquare,   // relu(x)^2
  kSigmoid,  // x / (1 + 2^(x * P(x^2)))
  kSilu,     // the same with a P that is its first coefficient
};

struct Activation {
  EpilogueKind kind;
  float largest_square;                         // x^2 is cut off here, where a polynomial has reached its last digit
  float coefficients[kActivationCoefficients];  // of P, from the constant on
};

W4A16_HOST_DEVICE constexpr Activation activation_of(int number) {
  constexpr float kLog2E = 1.4426950408889634f;
  constexpr float kTanh = -2 * 0.7978845608028654f * kLog2E;  // -2 sqrt(2 / pi) log2(e)
  switch (number) {
    case W4A16_SILU:
    case W4A16_SWIGLU:
      return {EpilogueKind::kSilu, 64.f, {-kLog2E}};
    case W4A16_GELU_TANH:
    case W4A16_GEGLU_TANH:
      return {EpilogueKind::kSigmoid, 64.f, {kTanh, kTanh * 0.044715f}};
    case W4A16_GELU:
    case W4A16_GEGLU:
      // Minimax for |x| up to 6: x * Phi(x) is off by at most 2^-14 of itself + 2^-27.
      return {EpilogueKind::kSigmoid,
              36.f,
              {-2.3019814647672012f, -0.10521787231541518f, 2.7631874212403313e-4f, 1.2298396534721250e-4f,
               -7.951234803015133e-6f, 2.269374407739912e-7f, -2.5334079291744133e-9f}};
    case W4A16_RELU2:
      return {EpilogueKind::kSquare, 0.f, {}};
    default:
      return {EpilogueKind::kLinear, 0.f, {}};
  }
}

// P(x^2) of an activation.
template <bool IsConstant>
W4A16_HOST_DEVICE inline float polynomial(const Activation& activation, float x) {
  if (IsConstant) return activation.coefficients[0];
  const float product = x * x;
  const float square = product < activation.largest_square ? product : activation.largest_square;
  float value = activation.coefficients[kActivationCoefficients - 1];
#pragma unroll
  for (int i = kActivationCoefficients - 2; i >= 0; --i) value = value * square + activation.coefficients[i];
  return value;
}

// x / (1 + 2^(x * P(x^2))). `exp2` and `reciprocal` are the machine's: 2^128 and more may be infinity, whose reciprocal
// is 0.
template <bool IsConstant, class Exp2, class Reciprocal>
W4A16_HOST_DEVICE inline float sigmoid_activation(const Activation& activation, float x, const Exp2& exp2,
                                                  const Reciprocal& reciprocal) {
  return x * reciprocal(1.f + exp2(x * polynomial<IsConstant>(activation, x)));
}

}  // namespace w4a16::native
