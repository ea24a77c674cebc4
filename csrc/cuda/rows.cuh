// How a warp shares a row out to its lanes, how rows are read and written, and what is wrong with a batch.
#ifndef DEEPFM_CUDA_ROWS_CUH_
#define DEEPFM_CUDA_ROWS_CUH_

#include <algorithm>
#include <initializer_list>
#include <stdexcept>

#include "launch.h"

namespace deepfm {
namespace cuda {

// A row of K elements is `pieces` loads of W elements. 2^log_lanes lanes hold one piece each; of more than 32 pieces
// they hold every 32nd, one after the other.
struct Lanes {
  int pieces, log_lanes;
};

// The place of a thread: lane `part` of those that hold a row, which are the group'th such lanes of the warp.
struct Lane {
  int lanes, part, group, groups;
  unsigned mask;  // of the lanes that hold the row

  __device__ __forceinline__ explicit Lane(const Lanes& of) {
    const int lane = threadIdx.x % 32;
    lanes = 1 << of.log_lanes;
    part = lane & (lanes - 1);
    group = lane >> of.log_lanes;
    groups = 32 >> of.log_lanes;
    mask = (lanes == 32 ? ~0u : (1u << lanes) - 1) << (lane - part);
  }
  // The sum over the lanes that hold the row.
  template <typename A>
  __device__ __forceinline__ A RowSum(A x) const {
    for (int o = lanes / 2; o > 0; o /= 2) x += __shfl_xor_sync(mask, x, o);
    return x;
  }
  // The sum over the groups of the warp, all of which must take part.
  __device__ __forceinline__ float GroupSum(float x) const {
    for (int o = 16; o >= lanes; o /= 2) x += __shfl_xor_sync(~0u, x, o);
    return x;
  }
};

__device__ __forceinline__ int64_t WarpOfGrid() {
  return (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) / 32;
}
__device__ __forceinline__ int64_t WarpsOfGrid() { return static_cast<int64_t>(gridDim.x) * (kBlock / 32); }
__device__ __forceinline__ int64_t ThreadOfGrid() { return static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; }
inline int64_t BlocksOf(int64_t threads) { return (threads + kBlock - 1) / kBlock; }

template <typename T>
T* Take(Memory* memory, int64_t count) {
  return static_cast<T*>(memory->Take(std::max<int64_t>(1, count) * sizeof(T)));
}

template <int kBytes>
struct BytesOf;
template <>
struct BytesOf<16> {
  typedef uint4 Type;
};
template <>
struct BytesOf<8> {
  typedef uint2 Type;
};
template <>
struct BytesOf<4> {
  typedef unsigned Type;
};
// W elements in one load.
template <typename T, int W>
struct WordOf : BytesOf<W * sizeof(T)> {};
template <typename T>
struct WordOf<T, 1> {
  typedef T Type;
};
template <typename T, int W>
using Word = typename WordOf<T, W>::Type;

template <int W>
struct Vec {
  float v[W];
};

__device__ __forceinline__ float ToFloat(float x) { return x; }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float ToFloat(__half x) { return __half2float(x); }
__device__ __forceinline__ void FromFloat(float x, float* y) { *y = x; }
__device__ __forceinline__ void FromFloat(float x, __nv_bfloat16* y) { *y = __float2bfloat16(x); }
__device__ __forceinline__ void FromFloat(float x, __half* y) { *y = __float2half(x); }

template <typename T, int W>
__device__ __forceinline__ Vec<W> Widen(const Word<T, W>& word) {
  T narrow[W];
  memcpy(narrow, &word, sizeof(word));
  Vec<W> wide;
  DEEPFM_UNROLL
  for (int i = 0; i < W; ++i) wide.v[i] = ToFloat(narrow[i]);
  return wide;
}
template <typename T, int W>
__device__ __forceinline__ Word<T, W> Narrow(const Vec<W>& wide) {
  T narrow[W];
  DEEPFM_UNROLL
  for (int i = 0; i < W; ++i) FromFloat(wide.v[i], narrow + i);
  Word<T, W> word;
  memcpy(&word, narrow, sizeof(word));
  return word;
}

// W elements of a table that this kernel may write to.
template <typename T, int W>
__device__ __forceinline__ Word<T, W> ReadWord(const T* p) {
  return __ldcg(reinterpret_cast<const Word<T, W>*>(p));
}
template <typename T, int W>
__device__ __forceinline__ void Write(T* p, const Vec<W>& wide) {
  __stwb(reinterpret_cast<Word<T, W>*>(p), Narrow<T, W>(wide));
}
// W floats, 16 bytes at most in one load; of memory that no kernel writes to meanwhile, or of any.
template <int W, bool kConstant = true>
__device__ __forceinline__ Vec<W> ReadFloats(const float* p) {
  constexpr int kEach = W < 4 ? W : 4;
  Word<float, kEach> words[W / kEach];
  DEEPFM_UNROLL
  for (int i = 0; i < W / kEach; ++i) {
    auto* word = reinterpret_cast<const Word<float, kEach>*>(p) + i;
    words[i] = kConstant ? __ldg(word) : __ldcg(word);
  }
  Vec<W> x;
  memcpy(&x, words, sizeof(x));
  return x;
}
template <int W>
__device__ __forceinline__ void WriteFloats(float* p, const Vec<W>& x) {
  constexpr int kEach = W < 4 ? W : 4;
  DEEPFM_UNROLL
  for (int i = 0; i < W; i += kEach) {
    Word<float, kEach> word;
    memcpy(&word, x.v + i, sizeof(word));
    __stwb(reinterpret_cast<Word<float, kEach>*>(p + i), word);
  }
}

template <int n>
struct Int {
  static constexpr int value = n;
};

// What the addresses of rows of K elements have in common: of the table's type, and of floats.
struct Addresses {
  uintptr_t of_table = 0, of_floats = 0;  // a bit is 0 where it is in all of them

