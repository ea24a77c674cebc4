// The gradient: the lanes of a row go from group to group, read the row once and write its gradient once.
#include "sums.cuh"

namespace deepfm {
namespace cuda {
namespace {

__global__ void __launch_bounds__(kBlock, 1)
    SamplesOfPairs(FmShape shape, int32_t* sample_of_pair, const Report* report) {
  if (Failed(report)) return;
  for (int64_t b = WarpOfGrid(); b < shape.num_samples; b += WarpsOfGrid())
    for (int64_t p = shape.row_splits[b] + threadIdx.x % 32; p < shape.row_splits[b + 1]; p += 32)
      sample_of_pair[p] = static_cast<int32_t>(b);
}

__global__ void __launch_bounds__(kBlock, 1) FieldsOfColumns(FmShape shape, int32_t* field_of_column) {
  const int64_t f = ThreadOfGrid();
  if (f >= shape.num_fields) return;
  for (int64_t c = shape.field_splits[f]; c < shape.field_splits[f + 1]; ++c)
    field_of_column[c] = static_cast<int32_t>(f);
}

// A block per group of many chunks. Its threads are teams, each of which adds a share of the chunks, a column a thread.
__global__ void __launch_bounds__(kLargestBlock) AddLong(Groups groups, Chunks chunks, const Report* report) {
  __shared__ float of_teams[kLargestBlock];
  if (Failed(report)) return;
  const int thread = static_cast<int>(threadIdx.x), num_long = *chunks.num_long;
  for (int i = static_cast<int>(blockIdx.x); i < num_long; i += static_cast<int>(gridDim.x)) {
    const Group group = GroupAt(groups, chunks.long_groups[i]);
    const int first = group.begin / kChunk, last = (group.end - 1) / kChunk;
    for (int64_t column = 0; column < chunks.stride; column += kLargestBlock) {
      const int64_t rest = chunks.stride - column;
      const int columns = static_cast<int>(rest < kLargestBlock ? rest : kLargestBlock),
                teams = kLargestBlock / columns;
      const int team = thread / columns, share = (last - first + teams - 1) / teams;
      const int64_t at = column + thread % columns;
      float sum = 0;
      if (team < teams) {
        const int begin = first + 1 + team * share, end = last + 1 < begin + share ? last + 1 : begin + share;
        for (int c = begin; c < end; ++c) sum += __ldg(chunks.At(c, 0) + at);
      }
      of_teams[thread] = sum;
      __syncthreads();
      if (team == 0) {
        float* total = chunks.At(first, 1) + at;
        for (int t = 1; t < teams; ++t) sum += of_teams[t * columns + thread];
        *total += sum;
      }
      __syncthreads();
    }
  }
}

template <typename T, int W>
__global__ void __launch_bounds__(kBlock, 1)
    Gradient(FmPairs<T, W> pairs, Groups groups, Chunks chunks, Lanes lanes, const Report* report) {
  if (Failed(report)) return;
  const Lane lane(lanes);
  const int64_t size = *groups.size, step = WarpsOfGrid() * lane.groups, dim = pairs.a.shape.dim;
  int64_t u = WarpOfGrid() * lane.groups + lane.group;
  if (u >= size) return;
  for (Group group = GroupAt(groups, u); u < size;) {
    u += step;
    const Group next = GroupAt(groups, u < size ? u : group.u);  // fetched ahead
    for (int piece = lane.part; piece - lane.part < lanes.pieces; piece += 32) {
      const bool has_piece = piece < lanes.pieces;
      const Sum<W> sum =
          pairs.Gradient(chunks, group, pairs.ReadRow(group.row, piece, has_piece), lane, piece, has_piece);
      if (pairs.a.rows && has_piece)
        Write<T, W>(static_cast<T*>(pairs.a.rows) + group.u * dim + static_cast<int64_t>(piece) * W, sum.row);
      if (pairs.a.weights && pairs.a.weight_rows && piece == 0)
        FromFloat(sum.weight, static_cast<T*>(pairs.a.weight_rows) + group.u);
    }
    group = next;
  }
}

}  // namespace

PairMap MakePairMap(const FmShape& shape, const Report* report, Memory* memory, Stream stream) {
  PairMap map = {0, shape.pairs_per_sample, nullptr, nullptr, shape.num_fields};
  if (shape.row_splits) {
    int32_t* samples = Take<int32_t>(memory, shape.num_pairs);
    Launch(SamplesOfPairs, BlocksOf(shape.num_samples * 32), kBlock, stream, shape, samples, report);
    map.sample_of_pair = samples;
  } else if (shape.pairs_per_sample > 1) {
    map.reciprocal = ~uint64_t{0} / static_cast<uint64_t>(shape.pairs_per_sample) + 1;
  }
  if (shape.field_splits) {
    int32_t* fields = Take<int32_t>(memory, shape.pairs_per_sample);
    Launch(FieldsOfColumns, BlocksOf(shape.num_fields), kBlock, stream, shape, fields);
    map.field_of_column = fields;
  }
  return map;
}

Chunks NewChunks(int64_t n, int64_t dim, Memory* memory, Stream stream) {
  Chunks chunks;
  chunks.more = (dim + 3) / 4 * 4;  // rows of sums are aligned to 16 bytes
  chunks.stride = chunks.more + 4;
  chunks.sums = Take<float>(memory, (n + kChunk - 1) / kChunk * 2 * chunks.stride);
  chunks.num_long = Take<int>(memory, 1);
  chunks.long_groups = Take<int32_t>(memory, n / (kChunk * (kManyChunks - 1)) + 1);
  SetBytes(chunks.num_long, 0, sizeof(int), stream);
  return chunks;
}

void AddChunks(const Groups& groups, const Chunks& chunks, const Report* report, Stream stream) {
  if (groups.num_pairs > kChunk * (kManyChunks - 1))
    Launch(AddLong, 2 * Processors(), kLargestBlock, stream, groups, chunks, report);
}

void FmGradient(const GradientArgs& args, const Scalars& scalars, const Groups& groups, Report* report, Memory* memory,
                Stream stream) {
  const FmShape& shape = args.shape;
  CheckRowSplits(shape, report, stream);
  if (groups.num_pairs == 0) return;
  if (shape.dim == 0) {
    if (args.d_values) SetBytes(args.d_values, 0, groups.num_pairs * sizeof(float), stream);
    return;
  }
  const PairMap map = MakePairMap(shape, report, memory, stream);
  ForRows(args.table_type, shape.dim, AddressesOf(args), [&](auto type, auto width, Lanes lanes) {
    typedef decltype(type) T;
    constexpr int W = decltype(width)::value;
    const FmPairs<T, W> pairs(args, map, scalars, groups);
    const Report* found = report;
    const Chunks chunks = SumLongGroups<W>(pairs, groups, shape.dim, lanes, found, memory, stream);
    Launch(Gradient<T, W>, BlocksOfGroups(groups, lanes), kBlock, stream, pairs, groups, chunks, lanes, found);
  });
}

}  // namespace cuda
}  // namespace deepfm
