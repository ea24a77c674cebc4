// Shares the CPU kernels' work out to threads: forward by samples, gradient and update by groups.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu_kernels.h"
#include "fm.h"

namespace deepfm {
namespace {

// Table elements per task, about 20 microseconds of work: less does not pay for waking a thread.
constexpr int64_t kGrainElements = 1 << 16;

PairMap MakePairMap(const FmShape& shape, Scratch<int64_t>* samples, Scratch<int32_t>* fields,
                    const Parallel& parallel) {
  PairMap map = {shape.pairs_per_sample, 0, nullptr, nullptr, shape.num_fields};
  if (shape.row_splits) {
    *samples = Scratch<int64_t>(shape.num_pairs);
    int64_t* out = samples->get();
    parallel.For(shape.num_samples, 1 << 12, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) std::fill(out + shape.row_splits[b], out + shape.row_splits[b + 1], b);
    });
    map.sample_of_pair = out;
  } else if (shape.pairs_per_sample > 1) {
    map.reciprocal = ~uint64_t{0} / static_cast<uint64_t>(shape.pairs_per_sample) + 1;
  }
  if (shape.field_splits) {
    *fields = Scratch<int32_t>(shape.pairs_per_sample);
    for (int64_t f = 0; f < shape.num_fields; ++f)
      std::fill(fields->get() + shape.field_splits[f], fields->get() + shape.field_splits[f + 1],
                static_cast<int32_t>(f));
    map.field_of_pair = fields->get();
  }
  return map;
}

// Pieces of equal numbers of pairs, moved to the next group's start: groups differ in size.
template <typename Fn>
void ForGroups(const RowGroups& groups, int64_t dim, const Parallel& parallel, const Fn& fn) {
  const int64_t* starts = groups.starts();
  auto group_at = [&](int64_t pair) { return std::lower_bound(starts, starts + groups.size(), pair) - starts; };
  parallel.For(groups.num_pairs(), kGrainElements / std::max<int64_t>(1, dim), [&](int64_t begin, int64_t end) {
    const int64_t first = group_at(begin), last = group_at(end);
    if (first < last) fn(first, last);
  });
}

// The weights of fields f and h by row h and column f, as the loops take them; `both` ways, or of f > h alone.
template <typename A>
Scratch<char> MatrixOf(const void* field_weights, int64_t fields, bool both) {
  const int64_t stride = PaddedFields(fields), bytes = fields * stride * static_cast<int64_t>(sizeof(A));
  Scratch<char> matrix(bytes);
  std::memset(matrix.get(), 0, bytes);
  const A* weight = static_cast<const A*>(field_weights);
  A* out = reinterpret_cast<A*>(matrix.get());
  for (int64_t f = 0; f < fields; ++f) {
    for (int64_t h = 0; h < f; ++h, ++weight) {
      out[h * stride + f] = *weight;
      if (both) out[f * stride + h] = *weight;
    }
  }
  return matrix;
}

int64_t FieldsOf(const FmShape& shape) { return shape.field_splits ? shape.num_fields : shape.pairs_per_sample; }

// The forward of an interaction that is not plain.
class ByFieldsForward {
 public:
  explicit ByFieldsForward(const ForwardArgs& args) : args_(args) {
    if (IsPlain(args) || !args.field_weights) return;
    matrix_ = (is_double_ ? MatrixOf<double> : MatrixOf<float>)(args.field_weights, FieldsOf(args.shape), false);
    args_.field_weights = matrix_.get();
  }

  int64_t operator()(int64_t begin, int64_t end) const {
    constexpr int64_t kInCache = 1 << 14;  // bytes of embeddings
    const FmShape& shape = args_.shape;
    const int64_t row_bytes = shape.dim * static_cast<int64_t>(is_double_ ? sizeof(double) : sizeof(float));
    const int64_t pairs = std::max<int64_t>(1, shape.num_pairs / std::max<int64_t>(1, shape.num_samples));
    const int64_t step = std::max<int64_t>(1, kInCache / (pairs * row_bytes));
    int64_t most = shape.row_splits ? 0 : step * FieldsOf(shape);
    for (int64_t b = begin; shape.row_splits && b < end; b += step)
      most = std::max(most, shape.row_splits[std::min(b + step, end)] - shape.row_splits[b]);
    Scratch<char> kept;
    if (!args_.embeddings) kept = Scratch<char>(most * row_bytes);
    auto* forward = Kernels().forward_by_fields[static_cast<int>(args_.table_type)][static_cast<int>(args_.index_type)];
    return forward(args_, begin, end, step, kept.get());
  }