  Addresses(std::initializer_list<const void*> table, std::initializer_list<const void*> floats) {
    for (const void* p : table) of_table |= reinterpret_cast<uintptr_t>(p);
    for (const void* p : floats) of_floats |= reinterpret_cast<uintptr_t>(p);
  }
  Addresses operator|(const Addresses& more) const {
    Addresses both = *this;
    both.of_table |= more.of_table;
    both.of_floats |= more.of_floats;
    return both;
  }
  // Whether W elements at a time are aligned.
  template <typename T>
  bool Allow(int W, int64_t dim) const {
    return dim % W == 0 && of_table % (W * sizeof(T)) == 0 && of_floats % std::min<size_t>(16, W * sizeof(float)) == 0;
  }
};

template <typename T, int W, typename Fn>
void CallWith(int64_t dim, const Fn& fn) {
  Lanes lanes = {static_cast<int>(dim / W), 0};
  while (lanes.log_lanes < 5 && 1 << lanes.log_lanes < lanes.pieces) ++lanes.log_lanes;
  fn(T{}, Int<W>(), lanes);
}

template <typename T, typename Fn>
void ForWidth(int64_t dim, const Addresses& rows, const Fn& fn) {
  constexpr int kMost = 16 / sizeof(T);
  if (rows.Allow<T>(kMost, dim)) return CallWith<T, kMost>(dim, fn);
  if (rows.Allow<T>(2, dim)) return CallWith<T, 2>(dim, fn);
  CallWith<T, 1>(dim, fn);
}

// Calls fn(T{}, Int<W>(), lanes): the run-time type and K become compile-time constants here and nowhere else.
template <typename Fn>
void ForRows(TableType type, int64_t dim, const Addresses& rows, const Fn& fn) {
  switch (type) {
    case TableType::kFloat32:
      return ForWidth<float>(dim, rows, fn);
    case TableType::kBFloat16:
      return ForWidth<__nv_bfloat16>(dim, rows, fn);
    case TableType::kFloat16:
      return ForWidth<__half>(dim, rows, fn);
    default:
      throw std::invalid_argument("table must be float32, bfloat16 or float16 on a GPU");
  }
}

// Sets *first to the smallest p that anyone brings, and calls write(*first): whoever writes last writes of the
// smallest.
template <typename Fn>
__device__ __forceinline__ void ReportFirst(uint64_t* first, int64_t p, const Fn& write) {
  auto* word = reinterpret_cast<unsigned long long*>(first);
  const auto none = static_cast<unsigned long long>(Report::kNone);
  atomicMin(word, static_cast<unsigned long long>(p));
  unsigned long long before, now = atomicMin(word, none);
  do {
    before = now;
    write(static_cast<int64_t>(before));
    __threadfence();
    now = atomicMin(word, none);
  } while (now != before);
}

__device__ __forceinline__ void Put(int64_t* p, int64_t x) {
  atomicExch(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(x));
}

template <typename I>
__device__ __forceinline__ void ReportIndex(Report* report, const I* indices, int64_t p) {
  ReportFirst(&report->pair, p, [=](int64_t first) { Put(&report->index, static_cast<int64_t>(indices[first])); });
}

// Of an earlier kernel.
__device__ __forceinline__ bool Failed(const Report* report) {
  return report->pair != Report::kNone || report->sample != Report::kNone;
}

void CheckRowSplits(const FmShape& shape, Report* report, Stream stream);

}  // namespace cuda
}  // namespace deepfm

#endif  // DEEPFM_CUDA_ROWS_CUH_
