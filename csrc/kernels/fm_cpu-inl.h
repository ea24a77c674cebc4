// The body of the CPU loops, compiled once per instruction set by fm_cpu_<set>.cc, which defines
// DEEPFM_ISA (a namespace) before including this. No standard templates are used here: an inline
// function compiled for AVX-512 must not become everyone's copy of it.

#include <immintrin.h>
#include <stdint.h>

#include "cpu_kernels.h"

namespace deepfm {
namespace DEEPFM_ISA {

#include "vec-inl.h"
// on top of it
#include "columns-inl.h"

static inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

#include "fields-inl.h"

// Rows that are fetched ahead of their use, unless they are so few that they stay in the cache. Null is harmless, and
// so is any number of a row.
struct Prefetcher {
  static constexpr int64_t kInCache = 1 << 18;  // bytes
  uintptr_t base;
  uint64_t row_bytes;
  bool straddles;  // a row may lie in one line more than its size says: asked once, as a branch on each is mispredicted

  Prefetcher(const void* rows, int64_t count, int64_t row_bytes)
      : base(count * row_bytes > kInCache ? reinterpret_cast<uintptr_t>(rows) : 0),
        row_bytes(static_cast<uint64_t>(row_bytes)),
        straddles(base % 64 != 0 || (row_bytes % 64 != 0 && (row_bytes & (row_bytes - 1)) != 0)) {}

  // Always inlined: as a function of its own it has no effect that GCC counts, and calls to it are dropped.
  DEEPFM_INLINE void Fetch(int64_t row) const {
    if (!base) return;
    const char* start = reinterpret_cast<const char*>(base + static_cast<uint64_t>(row) * row_bytes);
    for (uint64_t offset = 0; offset < row_bytes; offset += 64) __builtin_prefetch(start + offset);
    if (straddles) __builtin_prefetch(start + row_bytes - 1);
  }
};

// How many rows ahead to fetch, to hide the latency of memory: not more than so many, and so many bytes, which would be
// evicted again before they are used. A forward, which does least with a row, gains by more than the other loops.
static inline int64_t PrefetchDistance(int64_t row_bytes, int64_t most_rows = 24, int64_t most_bytes = 6144) {
  const int64_t rows = most_bytes / row_bytes;
  return rows > most_rows ? most_rows : rows < 4 ? 4 : rows;
}
// ---------------------------------------------------------------------------------------------
// Forward

// The rows that the pairs name. Their owner may change the indices at any time, so that an index is read once, checked
// and used; what is prefetched is not checked, as fetching ahead from any address is harmless.
template <typename T, typename I>
struct PairRows {
  const char* table;
  const I* indices;
  const T* weights;
  int64_t num_rows, row_bytes, distance;
  Prefetcher fetch_row, fetch_weight;

  explicit PairRows(const ForwardArgs& a)
      : table(static_cast<const char*>(a.table)),
        indices(static_cast<const I*>(a.indices)),
        weights(a.linear ? static_cast<const T*>(a.weights) : nullptr),
        num_rows(a.shape.num_rows),
        row_bytes(RowBytes(a.shape.dim, T{})),
        distance(PrefetchDistance(row_bytes, 64, 12288)),
        fetch_row(table, num_rows, row_bytes),
        fetch_weight(weights, num_rows, sizeof(T)) {}

