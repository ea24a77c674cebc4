// Groups equal indices: the unique rows of a batch, ascending, and for each the pairs that use it.
#ifndef DEEPFM_KERNELS_ROW_GROUPS_H_
#define DEEPFM_KERNELS_ROW_GROUPS_H_

#include <cstdint>

#include "parallel.h"
#include "scratch.h"

namespace deepfm {

enum class IndexType { kInt32, kInt64 };

// The j-th pair in the order of the groups is the low bits of the word at base + j * stride.
struct PairPositions {
  const char* base;
  int64_t stride;
  uint64_t mask;
};

// After Build: group u is row rows()[u] and the pairs positions()[starts()[u] .. starts()[u+1]),
// ascending. rows() is strictly ascending. A stable radix sort on log2(V) bits finds them; indices that
// ascend strictly, as those of a unique gradient do, are not sorted again.
class RowGroups {
 public:
  // indices: int32 or int64 [n]. Returns -1, or the smallest p with indices[p] outside [0, num_rows);
  // then the groups are empty. Of indices that another thread writes meanwhile any state may be grouped, but never
  // an index that is out of range.
  int64_t Build(const void* indices, IndexType type, int64_t n, int64_t num_rows, const Parallel& parallel);

  int64_t size() const { return size_; }
  int64_t num_pairs() const { return num_pairs_; }
  const int64_t* rows() const { return rows_.get(); }
  const int64_t* starts() const { return starts_.get(); }
  PairPositions positions() const { return positions_; }

 private:
  template <typename I>
  int64_t BuildTyped(const I* indices, int64_t n, int64_t num_rows, const Parallel& parallel);
  template <typename I>
  bool TakeAscending(const I* indices, int64_t n, int64_t num_rows, const Parallel& parallel);
  template <typename Item, typename I>
  int64_t Sort(const I* indices, int64_t n, int64_t num_rows, const Parallel& parallel);
  template <typename Item>
  void FindGroups(const Item* items, int64_t n, const Parallel& parallel);

  int64_t size_ = 0, num_pairs_ = 0;
  Scratch<int64_t> rows_, starts_;
  Scratch<char> items_;  // the sorted (row, position) items, which positions_ points into
  PairPositions positions_ = {nullptr, 0, 0};
};

// The smallest p with indices[p] outside [0, num_rows), or -1.
int64_t FirstOutOfRange(const void* indices, IndexType type, int64_t n, int64_t num_rows, const Parallel& parallel);

}  // namespace deepfm

#endif  // DEEPFM_KERNELS_ROW_GROUPS_H_