 private:
  ForwardArgs args_;
  const bool is_double_ = args_.table_type == TableType::kFloat64;
  Scratch<char> matrix_;
};

// The same gradient from that of all embeddings, `d_fields`, which the loops over groups add up. Those of the field
// weights are sums of pieces that do not depend on threads.
template <typename A>
GradientArgs ByFields(const GradientArgs& args, Scratch<char>* d_fields, const Parallel& parallel) {
  constexpr int64_t kGrain = 64, kMostPieces = 64, kSize = sizeof(A);
  const FmShape& shape = args.shape;
  const int64_t fields = FieldsOf(shape), samples = shape.num_samples, num_weights = fields * (fields - 1) / 2;
  const int64_t pieces = std::min(kMostPieces, (samples + kGrain - 1) / kGrain);
  const int64_t size = (shape.row_splits ? shape.num_pairs : samples * fields) * shape.dim;
  *d_fields = Scratch<char>((size + samples * shape.dim) * kSize);
  void* nothing = d_fields->get() + size * kSize;  // comes from the sum of a sample's embeddings
  std::memset(nothing, 0, samples * shape.dim * kSize);
  Scratch<char> matrix;
  if (args.field_weights) matrix = MatrixOf<A>(args.field_weights, fields, true);
  const Scratch<A> sums(args.d_field_weights ? pieces * num_weights : 0);
  parallel.Run(pieces, [&](int64_t piece) {
    GradientArgs mine = args;
    mine.field_weights = matrix.get();
    if (args.d_field_weights) {
      mine.d_field_weights = sums.get() + piece * num_weights;
      std::memset(mine.d_field_weights, 0, num_weights * kSize);
    }
    const int64_t begin = Parallel::Cut(samples, pieces, piece), end = Parallel::Cut(samples, pieces, piece + 1);
    Kernels().field_gradient[kSize == sizeof(double)](mine, begin, end, d_fields->get());
  });
  if (A* total = static_cast<A*>(args.d_field_weights)) {
    std::memset(total, 0, num_weights * kSize);
    for (int64_t i = 0; i < pieces * num_weights; ++i) total[i % num_weights] += sums[i];
  }
  GradientArgs by_fields = args;
  by_fields.output = Output::kSum;
  by_fields.d_interaction = nothing;
  by_fields.d_embeddings = d_fields->get();
  return by_fields;
}

GradientArgs ForGroupsOf(const GradientArgs& args, Scratch<char>* d_fields, const Parallel& parallel) {
  if (IsPlain(args)) return args;
  if (args.table_type == TableType::kFloat64) return ByFields<double>(args, d_fields, parallel);
  return ByFields<float>(args, d_fields, parallel);
}

}  // namespace

int64_t FmForward(const ForwardArgs& args, const Parallel& parallel) {
  const FmShape& shape = args.shape;
  if (shape.dim == 0) {  // no columns: the loops below write nothing
    const size_t acc = args.table_type == TableType::kFloat64 ? sizeof(double) : sizeof(float);
    if (args.output == Output::kScalar) std::memset(args.interaction, 0, shape.num_samples * acc);
    return FirstOutOfRange(args.indices, args.index_type, shape.num_pairs, shape.num_rows, parallel);
  }
  auto* forward = Kernels().forward[static_cast<int>(args.table_type)][static_cast<int>(args.index_type)];
  const int64_t elements = shape.num_pairs * shape.dim / std::max<int64_t>(1, shape.num_samples);
  std::atomic<int64_t> first_bad{shape.num_pairs};
  const ByFieldsForward by_fields(args);
  parallel.For(shape.num_samples, kGrainElements / std::max<int64_t>(1, elements), [&](int64_t begin, int64_t end) {
    const int64_t bad = IsPlain(args) ? forward(args, begin, end) : by_fields(begin, end);
    if (bad >= 0) AtomicMin(&first_bad, bad);
  });
  return first_bad.load() == shape.num_pairs ? -1 : first_bad.load();
}

