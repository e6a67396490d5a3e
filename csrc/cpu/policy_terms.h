// A clipped policy objective on given log-probabilities: loss terms, their gradients and the sums behind its metrics.
#pragma once

#include <cstdint>

namespace fastrl {

enum class KlEstimator : int { kNone = 0, kK1 = 1, kK2 = 2, kK3 = 3 };

// Columns of `sums`; fastrl_kernels.objective.TermSums has the same order.
enum TermSum { kPolicy, kBonus, kKl, kEntropy, kScored, kCounted, kLive, kLow, kHigh, kTermSums };

// A is double if `fp64`, else float. Arrays are [rows, cols] of A and contiguous unless said.
struct PolicyTermsArgs {
  bool fp64;
  int64_t rows, cols;
  const void* logps;
  const void* entropy;  // or null: 0
  const void* advantages;
  bool row_advantages;  // [rows] instead of [rows, cols]
  const void* old_logps;  // or null: logps, so that every ratio is 1
  const void* ref_logps;  // null iff kl is kNone
  const void* gate;       // or null: 1
  bool row_gate;
  const uint8_t* scored;  // 0 or 1; null: all 1. Elsewhere nothing is used and outputs are 0
  const uint8_t* mask;    // counted only; null: scored
  const uint8_t* live;    // counted only; null: scored
  const void* token_weight;
  const void* entropy_weight;  // or null: 0
  double low, high, delta, beta;
  KlEstimator kl;
  bool kl_times_ratio, sequence;
  void *terms, *grad_logps, *grad_entropy;  // each may be null
  double* sums;                             // [rows, kTermSums], or null
};

// Each processes the rows [begin, end); rows are independent, so any split over threads gives the same bits.
void policy_terms_generic(const PolicyTermsArgs&, int64_t begin, int64_t end);
#if defined(FASTRL_X86)
void policy_terms_avx2(const PolicyTermsArgs&, int64_t begin, int64_t end);
void policy_terms_avx512(const PolicyTermsArgs&, int64_t begin, int64_t end);
#endif

}  // namespace fastrl
