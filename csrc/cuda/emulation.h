// Lets g++ compile the kernels and run them on a CPU, for tests: no GPU and nothing of CUDA's toolkit is needed.
//
// A CUDA thread is a fiber or, with DEEPFM_EMULATE_WITH_THREADS, a thread, so that ThreadSanitizer sees races in shared
// memory. The blocks of a grid run one after the other, a grid is done when its launch returns, and launches wait for
// each other: what waits for another block would hang. Loads and stores of wrong alignment, barriers that not all
// threads reach and shuffles that not all their lanes reach abort with a message. Not shown: what weak ordering of
// memory, real caches, limits of a launch and time do.
#ifndef DEEPFM_CUDA_EMULATION_H_
#define DEEPFM_CUDA_EMULATION_H_

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>
#ifdef DEEPFM_EMULATE_WITH_THREADS
#include <chrono>
#include <condition_variable>
#include <thread>
#else
#include <ucontext.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-sra")  // of GCC 12, which fails on the kernels with it
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define threadIdx (::deepfm::cuda::emulation::thread_idx)
#define blockIdx (::deepfm::cuda::emulation::block_idx)
#define gridDim (::deepfm::cuda::emulation::grid_dim)

namespace deepfm {
namespace cuda {
namespace emulation {

struct Dim {
  unsigned x;
};

// A device whose memory the host must not touch sets this: called before and after whatever runs on the device.
inline void (*open_memory)(bool open) = nullptr;

// While one lives, the device is the caller's.
class Running {
 public:
  Running() : lock_(Device()) {
    if (open_memory) open_memory(true);
  }
  ~Running() {
    if (open_memory) open_memory(false);
  }

 private:
  static std::mutex& Device() {
    static std::mutex device;
    return device;
  }
  std::lock_guard<std::mutex> lock_;
};

[[noreturn]] inline void Abort(const char* what, unsigned a, unsigned b) {
  std::fprintf(stderr, "CUDA emulation: ");
  std::fprintf(stderr, what, a, b);
  std::fprintf(stderr, "\n");
  std::abort();
}

struct Barrier {
  unsigned arrived = 0;
  uint64_t generation = 0;
#ifdef DEEPFM_EMULATE_WITH_THREADS
  std::condition_variable released;
#endif
};

#ifdef DEEPFM_EMULATE_WITH_THREADS
inline std::mutex mutex;
#endif

// What the lanes of a warp hand to each other; lanes meet that name the same mask.
struct Warp {
  std::map<unsigned, Barrier> barriers;
  uint64_t value[32], result[32];
  int from[32];

  Barrier* BarrierOf(unsigned mask) {
#ifdef DEEPFM_EMULATE_WITH_THREADS
    const std::lock_guard<std::mutex> lock(mutex);
#endif
    return &barriers[mask];
  }
};

inline Dim grid_dim;
inline Barrier block_barrier;  // nobody waits at it when a grid begins or ends
inline std::vector<Warp> warps;
inline unsigned block_size;

constexpr const char* kStuck = "of block %u, %u threads wait at a barrier that the others do not reach";

// Wait: the last of n threads that arrive does `last` before they all go on.
#ifdef DEEPFM_EMULATE_WITH_THREADS
inline thread_local Dim thread_idx, block_idx;

template <typename Last>
void Wait(Barrier* barrier, unsigned n, const Last& last) {
  std::unique_lock<std::mutex> lock(mutex);
  const uint64_t generation = barrier->generation;
  if (++barrier->arrived == n) {
    last();
    barrier->arrived = 0;
    ++barrier->generation;
    lock.unlock();
    barrier->released.notify_all();
  } else if (!barrier->released.wait_for(lock, std::chrono::seconds(60),
                                         [&] { return barrier->generation != generation; })) {
    Abort(kStuck, block_idx.x, barrier->arrived);
  }
}

inline void RunBlocks(unsigned grid, unsigned block, const std::function<void()>& kernel) {
  Barrier end_of_block;
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < block; ++t) {
    threads.emplace_back([&, t] {
      thread_idx = {t};
      for (unsigned b = 0; b < grid; ++b) {
        block_idx = {b};
        kernel();
        Wait(&end_of_block, block, [] {});
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}
#else
inline Dim thread_idx, block_idx;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done;
};
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline uint64_t progress = 0;  // barriers that opened and threads that ended
inline const std::function<void()>* body;

inline void Yield() { swapcontext(&fibers[thread_idx.x].context, &scheduler); }

template <typename Last>
void Wait(Barrier* barrier, unsigned n, const Last& last) {
  const uint64_t generation = barrier->generation;
  if (++barrier->arrived == n) {
    last();
    barrier->arrived = 0;
    ++barrier->generation;
    ++progress;
  } else {
    while (barrier->generation == generation) Yield();
  }
}

inline void Thread() {
  (*body)();
  fibers[thread_idx.x].done = true;
  ++progress;
  Yield();
}

inline void RunBlocks(unsigned grid, unsigned block, const std::function<void()>& kernel) {
  constexpr size_t kStack = 256 << 10;
  body = &kernel;
  if (fibers.size() < block) fibers.resize(block);
  for (unsigned b = 0; b < grid; ++b) {
    block_idx = {b};
    for (unsigned t = 0; t < block; ++t) {
      Fiber& fiber = fibers[t];
      if (!fiber.stack) fiber.stack.reset(new char[kStack]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, Thread, 0);
      fiber.done = false;
    }
    for (unsigned left = block; left > 0;) {
      const uint64_t before = progress;
      left = 0;
      for (unsigned t = 0; t < block; ++t) {
        if (fibers[t].done) continue;
        ++left;
        thread_idx = {t};
        swapcontext(&scheduler, &fibers[t].context);
      }
      if (left > 0 && progress == before) Abort(kStuck, b, left);
    }
  }
}
#endif

inline void Run(unsigned grid, unsigned block, const std::function<void()>& kernel) {
  const Running running;
  grid_dim = {grid};
  block_size = block;
  warps = std::vector<Warp>((block + 31) / 32);
  RunBlocks(grid, block, kernel);
}

// The value that lane `from` gives; of a lane outside the mask, which is undefined, bits that show.
template <typename T>
T Exchange(unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "");
  Warp& warp = warps[thread_idx.x / 32];
  const unsigned lane = thread_idx.x % 32;
  if (!(mask >> lane & 1)) Abort("lane %u shuffles with the lanes %#x", lane, mask);
  std::memcpy(&warp.value[lane], &value, sizeof(value));
  warp.from[lane] = from;
  Wait(warp.BarrierOf(mask), static_cast<unsigned>(__builtin_popcount(mask)), [&] {
    for (int l = 0; l < 32; ++l)
      if (mask >> l & 1) warp.result[l] = mask >> warp.from[l] & 1 ? warp.value[warp.from[l]] : ~uint64_t{0};
  });
  std::memcpy(&value, &warp.result[lane], sizeof(value));
  return value;
}

template <typename T>
T Load(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T)) Abort("a load of %u bytes that is not aligned", sizeof(T), 0);
  T value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}

template <typename T>
void Store(T* p, T value) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T)) Abort("a store of %u bytes that is not aligned", sizeof(T), 0);
  std::memcpy(p, &value, sizeof(value));
}

}  // namespace emulation

