// The contract of the factorization-machine kernels. Nothing here knows of TensorFlow.
//
// A sample is a list of (index, value) pairs; a field is one pair, or, with `field_splits`, a fixed
// run of pair positions that are summed into one embedding (a multi-valued field).
//
// Forward, for every sample b:
//   e[b,f,:] = sum over pairs p in field f of  values[p] * table[indices[p], :]
//   s[b,:]   = sum over f of e[b,f,:]
//   v[b,:]   = 1/2 * (s[b,:]^2 - sum over f of e[b,f,:]^2)
//   interaction = s (kSum), sum over k of v (kScalar) or v (kVector)
//   linear[b]   = sum over pairs p of  values[p] * weights[indices[p]]                  (first order)
// For kScalar and kVector, v may be another interaction of the same fields:
//   order 3        v[b,:] + sum over f < h < i of e[b,f,:] * e[b,h,:] * e[b,i,:]        (Blondel et al., 2016)
//   field weights  sum over h < f of r[f,h] * e[b,f,:] * e[b,h,:]                       (FwFM, Pan et al., 2018)
// r[f,h] is field_weights[f * (f - 1) / 2 + h]: the lower triangle, row by row.
//
// Gradient, for g = d interaction and de = d embeddings:
//   d[b,f,:] = de[b,f,:] + (g[b,:] for kSum, g[b] * (s[b,:] - e[b,f,:]) otherwise)
//   with an order of 3     d[b,f,:] = de[b,f,:] + g[b] * (o + v[b,:] - o * e[b,f,:]), o = s[b,:] - e[b,f,:], v of order
//   2 with field weights     d[b,f,:] = de[b,f,:] + g[b] * sum over h of r[f,h] * e[b,h,:] d_field_weights[f,h] = sum
//   over b of g[b] * < e[b,f,:], e[b,h,:] > rows[u,:] = (2 * l2 + share[u] * prior) * table[unique[u], :]
//               + sum over pairs p with indices[p] == unique[u], in ascending p, of  values[p] * d[field of p, :]
//   weight_rows[u] = (2 * l2_linear + share[u] * prior_linear) * weights[unique[u]]
//               + sum over the same p of  values[p] * d_linear[b]
//   share[u] = how many of these p have values[p] != 0, divided by n = counts[unique[u]]; with prior_softness r > 0,
//               times r / (r + n)
//   d_values[p] = < table[indices[p], :], d[field of p, :] > + weights[indices[p]] * d_linear[b]
//
// A kInt8 row, of the forward alone, is K + 6 bytes: scale, offset and first-order weight as bfloat16, then
// K codes in 0..255; element k is offset + scale * code[k].
//
// Sums are kept in float for float32 and narrower tables, in double for float64. The bits of every
// result depend on the inputs and the instruction set only, never on the number of threads.
#ifndef DEEPFM_KERNELS_FM_H_
#define DEEPFM_KERNELS_FM_H_

#include <cstdint>

#include "parallel.h"
#include "row_groups.h"

namespace deepfm {

enum class TableType { kFloat32, kFloat64, kBFloat16, kFloat16, kInt8 };
constexpr int kInt8Header = 6;  // bytes before the codes of a kInt8 row
enum class Output { kSum, kScalar, kVector };

// Shapes: B samples, P pairs per sample (dense), n pairs in all, F fields per sample, V rows of K
// elements. "Acc" is float, or double for a float64 table. All arrays are dense and row-major.
struct FmShape {
  int64_t num_rows = 0;                   // V
  int64_t dim = 0;                        // K
  int64_t num_samples = 0;                // B
  int64_t num_pairs = 0;                  // n
  int64_t pairs_per_sample = 0;           // P; used when row_splits is null
  const int64_t* row_splits = nullptr;    // [B+1], sample b owns pairs [row_splits[b], row_splits[b+1])
  const int64_t* field_splits = nullptr;  // [F+1] over the P positions (dense only); null: a pair is a field
  int64_t num_fields = 0;                 // F, with field_splits
};

struct ForwardArgs {
  FmShape shape;
  TableType table_type = TableType::kFloat32;
  IndexType index_type = IndexType::kInt32;
  Output output = Output::kScalar;
  const void* table = nullptr;          // T   [V,K], or V rows of kInt8
  const void* indices = nullptr;        // I   [n]
  const void* values = nullptr;         // Acc [n], or null: all ones
  const void* weights = nullptr;        // T   [V], for the first order; null for kInt8, whose rows hold them
  void* interaction = nullptr;          // Acc [B] (kScalar) or [B,K]
  void* linear = nullptr;               // Acc [B], or null: no first order; needs K > 0
  void* sums = nullptr;                 // Acc [B,K], or null
  void* embeddings = nullptr;           // Acc [B,F,K] or [n,K], or null
  int order = 2;                        // or 3
  const void* field_weights = nullptr;  // Acc [F * (F - 1) / 2], or null; needs samples of F fields each, and order 2
};

struct GradientArgs {
  FmShape shape;
  TableType table_type = TableType::kFloat32;
  Output output = Output::kScalar;
  const void* table = nullptr;   // T   [V,K]
  const void* values = nullptr;  // Acc [n], or null: all ones
  const void* sums = nullptr;    // Acc [B,K], from the forward (unused for kSum)
  // Acc [B,F,K] or [n,K], from the forward; needed with field_splits, field weights and an order of 3 (unused for kSum)
  const void* embeddings = nullptr;
  const void* d_interaction = nullptr;  // Acc [B] (kScalar) or [B,K]
  const void* d_embeddings = nullptr;   // Acc [B,F,K] or [n,K], or null
  const void* weights = nullptr;        // T   [V], or null
  const void* d_linear = nullptr;       // Acc [B], with weights
  double l2 = 0, l2_linear = 0;         // strengths of a penalty on the rows of the batch
  const int32_t* counts = nullptr;      // [V], of a prior that counts, or null
  double prior = 0, prior_linear = 0;   // its strengths, with counts
  double prior_softness = 0;            // with counts
  const RowGroups* groups = nullptr;    // of the pairs' indices
  void* rows = nullptr;                 // T   [U,K], or null
  void* weight_rows = nullptr;          // T   [U], with weights
  void* d_values = nullptr;             // Acc [n], or null
  int64_t first_group = 0;              // the group of the first of rows and weight_rows
  int order = 2;                        // as for the forward
  const void* field_weights = nullptr;  // likewise
  void* d_field_weights = nullptr;      // Acc [F * (F - 1) / 2], or null
};

// Runs the forward. Returns -1, or the smallest p with indices[p] outside [0, V); then the outputs
// are unspecified and nothing outside the arrays was read.
int64_t FmForward(const ForwardArgs& args, const Parallel& parallel);

// Runs the gradient. The groups were built from the same indices, so every index is in range.
void FmGradient(const GradientArgs& args, const Parallel& parallel);

}  // namespace deepfm

#endif  // DEEPFM_KERNELS_FM_H_
