// The optimizers' row updates: the lanes of a row go from group to group, read the row and its slots once, and write
// them once.
#include <type_traits>

#include "sums.cuh"

namespace deepfm {
namespace cuda {
namespace {

// Gradients of pairs, or one of each group, as an update takes them.
template <typename T, int W>
struct GivenGradients {
  const T* gradient;
  int64_t dim;
  const int32_t* positions;
  bool in_order;

  struct Row {};
  __device__ __forceinline__ Row ReadRow(int64_t, int, bool) const { return {}; }

  __device__ __forceinline__ Vec<W> At(int64_t i, int piece) const {
    return Widen<T, W>(
        __ldcs(reinterpret_cast<const Word<T, W>*>(gradient + i * dim + static_cast<int64_t>(piece) * W)));
  }
  template <int kAtOnce>
  __device__ __forceinline__ void Add(int begin, int end, const Row&, const Lane&, int piece, bool has_piece,
                                      Sum<W>* sum) const {
    if (!has_piece) return;
    DEEPFM_UNROLL_BY(kAtOnce)
    for (int j = begin; j < end; ++j) {
      const Vec<W> g = At(positions[j], piece);
      DEEPFM_UNROLL
      for (int k = 0; k < W; ++k) sum->row.v[k] += g.v[k];
    }
  }
  __device__ __forceinline__ Sum<W> Gradient(const Chunks& chunks, const Group& group, const Row& row, const Lane& lane,
                                             int piece, bool has_piece) const {
    if (!in_order) return SumOf<W>(*this, chunks, group, row, lane, piece, has_piece);
    Sum<W> sum;
    if (has_piece) sum.row = At(group.u, piece);
    return sum;
  }
};

// Gradients that are computed here, and rounded as if they had been stored.
template <typename T, int W>
struct FusedGradients {
  FmPairs<T, W> pairs;

  typedef typename FmPairs<T, W>::Row Row;
  __device__ __forceinline__ Row ReadRow(int64_t row, int piece, bool has_piece) const {
    return pairs.ReadRow(row, piece, has_piece);
  }
  __device__ __forceinline__ Sum<W> Gradient(const Chunks& chunks, const Group& group, const Row& row, const Lane& lane,
                                             int piece, bool has_piece) const {
    Sum<W> sum = pairs.Gradient(chunks, group, row, lane, piece, has_piece);
    sum.row = Widen<T, W>(Narrow<T, W>(sum.row));
    T weight;
    FromFloat(sum.weight, &weight);
    sum.weight = ToFloat(weight);
    return sum;
  }
};

// x^power; the square root where it is one.
__device__ __forceinline__ float PowerOf(float x, float power) { return power == 0.5f ? sqrtf(x) : powf(x, power); }

// A rule, with its numbers.
template <Rule rule>
struct Step {
  static constexpr RuleShape kShape = ShapeOf(rule);
  static constexpr int kHyper = kShape.hyper;
  static constexpr bool kByRow = rule == Rule::kRowWiseAdagrad;
  static constexpr int kSlots = kByRow ? 0 : kShape.slots;  // that are as wide as the row
  float decay, h[5], lag_scale = 0, rare = 0, seen = 0;

  __device__ __forceinline__ explicit Step(const UpdateArgs& a) {
    const float* hyper = static_cast<const float*>(a.hyper);
    decay = hyper[0];
    DEEPFM_UNROLL
    for (int i = 0; i < 5; ++i) h[i] = i + 1 < kHyper ? hyper[i + 1] : 0;
    const float* more = hyper + kHyper;
    if (a.lag) lag_scale = *more++;
    if (a.counts) {
      rare = more[0];
      seen = more[1];
    }
  }

  // The share of its gradient that a row of one slot moves by, whose slot is s. kRowWiseAdagrad
  __device__ __forceinline__ float RateOf(float s) const { return h[0] / (sqrtf(s) + h[1]); }

