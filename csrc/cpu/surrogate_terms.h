// Policy terms beside the clipped one, on given log-probabilities: the loss, its gradient and the sums behind the metrics.
#pragma once

#include <cstdint>

namespace fastrl {

// fastrl_kernels.objective.SURROGATES has the same order.
enum class Surrogate : int {
  kClipped,     // max(-c A, -clip(c) A), at most -cap A where A < 0
  kTruncated,   // -clip(c) A l, the factor of l constant
  kLikelihood,  // -A l
  kSoft,        // -(4 / tau) sigmoid(tau (c - 1)) A
  kQuadratic,   // -A l + coef / 2 d^2
  kVariation,   // -min(c, cap) A l where |p - q| allows it, the factor of l constant
  kDivergence,  // the same with KL(old || policy) of the token against all others
};

// Columns of `sums`: those of TermSum, then these. fastrl_kernels.objective.SurrogateSums has the same order.
enum SurrogateSum { kOutside = 9, kCapped, kLogRatio, kDrift, kSurrogateSums };

// A is double if `fp64`, else float. Arrays are [rows, cols] of A and contiguous unless said.
struct SurrogateTermsArgs {
  bool fp64;
  int64_t rows, cols;
  const void* logps;
  const void* entropy;  // or null: 0; for its sum only
  const void* advantages;
  bool row_advantages;    // [rows] instead of [rows, cols]
  const void* old_logps;  // or null: logps, so that every ratio is 1
  const void* gate;       // or null: 1
  bool row_gate;
  const uint8_t* scored;  // 0 or 1. Elsewhere nothing is used and the gradient is 0
  const uint8_t* mask;    // counted only
  const uint8_t* live;    // counted only
  const void* token_weight;
  Surrogate surrogate;
  bool row_mean;             // the log-ratio's value is its row's mean; its gradient stays the token's own
  double low, high;          // of the ratio; kVariation, kDivergence: largest step down and up
  double cap;                // of the ratio where A < 0 (kClipped) or anywhere (the last two); inf for none
  double log_low, log_high;  // the log-ratio is kept within them, without a gradient beyond
  double tau_pos, tau_neg, coef;
  void* grad_logps;  // or null
  double* sums;      // [rows, kSurrogateSums]
};

// Each processes the rows [begin, end); rows are independent, so any split over threads gives the same bits.
void surrogate_terms_generic(const SurrogateTermsArgs&, int64_t begin, int64_t end);
#if defined(FASTRL_X86)
void surrogate_terms_avx2(const SurrogateTermsArgs&, int64_t begin, int64_t end);
void surrogate_terms_avx512(const SurrogateTermsArgs&, int64_t begin, int64_t end);
#endif

}  // namespace fastrl