void FmGradient(const GradientArgs& args, const Parallel& parallel) {
  const RowGroups& groups = *args.groups;
  const size_t acc = args.table_type == TableType::kFloat64 ? sizeof(double) : sizeof(float);
  if (args.d_field_weights && (args.shape.dim == 0 || args.output == Output::kSum))  // which do not depend on them
    std::memset(args.d_field_weights, 0, FieldsOf(args.shape) * (FieldsOf(args.shape) - 1) / 2 * acc);
  if (args.shape.dim == 0) {
    if (args.d_values) std::memset(args.d_values, 0, groups.num_pairs() * acc);
    return;
  }
  Scratch<char> d_fields;
  const GradientArgs loop_args = ForGroupsOf(args, &d_fields, parallel);
  auto* gradient = Kernels().gradient[static_cast<int>(args.table_type)];
  Scratch<int64_t> samples;
  Scratch<int32_t> fields;
  const PairMap map = MakePairMap(args.shape, &samples, &fields, parallel);
  ForGroups(groups, args.shape.dim, parallel,
            [&](int64_t begin, int64_t end) { gradient(loop_args, map, begin, end, end); });
}

void SparseUpdate(const UpdateArgs& args, const Parallel& parallel) {
  if (args.dim == 0) return;
  auto* update = Kernels().update[static_cast<int>(args.table_type)];
  ForGroups(*args.groups, args.dim, parallel, [&](int64_t begin, int64_t end) { update(args, begin, end, end); });
}

void FmUpdate(const GradientArgs& gradient_args, const UpdateArgs& table, const UpdateArgs* weights,
              const Parallel& parallel) {
  constexpr int64_t kBuffer = 1 << 13, kMostGroups = 64;  // of gradients that stay in the first cache
  const int type = static_cast<int>(gradient_args.table_type);
  const RowGroups& groups = *gradient_args.groups;
  const int64_t dim = gradient_args.shape.dim, row_bytes = dim * static_cast<int64_t>(sizeof(double));
  if (dim == 0) return;
  const int64_t step = std::max<int64_t>(1, std::min(kMostGroups, kBuffer / row_bytes));
  auto* gradient = Kernels().gradient[type];
  auto* update = Kernels().update[type];
  Scratch<int64_t> samples;
  Scratch<int32_t> fields;
  const PairMap map = MakePairMap(gradient_args.shape, &samples, &fields, parallel);
  Scratch<char> d_fields;
  const GradientArgs loop_args = ForGroupsOf(gradient_args, &d_fields, parallel);
  const Scratch<char> rows(parallel.MostPieces() * step * row_bytes);
  std::atomic<int64_t> taken{0};
  ForGroups(groups, dim, parallel, [&](int64_t begin, int64_t end) {
    double weight_rows[kMostGroups];
    GradientArgs g = loop_args;
    g.rows = rows.get() + taken.fetch_add(1) * step * row_bytes;
    g.weight_rows = weight_rows;
    g.d_values = nullptr;
    UpdateArgs of_table = table, of_weights = weights ? *weights : UpdateArgs();
    of_table.gradient = g.rows;
    of_weights.gradient = weight_rows;
    of_table.groups = of_weights.groups = &groups;
    of_table.in_order = of_weights.in_order = true;
    for (int64_t u = begin; u < end; u += step) {
      const int64_t stop = std::min(u + step, end);
      g.first_group = of_table.first_group = of_weights.first_group = u;
      gradient(g, map, u, stop, end);
      update(of_table, u, stop, end);
      if (weights) update(of_weights, u, stop, end);
    }
  });
}

}  // namespace deepfm
