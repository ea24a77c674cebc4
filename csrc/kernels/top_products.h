// The rows of a table with the largest inner products, per query: one pass over the rows, in memory order.
#ifndef DEEPFM_KERNELS_TOP_PRODUCTS_H_
#define DEEPFM_KERNELS_TOP_PRODUCTS_H_

#include <cstdint>

#include "parallel.h"

namespace deepfm {

// For every query b:
//   x[b,j] = < rows[chosen[j], :], queries[b, :] >                    j in [0, n)
//   products[b, 0 ... m) = the m = min(k, n) largest x[b,j], falling; of equal ones the smaller chosen[j] is first
//   places[b, 0 ... m)   = their chosen[j]
//   first_nan[b]         = the smallest chosen[j] with x[b,j] NaN, or -1; places and products are then unspecified
// A product's bits depend on its row, its query and the instruction set alone: neither on the other rows nor on
// threads.
struct TopProductsArgs {
  const float* rows = nullptr;  // [num_rows, dim]
  int64_t num_rows = 0, dim = 0;
  const int64_t* chosen = nullptr;  // [n], ascending, each in [0, num_rows)
  int64_t num_chosen = -1;          // n; below 0: all rows, and chosen is null
  const float* queries = nullptr;   // [num_queries, dim]
  int64_t num_queries = 0;
  int64_t k = 0;
  int64_t* places = nullptr;     // [num_queries, m]
  float* products = nullptr;     // [num_queries, m]
  int64_t* first_nan = nullptr;  // [num_queries]
};

void TopProducts(const TopProductsArgs& args, const Parallel& parallel);

}  // namespace deepfm

#endif  // DEEPFM_KERNELS_TOP_PRODUCTS_H_
