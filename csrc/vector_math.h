// exp, log and tanh that a compiler turns into vector code by itself, on any instruction set, without -ffast-math and without
// a vector math library. Plain functions of one number, so that the same text serves as host and as device code.
// All keep NaN. Errors against a long double libm, measured over a dense sweep: at most 2 ulp (float), 3 ulp (double).
#pragma once

#include <math.h>

#include <cstdint>

#if defined(__CUDACC__)
#define FASTRL_FN static __host__ __device__ __forceinline__
#else
#define FASTRL_FN static inline __attribute__((always_inline))
#endif
#if defined(__CUDACC__) && defined(__CUDA_ARCH__)
#define FASTRL_ON_DEVICE  // the pass of nvcc that makes device code: the chip's own instructions may be used
#endif

// A member function is not `static`, whoever compiles it.
#if defined(__CUDACC__)
#define FASTRL_METHOD __host__ __device__ __forceinline__
#else
#define FASTRL_METHOD inline __attribute__((always_inline))
#endif

// Before a loop over a block of numbers: vector code on a CPU, an array in registers on a GPU.
#define FASTRL_PRAGMA(text) _Pragma(#text)
#if defined(__CUDACC__)
#define FASTRL_LOOP(...) FASTRL_PRAGMA(unroll)
#else
#define FASTRL_LOOP(...) FASTRL_PRAGMA(omp simd __VA_ARGS__)
#endif

