// What the pairs of a group add up to.
//
// The pairs of a group of up to kChunk are added in ascending order by whoever needs the sum. Longer groups are cut
// where the position of a pair, in the order of all groups, is a multiple of kChunk: SumChunks adds the pairs of each
// piece, AddChunks the pieces of the groups that have very many, and whoever needs the sum what is left, in order. So
// no sum depends on what runs when.
#ifndef DEEPFM_CUDA_SUMS_CUH_
#define DEEPFM_CUDA_SUMS_CUH_

#include "rows.cuh"

namespace deepfm {
namespace cuda {

constexpr int kChunk = 32;

template <int W>
struct Sum {
  Vec<W> row = {};
  float occurrences = 0;  // pairs whose value is not 0
  float weight = 0;       // of the first-order weight

  __device__ __forceinline__ void Add(const Sum& more) {
    DEEPFM_UNROLL
    for (int i = 0; i < W; ++i) row.v[i] += more.row.v[i];
    occurrences += more.occurrences;
    weight += more.weight;
  }
};

// A group, of which a lane holds piece `piece` of the row and of the sum, if there is such a piece.
struct Group {
  int64_t u, row;
  int32_t begin, end;  // of its positions
};
__device__ __forceinline__ Group GroupAt(const Groups& groups, int64_t u) {
  return {u, groups.rows[u], groups.starts[u], groups.starts[u + 1]};
}

// The sums of pieces of groups. Of chunk c, [c, 0] is the end or the middle of a group that began before, [c, 1] the
// beginning of one that goes on.
struct Chunks {
  float* sums = nullptr;  // [chunks, 2, stride]: K columns, and from `more` on occurrences and weight
  int64_t more = 0, stride = 0;
  int* num_long = nullptr;  // groups of many chunks, in any order
  int32_t* long_groups = nullptr;

  __device__ __forceinline__ float* At(int64_t chunk, int begins) const { return sums + (2 * chunk + begins) * stride; }
  template <int W>
  __device__ __forceinline__ Sum<W> Read(int64_t chunk, int begins, int64_t column) const {
    Sum<W> sum;
    sum.row = ReadFloats<W>(At(chunk, begins) + column);
    sum.occurrences = At(chunk, begins)[more];
    sum.weight = At(chunk, begins)[more + 1];
    return sum;
  }
};

// The sum of a group at `column`. Pairs has a type Row, of what it must know of the group's row, and
//   Add<kAtOnce>(begin, end, row, lane, piece, has_piece, &sum)   of positions [begin, end)
template <int W, typename Pairs>
__device__ __forceinline__ Sum<W> SumOf(const Pairs& pairs, const Chunks& chunks, const Group& group,
                                        const typename Pairs::Row& row, const Lane& lane, int piece, bool has_piece) {
  Sum<W> sum;
  if (group.end - group.begin <= kChunk) {
    pairs.template Add<1>(group.begin, group.end, row, lane, piece, has_piece, &sum);
  } else if (has_piece) {
    const int first = group.begin / kChunk, last = (group.end - 1) / kChunk;
    sum = chunks.Read<W>(first, 1, static_cast<int64_t>(piece) * W);
    if (last - first < kManyChunks) {
      DEEPFM_UNROLL_BY(2)
      for (int c = first + 1; c <= last; ++c) sum.Add(chunks.Read<W>(c, 0, static_cast<int64_t>(piece) * W));
    }
  }
  return sum;
}

template <int W, typename Pairs>
__global__ void __launch_bounds__(kBlock, 1)
    SumChunks(Pairs pairs, Groups groups, Chunks chunks, Lanes lanes, const Report* report) {
  if (Failed(report)) return;
  constexpr int kAtOnce = W < 8 ? 4 : 2;  // as many as registers hold
  const Lane lane(lanes);
  const int64_t chunk = WarpOfGrid() * lane.groups + lane.group, n = groups.num_pairs;
  if (chunk * kChunk >= n) return;
  const int begin = static_cast<int>(chunk * kChunk), end = static_cast<int>(n - begin < kChunk ? n : begin + kChunk);
  for (int begins = 0; begins < 2; ++begins) {
    const Group group = GroupAt(groups, groups.group_of[begins ? end - 1 : begin]);
    if (group.end - group.begin <= kChunk || (group.begin >= begin) != begins) continue;
    float* sums = chunks.At(chunk, begins);
    for (int piece = lane.part; piece - lane.part < lanes.pieces; piece += 32) {
      const bool has_piece = piece < lanes.pieces;
      Sum<W> sum;
      pairs.template Add<kAtOnce>(begins ? group.begin : begin, group.end < end ? group.end : end,
                                  pairs.ReadRow(group.row, piece, has_piece), lane, piece, has_piece, &sum);
      if (has_piece) WriteFloats(sums + static_cast<int64_t>(piece) * W, sum.row);
      if (piece == 0) {
        sums[chunks.more] = sum.occurrences;
        sums[chunks.more + 1] = sum.weight;
        if (begins && (group.end - 1) / kChunk - chunk >= kManyChunks)
          chunks.long_groups[atomicAdd(chunks.num_long, 1)] = static_cast<int32_t>(group.u);
      }
    }
  }
}

void AddChunks(const Groups& groups, const Chunks& chunks, const Report* report, Stream stream);
Chunks NewChunks(int64_t n, int64_t dim, Memory* memory, Stream stream);

// The sums of all groups that are longer than a chunk.
template <int W, typename Pairs>
Chunks SumLongGroups(const Pairs& pairs, const Groups& groups, int64_t dim, Lanes lanes, const Report* report,
                     Memory* memory, Stream stream) {
  if (groups.num_pairs <= kChunk) return {};
  const Chunks chunks = NewChunks(groups.num_pairs, dim, memory, stream);
  const int64_t num_chunks = (groups.num_pairs + kChunk - 1) / kChunk;
  Launch(SumChunks<W, Pairs>, BlocksOf(num_chunks << lanes.log_lanes), kBlock, stream, pairs, groups, chunks, lanes,
         report);
  AddChunks(groups, chunks, report, stream);
  return chunks;
}

// As many blocks as the device holds at once, or as groups need: each goes on to the next ones.
inline int64_t BlocksOfGroups(const Groups& groups, Lanes lanes) {
  return std::min<int64_t>(BlocksOf(groups.num_pairs << lanes.log_lanes), Processors() * (2048 / kBlock));
}

// Finds the sample and the field of a pair.
struct PairMap {
  uint64_t reciprocal;  // 2^64 / pairs_per_sample, rounded up
  int64_t pairs_per_sample;
  const int32_t* sample_of_pair;   // [n], or null: pairs_per_sample each
  const int32_t* field_of_column;  // [P], or null: a pair is a field
  int64_t num_fields;

