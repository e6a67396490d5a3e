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
  kPenalised,   // -c A, plus coef |d| where selected
  kGamma,       // -phi A l, phi = exp(lambda + k u - lambda exp(u)) constant, u the row's sum of log-ratios
  kGeometric,   // -mean(A) exp(mean of u), u the smaller (A > 0) or larger of d and clip(d): one loss of a row
};

// Where the ratio comes from; fastrl_kernels.objective.LEVELS has the same order.
enum class Level : int {
  kToken,
  kRowMean,  // the log-ratio's value is its row's mean; its gradient stays the token's own
  kRowSum,   // one ratio of a row, by the sum of its log-ratios; kClipped only
};

// Columns of `sums`: those of TermSum, then these. fastrl_kernels.objective.SurrogateSums has the same order.
enum SurrogateSum { kOutside = 9, kCapped, kLogRatio, kDrift, kSelected, kPhi, kSurrogateSums };

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
  const uint8_t* live;    // counted only; null: the mask, or with `moved` its tokens whose advantage and gate are not 0
  bool moved;
  const uint8_t* selected;  // 0 or 1, or null: none. kClipped: no loss there; kPenalised: the penalty's
  const void* mismatch;     // kGamma, kGeometric: further importance ratios, or null
  bool row_mismatch;
  const void* row_weight;  // [rows], of each of its tokens
  Surrogate surrogate;
  Level level;
  double low, high;          // of the ratio; kVariation, kDivergence: largest step down and up; kGeometric: of d
  double cap;                // of the ratio where A < 0 (kClipped) or anywhere (the last two); inf for none
  double log_low, log_high;  // the log-ratio is kept within them, without a gradient beyond
  double tau_pos, tau_neg, coef;
  double k_pos, lambda_pos, k_neg, lambda_neg;  // kGamma
  double length_eps;                            // kGeometric: added to the lengths
  bool reads_padding;                           // kGamma: `mismatch` counts outside `scored` too
  void* grad_logps;                             // or null
  void* scored_logps;                           // logps, 0 where not scored
  double* sums;                                 // [rows, kSurrogateSums]
};

// (A - mean A)(logps - mean logps) over the scored tokens where both are finite, -inf elsewhere; and of these the tokens with
// lower < it < upper whose ratio is not clipped.
struct CovarianceArgs {
  bool fp64;
  int64_t rows, cols;
  const void *logps, *old_logps;  // old_logps may be null
  const void* advantages;
  bool row_advantages;
  const uint8_t* scored;
  double mean_advantage, mean_logp;
  double low, high, lower, upper;
  void* covariance;     // or null
  uint8_t* candidates;  // or null
  double* sums;         // [rows, 3]: in the first pass of advantages, logps and ones; in the second of candidates, 0, 0
};

// Each processes the rows [begin, end); rows are independent, so any split over threads gives the same bits.
void surrogate_terms_generic(const SurrogateTermsArgs&, int64_t begin, int64_t end);
void covariance_sums_generic(const CovarianceArgs&, int64_t begin, int64_t end);
void covariances_generic(const CovarianceArgs&, int64_t begin, int64_t end);
#if defined(FASTRL_X86)
void surrogate_terms_avx2(const SurrogateTermsArgs&, int64_t begin, int64_t end);
void covariance_sums_avx2(const CovarianceArgs&, int64_t begin, int64_t end);
void covariances_avx2(const CovarianceArgs&, int64_t begin, int64_t end);
void surrogate_terms_avx512(const SurrogateTermsArgs&, int64_t begin, int64_t end);
void covariance_sums_avx512(const CovarianceArgs&, int64_t begin, int64_t end);
void covariances_avx512(const CovarianceArgs&, int64_t begin, int64_t end);
#endif

}  // namespace fastrl
