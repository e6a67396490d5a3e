// The extension fastrl_kernels._C: pointers and sizes in, nothing of torch. Every argument was validated in Python
// (fastrl_kernels/native.py), which also keeps the tensors alive during the call. The kernels of a device differ in the last
// argument only: the number of threads on the CPU, the stream on CUDA.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu/rows.h"
#include "cpu/vectors.h"
#if defined(FASTRL_WITH_CUDA)
#include "cuda/kernels.h"
#endif

namespace py = pybind11;
using fastrl::RowKernels;

namespace {

std::vector<const RowKernels*> usable_row_kernels() {  // best last
  std::vector<const RowKernels*> kernels{&fastrl::row_kernels_generic()};
#if defined(FASTRL_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) kernels.push_back(&fastrl::row_kernels_avx2());
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    kernels.push_back(&fastrl::row_kernels_avx512());
#endif
  return kernels;
}

const RowKernels* current_kernels = usable_row_kernels().back();

// GOMP_parallel of the OpenMP runtime that torch computes on, or null. Its threads are awake right after a matrix product,
// and spin: threads of our own would have to share a core with them, at twice the time.
using Parallel = void (*)(void (*)(void*), void* job, unsigned threads, unsigned flags);
Parallel torch_openmp = nullptr;

// A job whose equal shares are taken by whoever comes first, so that it is done whatever number of threads turns up.
template <typename Work>
struct Job {
  const Work& work;
  const int64_t rows, parts;
  std::atomic<int64_t> next{0};

  static void take_shares(void* self) {
    Job& job = *static_cast<Job*>(self);
    for (int64_t part = job.next++; part < job.parts; part = job.next++)
      job.work(job.rows * part / job.parts, job.rows * (part + 1) / job.parts);
  }
};

// Rows are split evenly over `threads` threads: torch's, or else ones that live for this call only. Where one can't be
// started, the others do its share.
template <typename Work>
void parallel_rows(int64_t rows, int threads, const Work& work) {
  Job<Work> job{work, rows, std::max<int64_t>(1, std::min<int64_t>(threads, rows))};
  if (job.parts == 1) return work(0, rows);
  if (torch_openmp) return torch_openmp(Job<Work>::take_shares, &job, static_cast<unsigned>(job.parts), 0);
  std::vector<std::thread> pool;
  pool.reserve(job.parts - 1);
  try {
    while (static_cast<int64_t>(pool.size()) < job.parts - 1) pool.emplace_back(Job<Work>::take_shares, &job);
  } catch (const std::system_error&) {
  }
  Job<Work>::take_shares(&job);
  for (auto& thread : pool) thread.join();
}

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Each of these makes the Python function of a kernel `run(args, last)`.
template <typename Last, typename Run>
auto row_stats(const Run& run) {
  return [run](int dtype, uintptr_t tile, int64_t rows, int64_t cols, int64_t stride, uintptr_t ids, double temperature,
               double logit_scale, double softcap, uintptr_t bias, uintptr_t row_max, uintptr_t log_sum, uintptr_t logps,
               uintptr_t mean, Last last) {
    const fastrl::StatsArgs args{
        static_cast<fastrl::DType>(dtype), pointer<void>(tile), rows, cols, stride, pointer<int64_t>(ids),
        {temperature, logit_scale, softcap, pointer<void>(bias)}, pointer<void>(row_max), pointer<void>(log_sum),
        pointer<void>(logps), pointer<void>(mean)};
    py::gil_scoped_release release;
    run(args, last);
  };
}

template <typename Last, typename Run>
auto row_grad(const Run& run) {
  return [run](int dtype, uintptr_t tile, int64_t cols, int64_t stride, int out_dtype, uintptr_t out, int64_t out_stride,
               uintptr_t ids, double temperature, double logit_scale, double softcap, uintptr_t bias, uintptr_t row_max,
               uintptr_t log_sum, uintptr_t mean, uintptr_t grad_logps, uintptr_t grad_entropy, uintptr_t grad_lse,
               uintptr_t source, uintptr_t target, int64_t moves, Last last) {
    const fastrl::GradArgs args{
        static_cast<fastrl::DType>(dtype), pointer<void>(tile), cols, stride, static_cast<fastrl::DType>(out_dtype),
        pointer<void>(out), out_stride, pointer<int64_t>(ids), {temperature, logit_scale, softcap, pointer<void>(bias)},
        pointer<void>(row_max), pointer<void>(log_sum), pointer<void>(mean), pointer<void>(grad_logps),
        pointer<void>(grad_entropy), pointer<void>(grad_lse), pointer<int64_t>(source), pointer<int64_t>(target), moves};
    py::gil_scoped_release release;
    run(args, last);
  };
}

template <typename Last, typename Run>
auto group_advantages(const Run& run) {
  return [run](bool fp64, uintptr_t rewards, uintptr_t group_ids, int64_t count, int baseline, int scale, double eps,
               uintptr_t advantages, Last last) {
    const fastrl::AdvantageArgs args{
        fp64, pointer<void>(rewards), pointer<int64_t>(group_ids), count, static_cast<fastrl::Baseline>(baseline),
        static_cast<fastrl::Scale>(scale), eps, pointer<void>(advantages)};
    py::gil_scoped_release release;
    run(args, last);
  };
}

template <typename Last, typename Run>
auto gae(const Run& run) {
  return [run](bool fp64, uintptr_t rewards, uintptr_t values, uintptr_t mask, int64_t rows, int64_t cols, double gamma,
               double lam, bool through_mask, uintptr_t advantages, uintptr_t returns, Last last) {
    const fastrl::GaeArgs args{
        fp64, pointer<void>(rewards), pointer<void>(values), pointer<uint8_t>(mask), rows, cols, gamma, lam, through_mask,
        pointer<void>(advantages), pointer<void>(returns)};
    py::gil_scoped_release release;
    run(args, last);
  };
}

// Tokens per thread under which starting a thread costs more than it saves.
constexpr int64_t kTokensPerThread = 1 << 15;

int threads_for(int64_t tokens, int threads) {
  return static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(1, tokens / kTokensPerThread)));
}