  DEEPFM_INLINE int64_t Index(int64_t p) const { return __atomic_load_n(indices + p, __ATOMIC_RELAXED); }
  DEEPFM_INLINE bool InRange(int64_t index) const {
    return __builtin_expect(static_cast<uint64_t>(index) < static_cast<uint64_t>(num_rows), 1);
  }
  DEEPFM_INLINE const char* At(int64_t index) const { return table + index * row_bytes; }
  DEEPFM_INLINE void Fetch(int64_t p) const {
    const int64_t index = Index(p);
    fetch_row.Fetch(index);
    fetch_weight.Fetch(index);
  }
};

// One block of columns, samples [begin, end). Returns the first pair that is out of range, or -1. The first block also
// fetches rows ahead, up to that of `last_pair`, and computes the first order.
template <typename T, typename I, int kVecs, bool kPartial>
static int64_t ForwardBlock(const ForwardArgs& a, const PairRows<T, I>& rows, int64_t begin, int64_t end,
                            int64_t last_pair, int64_t first, int tail) {
  typedef AccOf<T> A;
  typedef Columns<A, kVecs, kPartial> Block;
  const FmShape& shape = a.shape;
  const int64_t dim = shape.dim;
  const int64_t* fields = shape.field_splits;
  const A* values = static_cast<const A*>(a.values);
  A* interaction = static_cast<A*>(a.interaction);
  A* sums = static_cast<A*>(a.sums);
  A* embeddings = static_cast<A*>(a.embeddings);
  A* linear = first == 0 ? static_cast<A*>(a.linear) : nullptr;
  const int64_t distance = rows.distance;

  for (int64_t b = begin; b < end; ++b) {
    const int64_t start = shape.row_splits ? shape.row_splits[b] : b * shape.pairs_per_sample;
    const int64_t stop = shape.row_splits ? shape.row_splits[b + 1] : start + shape.pairs_per_sample;
    Block sum = {}, squares = {};
    A first_order = 0;
    // The pair's row times its value; false if there is no such row.
    auto load_pair = [&](int64_t p, Block* e) {
      if (first == 0 && p + distance < last_pair) rows.Fetch(p + distance);
      const int64_t index = rows.Index(p);
      if (!rows.InRange(index)) return false;
      const char* row = rows.At(index);
      *e = Block::LoadRow(row, first, tail, T{});
      if (linear) first_order += WeightOf(rows.weights, index, row, T{}) * (values ? values[p] : A(1));
      if (values) e->Scale(values[p]);
      return true;
    };
    auto add_field = [&](const Block& e, int64_t field) {
      sum.Add(e);
      squares.AddSquare(e);
      if (embeddings) e.Store(embeddings + field * dim + first, tail);
    };
    if (!fields) {
      for (int64_t p = start; p < stop; ++p) {
        Block e;
        if (!load_pair(p, &e)) return p;
        add_field(e, p);
      }
    } else {
      for (int64_t f = 0; f < shape.num_fields; ++f) {
        Block e = {};
        for (int64_t p = start + fields[f]; p < start + fields[f + 1]; ++p) {
          Block pair;
          if (!load_pair(p, &pair)) return p;
          e.Add(pair);
        }
        add_field(e, b * shape.num_fields + f);
      }
    }

    if (linear) linear[b] = first_order;
    if (sums) sum.Store(sums + b * dim + first, tail);
    if (a.output == Output::kSum) {
      sum.Store(interaction + b * dim + first, tail);
    } else {
      const Block vector = HalfOfSquareMinus(sum, squares);
      if (a.output == Output::kVector) {
        vector.Store(interaction + b * dim + first, tail);
      } else {
        interaction[b] = (first == 0 ? A(0) : interaction[b]) + vector.Total();
      }
    }
  }
  return -1;
}

template <typename T, typename I>
static int64_t Forward(const ForwardArgs& a, int64_t begin, int64_t end) {
  const FmShape& shape = a.shape;
  const PairRows<T, I> rows(a);
  const int64_t first_pair = shape.row_splits ? shape.row_splits[begin] : begin * shape.pairs_per_sample;
  const int64_t last_pair = shape.row_splits ? shape.row_splits[end] : end * shape.pairs_per_sample;
  const int64_t warm = Min(last_pair, first_pair + rows.distance);
  for (int64_t p = first_pair; p < warm; ++p) rows.Fetch(p);
  // With several blocks of columns a sample's rows are read once per block, while still in cache.
  const int64_t step = shape.dim <= kMaxVecs * kLanes<T> ? end - begin : 1;
  int64_t bad = -1;
  for (int64_t b = begin; b < end && bad < 0; b += step) {
    ForColumnBlocks<T>(shape.dim, [&](auto vecs, auto partial, int64_t first, int tail) {
      if (bad < 0)
        bad = ForwardBlock<T, I, decltype(vecs)::value, decltype(partial)::value != 0>(a, rows, b, b + step, last_pair,
                                                                                       first, tail);
    });
  }
  return bad;
}

// Where the interaction is not the plain one: `step` samples at a time, to find their embeddings in cache. They are
// kept in `kept` if nobody wants them. The rows of the next samples come in meanwhile.
template <typename T, typename I>
static int64_t ForwardByFields(const ForwardArgs& a, int64_t begin, int64_t end, int64_t step, void* kept) {
  typedef AccOf<T> A;
  const FmShape& shape = a.shape;
  const PairRows<T, I> rows(a);
  auto first_pair = [&](int64_t b) { return shape.row_splits ? shape.row_splits[b] : b * shape.pairs_per_sample; };
  ForwardArgs of_some = a;
  for (int64_t from = begin; from < end; from += step) {
    const int64_t to = Min(from + step, end);
    const int64_t before = FirstField(shape, from) * shape.dim * static_cast<int64_t>(sizeof(A));
    // Forward counts from the embeddings of the first of all samples.
    if (kept) of_some.embeddings = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(kept) - before);
    const int64_t bad = Forward<T, I>(of_some, from, to);
    if (bad >= 0) return bad;
    const char* e = kept ? static_cast<const char*>(kept) : static_cast<const char*>(a.embeddings) + before;
    for (int64_t b = from; b < to; ++b) {
      if (b + step < end)
        for (int64_t p = first_pair(b + step); p < first_pair(b + step + 1); ++p) rows.Fetch(p);
      e += Interact<A>(a, b, reinterpret_cast<const A*>(e)) * static_cast<int64_t>(sizeof(A));
    }
  }
  return -1;
}

// ---------------------------------------------------------------------------------------------
// Gradient

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

// Of one occurrence; a feature that occurs though none was counted has a count of one.
template <typename A>
static inline A PriorShare(int32_t count, A softness) {
  const A n = count < 1 ? A(1) : static_cast<A>(count);
  return softness > 0 ? softness / ((softness + n) * n) : 1 / n;
}

// One block of columns, groups [begin, end). The first block also fetches ahead, up to group `last`, and computes the
// first order.
template <typename T, int kVecs, bool kPartial>
static void GradientBlock(const GradientArgs& a, const PairMap& map, int64_t begin, int64_t end, int64_t last,
                          int64_t first, int tail) {
  typedef AccOf<T> A;
  typedef Columns<A, kVecs, kPartial> Block;
  const int64_t dim = a.shape.dim;
  const T* table = static_cast<const T*>(a.table);
  const A* values = static_cast<const A*>(a.values);
  const A* sums = a.output == Output::kSum ? nullptr : static_cast<const A*>(a.sums);
  const A* embeddings = a.output == Output::kSum ? nullptr : static_cast<const A*>(a.embeddings);
  const A* g = static_cast<const A*>(a.d_interaction);
  const A* de = static_cast<const A*>(a.d_embeddings);
  T* rows = static_cast<T*>(a.rows);
  A* d_values = static_cast<A*>(a.d_values);
  const T* weights = first == 0 ? static_cast<const T*>(a.weights) : nullptr;
  const A* d_linear = static_cast<const A*>(a.d_linear);
  const A l2 = static_cast<A>(2 * a.l2), l2_linear = static_cast<A>(2 * a.l2_linear);
  const int32_t* counts = a.counts;
  const A prior = static_cast<A>(a.prior), prior_linear = static_cast<A>(a.prior_linear);
  const A softness = static_cast<A>(a.prior_softness);
  // Each is a cache line of its own.
  const bool read_table = d_values || l2 != 0 || (counts && prior != 0) || (sums && !embeddings);
  const bool read_weights = weights && (d_values || l2_linear != 0 || (counts && prior_linear != 0));
  const int64_t* row_of = a.groups->rows();
  const int64_t* starts = a.groups->starts();
  const PairPositions positions = a.groups->positions();
  const int64_t last_pair = starts[last];
  const int64_t distance = PrefetchDistance(dim * static_cast<int64_t>(sizeof(T)));

  constexpr int64_t kSize = sizeof(A);
  const FmShape& shape = a.shape;
  const int64_t V = shape.num_rows, B = shape.num_samples, n = shape.num_pairs;
  const Prefetcher fetch_row(read_table ? table : nullptr, V, dim * static_cast<int64_t>(sizeof(T))),
      fetch_weight(read_weights ? weights : nullptr, V, sizeof(T)), fetch_count(counts, V, sizeof(int32_t)),
      fetch_value(values, n, kSize), fetch_g(g, B, a.output == Output::kScalar ? kSize : dim * kSize),
      fetch_d_linear(weights ? d_linear : nullptr, B, kSize), fetch_sum(sums, B, dim * kSize),
      fetch_e(embeddings, n, dim * kSize), fetch_de(de, n, dim * kSize);
  auto fetch_group = [&](int64_t row) __attribute__((always_inline)) {
    fetch_row.Fetch(row);
    fetch_weight.Fetch(row);
    fetch_count.Fetch(row);
  };
  auto fetch_pair = [&](int64_t p) __attribute__((always_inline)) {
    const int64_t b = SampleOf(map, p);
    fetch_value.Fetch(p);
    fetch_g.Fetch(b);
    fetch_d_linear.Fetch(b);
    fetch_sum.Fetch(b);
    if (embeddings || de) {
      const int64_t field = FieldOf(map, p);
      fetch_e.Fetch(field);
      fetch_de.Fetch(field);
    }
  };
  // The gradient of the embedding of the pair's field, which is the row times x unless the embeddings are at hand.
  auto field_gradient = [&](int64_t p, int64_t b, const Block& row, A x) {
    Block d;
    if (!sums) {
      d = Block::Load(g + b * dim + first, tail);
    } else {
      d = Block::Load(sums + b * dim + first, tail);
      if (embeddings) {
        d.Subtract(Block::Load(embeddings + FieldOf(map, p) * dim + first, tail));
      } else {
        d.SubtractScaled(row, x);
      }
      if (a.output == Output::kScalar) {
        d.Scale(g[b]);
      } else {
        d.Multiply(Block::Load(g + b * dim + first, tail));
      }
    }
    if (de) d.Add(Block::Load(de + FieldOf(map, p) * dim + first, tail));
    return d;
  };

  for (int64_t u = begin; u < end; ++u) {
    if (first == 0 && u + distance < last) fetch_group(row_of[u + distance]);
    Block row = {}, total = {};
    if (read_table) row = Block::Load(table + row_of[u] * dim + first, tail);
    const A weight = read_weights ? LoadOne(weights + row_of[u]) : A(0);
    A weight_total = 0, occurrences = 0;
    for (int64_t j = starts[u]; j < starts[u + 1]; ++j) {
      if (first == 0 && j + distance < last_pair) fetch_pair(PositionOf(positions, j + distance));
      const int64_t p = PositionOf(positions, j), b = SampleOf(map, p);
      const A x = values ? values[p] : A(1);
      if (x != 0) occurrences += 1;
      const Block d = field_gradient(p, b, row, x);
      if (d_values) {
        d_values[p] = (first == 0 ? A(0) : d_values[p]) + Dot(d, row);
        if (weights) d_values[p] += weight * d_linear[b];
      }
      if (weights) weight_total += d_linear[b] * x;
      total.AddScaled(d, x);
    }
    const A share = counts ? occurrences * PriorShare(counts[row_of[u]], softness) : A(0);
    const A strength = l2 + share * prior;
    if (strength != 0) total.AddScaled(row, strength);
    if (rows) total.Store(rows + (u - a.first_group) * dim + first, tail);
    if (weights)
      StoreOne(static_cast<T*>(a.weight_rows) + (u - a.first_group),
               weight_total + weight * (l2_linear + share * prior_linear));
  }
}

template <typename T>
static void Gradient(const GradientArgs& a, const PairMap& map, int64_t begin, int64_t end, int64_t last) {
  // With several blocks of columns a few groups at a time, whose pairs are then still in cache.
  const int64_t step = a.shape.dim <= kMaxVecs * kLanes<T> ? end - begin : 8;
  for (int64_t u = begin; u < end; u += step) {
    ForColumnBlocks<T>(a.shape.dim, [&](auto vecs, auto partial, int64_t first, int tail) {
      GradientBlock<T, decltype(vecs)::value, decltype(partial)::value != 0>(a, map, u, Min(u + step, end), last, first,
                                                                             tail);
    });
  }
}

static uint64_t ReadRows(const char* table, int64_t num_rows, int64_t row_bytes, const int64_t* indices, int64_t begin,
                         int64_t end, int64_t n, int64_t distance) {
  const Prefetcher fetch(table, num_rows, row_bytes);
  WordBits seen = {};
  uint64_t tail = 0;
  for (int64_t p = begin; p < end; ++p) {
    if (distance && p + distance < n) fetch.Fetch(indices[p + distance]);
    const int64_t index = __atomic_load_n(indices + p, __ATOMIC_RELAXED);
    if (static_cast<uint64_t>(index) >= static_cast<uint64_t>(num_rows)) continue;
    const char* row = table + index * row_bytes;
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
#include "top_products-inl.h"

extern const CpuKernels kKernels;
const CpuKernels kKernels = {
    {{Forward<float, int32_t>, Forward<float, int64_t>},
     {Forward<double, int32_t>, Forward<double, int64_t>},
     {Forward<BFloat16, int32_t>, Forward<BFloat16, int64_t>},
     {Forward<Float16, int32_t>, Forward<Float16, int64_t>},
     {Forward<Int8, int32_t>, Forward<Int8, int64_t>}},
    {{ForwardByFields<float, int32_t>, ForwardByFields<float, int64_t>},
     {ForwardByFields<double, int32_t>, ForwardByFields<double, int64_t>},
     {ForwardByFields<BFloat16, int32_t>, ForwardByFields<BFloat16, int64_t>},
     {ForwardByFields<Float16, int32_t>, ForwardByFields<Float16, int64_t>},
     {ForwardByFields<Int8, int32_t>, ForwardByFields<Int8, int64_t>}},
    {FieldGradient<float>, FieldGradient<double>},
    {Gradient<float>, Gradient<double>, Gradient<BFloat16>, Gradient<Float16>},
    {Update<float>, Update<double>, Update<BFloat16>, Update<Float16>},
    ReadRows,
    Products,
};

}  // namespace DEEPFM_ISA
}  // namespace deepfm
