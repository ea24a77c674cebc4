// The body of the CPU loops, compiled once per instruction set by fm_cpu_<set>.cc, which defines
// DEEPFM_ISA (a namespace) before including this. No standard templates are used here: an inline
// function compiled for AVX-512 must not become everyone's copy of it.

#include <immintrin.h>
#include <stdint.h>

#include "cpu_kernels.h"

namespace deepfm {
namespace DEEPFM_ISA {

#include "vec-inl.h"

// A sample's columns are worked on in blocks that keep sums and squares of a block in registers.
constexpr int kMaxVecs = kVecBytes == 64 ? 8 : 4;

static inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

// Always inlined: as a function of its own it has no effect that GCC counts, and calls to it are dropped.
static inline __attribute__((always_inline)) void PrefetchRow(const char* row, int64_t bytes) {
  // Line by line: a row that is not aligned to a line lies in one more than its size says.
  const char* end = row + bytes;
  for (const char* line = row - (reinterpret_cast<uintptr_t>(row) & 63); line < end; line += 64)
    __builtin_prefetch(line);
}

// How many rows ahead to fetch: about 2 KiB in flight, which hides the latency of memory without
// evicting what was fetched before it is used.
static inline int64_t PrefetchDistance(int64_t row_bytes) {
  const int64_t rows = 2048 / row_bytes;
  return rows > 24 ? 24 : rows < 4 ? 4 : rows;
}

static inline int64_t PositionOf(const PairPositions& positions, int64_t j) {
  uint64_t word;
  __builtin_memcpy(&word, positions.base + j * positions.stride, sizeof(word));
  return static_cast<int64_t>(word & positions.mask);
}

static inline int64_t SampleOf(const PairMap& map, int64_t p) {
  if (map.sample_of_pair) return map.sample_of_pair[p];
  if (!map.reciprocal) return p;
  // The product's high half is the exact quotient while p * pairs_per_sample < 2^64.
  return static_cast<int64_t>(static_cast<unsigned __int128>(p) * map.reciprocal >> 64);
}

static inline int64_t FieldOf(const PairMap& map, int64_t p) {
  if (!map.field_of_pair) return p;
  const int64_t b = SampleOf(map, p);
  return b * map.num_fields + map.field_of_pair[p - b * map.pairs_per_sample];
}

// One element, by way of a register's first lane.
template <typename T>
static inline AccOf<T> LoadOne(const T* p) {
  return Load<true>(p, 1)[0];
}
template <typename T>
static inline void StoreOne(T* p, AccOf<T> x) {
  VecOf<T> v = {};
  v[0] = x;
  Store<true>(p, v, 1);
}

template <int n>
struct Int {
  static constexpr int value = n;
};

// Calls fn(Int<vecs>, Int<partial>) for each block of columns, with its first column and the lanes
// of its last register: the run-time K becomes compile-time register counts here and nowhere else.
template <typename T, typename Fn>
static inline void ForColumnBlocks(int64_t dim, const Fn& fn) {
  constexpr int lanes = kLanes<T>;
  for (int64_t first = 0; first < dim; first += kMaxVecs * lanes) {
    const int64_t columns = Min(dim - first, kMaxVecs * lanes);
    const int vecs = static_cast<int>((columns + lanes - 1) / lanes);
    const int tail = static_cast<int>(columns - (vecs - 1) * lanes);
#define DEEPFM_CASE(n)                         \
  case n:                                      \
    if (n <= kMaxVecs) {                       \
      constexpr int m = n <= kMaxVecs ? n : 1; \
      if (tail == lanes) {                     \
        fn(Int<m>(), Int<0>(), first, tail);   \
      } else {                                 \
        fn(Int<m>(), Int<1>(), first, tail);   \
      }                                        \
    }                                          \
    break;
    switch (vecs) {
      DEEPFM_CASE(1)
      DEEPFM_CASE(2)
      DEEPFM_CASE(3)
      DEEPFM_CASE(4)
      DEEPFM_CASE(5)
      DEEPFM_CASE(6)
      DEEPFM_CASE(7)
      DEEPFM_CASE(8)
    }
#undef DEEPFM_CASE
  }
}

// A block of kVecs registers, the last of them `tail` lanes wide if kPartial.
template <int kVecs, bool kPartial, typename T>
static inline void LoadBlock(const T* p, int tail, VecOf<T> (&v)[kVecs]) {
  constexpr int lanes = kLanes<T>;
#pragma GCC unroll 8
  for (int n = 0; n < kVecs; ++n)
    v[n] = kPartial && n == kVecs - 1 ? Load<true>(p + n * lanes, tail) : Load<false>(p + n * lanes, lanes);
}

template <typename T>
static inline int64_t RowBytes(int64_t dim, T) {
  return dim * static_cast<int64_t>(sizeof(T));
}
static inline int64_t RowBytes(int64_t dim, Int8) { return dim + kInt8Header; }

static inline float HeaderAt(const char* row, int position) {
  BFloat16 number;  // rows lie at any byte
  __builtin_memcpy(&number, row + position * sizeof(number), sizeof(number));
  return LoadOne(&number);
}

// Columns [first, ...) of the row at `row`, zeros behind its tail.
template <int kVecs, bool kPartial, typename T>
static inline void LoadRow(const char* row, int64_t first, int tail, VecOf<T> (&e)[kVecs], T) {
  LoadBlock<kVecs, kPartial>(reinterpret_cast<const T*>(row) + first, tail, e);
}
template <int kVecs, bool kPartial>
static inline void LoadRow(const char* row, int64_t first, int tail, VecOf<float> (&e)[kVecs], Int8) {
  const float scale = HeaderAt(row, 0), offset = HeaderAt(row, 1);
  LoadBlock<kVecs, kPartial>(reinterpret_cast<const Int8*>(row) + kInt8Header + first, tail, e);
#pragma GCC unroll 8
  for (int n = 0; n < kVecs; ++n) {
    VecOf<float> shift = {};
    if (kPartial && n == kVecs - 1) {
      for (int i = 0; i < kLanes<float>; ++i) shift[i] = i < tail ? offset : 0.f;
    } else {
      shift += offset;
    }
    e[n] = e[n] * scale + shift;
  }
}

// The first-order weight of a feature.
template <typename T>
static inline AccOf<T> WeightOf(const void* weights, int64_t index, const char*, T) {
  return LoadOne(static_cast<const T*>(weights) + index);
}
static inline float WeightOf(const void*, int64_t, const char* row, Int8) { return HeaderAt(row, 2); }

template <int kVecs, bool kPartial, typename T>
static inline void StoreBlock(T* p, int tail, const VecOf<T> (&v)[kVecs]) {
  constexpr int lanes = kLanes<T>;
#pragma GCC unroll 8
  for (int n = 0; n < kVecs; ++n) {
    if (kPartial && n == kVecs - 1) {
      Store<true>(p + n * lanes, v[n], tail);
    } else {
      Store<false>(p + n * lanes, v[n], lanes);
    }
  }
}

template <typename I>
static inline bool InRange(I index, int64_t num_rows) {
  return static_cast<uint64_t>(static_cast<int64_t>(index)) < static_cast<uint64_t>(num_rows);
}

// One block of columns, samples [begin, end). The first block checks and prefetches the pairs a
// distance ahead, up to `last_pair`, and returns the first that is out of range, before any use of
// it; else -1.
template <typename T, typename I, int kVecs, bool kPartial>
static int64_t ForwardBlock(const ForwardArgs& a, int64_t begin, int64_t end, int64_t last_pair, int64_t first,
                            int tail) {
  typedef AccOf<T> A;
  typedef VecOf<T> V;
  const FmShape& shape = a.shape;
  const int64_t dim = shape.dim;
  const char* table = static_cast<const char*>(a.table);
  const I* indices = static_cast<const I*>(a.indices);
  const A* values = static_cast<const A*>(a.values);
  A* interaction = static_cast<A*>(a.interaction);
  A* sums = static_cast<A*>(a.sums);
  A* embeddings = static_cast<A*>(a.embeddings);
  A* linear = first == 0 ? static_cast<A*>(a.linear) : nullptr;
  const T* weights = linear ? static_cast<const T*>(a.weights) : nullptr;
  const int64_t row_bytes = RowBytes(dim, T{});
  const int64_t distance = PrefetchDistance(row_bytes);
  const int64_t* fields = shape.field_splits;

  for (int64_t b = begin; b < end; ++b) {
    const int64_t start = shape.row_splits ? shape.row_splits[b] : b * shape.pairs_per_sample;
    const int64_t stop = shape.row_splits ? shape.row_splits[b + 1] : start + shape.pairs_per_sample;
    V s[kVecs] = {}, q[kVecs] = {};
    A first_order = 0;
    auto prefetch = [&](int64_t p) __attribute__((always_inline)) {
      if (first != 0 || p + distance >= last_pair) return true;
      const I index = indices[p + distance];
      if (__builtin_expect(!InRange(index, shape.num_rows), 0)) return false;
      PrefetchRow(table + static_cast<int64_t>(index) * row_bytes, row_bytes);
      if (weights) __builtin_prefetch(weights + index);
      return true;
    };
    auto load = [&](int64_t p, V(&e)[kVecs]) {
      const char* row = table + static_cast<int64_t>(indices[p]) * row_bytes;
      LoadRow<kVecs, kPartial>(row, first, tail, e, T{});
      if (linear) first_order += WeightOf(weights, indices[p], row, T{}) * (values ? values[p] : A(1));
      if (!values) return;
      const A x = values[p];
#pragma GCC unroll 8
      for (int n = 0; n < kVecs; ++n) e[n] *= x;
    };
    auto add_field = [&](const V(&e)[kVecs], int64_t field) {
#pragma GCC unroll 8
      for (int n = 0; n < kVecs; ++n) {
        s[n] += e[n];
        q[n] += e[n] * e[n];
      }
      if (embeddings) StoreBlock<kVecs, kPartial>(embeddings + field * dim + first, tail, e);
    };
    if (!fields) {
      for (int64_t p = start; p < stop; ++p) {
        if (!prefetch(p)) return p + distance;
        V e[kVecs];
        load(p, e);
        add_field(e, p);
      }
    } else {
      for (int64_t f = 0; f < shape.num_fields; ++f) {
        V e[kVecs] = {};
        for (int64_t p = start + fields[f]; p < start + fields[f + 1]; ++p) {
          if (!prefetch(p)) return p + distance;
          V pair[kVecs];
          load(p, pair);
#pragma GCC unroll 8
          for (int n = 0; n < kVecs; ++n) e[n] += pair[n];
        }
        add_field(e, b * shape.num_fields + f);
      }
    }

    if (linear) linear[b] = first_order;
    if (sums) StoreBlock<kVecs, kPartial>(sums + b * dim + first, tail, s);
    if (a.output == Output::kSum) {
      StoreBlock<kVecs, kPartial>(interaction + b * dim + first, tail, s);
      continue;
    }
#pragma GCC unroll 8
    for (int n = 0; n < kVecs; ++n) q[n] = (s[n] * s[n] - q[n]) * A(0.5);
    if (a.output == Output::kVector) {
      StoreBlock<kVecs, kPartial>(interaction + b * dim + first, tail, q);
    } else {
#pragma GCC unroll 8
      for (int n = 1; n < kVecs; ++n) q[0] += q[n];
      interaction[b] = (first == 0 ? A(0) : interaction[b]) + HorizontalSum(q[0]);
    }
  }
  return -1;
}

template <typename T, typename I>
static int64_t Forward(const ForwardArgs& a, int64_t begin, int64_t end) {
  const FmShape& shape = a.shape;
  const int64_t first_pair = shape.row_splits ? shape.row_splits[begin] : begin * shape.pairs_per_sample;
  const int64_t last_pair = shape.row_splits ? shape.row_splits[end] : end * shape.pairs_per_sample;
  const int64_t row_bytes = RowBytes(shape.dim, T{});
  const int64_t warm = Min(last_pair, first_pair + PrefetchDistance(row_bytes));
  for (int64_t p = first_pair; p < warm; ++p) {
    const I index = static_cast<const I*>(a.indices)[p];
    if (!InRange(index, shape.num_rows)) return p;
    PrefetchRow(static_cast<const char*>(a.table) + static_cast<int64_t>(index) * row_bytes, row_bytes);
    if (a.weights) __builtin_prefetch(static_cast<const T*>(a.weights) + index);
  }
  // With several blocks of columns a sample's rows are read once per block, while still in cache.
  const int64_t step = shape.dim <= kMaxVecs * kLanes<T> ? end - begin : 1;
  int64_t bad = -1;
  for (int64_t b = begin; b < end && bad < 0; b += step) {
    ForColumnBlocks<T>(shape.dim, [&](auto vecs, auto partial, int64_t first, int tail) {
      if (bad < 0)
        bad = ForwardBlock<T, I, decltype(vecs)::value, decltype(partial)::value != 0>(a, b, b + step, last_pair, first,
                                                                                       tail);
    });
  }
  return bad;
}

// Of one occurrence; a feature that occurs though none was counted has a count of one.
template <typename A>
static inline A PriorShare(int32_t count, A softness) {
  const A n = static_cast<A>(count > 0 ? count : 1);
  return softness > 0 ? softness / ((softness + n) * n) : 1 / n;
}

// One block of columns, groups [begin, end).
template <typename T, int kVecs, bool kPartial>
static void GradientBlock(const GradientArgs& a, const PairMap& map, int64_t begin, int64_t end, int64_t first,
                          int tail) {
  typedef AccOf<T> A;
  typedef VecOf<T> V;
  const FmShape& shape = a.shape;
  const int64_t dim = shape.dim;
  const T* table = static_cast<const T*>(a.table) + first;
  const A* values = static_cast<const A*>(a.values);
  const A* sums = a.sums ? static_cast<const A*>(a.sums) + first : nullptr;
  const A* embeddings = a.embeddings ? static_cast<const A*>(a.embeddings) + first : nullptr;
  const A* g = static_cast<const A*>(a.d_interaction);
  const A* de = a.d_embeddings ? static_cast<const A*>(a.d_embeddings) + first : nullptr;
  T* rows = a.rows ? static_cast<T*>(a.rows) + first : nullptr;
  A* d_values = static_cast<A*>(a.d_values);
  const T* weights = first == 0 ? static_cast<const T*>(a.weights) : nullptr;
  const A* d_linear = static_cast<const A*>(a.d_linear);
  const A pull = static_cast<A>(2 * a.l2), pull_linear = static_cast<A>(2 * a.l2_linear);
  const int32_t* counts = a.counts;
  const A prior = static_cast<A>(a.prior), prior_linear = static_cast<A>(a.prior_linear);
  const A softness = static_cast<A>(a.prior_softness);
  // Each is a cache line of its own.
  const bool read_weights = weights && (d_values || pull_linear != 0 || (counts && prior_linear != 0));
  const int64_t* row_of = a.groups->rows();
  const int64_t* starts = a.groups->starts();
  const PairPositions positions = a.groups->positions();
  const int64_t stop = starts[end];
  const int64_t row_bytes = dim * static_cast<int64_t>(sizeof(T));
  const int64_t distance = PrefetchDistance(row_bytes);

  for (int64_t u = begin; u < end; ++u) {
    if (first == 0) {
      if (u + distance < end)
        PrefetchRow(reinterpret_cast<const char*>(table) + row_of[u + distance] * row_bytes, row_bytes);
      if (read_weights && u + distance < end) __builtin_prefetch(weights + row_of[u + distance]);
      if (counts && u + distance < end) __builtin_prefetch(counts + row_of[u + distance]);
    }
    V row[kVecs], total[kVecs] = {};
    LoadBlock<kVecs, kPartial>(table + row_of[u] * dim, tail, row);
    const A weight = read_weights ? LoadOne(weights + row_of[u]) : A(0);
    A weight_total = 0, occurrences = 0;
    for (int64_t j = starts[u]; j < starts[u + 1]; ++j) {
      if (first == 0 && j + distance < stop) {
        const int64_t ahead = PositionOf(positions, j + distance);
        const int64_t sample = SampleOf(map, ahead);
        if (values) __builtin_prefetch(values + ahead);
        if (weights) __builtin_prefetch(d_linear + sample);
        if (a.output == Output::kScalar) {
          __builtin_prefetch(g + sample);
        } else {
          PrefetchRow(reinterpret_cast<const char*>(g + sample * dim), dim * sizeof(A));
        }
        if (sums) PrefetchRow(reinterpret_cast<const char*>(sums + sample * dim), dim * sizeof(A));
        if (de) PrefetchRow(reinterpret_cast<const char*>(de + FieldOf(map, ahead) * dim), dim * sizeof(A));
      }
      const int64_t p = PositionOf(positions, j);
      const int64_t b = SampleOf(map, p);
      const A x = values ? values[p] : A(1);
      if (x != 0) occurrences += 1;
      V d[kVecs];
      if (a.output == Output::kSum) {
        LoadBlock<kVecs, kPartial>(g + b * dim + first, tail, d);
      } else {
        V e[kVecs];
        LoadBlock<kVecs, kPartial>(sums + b * dim, tail, d);
        if (shape.field_splits) {
          LoadBlock<kVecs, kPartial>(embeddings + FieldOf(map, p) * dim, tail, e);
        } else {
#pragma GCC unroll 8
          for (int n = 0; n < kVecs; ++n) e[n] = row[n] * x;
        }
        if (a.output == Output::kScalar) {
#pragma GCC unroll 8
          for (int n = 0; n < kVecs; ++n) d[n] = (d[n] - e[n]) * g[b];
        } else {
          V gv[kVecs];
          LoadBlock<kVecs, kPartial>(g + b * dim + first, tail, gv);
#pragma GCC unroll 8
          for (int n = 0; n < kVecs; ++n) d[n] = (d[n] - e[n]) * gv[n];
        }
      }
      if (de) {
        V extra[kVecs];
        LoadBlock<kVecs, kPartial>(de + FieldOf(map, p) * dim, tail, extra);
#pragma GCC unroll 8
        for (int n = 0; n < kVecs; ++n) d[n] += extra[n];
      }
      if (d_values) {
        V dot = {};
#pragma GCC unroll 8
        for (int n = 0; n < kVecs; ++n) dot += d[n] * row[n];
        d_values[p] = (first == 0 ? A(0) : d_values[p]) + HorizontalSum(dot);
        if (weights) d_values[p] += weight * d_linear[b];
      }
      if (weights) weight_total += d_linear[b] * x;
#pragma GCC unroll 8
      for (int n = 0; n < kVecs; ++n) total[n] += d[n] * x;
    }
    const A share = counts ? occurrences * PriorShare(counts[row_of[u]], softness) : A(0);
    const A here = pull + share * prior, here_linear = pull_linear + share * prior_linear;
    if (here != 0) {
#pragma GCC unroll 8
      for (int n = 0; n < kVecs; ++n) total[n] += row[n] * here;
    }
    if (rows) StoreBlock<kVecs, kPartial>(rows + u * dim, tail, total);
    if (weights) StoreOne(static_cast<T*>(a.weight_rows) + u, weight_total + weight * here_linear);
  }
}

template <typename T>
static void Gradient(const GradientArgs& a, const PairMap& map, int64_t begin, int64_t end) {
  ForColumnBlocks<T>(a.shape.dim, [&](auto vecs, auto partial, int64_t first, int tail) {
    GradientBlock<T, decltype(vecs)::value, decltype(partial)::value != 0>(a, map, begin, end, first, tail);
  });
}

static uint64_t Touch(const char* table, int64_t row_bytes, const int64_t* indices, int64_t begin, int64_t end,
                      int64_t n, int64_t distance) {
  WordBits seen = {};
  uint64_t tail = 0;
  for (int64_t p = begin; p < end; ++p) {
    if (distance && p + distance < n)
      PrefetchRow(table + static_cast<uint64_t>(indices[p + distance]) * row_bytes, row_bytes);
    const char* row = table + indices[p] * row_bytes;
    int64_t offset = 0;
    for (; offset + kVecBytes <= row_bytes; offset += kVecBytes) {
      WordBits word;
      __builtin_memcpy(&word, row + offset, sizeof(word));
      seen ^= word;
    }
    for (; offset < row_bytes; ++offset) tail ^= static_cast<unsigned char>(row[offset]);
  }
  for (unsigned i = 0; i < sizeof(seen) / sizeof(seen[0]); ++i) tail ^= seen[i];
  return tail;
}

#include "sparse_update-inl.h"

extern const CpuKernels kKernels;
const CpuKernels kKernels = {
    {{Forward<float, int32_t>, Forward<float, int64_t>},
     {Forward<double, int32_t>, Forward<double, int64_t>},
     {Forward<BFloat16, int32_t>, Forward<BFloat16, int64_t>},
     {Forward<Float16, int32_t>, Forward<Float16, int64_t>},
     {Forward<Int8, int32_t>, Forward<Int8, int64_t>}},
    {Gradient<float>, Gradient<double>, Gradient<BFloat16>, Gradient<Float16>},
    {Update<float>, Update<double>, Update<BFloat16>, Update<Float16>},
    Touch,
};

}  // namespace DEEPFM_ISA
}  // namespace deepfm