namespace fastrl {
namespace {

// Contraction is off in the build (row passes 1 and 2 must round a logit alike), so fused multiply-adds are spelled out;
// without the instruction a library call would cost more than the whole row pass.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__CUDACC__)
FASTRL_FN float mul_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FASTRL_FN double mul_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
FASTRL_FN float mul_add(float a, float b, float c) { return a * b + c; }
FASTRL_FN double mul_add(double a, double b, double c) { return a * b + c; }
#endif

// 2^n for the integer n held in the low bits of `shifted` (a number to which 1.5 * 2^mantissa_bits was added).
FASTRL_FN float power_of_two(float shifted) {
  const int32_t n = __builtin_bit_cast(int32_t, shifted) - 0x4b400000;
  return __builtin_bit_cast(float, (n + 127) << 23);
}
FASTRL_FN double power_of_two(double shifted) {
  const int64_t n = __builtin_bit_cast(int64_t, shifted) - 0x4338000000000000LL;
  return __builtin_bit_cast(double, (n + 1023) << 52);
}

// Lower bound that keeps a NaN: a single instruction on x86.
template <typename A>
FASTRL_FN A at_least(A x, A low) {
  return low > x ? low : x;
}

// exp(x) for x up to 88 (double: 709), as of a log-probability: 2^n exp(r), |r| <= ln(2)/2. Below -88 (double: -708.5) the
// result is 0: a subnormal probability is noise.
FASTRL_FN float exp_of_log(float x) {
#if defined(FASTRL_ON_DEVICE)
  return expf(x);  // by the chip's 2^x: 8 instructions for 20, or a bf16 tile would be read at half the memory's speed
#else
  const float c = at_least(x, -88.0f);
  const float shifted = mul_add(c, 1.44269504088896341f, 12582912.0f);
  const float n = shifted - 12582912.0f;
  const float r = mul_add(n, 2.12194440e-4f, mul_add(n, -0.693359375f, c));
  float p = 1.9875691500e-4f;  // minimax polynomial of Cephes expf
  p = mul_add(p, r, 1.3981999507e-3f);
  p = mul_add(p, r, 8.3334519073e-3f);
  p = mul_add(p, r, 4.1665795894e-2f);
  p = mul_add(p, r, 1.6666665459e-1f);
  p = mul_add(p, r, 5.0000001201e-1f);
  p = mul_add(p, r * r, r) + 1.0f;
  return p * power_of_two(shifted);
#endif
}
FASTRL_FN double exp_of_log(double x) {
  const double c = at_least(x, -709.0);
  const double shifted = mul_add(c, 1.4426950408889634074, 6755399441055744.0);
  const double n = shifted - 6755399441055744.0;
  const double r = mul_add(n, -1.90821492927058770002e-10, mul_add(n, -6.93147180369123816490e-01, c));
  double p = 1.0 / 6227020800.0;  // Taylor to r^13: the remainder is below 5e-18
  p = mul_add(p, r, 1.0 / 479001600.0);
  p = mul_add(p, r, 1.0 / 39916800.0);
  p = mul_add(p, r, 1.0 / 3628800.0);
  p = mul_add(p, r, 1.0 / 362880.0);
  p = mul_add(p, r, 1.0 / 40320.0);
  p = mul_add(p, r, 1.0 / 5040.0);
  p = mul_add(p, r, 1.0 / 720.0);
  p = mul_add(p, r, 1.0 / 120.0);
  p = mul_add(p, r, 1.0 / 24.0);
  p = mul_add(p, r, 1.0 / 6.0);
  p = mul_add(p, r, 0.5);
  p = mul_add(p, r * r, r) + 1.0;
  return x < -708.5 ? 0.0 : p * power_of_two(shifted);
}

FASTRL_FN float exp_of(float x) { return exp_of_log(x > 88.0f ? 88.0f : x); }
FASTRL_FN double exp_of(double x) { return exp_of_log(x > 709.0 ? 709.0 : x); }

// log(x) for a normal x > 0, exactly 0 at 1: n ln(2) + log(m), sqrt(1/2) <= m < sqrt(2), by the series of atanh in
// s = (m - 1) / (m + 1). A NaN stays. Errors against a long double libm: at most 2 ulp (float), 3 ulp (double).
FASTRL_FN float log_of(float x) {
  const int32_t bits = __builtin_bit_cast(int32_t, x);
  const int32_t n = (bits - 0x3f3504f3) >> 23;
  const float m = __builtin_bit_cast(float, bits - n * (1 << 23));
  const float s = (m - 1.0f) / (m + 1.0f), y = s * s;
  float p = 2.0f / 9.0f;
  p = mul_add(p, y, 2.0f / 7.0f);
  p = mul_add(p, y, 2.0f / 5.0f);
  p = mul_add(p, y, 2.0f / 3.0f);
  const float log_m = mul_add(s * y, p, 2.0f * s);
  return x != x ? x : mul_add(static_cast<float>(n), 0.693147180559945309f, log_m);
}
FASTRL_FN double log_of(double x) {
  const int64_t bits = __builtin_bit_cast(int64_t, x);
  const int64_t n = (bits - 0x3fe6a09e667f3bcdLL) >> 52;
  const double m = __builtin_bit_cast(double, bits - n * (1LL << 52));
  const double exponent = __builtin_bit_cast(double, 0x4338000000000000LL + n) - 6755399441055744.0;
  const double s = (m - 1.0) / (m + 1.0), y = s * s;
  double p = 2.0 / 23.0;  // the remainder is below 1e-19
  p = mul_add(p, y, 2.0 / 21.0);
  p = mul_add(p, y, 2.0 / 19.0);
  p = mul_add(p, y, 2.0 / 17.0);
  p = mul_add(p, y, 2.0 / 15.0);
  p = mul_add(p, y, 2.0 / 13.0);
  p = mul_add(p, y, 2.0 / 11.0);
  p = mul_add(p, y, 2.0 / 9.0);
  p = mul_add(p, y, 2.0 / 7.0);
  p = mul_add(p, y, 2.0 / 5.0);
  p = mul_add(p, y, 2.0 / 3.0);
  const double log_m = mul_add(s * y, p, 2.0 * s);
  return x != x ? x : mul_add(exponent, 0.693147180559945309417, log_m);
}

// tanh: 1 - 2 / (exp(2|x|) + 1) cancels near 0, so there the odd series (Cephes tanhf, tanh) takes over.
FASTRL_FN float tanh_of(float x) {
  const float a = x < 0.0f ? -x : x;
  const float y = a * a;
  float s = -5.70498872745e-3f;
  s = mul_add(s, y, 2.06390887954e-2f);
  s = mul_add(s, y, -5.37397155531e-2f);
  s = mul_add(s, y, 1.33314422036e-1f);
  s = mul_add(s, y, -3.33332819422e-1f);
  const float small = mul_add(s * y, x, x);
  const float large = 1.0f - 2.0f / (exp_of(2.0f * a) + 1.0f);
  return a < 0.625f ? small : (x < 0.0f ? -large : large);
}
FASTRL_FN double tanh_of(double x) {
  const double a = x < 0.0 ? -x : x;
  const double y = a * a;
  double s = -9.64399179425052238628e-1;
  s = mul_add(s, y, -9.92877231001918586564e1);
  s = mul_add(s, y, -1.61468768441708447952e3);
  double q = y + 1.12811678491632931402e2;
  q = mul_add(q, y, 2.23548839060100448583e3);
  q = mul_add(q, y, 4.84406305325125486048e3);
  const double small = mul_add(x * y, s / q, x);
  const double large = 1.0 - 2.0 / (exp_of(2.0 * a) + 1.0);
  return a < 0.625 ? small : (x < 0.0 ? -large : large);
}

}  // namespace
}  // namespace fastrl