void policy_terms(bool fp64, int64_t rows, int64_t cols, uintptr_t logps, uintptr_t entropy, uintptr_t advantages,
                  bool row_advantages, uintptr_t old_logps, uintptr_t ref_logps, uintptr_t gate, bool row_gate,
                  uintptr_t scored, uintptr_t mask, uintptr_t live, uintptr_t token_weight, uintptr_t entropy_weight,
                  double low, double high, double delta, double beta, int kl, bool kl_times_ratio, bool sequence,
                  uintptr_t terms, uintptr_t grad_logps, uintptr_t grad_entropy, uintptr_t sums, int threads) {
  const fastrl::PolicyTermsArgs args{
      fp64, rows, cols, pointer<void>(logps), pointer<void>(entropy), pointer<void>(advantages), row_advantages,
      pointer<void>(old_logps), pointer<void>(ref_logps), pointer<void>(gate), row_gate, pointer<uint8_t>(scored),
      pointer<uint8_t>(mask), pointer<uint8_t>(live), pointer<void>(token_weight), pointer<void>(entropy_weight), low, high,
      delta, beta, static_cast<fastrl::KlEstimator>(kl), kl_times_ratio, sequence, pointer<void>(terms),
      pointer<void>(grad_logps), pointer<void>(grad_entropy), pointer<double>(sums)};
  py::gil_scoped_release release;
  parallel_rows(rows, threads_for(rows * cols, threads),
                [&](int64_t begin, int64_t end) { current_kernels->policy_terms(args, begin, end); });
}

