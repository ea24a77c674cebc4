// The contract of the optimizers' row updates: the rows of a batch and their slots are fetched once,
// updated and written once; no other row is touched.
//
// For every row u of the groups, with g = sum over its pairs p, ascending, of gradient[p, :]:
//   table -= table * decay
//   kSgd             table -= g * rate
//   kAdagrad         s0 += g^2;              table -= rate * g / sqrt(s0 + epsilon)
//   kRowWiseAdagrad  s0 += mean of g^2;      table -= rate / (sqrt(s0) + epsilon) * g      s0 is [V]
//   kLazyAdam        s0 += (g - s0) * one_minus_beta_1;  s1 += (g^2 - s1) * one_minus_beta_2
//                    table -= s0 * rate / (sqrt(s1) + epsilon)       rate holds the bias corrections
//   kFtrl            n = s0 + g^2;  s1 += g + 2 * shrinkage * table - (n^-power - s0^-power) / rate * table
//                    s0 = n;  table = (clip(s1, -l1, l1) - s1) / (n^-power / rate + 2 * l2)
// Rows are rounded to the table's type after the update; slots have the table's type too.
//
// With counts of the features, a row of count n moves 1 + rare * kRareCount / (kRareCount + seen * n) times as far,
// seen being the share of the first pass that is done.
//
// With an exponential average of the rows, whose decay in step t is d_t and D_t = d_1 * ... * d_t:
//   average = table + D_t * lag;  a step that moves a row by m does  lag -= m / D_(t-1)
// which is average = d_t * average + (1 - d_t) * table, and leaves rows that do not move alone.
#ifndef DEEPFM_KERNELS_SPARSE_UPDATE_H_
#define DEEPFM_KERNELS_SPARSE_UPDATE_H_

#include "fm.h"

namespace deepfm {

enum class Rule { kSgd, kAdagrad, kRowWiseAdagrad, kLazyAdam, kFtrl };
constexpr int kMostSlots = 2;
constexpr int kMostHyper = 9;
constexpr int kRareCount = 20;

// How many slots a rule has, and numbers: the decay, then those of the formula in the order
// rate, epsilon; rate, one_minus_beta_1, one_minus_beta_2, epsilon; rate, power, l1, l2, shrinkage. With a lag,
// 1 / D_(t-1) follows; with counts, rare and seen.
struct RuleShape {
  int slots, hyper;
};
constexpr RuleShape ShapeOf(Rule rule) {
  constexpr RuleShape shapes[] = {{0, 2}, {1, 3}, {1, 3}, {2, 5}, {2, 6}};
  return shapes[static_cast<int>(rule)];
}

struct UpdateArgs {
  Rule rule = Rule::kSgd;
  TableType table_type = TableType::kFloat32;
  int64_t num_rows = 0;                          // V
  int64_t dim = 0;                               // K
  void* table = nullptr;                         // T   [V,K]
  void* slots[kMostSlots] = {nullptr, nullptr};  // T   [V,K], or [V] (kRowWiseAdagrad)
  void* lag = nullptr;                           // T   [V,K], float32 or float64, or null
  const int32_t* counts = nullptr;               // [V], of the features, or null
  const void* gradient = nullptr;                // T   [n,K]
  const void* hyper = nullptr;                   // Acc [ShapeOf(rule).hyper], one more with a lag, two with counts
  const RowGroups* groups = nullptr;             // of the n pairs' rows
  // Where the gradients are those of the groups, one each, from this group on: [U,K].
  bool in_order = false;
  int64_t first_group = 0;
};

void SparseUpdate(const UpdateArgs& args, const Parallel& parallel);

// FmGradient, and SparseUpdate of the table and, if there are any, of the weights by it, to the same bits: but a row is
// fetched once for both, and no gradient is written to memory. The groups are those of the gradient's pairs; rows and
// weight_rows, d_values and the updates' gradients are not used.
void FmUpdate(const GradientArgs& gradient, const UpdateArgs& table, const UpdateArgs* weights,
              const Parallel& parallel);

}  // namespace deepfm

#endif  // DEEPFM_KERNELS_SPARSE_UPDATE_H_