  __device__ __forceinline__ int64_t SampleOf(int32_t p) const {
    if (sample_of_pair) return sample_of_pair[p];
    return reciprocal ? static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(p), reciprocal)) : p;
  }
  __device__ __forceinline__ int64_t FieldOf(int32_t p, int64_t sample) const {
    return field_of_column ? sample * num_fields + field_of_column[p - sample * pairs_per_sample] : p;
  }
};

PairMap MakePairMap(const FmShape& shape, const Report* report, Memory* memory, Stream stream);

// The pairs of a factorization machine, as the gradient adds them.
template <typename T, int W>
struct FmPairs {
  GradientArgs a;
  PairMap map;
  Scalars scalars;
  const int32_t* positions;
  bool read_table, read_weights;

  struct Row {
    Word<T, W> piece;
    float weight;
  };

  FmPairs(const GradientArgs& args, const PairMap& pair_map, const Scalars& on_device, const Groups& groups)
      : a(args), map(pair_map), scalars(on_device), positions(groups.positions) {
    const bool prior = a.counts && (scalars.priors || a.prior != 0);
    const bool prior_linear = a.counts && (scalars.priors || a.prior_linear != 0);
    read_table = a.d_values || a.l2 != 0 || prior || (a.output != Output::kSum && !a.embeddings);
    read_weights = a.weights && (a.d_values || a.l2_linear != 0 || prior_linear);
  }

  __device__ __forceinline__ Row ReadRow(int64_t row, int piece, bool has_piece) const {
    Row read = {Word<T, W>{}, 0};
    if (read_table && has_piece)
      read.piece = ReadWord<T, W>(static_cast<const T*>(a.table) + row * a.shape.dim + static_cast<int64_t>(piece) * W);
    if (read_weights && piece == 0) read.weight = ToFloat(static_cast<const T*>(a.weights)[row]);
    return read;
  }