// Sums over the rows, then the smallest share of a row's tokens that is clipped from below and the largest from above (NaN: no
// row has a token).
std::vector<double> surrogate_terms(
    bool fp64, int64_t rows, int64_t cols, uintptr_t logps, uintptr_t entropy, uintptr_t advantages, bool row_advantages,
    uintptr_t old_logps, uintptr_t gate, bool row_gate, uintptr_t mismatch, bool row_mismatch, uintptr_t scored, uintptr_t mask,
    uintptr_t live, uintptr_t selected, uintptr_t row_weight, bool moved, int surrogate, int level, double low, double high,
    double cap, double log_low, double log_high, double tau_pos, double tau_neg, double coef, double k_pos, double lambda_pos,
    double k_neg, double lambda_neg, double length_eps, bool reads_padding, uintptr_t grad_logps, uintptr_t scored_logps,
    int threads) {
  constexpr int64_t kSums = fastrl::kSurrogateSums;
  std::vector<double> sums(rows * kSums), totals(kSums + 2);
  const fastrl::SurrogateTermsArgs args{
      fp64, rows, cols, pointer<void>(logps), pointer<void>(entropy), pointer<void>(advantages), row_advantages,
      pointer<void>(old_logps), pointer<void>(gate), row_gate, pointer<uint8_t>(scored), pointer<uint8_t>(mask),
      pointer<uint8_t>(live), moved, pointer<uint8_t>(selected), pointer<void>(mismatch), row_mismatch,
      pointer<void>(row_weight), static_cast<fastrl::Surrogate>(surrogate), static_cast<fastrl::Level>(level), low, high, cap,
      log_low, log_high, tau_pos, tau_neg, coef, k_pos, lambda_pos, k_neg, lambda_neg, length_eps, reads_padding,
      pointer<void>(grad_logps), pointer<void>(scored_logps), sums.data()};
  py::gil_scoped_release release;
  parallel_rows(rows, threads_for(rows * cols, threads),
                [&](int64_t begin, int64_t end) { current_kernels->surrogate_terms(args, begin, end); });
  const bool of_rows = args.level == fastrl::Level::kRowSum && row_advantages;
  double lowest = std::nan(""), highest = std::nan("");
  for (int64_t row = 0; row < rows; ++row) {
    const double* x = &sums[row * kSums];
    for (int64_t k = 0; k < kSums; ++k) totals[k] += x[k];
    const double count = of_rows ? 1 : x[fastrl::kCounted];
    lowest = std::fmin(lowest, x[fastrl::kLow] / count);  // NaN only where both are
    highest = std::fmax(highest, x[fastrl::kHigh] / count);
  }
  totals[kSums] = lowest;
  totals[kSums + 1] = highest;
  return totals;
}

// Number of tokens of the mask in each row; their sum.
double count_rows(bool fp64, int64_t rows, int64_t cols, uintptr_t mask, uintptr_t counts) {
  const uint8_t* x = pointer<uint8_t>(mask);
  int64_t total = 0;
  for (int64_t row = 0; row < rows; ++row, x += cols) {
    int64_t count = 0;
    for (int64_t start = 0; start < cols; start += 128) {  // so many ones fit a byte
      const int64_t end = std::min<int64_t>(cols, start + 128);
      uint8_t sum = 0;
      for (int64_t j = start; j < end; ++j) sum += x[j];
      count += sum;
    }
    fp64 ? pointer<double>(counts)[row] = static_cast<double>(count) : pointer<float>(counts)[row] = static_cast<float>(count);
    total += count;
  }
  return static_cast<double>(total);
}

// Number of candidates.
double covariances(bool fp64, int64_t rows, int64_t cols, uintptr_t logps, uintptr_t old_logps, uintptr_t advantages,
                   bool row_advantages, uintptr_t scored, double low, double high, double lower, double upper,
                   uintptr_t covariance, uintptr_t candidates, int threads) {
  std::vector<double> sums(3 * rows);
  fastrl::CovarianceArgs args{
      fp64, rows, cols, pointer<void>(logps), pointer<void>(old_logps), pointer<void>(advantages), row_advantages,
      pointer<uint8_t>(scored), 0, 0, low, high, lower, upper, pointer<void>(covariance), pointer<uint8_t>(candidates),
      sums.data()};
  const int n = threads_for(rows * cols, threads);
  const auto total = [&](int64_t column) {
    double sum = 0;
    for (int64_t row = 0; row < rows; ++row) sum += sums[3 * row + column];
    return sum;
  };
  py::gil_scoped_release release;
  parallel_rows(rows, n, [&](int64_t begin, int64_t end) { current_kernels->covariance_sums(args, begin, end); });
  const double count = std::max(1.0, total(2));
  args.mean_advantage = total(0) / count;
  args.mean_logp = total(1) / count;
  parallel_rows(rows, n, [&](int64_t begin, int64_t end) { current_kernels->covariances(args, begin, end); });
  return total(0);
}

