// Sorts and sums over a whole array: CUB's, or plain loops where nvcc does not compile.
#ifndef DEEPFM_CUDA_SORT_H_
#define DEEPFM_CUDA_SORT_H_

#include <cstdint>
#include <utility>

#include "launch.h"

#ifdef __CUDACC__
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#else
#include <algorithm>
#include <numeric>
#include <vector>
#endif

namespace deepfm {
namespace cuda {

// An array and another one of its size; what is in the second is lost.
template <typename T>
struct Pair {
  T* now;
  T* other;
};

// Sorts by the low `bits` bits of the keys; equal ones stay in order.
inline void SortPairs(Pair<uint32_t>* keys, Pair<int32_t>* values, int n, int bits, Memory* memory, Stream stream) {
#ifdef __CUDACC__
  cub::DoubleBuffer<uint32_t> k(keys->now, keys->other);
  cub::DoubleBuffer<int32_t> v(values->now, values->other);
  size_t bytes = 0;
  Check(cub::DeviceRadixSort::SortPairs(nullptr, bytes, k, v, n, 0, bits, stream));
  Check(cub::DeviceRadixSort::SortPairs(memory->Take(bytes), bytes, k, v, n, 0, bits, stream));
  *keys = {k.Current(), k.Alternate()};
  *values = {v.Current(), v.Alternate()};
#else
  (void)memory;
  (void)stream;
  const emulation::Running running;
  const uint32_t mask = bits < 32 ? (uint32_t{1} << bits) - 1 : ~uint32_t{0};
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return (keys->now[a] & mask) < (keys->now[b] & mask); });
  for (int j = 0; j < n; ++j) {
    keys->other[j] = keys->now[order[j]];
    values->other[j] = values->now[order[j]];
  }
  std::swap(keys->now, keys->other);
  std::swap(values->now, values->other);
#endif
}

// x[j] = x[0] + ... + x[j]
inline void SumUpTo(int32_t* x, int n, Memory* memory, Stream stream) {
#ifdef __CUDACC__
  size_t bytes = 0;
  Check(cub::DeviceScan::InclusiveSum(nullptr, bytes, x, x, n, stream));
  Check(cub::DeviceScan::InclusiveSum(memory->Take(bytes), bytes, x, x, n, stream));
#else
  (void)memory;
  (void)stream;
  const emulation::Running running;
  std::partial_sum(x, x + n, x);
#endif
}

}  // namespace cuda
}  // namespace deepfm

#endif  // DEEPFM_CUDA_SORT_H_
