// Divergence of each row of a student's tile of raw logits from the teacher's, and its gradient in place of the student's.
// A row of both tiles stays in the cache for its three passes: the log-sum-exps, the divergence, the gradient. Neither
// probabilities nor log-probabilities are ever stored. Compiled once per instruction set, see rows.cpp.
#include "divergence.h"

#include "../divergence_math.h"

namespace fastrl {
namespace {

constexpr int64_t kBlock = 1024;  // columns of both tiles, and a slope, held in L1

// Logits of some columns of a row, and their slopes against the raw products.
template <typename A, bool kBias, bool kCap>
void logits_of(const Logit<A>& logit, const A* row, int64_t start, int64_t size, A* z, A* slope) {
#pragma omp simd
  for (int64_t j = 0; j < size; ++j)
    z[j] = logit.template operator()<kBias, kCap>(row[start + j], start + j, slope[j]);
}

// One of the two tiles.
template <typename A>
struct Tile {
  using LogitsOf = void (*)(const Logit<A>&, const A*, int64_t, int64_t, A*, A*);

  const A* data;
  int64_t stride, cols;
  Logit<A> logit;
  LogitsOf fill;
  // Of the current row.
  const A* row = nullptr;
  A max = 0, log_sum = 0;
  A z[kBlock], slope[kBlock];

  Tile(const void* tile, int64_t stride, int64_t cols, const Transform& t)
      : data(static_cast<const A*>(tile)), stride(stride), cols(cols), logit(t) {
    const bool cap = t.softcap > 0;
    fill = t.bias ? (cap ? logits_of<A, true, true> : logits_of<A, true, false>)
                  : (cap ? logits_of<A, false, true> : logits_of<A, false, false>);
  }

  void load(int64_t start, int64_t size) { fill(logit, row, start, size, z, slope); }

  void take_row(int64_t number) {
    row = data + number * stride;
    Partial<A, double> total;
    for (int64_t start = 0; start < cols; start += kBlock) {
      const int64_t size = cols - start < kBlock ? cols - start : kBlock;
      load(start, size);
      A block_max = -static_cast<A>(__builtin_inf());
#pragma omp simd reduction(max : block_max)
      for (int64_t j = 0; j < size; ++j) block_max = z[j] > block_max ? z[j] : block_max;
      total.raise(block_max);
      total.add(z, size);
    }
    max = total.max;
    log_sum = static_cast<A>(log(total.sum));
  }
};

template <typename A, Divergence kKind>
void divergence_rows(const DivergenceArgs& a, int64_t begin, int64_t end) {
  const DivergenceTerms<A, kKind> terms(a.beta);
  Tile<A> student(a.tile, a.stride, a.cols, a.transform), teacher(a.ref_tile, a.ref_stride, a.cols, a.ref_transform);
  for (int64_t row = begin; row < end; ++row) {
    student.take_row(row);
    teacher.take_row(row);
    const A max = student.max, log_sum = student.log_sum, ref_max = teacher.max, ref_log_sum = teacher.log_sum;
    const A *z = student.z, *y = teacher.z, *slope = student.slope;

    double divergence = 0, centre = 0;
    for (int64_t start = 0; start < a.cols; start += kBlock) {
      const int64_t size = a.cols - start < kBlock ? a.cols - start : kBlock;
      student.load(start, size);
      teacher.load(start, size);
      for (int64_t strip = 0; strip < size; strip += kStrip) {
        const int64_t stop = size - strip < kStrip ? size : strip + kStrip;
        A strip_divergence = 0, strip_centre = 0;
#pragma omp simd reduction(+ : strip_divergence, strip_centre)
        for (int64_t j = strip; j < stop; ++j) {
          A share, centring;
          terms((z[j] - max) - log_sum, (y[j] - ref_max) - ref_log_sum, share, centring);
          strip_divergence += share;
          strip_centre += centring;
        }
        divergence += strip_divergence;
        centre += strip_centre;
      }
    }
    static_cast<A*>(a.divergence)[row] = static_cast<A>(divergence);
    if (!a.out) continue;

    const A weight = static_cast<const A*>(a.token_weight)[row], mean = static_cast<A>(centre);
    A* out = static_cast<A*>(a.out) + row * a.out_stride;
    for (int64_t start = 0; start < a.cols; start += kBlock) {
      const int64_t size = a.cols - start < kBlock ? a.cols - start : kBlock;
      student.load(start, size);
      teacher.load(start, size);
#pragma omp simd
      for (int64_t j = 0; j < size; ++j) {
        const A gradient = terms.gradient((z[j] - max) - log_sum, (y[j] - ref_max) - ref_log_sum, mean);
        out[start + j] = gradient * slope[j] * weight;
      }
    }
  }
}

template <typename A>
void divergence_rows(const DivergenceArgs& a, int64_t begin, int64_t end) {
  switch (a.kind) {
    case Divergence::kForwardKl: return divergence_rows<A, Divergence::kForwardKl>(a, begin, end);
    case Divergence::kReverseKl: return divergence_rows<A, Divergence::kReverseKl>(a, begin, end);
    case Divergence::kJensenShannon: return divergence_rows<A, Divergence::kJensenShannon>(a, begin, end);
  }
}

}  // namespace

#define FASTRL_JOIN2(a, b) a##b
#define FASTRL_JOIN(a, b) FASTRL_JOIN2(a, b)

void FASTRL_JOIN(divergence_, FASTRL_ISA)(const DivergenceArgs& a, int64_t begin, int64_t end) {
  a.fp64 ? divergence_rows<double>(a, begin, end) : divergence_rows<float>(a, begin, end);
}

}  // namespace fastrl