void divergence_rows(bool fp64, int64_t rows, int64_t cols, uintptr_t tile, int64_t stride, uintptr_t ref_tile,
                     int64_t ref_stride, double temperature, double logit_scale, double softcap, uintptr_t bias,
                     double ref_temperature, double ref_logit_scale, double ref_softcap, uintptr_t ref_bias, int kind,
                     double beta, uintptr_t divergence, uintptr_t token_weight, uintptr_t out, int64_t out_stride,
                     int threads) {
  const fastrl::DivergenceArgs args{
      fp64, rows, cols, pointer<void>(tile), stride, pointer<void>(ref_tile), ref_stride,
      {temperature, logit_scale, softcap, pointer<void>(bias)},
      {ref_temperature, ref_logit_scale, ref_softcap, pointer<void>(ref_bias)}, static_cast<fastrl::Divergence>(kind), beta,
      pointer<void>(divergence), pointer<void>(token_weight), pointer<void>(out), out_stride};
  py::gil_scoped_release release;
  parallel_rows(rows, threads, [&](int64_t begin, int64_t end) { current_kernels->divergence(args, begin, end); });
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto* kernels : usable_row_kernels()) names.emplace_back(kernels->name);
  return names;
}

void use_instruction_set(const std::string& name) {
  for (const auto* kernels : usable_row_kernels()) {
    if (name == kernels->name) {
      current_kernels = kernels;
      return;
    }
  }
  throw std::invalid_argument("instruction set '" + name + "' is not built or this processor lacks it");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of fastrl; call them through fastrl_kernels.cpu and .cuda, which validate the arguments.";
  m.def("row_stats", row_stats<int>([](const fastrl::StatsArgs& args, int threads) {
          parallel_rows(args.rows, threads, [&](int64_t begin, int64_t end) { current_kernels->stats(args, begin, end); });
        }));
  m.def("row_grad", row_grad<int>([](const fastrl::GradArgs& args, int threads) {
          parallel_rows(args.moves, threads, [&](int64_t begin, int64_t end) { current_kernels->grad(args, begin, end); });
        }));
  m.def("policy_terms", &policy_terms);
  m.def("surrogate_terms", &surrogate_terms);
  m.def("covariances", &covariances);
  m.def("count_rows", &count_rows);
  m.def("divergence_rows", &divergence_rows);
  m.def("group_advantages",
        group_advantages<int>([](const fastrl::AdvantageArgs& args, int) { fastrl::group_advantages(args); }));
  m.def("gae", gae<int>([](const fastrl::GaeArgs& args, int threads) {
          parallel_rows(args.rows, threads_for(args.rows * args.cols, threads),
                        [&](int64_t begin, int64_t end) { fastrl::gae(args, begin, end); });
        }));
  m.def("use_openmp", [](uintptr_t gomp_parallel) { torch_openmp = reinterpret_cast<Parallel>(gomp_parallel); },
        "Run on the threads of this OpenMP runtime (the address of its GOMP_parallel); 0: on threads made for a call.");
  m.def("instruction_sets", &instruction_sets, "Builds of the row kernels that run on this processor, best last.");
  m.def("instruction_set", [] { return std::string(current_kernels->name); }, "The build in use.");
  m.def("use_instruction_set", &use_instruction_set, "Force one of instruction_sets(); ValueError for any other.");
  m.attr("compiler") = FASTRL_COMPILER;
#if defined(FASTRL_WITH_CUDA)
  py::module_ cuda = m.def_submodule("cuda", "The CUDA kernels; each is queued on a stream of the current device.");
  const auto on = [](auto kernel) {
    return [kernel](const auto& args, uintptr_t stream) { kernel(args, pointer<void>(stream)); };
  };
  cuda.def("row_stats", row_stats<uintptr_t>(on(fastrl::cuda::row_stats)));
  cuda.def("row_grad", row_grad<uintptr_t>(on(fastrl::cuda::row_grad)));
  cuda.def("group_advantages", group_advantages<uintptr_t>(on(fastrl::cuda::group_advantages)));
  cuda.def("gae", gae<uintptr_t>(on(fastrl::cuda::gae)));
  cuda.def("device_count", &fastrl::cuda::device_count, "Devices that the driver shows; 0 without a driver.");
  m.attr("cuda_version") = fastrl::cuda::compiled_version();
#else
  m.attr("cuda_version") = py::none();
#endif
}
