// How work is put on a stream: by CUDA, or by emulation.h where nvcc does not compile. Together with sort.h the only
// place where the two differ.
#ifndef DEEPFM_CUDA_LAUNCH_H_
#define DEEPFM_CUDA_LAUNCH_H_

#include <cstring>

#include "fm_cuda.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define DEEPFM_UNROLL _Pragma("unroll")
#define DEEPFM_UNROLL_BY(n) _Pragma(DEEPFM_TEXT(unroll n))
#define DEEPFM_TEXT(text) #text
#else
#include <cmath>

#include "emulation.h"

#define DEEPFM_UNROLL
#define DEEPFM_UNROLL_BY(n)
#endif

namespace deepfm {
namespace cuda {

#ifdef __CUDACC__

inline void Check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

template <typename Kernel, typename... Args>
void Launch(Kernel kernel, int64_t grid, int block, Stream stream, Args... args) {
  if (grid == 0) return;
  kernel<<<static_cast<unsigned>(grid), block, 0, stream>>>(args...);
  Check(cudaGetLastError());
}

inline void SetBytes(void* p, int byte, size_t bytes, Stream stream) { Check(cudaMemsetAsync(p, byte, bytes, stream)); }

// Multiprocessors of the current device.
inline int Processors() {
  int device, count;
  Check(cudaGetDevice(&device));
  Check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Threads. Kernels name kBlock with a 1 in __launch_bounds__: without it ptxas spills to save a few registers.
constexpr int kBlock = 128, kLargestBlock = 1024;

constexpr int kManyChunks = 16;  // of a group, which a block adds then: see sums.cuh

#else

template <typename... Params, typename... Args>
void Launch(void (*kernel)(Params...), int64_t grid, int block, Stream, Args... args) {
  emulation::Run(static_cast<unsigned>(grid), static_cast<unsigned>(block), [=] { kernel(args...); });
}

inline void SetBytes(void* p, int byte, size_t bytes, Stream) {
  const emulation::Running running;
  std::memset(p, byte, bytes);
}

inline int Processors() { return 1; }

constexpr int kBlock = 64, kLargestBlock = 64;  // every thread costs
constexpr int kManyChunks = 3;                  // and so does a pair

#endif

}  // namespace cuda
}  // namespace deepfm

#endif  // DEEPFM_CUDA_LAUNCH_H_
