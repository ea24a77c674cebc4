// The forward: a warp per sample, several rows of it at once, sums and squares in registers.
#include "rows.cuh"

namespace deepfm {
namespace cuda {
namespace {

constexpr int kRows = 5;  // rows that a lane has in flight; 39 fields of 64-byte rows are one round of a warp

__global__ void __launch_bounds__(kBlock, 1) RowSplits(FmShape shape, Report* report) {
  const int64_t b = ThreadOfGrid(), B = shape.num_samples, n = shape.num_pairs;
  const int64_t* splits = shape.row_splits;
  if (b > B) return;
  if (b < B ? splits[b] <= splits[b + 1] && (b > 0 || splits[0] == 0) : splits[B] == n && (B > 0 || n == 0)) return;
  ReportFirst(&report->sample, b, [=](int64_t first) {
    Put(&report->begin, splits[first]);
    Put(&report->end, first < B ? splits[first + 1] : n);
  });
}

template <typename I>
__global__ void __launch_bounds__(kBlock, 1) Indices(const I* indices, int64_t n, int64_t num_rows, Report* report) {
  const int64_t p = ThreadOfGrid();
  if (p < n && static_cast<uint64_t>(indices[p]) >= static_cast<uint64_t>(num_rows)) ReportIndex(report, indices, p);
}

template <typename T, int W, typename I>
__global__ void __launch_bounds__(kBlock, 1) Forward(ForwardArgs a, Lanes lanes, Report* report) {
  const Lane lane(lanes);
  const int64_t dim = a.shape.dim, num_rows = a.shape.num_rows, B = a.shape.num_samples, n = a.shape.num_pairs;
  const T* __restrict__ table = static_cast<const T*>(a.table);
  const T* __restrict__ weights = a.linear ? static_cast<const T*>(a.weights) : nullptr;
  const I* __restrict__ indices = static_cast<const I*>(a.indices);
  const float* __restrict__ values = static_cast<const float*>(a.values);
  float* interaction = static_cast<float*>(a.interaction);
  float* sums = static_cast<float*>(a.sums);
  float* embeddings = static_cast<float*>(a.embeddings);
  const int64_t* fields = a.shape.field_splits;

  for (int64_t b = WarpOfGrid(); b < B; b += WarpsOfGrid()) {
    int64_t begin = b * a.shape.pairs_per_sample, end = begin + a.shape.pairs_per_sample;
    if (a.shape.row_splits) {
      begin = a.shape.row_splits[b];
      end = a.shape.row_splits[b + 1];
      if (begin < 0 || begin > end || end > n) begin = end = 0;  // reported by RowSplits
    }
    int64_t bad = end;
    float total = 0, first_order = 0;
    for (int piece = lane.part; piece - lane.part < lanes.pieces; piece += 32) {
      const bool has_piece = piece < lanes.pieces, has_weight = weights && piece == 0;
      const int64_t column = static_cast<int64_t>(piece) * W;
      struct Pair {
        Word<T, W> row;
        float value, weight;
      };
      // The row, value and weight of pair p; zeros if it is not `in` the sample, or has no such row.
      auto load = [&](int64_t p, bool in) {
        const int64_t index = in ? static_cast<int64_t>(__ldcs(indices + p)) : 0;
        const bool found = in && static_cast<uint64_t>(index) < static_cast<uint64_t>(num_rows);
        if (in && !found && p < bad) bad = p;
        Pair pair = {Word<T, W>{}, 0, 0};
        if (found) pair.value = values ? __ldcs(values + p) : 1.f;
        if (found && has_piece) pair.row = __ldg(reinterpret_cast<const Word<T, W>*>(table + index * dim + column));
        if (found && has_weight) pair.weight = ToFloat(weights[index]);
        return pair;
      };
      Vec<W> sum = {}, squares = {};
      auto add_field = [&](const Vec<W>& e, int64_t field) {
        DEEPFM_UNROLL
        for (int i = 0; i < W; ++i) {
          sum.v[i] += e.v[i];
          squares.v[i] += e.v[i] * e.v[i];
        }
        if (embeddings && has_piece) WriteFloats(embeddings + field * dim + column, e);
      };
      if (!fields) {
        for (int64_t from = begin + lane.group; from - lane.group < end; from += kRows * lane.groups) {
          Pair pairs[kRows];
          DEEPFM_UNROLL
          for (int i = 0; i < kRows; ++i) pairs[i] = load(from + i * lane.groups, from + i * lane.groups < end);
          DEEPFM_UNROLL
          for (int i = 0; i < kRows; ++i) {
            Vec<W> e = Widen<T, W>(pairs[i].row);
            DEEPFM_UNROLL
            for (int k = 0; k < W; ++k) e.v[k] *= pairs[i].value;
            first_order += pairs[i].weight * pairs[i].value;
            if (from + i * lane.groups < end) add_field(e, from + i * lane.groups);
          }
        }
      } else {
        for (int64_t f = lane.group; f < a.shape.num_fields; f += lane.groups) {
          Vec<W> e = {};
          for (int64_t p = begin + fields[f]; p < begin + fields[f + 1]; ++p) {
            const Pair pair = load(p, true);
            const Vec<W> row = Widen<T, W>(pair.row);
            DEEPFM_UNROLL
            for (int k = 0; k < W; ++k) e.v[k] += row.v[k] * pair.value;
            first_order += pair.weight * pair.value;
          }
          add_field(e, b * a.shape.num_fields + f);
        }
      }

      Vec<W> half;
      DEEPFM_UNROLL
      for (int i = 0; i < W; ++i) {
        sum.v[i] = lane.GroupSum(sum.v[i]);
        squares.v[i] = lane.GroupSum(squares.v[i]);
        half.v[i] = (sum.v[i] * sum.v[i] - squares.v[i]) * 0.5f;
        total += half.v[i];
      }
      if (lane.group == 0 && has_piece) {
        if (sums) WriteFloats(sums + b * dim + column, sum);
        if (a.output != Output::kScalar)
          WriteFloats(interaction + b * dim + column, a.output == Output::kSum ? sum : half);
      }
    }
    if (a.output == Output::kScalar) {
      total = lane.RowSum(total);
      if (threadIdx.x % 32 == 0) interaction[b] = total;
    }
    if (weights) {
      first_order = lane.GroupSum(first_order);
      if (threadIdx.x % 32 == 0) static_cast<float*>(a.linear)[b] = first_order;
    }
    if (bad < end && lane.part == 0) ReportIndex(report, indices, bad);
  }
}

}  // namespace

void CheckRowSplits(const FmShape& shape, Report* report, Stream stream) {
  if (shape.row_splits) Launch(RowSplits, BlocksOf(shape.num_samples + 1), kBlock, stream, shape, report);
}

void NoErrors(Report* report, Stream stream) { SetBytes(report, 0xff, sizeof(*report), stream); }

void FmForward(const ForwardArgs& args, Report* report, Memory*, Stream stream) {
  const FmShape& shape = args.shape;
  auto by_index = [&](const auto& fn) { args.index_type == IndexType::kInt32 ? fn(int32_t{}) : fn(int64_t{}); };
  CheckRowSplits(shape, report, stream);
  if (shape.dim == 0) {  // no columns: nothing is read but the indices
    if (args.output == Output::kScalar && shape.num_samples > 0)
      SetBytes(args.interaction, 0, shape.num_samples * sizeof(float), stream);
    by_index([&](auto index) {
      typedef decltype(index) I;
      if (shape.num_pairs > 0)
        Launch(Indices<I>, BlocksOf(shape.num_pairs), kBlock, stream, static_cast<const I*>(args.indices),
               shape.num_pairs, shape.num_rows, report);
    });
    return;
  }
  if (shape.num_samples == 0) return;
  ForRows(args.table_type, shape.dim, {{args.table}, {args.interaction, args.sums, args.embeddings}},
          [&](auto type, auto width, Lanes lanes) {
            typedef decltype(type) T;
            constexpr int W = decltype(width)::value;
            by_index([&](auto index) {
              Launch(Forward<T, W, decltype(index)>, BlocksOf(shape.num_samples * 32), kBlock, stream, args, lanes,
                     report);
            });
          });
}

}  // namespace cuda
}  // namespace deepfm
