// The contract of fm.h and sparse_update.h on a CUDA stream. Nothing here knows of TensorFlow, and no CUDA header is
// needed to call it.
//
// The arguments are those of the CPU kernels, with every array on the device, `row_splits`, `field_splits`, `counts`
// and `hyper` included; `groups` and `first_group` of GradientArgs and UpdateArgs are not used. Tables are float32,
// bfloat16 or float16; there are fewer than 2^31 pairs.
//
// A call enqueues its work and returns: it never waits for the device. What it finds wrong stands in a Report on the
// device; from then on nothing is written but outputs, which are unspecified, and no table or slot is. All calls of a
// batch share one Report, which NoErrors has set first.
//
// The same bits at every call: sums are taken in an order that depends on the inputs alone.
#ifndef DEEPFM_CUDA_FM_CUDA_H_
#define DEEPFM_CUDA_FM_CUDA_H_

#include <cstddef>
#include <cstdint>

#include "../kernels/fm.h"
#include "../kernels/sparse_update.h"

struct CUstream_st;

namespace deepfm {
namespace cuda {

using Stream = CUstream_st*;  // a cudaStream_t; null: the default one

// Where a call takes device memory from that it needs until its work is done.
class Memory {
 public:
  virtual ~Memory() = default;
  virtual void* Take(size_t bytes) = 0;  // aligned to 256 bytes
};

// On the device.
struct Report {
  static constexpr uint64_t kNone = ~uint64_t{0};
  uint64_t pair;       // the smallest p with indices[p] outside [0, V), or kNone
  int64_t index;       // that index
  uint64_t sample;     // the smallest b with row_splits[b] > row_splits[b+1], or with row_splits[0] != 0 (b = 0) or
                       // row_splits[B] != n (b = B), or kNone
  int64_t begin, end;  // row_splits[b] and row_splits[b+1]; of b = B, row_splits[B] and n
};

// The unique rows of n pairs, ascending, and for each the pairs that use it, ascending: see RowGroups. All on the
// device.
struct Groups {
  int64_t num_pairs = 0;               // n, on the host
  const int64_t* size = nullptr;       // [1]  U; 0 where the Report holds an error
  const int64_t* rows = nullptr;       // [n], of which U hold
  const int32_t* starts = nullptr;     // [n+1], of which U + 1 hold
  const int32_t* positions = nullptr;  // [n]
  const int32_t* group_of = nullptr;   // [n]  the group of the j-th of them
};

// What the CPU reads on the host, and the GPU where it is.
struct Scalars {
  const float* penalty = nullptr;  // [1], what l2, l2_linear and the priors are multiplied with; null: 1
  const float* priors = nullptr;   // [3], strengths of both priors and the softness, in place of those of GradientArgs,
                                   // which are used if this is null; the strengths are divided by B
};

void NoErrors(Report* report, Stream stream);

void FmForward(const ForwardArgs& args, Report* report, Memory* memory, Stream stream);

Groups GroupRows(const void* indices, IndexType type, int64_t n, int64_t num_rows, Report* report, Memory* memory,
                 Stream stream);

// rows, weight_rows and d_values as on the CPU; U may be unknown to the host, then rows and weight_rows hold n.
void FmGradient(const GradientArgs& args, const Scalars& scalars, const Groups& groups, Report* report, Memory* memory,
                Stream stream);

// gradient of args: of the n pairs, or of the groups where in_order is set.
void SparseUpdate(const UpdateArgs& args, const Groups& groups, const Report* report, Memory* memory, Stream stream);

// The gradient and the updates by it, to the bits of FmGradient and SparseUpdate. Both updates are of one rule.
void FmUpdate(const GradientArgs& gradient, const Scalars& scalars, const UpdateArgs& table, const UpdateArgs* weights,
              const Groups& groups, Report* report, Memory* memory, Stream stream);

}  // namespace cuda
}  // namespace deepfm

#endif  // DEEPFM_CUDA_FM_CUDA_H_
