// What the row pass over two tiles of raw logits takes: the student's, and the teacher's that it is compared with.
#pragma once

#include "rows.h"

namespace fastrl {

enum class Divergence : int { kForwardKl = 0, kReverseKl = 1, kJensenShannon = 2 };

// A is double if `fp64`, else float. All vectors are [rows] of A.
struct DivergenceArgs {
  bool fp64;
  int64_t rows, cols;
  const void* tile;  // [rows, cols] of A, the student's
  int64_t stride;
  const void* ref_tile;  // [rows, cols] of A, the teacher's
  int64_t ref_stride;
  Transform transform, ref_transform;
  Divergence kind;
  double beta;  // weight of the teacher in the mixture; of kJensenShannon only, above 0 and below 1
  void* divergence;
  const void* token_weight;  // or null: no gradient is wanted
  void* out;                 // [rows, cols] of A; may be the student's tile; null iff token_weight is
  int64_t out_stride;
};

}  // namespace fastrl
