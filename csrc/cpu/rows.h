// The row passes on the CPU, and the table of their builds per instruction set.
#pragma once

#include "../rows.h"
#include "divergence.h"
#include "policy_terms.h"
#include "surrogate_terms.h"

namespace fastrl {

// Each processes the rows (moves) [begin, end); rows are independent, so any split over threads gives the same bits.
struct RowKernels {
  const char* name;
  void (*stats)(const StatsArgs&, int64_t begin, int64_t end);
  void (*grad)(const GradArgs&, int64_t begin, int64_t end);
  void (*policy_terms)(const PolicyTermsArgs&, int64_t begin, int64_t end);
  void (*divergence)(const DivergenceArgs&, int64_t begin, int64_t end);
  void (*surrogate_terms)(const SurrogateTermsArgs&, int64_t begin, int64_t end);
  void (*covariance_sums)(const CovarianceArgs&, int64_t begin, int64_t end);
  void (*covariances)(const CovarianceArgs&, int64_t begin, int64_t end);
};

const RowKernels& row_kernels_generic();
#if defined(FASTRL_X86)
const RowKernels& row_kernels_avx2();
const RowKernels& row_kernels_avx512();
#endif

}  // namespace fastrl
