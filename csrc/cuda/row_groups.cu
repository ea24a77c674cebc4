// The unique rows of a batch: a stable radix sort of (row, position) on log2(V) bits, of rows beyond 32 bits by the low
// half and then by the high one, and then the heads of equal rows.
#include "rows.cuh"
#include "sort.h"

namespace deepfm {
namespace cuda {
namespace {

// The row of pair p; if there is no such row, 0.
template <typename I>
__device__ __forceinline__ int64_t RowOf(const I* indices, int64_t p, int64_t num_rows) {
  const int64_t row = indices[p];
  return static_cast<uint64_t>(row) < static_cast<uint64_t>(num_rows) ? row : 0;
}

template <typename I>
__global__ void __launch_bounds__(kBlock, 1)
    Keys(const I* indices, int64_t n, int64_t num_rows, uint32_t* keys, int32_t* positions, Report* report) {
  const int64_t p = ThreadOfGrid();
  if (p >= n) return;
  const int64_t index = __ldcs(indices + p);
  const bool bad = static_cast<uint64_t>(index) >= static_cast<uint64_t>(num_rows);
  if (bad) ReportIndex(report, indices, p);
  keys[p] = bad ? 0 : static_cast<uint32_t>(index);
  positions[p] = static_cast<int32_t>(p);
}

template <typename I>
__global__ void __launch_bounds__(kBlock, 1)
    HighKeys(const I* indices, int64_t n, int64_t num_rows, const int32_t* positions, uint32_t* keys) {
  const int64_t j = ThreadOfGrid();
  if (j < n) keys[j] = static_cast<uint32_t>(RowOf(indices, positions[j], num_rows) >> 32);
}

// 1 where another row begins than that of the first pair. The keys are those of the last sort: if there were two, the
// rows are looked up.
template <typename I>
__global__ void __launch_bounds__(kBlock, 1) Heads(const I* indices, int64_t n, int64_t num_rows, const uint32_t* keys,
                                                   const int32_t* positions, bool look_up, int32_t* heads) {
  const int64_t j = ThreadOfGrid();
  if (j >= n) return;
  auto row_at = [&](int64_t at) {
    return look_up ? RowOf(indices, positions[at], num_rows) : static_cast<int64_t>(keys[at]);
  };
  heads[j] = j > 0 && row_at(j) != row_at(j - 1);
}

template <typename I>
__global__ void __launch_bounds__(kBlock, 1)
    Unique(const I* indices, int64_t n, int64_t num_rows, const int32_t* positions, const int32_t* group_of,
           int64_t* size, int64_t* rows, int32_t* starts, const Report* report) {
  const int64_t j = ThreadOfGrid();
  if (j >= n) return;
  const int32_t u = group_of[j];
  if (j == 0 || group_of[j - 1] != u) {
    rows[u] = RowOf(indices, positions[j], num_rows);
    starts[u] = static_cast<int32_t>(j);
  }
  if (j == n - 1) {
    *size = Failed(report) ? 0 : u + 1;
    starts[u + 1] = static_cast<int32_t>(n);
  }
}

template <typename I>
Groups Group(const I* indices, int64_t n, int64_t num_rows, Report* report, Memory* memory, Stream stream) {
  int64_t* size = Take<int64_t>(memory, 1);
  int64_t* rows = Take<int64_t>(memory, n);
  int32_t* starts = Take<int32_t>(memory, n + 1);
  int32_t* group_of = Take<int32_t>(memory, n);
  Pair<int32_t> positions = {Take<int32_t>(memory, n), Take<int32_t>(memory, n)};
  if (n == 0) {
    SetBytes(size, 0, sizeof(*size), stream);
    SetBytes(starts, 0, sizeof(*starts), stream);
    return {0, size, rows, starts, positions.now, group_of};
  }
  Pair<uint32_t> keys = {Take<uint32_t>(memory, n), Take<uint32_t>(memory, n)};
  int bits = 1;
  while (bits < 63 && (num_rows - 1) >> bits) ++bits;
  const int64_t blocks = BlocksOf(n);
  Launch(Keys<I>, blocks, kBlock, stream, indices, n, num_rows, keys.now, positions.now, report);
  SortPairs(&keys, &positions, static_cast<int>(n), std::min(bits, 32), memory, stream);
  if (bits > 32) {
    Launch(HighKeys<I>, blocks, kBlock, stream, indices, n, num_rows, positions.now, keys.now);
    SortPairs(&keys, &positions, static_cast<int>(n), bits - 32, memory, stream);
  }
  Launch(Heads<I>, blocks, kBlock, stream, indices, n, num_rows, keys.now, positions.now, bits > 32, group_of);
  SumUpTo(group_of, static_cast<int>(n), memory, stream);
  Launch(Unique<I>, blocks, kBlock, stream, indices, n, num_rows, positions.now, group_of, size, rows, starts,
         static_cast<const Report*>(report));
  return {n, size, rows, starts, positions.now, group_of};
}

}  // namespace

Groups GroupRows(const void* indices, IndexType type, int64_t n, int64_t num_rows, Report* report, Memory* memory,
                 Stream stream) {
  if (type == IndexType::kInt32)
    return Group(static_cast<const int32_t*>(indices), n, num_rows, report, memory, stream);
  return Group(static_cast<const int64_t*>(indices), n, num_rows, report, memory, stream);
}

}  // namespace cuda
}  // namespace deepfm