  template <int kAtOnce>
  __device__ __forceinline__ void Add(int begin, int end, const Row& row, const Lane& lane, int piece, bool has_piece,
                                      Sum<W>* sum) const {
    const int64_t dim = a.shape.dim, column = has_piece ? static_cast<int64_t>(piece) * W : 0;
    const float* values = static_cast<const float*>(a.values);
    const float* g = static_cast<const float*>(a.d_interaction);
    const float* of_sums = a.output == Output::kSum ? g : static_cast<const float*>(a.sums);
    const float* embeddings = static_cast<const float*>(a.embeddings);
    const float* de = static_cast<const float*>(a.d_embeddings);
    const float* d_linear = a.weights ? static_cast<const float*>(a.d_linear) : nullptr;
    float* d_values = static_cast<float*>(a.d_values);
    const Vec<W> elements = Widen<T, W>(row.piece);
    DEEPFM_UNROLL_BY(1)
    for (int j = begin; j < end; j += kAtOnce) {
      int32_t p[kAtOnce];
      int64_t b[kAtOnce];
      float x[kAtOnce], factor[kAtOnce], linear[kAtOnce];
      Vec<W> d[kAtOnce], more[kAtOnce];
      DEEPFM_UNROLL
      for (int i = 0; i < kAtOnce; ++i) p[i] = positions[j + i < end ? j + i : end - 1];
      DEEPFM_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        b[i] = map.SampleOf(p[i]);
        x[i] = values ? __ldg(values + p[i]) : 1.f;
        d[i] = ReadFloats<W>(of_sums + b[i] * dim + column);
        factor[i] = a.output == Output::kScalar ? __ldg(g + b[i]) : 1.f;
        linear[i] = d_linear ? __ldg(d_linear + b[i]) : 0.f;
        more[i] = {};
        if (de) more[i] = ReadFloats<W>(de + map.FieldOf(p[i], b[i]) * dim + column);
      }
      DEEPFM_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        if (a.output != Output::kSum) {
          if (embeddings) {
            const Vec<W> e = ReadFloats<W>(embeddings + map.FieldOf(p[i], b[i]) * dim + column);
            DEEPFM_UNROLL
            for (int k = 0; k < W; ++k) d[i].v[k] -= e.v[k];
          } else {
            DEEPFM_UNROLL
            for (int k = 0; k < W; ++k) d[i].v[k] -= elements.v[k] * x[i];
          }
        }
        if (a.output == Output::kScalar) {
          DEEPFM_UNROLL
          for (int k = 0; k < W; ++k) d[i].v[k] *= factor[i];
        } else if (a.output == Output::kVector) {
          const Vec<W> factors = ReadFloats<W>(g + b[i] * dim + column);
          DEEPFM_UNROLL
          for (int k = 0; k < W; ++k) d[i].v[k] *= factors.v[k];
        }
        float dot = 0;
        DEEPFM_UNROLL
        for (int k = 0; k < W; ++k) {
          d[i].v[k] += more[i].v[k];
          dot += d[i].v[k] * elements.v[k];
        }
        if (j + i >= end) continue;
        DEEPFM_UNROLL
        for (int k = 0; k < W; ++k) sum->row.v[k] += d[i].v[k] * x[i];
        sum->occurrences += x[i] != 0 ? 1.f : 0.f;
        sum->weight += linear[i] * x[i];
        if (d_values) {
          dot = lane.RowSum(has_piece ? dot : 0.f);
          if (lane.part == 0) d_values[p[i]] = (piece == 0 ? row.weight * linear[i] : d_values[p[i]]) + dot;
        }
      }
    }
  }

  // The gradient of a group's row and weight: the sum of its pairs, and the penalties.
  __device__ __forceinline__ Sum<W> Gradient(const Chunks& chunks, const Group& group, const Row& row, const Lane& lane,
                                             int piece, bool has_piece) const {
    Sum<W> sum = SumOf<W>(*this, chunks, group, row, lane, piece, has_piece);
    const float scale = scalars.penalty ? *scalars.penalty : 1.f;
    float strength = 2 * static_cast<float>(a.l2) * scale,
          strength_linear = 2 * static_cast<float>(a.l2_linear) * scale;
    if (a.counts) {
      float prior = static_cast<float>(a.prior), prior_linear = static_cast<float>(a.prior_linear);
      float softness = static_cast<float>(a.prior_softness);
      if (scalars.priors) {
        prior = scalars.priors[0] / static_cast<float>(a.shape.num_samples);
        prior_linear = scalars.priors[1] / static_cast<float>(a.shape.num_samples);
        softness = scalars.priors[2];
      }
      const int32_t count = a.counts[group.row];
      const float n = count < 1 ? 1.f : static_cast<float>(count);
      const float share = sum.occurrences * (softness > 0 ? softness / ((softness + n) * n) : 1 / n) * scale;
      strength += share * prior;
      strength_linear += share * prior_linear;
    }
    if (strength != 0) {
      const Vec<W> elements = Widen<T, W>(row.piece);
      DEEPFM_UNROLL
      for (int k = 0; k < W; ++k) sum.row.v[k] += elements.v[k] * strength;
    }
    sum.weight += row.weight * strength_linear;
    return sum;
  }
};

// The addresses that FmPairs reads rows of.
inline Addresses AddressesOf(const GradientArgs& a) {
  return {{a.table, a.rows}, {a.sums, a.embeddings, a.d_interaction, a.d_embeddings}};
}

}  // namespace cuda
}  // namespace deepfm

#endif  // DEEPFM_CUDA_SUMS_CUH_