  // Moves W elements of a row, and of its slots.
  template <int W>
  __device__ __forceinline__ void Move(const Vec<W>& g, float row_rate, Vec<W>* p, Vec<W>* s0, Vec<W>* s1) const {
    DEEPFM_UNROLL
    for (int k = 0; k < W; ++k) {
      float& x = p->v[k];
      if (decay != 0) x -= x * decay;
    }
    switch (rule) {
      case Rule::kSgd:
        DEEPFM_UNROLL
        for (int k = 0; k < W; ++k) p->v[k] -= g.v[k] * h[0];
        break;
      case Rule::kAdagrad:
        DEEPFM_UNROLL
        for (int k = 0; k < W; ++k) {
          s0->v[k] += g.v[k] * g.v[k];
          p->v[k] -= g.v[k] * h[0] / sqrtf(s0->v[k] + h[1]);
        }
        break;
      case Rule::kRowWiseAdagrad:
        DEEPFM_UNROLL
        for (int k = 0; k < W; ++k) p->v[k] -= g.v[k] * row_rate;
        break;
      case Rule::kLazyAdam:
        DEEPFM_UNROLL
        for (int k = 0; k < W; ++k) {
          s0->v[k] += (g.v[k] - s0->v[k]) * h[1];
          s1->v[k] += (g.v[k] * g.v[k] - s1->v[k]) * h[2];
          p->v[k] -= s0->v[k] * h[0] / (sqrtf(s1->v[k]) + h[3]);
        }
        break;
      case Rule::kFtrl:
        DEEPFM_UNROLL
        for (int k = 0; k < W; ++k) {
          const float n = s0->v[k] + g.v[k] * g.v[k], powered = PowerOf(n, -h[1]);
          float& z = s1->v[k];
          z += g.v[k] + 2 * h[4] * p->v[k] - (powered - PowerOf(s0->v[k], -h[1])) / h[0] * p->v[k];
          const float clipped = z > h[2] ? h[2] : z < -h[2] ? -h[2] : z;
          p->v[k] = (clipped - z) / (powered / h[0] + 2 * h[3]);
          s0->v[k] = n;
        }
        break;
    }
  }
};

// W elements of a row and its slots: read when made, moved and written by Apply.
template <typename T, int W, Rule rule>
struct Moving {
  typedef Step<rule> Rules;
  const UpdateArgs& a;
  const Rules& step;
  const int64_t row, at;
  Word<T, W> elements = {}, slots[kMostSlots] = {};
  Vec<W> lag = {};
  bool reads;

  __device__ __forceinline__ Moving(const UpdateArgs& args, const Rules& of, int64_t moved, int64_t column, bool has)
      : a(args), step(of), row(moved), at(moved * args.dim + column), reads(has) {
    if (!reads) return;
    elements = ReadWord<T, W>(static_cast<const T*>(a.table) + at);
    if (Rules::kSlots > 0) slots[0] = ReadWord<T, W>(static_cast<const T*>(a.slots[0]) + at);
    if (Rules::kSlots > 1) slots[1] = ReadWord<T, W>(static_cast<const T*>(a.slots[1]) + at);
    if (a.lag) lag = ReadFloats<W, false>(static_cast<const float*>(a.lag) + at);
  }

