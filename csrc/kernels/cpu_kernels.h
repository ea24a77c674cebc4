// What one instruction set's build of the loops offers, and which build is in use.
#ifndef DEEPFM_KERNELS_CPU_KERNELS_H_
#define DEEPFM_KERNELS_CPU_KERNELS_H_

#include <stdint.h>

#include "fm.h"
#include "sparse_update.h"

namespace deepfm {

// From a pair's position to its sample and to its field's row in the embeddings.
struct PairMap {
  int64_t pairs_per_sample;
  uint64_t reciprocal;            // ceil(2^64 / pairs_per_sample), 0 for one pair per sample
  const int64_t* sample_of_pair;  // [n] for ragged samples, else null
  const int32_t* field_of_pair;   // [P] with field_splits, else null
  int64_t num_fields;
};

// With field weights the loops get them as a matrix, [F, PaddedFields(F)]: in row h and column f the weight of fields f
// and h, zero for f == h and for columns past F; for the forward, zero for f < h too.
constexpr int kFieldPadding = 8;
static inline int64_t PaddedFields(int64_t fields) {
  return (fields + kFieldPadding - 1) / kFieldPadding * kFieldPadding;
}

// Of ForwardArgs and GradientArgs: whether the interaction is half of (square of the sum - sum of the squares), or
// kSum.
template <typename Args>
static inline bool IsPlain(const Args& args) {
  return args.output == Output::kSum || (args.order == 2 && !args.field_weights);
}

struct CpuKernels {
  // Returns -1, or the first p of these samples with indices[p] out of range.
  int64_t (*forward[5][2])(const ForwardArgs&, int64_t begin_sample, int64_t end_sample);  // [TableType][IndexType]
  // The same where the interaction is not plain, `step` samples at a time; `kept` is room for the embeddings of so
  // many, if there are none.
  int64_t (*forward_by_fields[5][2])(const ForwardArgs&, int64_t begin_sample, int64_t end_sample, int64_t step,
                                     void* kept);
  // For an order of 3 and field weights: d_fields becomes d[b,f,:], and d_field_weights is added to, if there is one.
  void (*field_gradient[2])(const GradientArgs&, int64_t begin_sample, int64_t end_sample,
                            void* d_fields);  // float, double
  // Both fetch ahead up to last_group.
  void (*gradient[4])(const GradientArgs&, const PairMap&, int64_t begin_group, int64_t end_group, int64_t last_group);
  void (*update[4])(const UpdateArgs&, int64_t begin_group, int64_t end_group, int64_t last_group);
  // Reads the rows of indices [begin, end) out of n and nothing else, for measuring against.
  uint64_t (*read_rows)(const char* table, int64_t num_rows, int64_t row_bytes, const int64_t* indices, int64_t begin,
                        int64_t end, int64_t n, int64_t distance);
  // out[j - begin] = < rows[chosen ? chosen[j] : j, :], query >, j in [begin, end).
  void (*products)(const float* rows, int64_t dim, const int64_t* chosen, int64_t begin, int64_t end,
                   const float* query, float* out);
};

// The build in use: the widest this machine runs, or the one DEEPFM_OPS_ISA names.
const CpuKernels& Kernels();

// "baseline", "avx2" or "avx512".
const char* Isa();

// Makes Kernels() return that build. False, and no change, if this machine cannot run it.
bool SetIsa(const char* name);

}  // namespace deepfm

#endif  // DEEPFM_KERNELS_CPU_KERNELS_H_