// What the kernels use of CUDA, under its names.

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline void __syncthreads() {
  emulation::Wait(&emulation::block_barrier, emulation::block_size, [] {});
}
inline void __threadfence() {}  // the atomics below are in order

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  return emulation::Exchange(mask, value, static_cast<int>(threadIdx.x % 32) ^ with);
}

template <typename T>
T atomicMin(T* p, T value) {
  T old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
  while (value < old && !__atomic_compare_exchange_n(p, &old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return old;
}
inline int atomicAdd(int* p, int value) { return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST); }
template <typename T>
T atomicExch(T* p, T value) {
  return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);
}

// Loads and stores by way of this or that cache.
template <typename T>
T __ldg(const T* p) {
  return emulation::Load(p);
}
template <typename T>
T __ldcg(const T* p) {
  return emulation::Load(p);
}
template <typename T>
T __ldcs(const T* p) {
  return emulation::Load(p);
}
template <typename T>
void __stwb(T* p, T value) {
  emulation::Store(p, value);
}

inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsub_rn(float a, float b) { return a - b; }

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t word = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &word, sizeof(y));
  return y;
}
inline __nv_bfloat16 __float2bfloat16(float x) {
  uint32_t word;
  std::memcpy(&word, &x, sizeof(word));
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16)};  // to nearest, ties to even
}
inline float __half2float(__half x) {
  const uint32_t exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  uint32_t word = exponent == 31 ? 0x7f800000 | fraction << 13 : (exponent + 112) << 23 | fraction << 13;
  float y;
  if (exponent == 0) {
    y = static_cast<float>(fraction) * 0x1p-24f;
    std::memcpy(&word, &y, sizeof(word));
  }
  word |= static_cast<uint32_t>(x.bits & 0x8000) << 16;
  std::memcpy(&y, &word, sizeof(y));
  return y;
}
inline __half __float2half(float x) {
  uint32_t word;
  std::memcpy(&word, &x, sizeof(word));
  const uint16_t sign = word >> 16 & 0x8000;
  word &= 0x7fffffff;
  if (word > 0x7f800000) return {0x7fff};
  if (word >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to infinity
  if (word >= 0x38800000) return {static_cast<uint16_t>(sign | ((word - 0x38000000 + 0xfff + (word >> 13 & 1)) >> 13))};
  float aligned;  // a subnormal half: adding 1/2 rounds at its last bit
  std::memcpy(&aligned, &word, sizeof(aligned));
  aligned += 0.5f;
  std::memcpy(&word, &aligned, sizeof(word));
  return {static_cast<uint16_t>(sign | (word - 0x3f000000))};
}

}  // namespace cuda
}  // namespace deepfm

#endif  // DEEPFM_CUDA_EMULATION_H_