  __device__ __forceinline__ void Apply(const Vec<W>& g, float row_rate) {
    if (!reads) return;
    const Vec<W> before = Widen<T, W>(elements);
    Vec<W> p = before, s0 = Widen<T, W>(slots[0]), s1 = Widen<T, W>(slots[1]);
    step.Move(g, row_rate, &p, &s0, &s1);
    if (a.counts) {
      const float farther = step.rare * kRareCount / (kRareCount + step.seen * static_cast<float>(a.counts[row]));
      DEEPFM_UNROLL
      for (int k = 0; k < W; ++k) p.v[k] += (p.v[k] - before.v[k]) * farther;
    }
    Write<T, W>(static_cast<T*>(a.table) + at, p);
    if (Rules::kSlots > 0) Write<T, W>(static_cast<T*>(a.slots[0]) + at, s0);
    if (Rules::kSlots > 1) Write<T, W>(static_cast<T*>(a.slots[1]) + at, s1);
    if (a.lag) {  // a product that is rounded before it is subtracted, as on the CPU
      DEEPFM_UNROLL
      for (int k = 0; k < W; ++k) lag.v[k] = __fsub_rn(lag.v[k], __fmul_rn(p.v[k] - before.v[k], step.lag_scale));
      WriteFloats(static_cast<float*>(a.lag) + at, lag);
    }
  }
};

// weights: of the first order, moved by the lane that holds a row's first piece; no table: none.
template <typename T, int W, Rule rule, typename Gradients>
__global__ void __launch_bounds__(kBlock, 1) Update(Gradients gradients, UpdateArgs table, UpdateArgs weights,
                                                    Groups groups, Chunks chunks, Lanes lanes, const Report* report) {
  if (Failed(report)) return;
  const Lane lane(lanes);
  const Step<rule> step(table);
  const int64_t size = *groups.size, stride = WarpsOfGrid() * lane.groups;
  int64_t u = WarpOfGrid() * lane.groups + lane.group;
  if (u >= size) return;
  for (Group group = GroupAt(groups, u); u < size;) {
    u += stride;
    const Group next = GroupAt(groups, u < size ? u : group.u);  // fetched ahead
    float row_rate = 0;
    if (step.kByRow) {
      T* slot = static_cast<T*>(table.slots[0]) + group.row;
      float s = ToFloat(*slot);
      double squares = 0;  // so that their order, which alignment decides, is not seen in the float
      for (int piece = lane.part; piece - lane.part < lanes.pieces; piece += 32) {
        const bool has_piece = piece < lanes.pieces;
        const Vec<W> g =
            gradients.Gradient(chunks, group, gradients.ReadRow(group.row, piece, has_piece), lane, piece, has_piece)
                .row;
        DEEPFM_UNROLL
        for (int k = 0; k < W; ++k) squares += has_piece ? static_cast<double>(g.v[k]) * g.v[k] : 0;
      }
      s += static_cast<float>(lane.RowSum(squares) / static_cast<double>(table.dim));
      row_rate = step.RateOf(s);
      if (lane.part == 0) FromFloat(s, slot);
    }
    for (int piece = lane.part; piece - lane.part < lanes.pieces; piece += 32) {
      const bool has_piece = piece < lanes.pieces;
      Moving<T, W, rule> moving(table, step, group.row, static_cast<int64_t>(piece) * W, has_piece);
      const Sum<W> g =
          gradients.Gradient(chunks, group, gradients.ReadRow(group.row, piece, has_piece), lane, piece, has_piece);
      moving.Apply(g.row, row_rate);
      if (weights.table && piece == 0) {
        const Step<rule> weight_step(weights);
        float weight_rate = 0;
        if (step.kByRow) {
          T* slot = static_cast<T*>(weights.slots[0]) + group.row;
          const float s = ToFloat(*slot) + g.weight * g.weight;
          weight_rate = weight_step.RateOf(s);
          FromFloat(s, slot);
        }
        Moving<T, 1, rule>(weights, weight_step, group.row, 0, true).Apply({{g.weight}}, weight_rate);
      }
    }
    group = next;
  }
}

// The addresses of what an update reads rows of.
Addresses AddressesOf(const UpdateArgs& a) {
  const bool row_wise = a.rule == Rule::kRowWiseAdagrad;
  return {{a.table, a.gradient, row_wise ? nullptr : a.slots[0], a.slots[1]}, {a.lag}};
}

// Calls fn with the rule as a constant.
template <typename Fn>
void ForRule(Rule rule, const Fn& fn) {
  switch (rule) {
    case Rule::kSgd:
      return fn(std::integral_constant<Rule, Rule::kSgd>());
    case Rule::kAdagrad:
      return fn(std::integral_constant<Rule, Rule::kAdagrad>());
    case Rule::kRowWiseAdagrad:
      return fn(std::integral_constant<Rule, Rule::kRowWiseAdagrad>());
    case Rule::kLazyAdam:
      return fn(std::integral_constant<Rule, Rule::kLazyAdam>());
    case Rule::kFtrl:
      return fn(std::integral_constant<Rule, Rule::kFtrl>());
  }
}

}  // namespace

void SparseUpdate(const UpdateArgs& args, const Groups& groups, const Report* report, Memory* memory, Stream stream) {
  if (groups.num_pairs == 0 || args.dim == 0) return;
  ForRows(args.table_type, args.dim, AddressesOf(args), [&](auto type, auto width, Lanes lanes) {
    typedef decltype(type) T;
    constexpr int W = decltype(width)::value;
    typedef GivenGradients<T, W> Gradients;
    const Gradients gradients = {static_cast<const T*>(args.gradient), args.dim, groups.positions, args.in_order};
    const Chunks chunks =
        args.in_order ? Chunks() : SumLongGroups<W>(gradients, groups, args.dim, lanes, report, memory, stream);
    ForRule(args.rule, [&](auto rule) {
      Launch(Update<T, W, decltype(rule)::value, Gradients>, BlocksOfGroups(groups, lanes), kBlock, stream, gradients,
             args, UpdateArgs(), groups, chunks, lanes, report);
    });
  });
}

void FmUpdate(const GradientArgs& gradient, const Scalars& scalars, const UpdateArgs& table, const UpdateArgs* weights,
              const Groups& groups, Report* report, Memory* memory, Stream stream) {
  const FmShape& shape = gradient.shape;
  CheckRowSplits(shape, report, stream);
  if (groups.num_pairs == 0 || shape.dim == 0) return;
  GradientArgs args = gradient;
  args.rows = args.weight_rows = args.d_values = nullptr;
  const PairMap map = MakePairMap(shape, report, memory, stream);
  UpdateArgs moved = table;
  moved.gradient = nullptr;
  ForRows(args.table_type, shape.dim, AddressesOf(args) | AddressesOf(moved), [&](auto type, auto width, Lanes lanes) {
    typedef decltype(type) T;
    constexpr int W = decltype(width)::value;
    typedef FusedGradients<T, W> Gradients;
    const Gradients gradients = {FmPairs<T, W>(args, map, scalars, groups)};
    const Report* found = report;
    const Chunks chunks = SumLongGroups<W>(gradients.pairs, groups, shape.dim, lanes, found, memory, stream);
    ForRule(table.rule, [&](auto rule) {
      Launch(Update<T, W, decltype(rule)::value, Gradients>, BlocksOfGroups(groups, lanes), kBlock, stream, gradients,
             table, weights ? *weights : UpdateArgs(), groups, chunks, lanes, found);
    });
  });
}

}  // namespace cuda
}  // namespace deepfm
