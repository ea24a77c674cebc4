// A kernel that reads every byte of the rows that the indices name, and does nothing with them: the floor of a forward.
#include "../../csrc/cuda/launch.h"

using namespace deepfm::cuda;

namespace {

constexpr int kThreads = 128, kRows = 5;  // rows in flight per lane

// A row is `pieces` times 16 bytes, which divide 32.
__global__ void __launch_bounds__(kThreads)
    Read(const uint4* table, const int64_t* indices, int64_t n, int pieces, uint32_t* seen) {
  const int lane = threadIdx.x % 32, groups = 32 / pieces;
  const int64_t warp = (blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x) / 32;
  const int64_t from = warp * groups * kRows + lane / pieces;
  uint32_t sum = 0;
  uint4 rows[kRows];
  DEEPFM_UNROLL
  for (int i = 0; i < kRows; ++i) {
    const int64_t p = from + i * groups;
    rows[i] = p < n ? table[indices[p] * pieces + lane % pieces] : uint4{};
  }
  DEEPFM_UNROLL
  for (int i = 0; i < kRows; ++i) sum += rows[i].x + rows[i].y + rows[i].z + rows[i].w;
  if (sum == 1234567890) *seen = sum;  // or the compiler drops the reads
}

}  // namespace

extern "C" void read_rows(const void* table, const int64_t* indices, int64_t n, int pieces, uint32_t* seen,
                          void* stream) {
  const int64_t rows_per_block = kThreads / pieces * kRows;
  Launch(Read, (n + rows_per_block - 1) / rows_per_block, kThreads, static_cast<Stream>(stream),
         static_cast<const uint4*>(table), indices, n, pieces, seen);
}
