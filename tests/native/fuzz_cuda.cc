// Drives the CUDA kernels on the CPU over random and adversarial shapes: fuzz_cuda [cases] [seed].
// Every case is checked against a double-precision loop. What the kernels write to is poisoned before and has sentinels
// around it; what they read ends where its memory ends, at any alignment.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cuda/fm_cuda.h"
#include "definition.h"
#include "fuzz.h"

namespace deepfm {
namespace cuda {
namespace {

#ifdef DEEPFM_EMULATE_WITH_THREADS
constexpr bool kSmall = true;  // every CUDA thread is one of the system's
#else
constexpr bool kSmall = false;
#endif
constexpr unsigned char kPoison = 0xA5;
constexpr Stream kStream = nullptr;

double Random(double low, double high) { return std::uniform_real_distribution<double>(low, high)(rng); }

// n items in memory of their own, behind so many others: at the start of 256 bytes if `shift` is 0.
template <typename T>
class Array {
 public:
  static constexpr int64_t kSentinels = 3;
  explicit Array(int64_t n, int64_t shift = 0) : size_(n), shift_(shift) {
    void* p;
    bytes_ = (n + shift + kSentinels) * sizeof(T);
    if (posix_memalign(&p, 256, bytes_)) std::abort();
    std::memset(p, kPoison, bytes_);
    memory_.reset(static_cast<char*>(p), std::free);
  }
  Array Copy() const {
    Array copy(size_, shift_);
    std::memcpy(copy.memory_.get(), memory_.get(), bytes_);
    return copy;
  }
  T* data() const { return reinterpret_cast<T*>(memory_.get()) + shift_; }
  T* or_null() const { return size_ ? data() : nullptr; }
  T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return size_; }
  bool Same(const Array& other) const { return !std::memcmp(memory_.get(), other.memory_.get(), bytes_); }
  // Nothing was written before the first item, nor to items from `end` on.
  bool Intact(int64_t end) const {
    auto poisoned = [](const void* from, const void* to) {
      return std::all_of(static_cast<const unsigned char*>(from), static_cast<const unsigned char*>(to),
                         [](unsigned char c) { return c == kPoison; });
    };
    return poisoned(memory_.get(), data()) && poisoned(data() + end, memory_.get() + bytes_);
  }
  bool Intact() const { return Intact(size_); }

 private:
  int64_t size_, shift_;
  size_t bytes_;
  std::shared_ptr<char> memory_;
};

class TestMemory : public Memory {
 public:
  void* Take(size_t bytes) override {
    void* p;
    if (posix_memalign(&p, 256, bytes)) std::abort();
    std::memset(p, kPoison, bytes);
    taken_.emplace_back(p, std::free);
    return p;
  }

 private:
  std::vector<std::shared_ptr<void>> taken_;
};

// The stored types: Make rounds towards zero, to few bits.
struct Float {
  typedef float T;
  static constexpr TableType kType = TableType::kFloat32;
  static T Make(double x) { return static_cast<T>(x); }
  static double Read(T x) { return x; }
  static constexpr double kStored = 0;
};
struct Brain {
  typedef uint16_t T;
  static constexpr TableType kType = TableType::kBFloat16;
  static T Make(double x) {
    const float y = static_cast<float>(x);
    uint32_t bits;
    std::memcpy(&bits, &y, 4);
    return static_cast<T>(bits >> 16);
  }
  static double Read(T x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
  }
  static constexpr double kStored = 0.01;
};
struct Half {
  typedef uint16_t T;
  static constexpr TableType kType = TableType::kFloat16;
  static T Make(double x) {
    int exponent;
    const double fraction = std::frexp(std::fabs(x), &exponent);  // in [1/2, 1)
    if (exponent < -13) return 0;
    const int bits = static_cast<int>(fraction * 2048) - 1024;
    return static_cast<T>((x < 0 ? 0x8000 : 0) | (exponent + 14) << 10 | bits);
  }
  static double Read(T x) {
    const int exponent = x >> 10 & 31;
    const double fraction = x & 1023;
    const double size = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                        : exponent == 0 ? std::ldexp(fraction, -24)
                                        : std::ldexp(1024 + fraction, exponent - 25);
    return x & 0x8000 ? -size : size;
  }
  static constexpr double kStored = 0.002;
};

Report Fresh() {
  Report report;
  NoErrors(&report, kStream);
  return report;
}
bool Good(const Report& report) { return report.pair == Report::kNone && report.sample == Report::kNone; }

template <typename I>
IndexType TypeOf(I) {
  return sizeof(I) == 4 ? IndexType::kInt32 : IndexType::kInt64;
}

// The groups are those of the indices.
template <typename I>
void CheckGroups(const char* where, const Groups& groups, const I* indices, int64_t n) {
  std::map<int64_t, std::vector<int32_t>> want;
  for (int64_t p = 0; p < n; ++p) want[indices[p]].push_back(static_cast<int32_t>(p));
  EXPECT(*groups.size == static_cast<int64_t>(want.size()) && groups.num_pairs == n, "U=%ld", long(*groups.size));
  int64_t u = 0, j = 0;
  for (const auto& [row, pairs] : want) {
    EXPECT(groups.rows[u] == row && groups.starts[u] == j, "row %ld", long(row));
    for (int32_t p : pairs) {
      EXPECT(groups.positions[j] == p && groups.group_of[j] == u, "position %ld", long(j));
      ++j;
    }
    ++u;
  }
  EXPECT(groups.starts[u] == n, "U=%ld", long(u));
}

// Rows beyond 32 bits, of which there is no table.
void FarRowsCase(const char* where) {
  const int64_t n = Uniform(1, 300), V = int64_t{1} << Uniform(31, 50);
  Array<int64_t> indices(n);
  for (int64_t p = 0; p < n; ++p) {
    const int64_t few[] = {0, 1, V - 1, V >> 1, (V >> 1) + 1};
    indices[p] = Chance(50) ? few[Uniform(0, 4)] : Uniform(0, V - 1);
  }
  TestMemory memory;
  Report report = Fresh();
  CheckGroups(where, GroupRows(indices.data(), IndexType::kInt64, n, V, &report, &memory, kStream), indices.data(), n);
  EXPECT(Good(report), "n=%ld", long(n));
  const int64_t bad = Uniform(0, n - 1);
  indices[bad] = V;
  const Groups none = GroupRows(indices.data(), IndexType::kInt64, n, V, &report, &memory, kStream);
  EXPECT(*none.size == 0 && report.pair == static_cast<uint64_t>(bad) && report.index == V, "n=%ld", long(n));
}

// A table or weights of an optimizer, and what moves with them.
template <typename D>
struct State {
  typedef typename D::T T;
  std::vector<Array<T>> arrays;  // the table and its slots
  Array<float> lag{0}, hyper{0};
  Array<int32_t> counts{0};
  int64_t num_rows, dim;
  Rule rule;

  State(const Array<T>& table, int64_t V, int64_t K, Rule of, bool with_lag, const Array<int32_t>& of_rare)
      : counts(of_rare), num_rows(V), dim(K), rule(of) {
    const RuleShape shape = ShapeOf(rule);
    arrays.push_back(table.Copy());
    for (int i = 0; i < shape.slots; ++i) {
      arrays.emplace_back(rule == Rule::kRowWiseAdagrad ? V : V * K, Chance(80) ? 0 : Uniform(1, 8));
      for (int64_t j = 0; j < arrays.back().size(); ++j) arrays.back()[j] = D::Make(Random(0.5, 1));
    }
    if (with_lag) lag = Array<float>(V * K, Chance(80) ? 0 : 1);
    for (int64_t i = 0; i < lag.size(); ++i) lag[i] = 0.5f;
    const double decay = Chance(50) ? 0 : 0.25, power = Chance(50) ? -0.5 : -0.75;
    const double numbers[5][6] = {{decay, 0.5},
                                  {decay, 0.5, 0.125},
                                  {decay, 0.5, 0.125},
                                  {decay, 0.5, 0.25, 0.125, 0.125},
                                  {decay, 0.5, power, 0.25, 0.125, 0.25}};
    hyper = Array<float>(shape.hyper + with_lag + 2 * (counts.size() > 0));
    int64_t i = 0;
    for (; i < shape.hyper; ++i) hyper[i] = static_cast<float>(numbers[static_cast<int>(rule)][i]);
    if (with_lag) hyper[i++] = 4;
    if (counts.size()) {
      hyper[i++] = 2;
      hyper[i++] = 0.5;
    }
  }
  State Copy() const {
    State copy = *this;
    for (Array<T>& array : copy.arrays) array = array.Copy();
    copy.lag = lag.Copy();
    return copy;
  }
  bool Same(const State& other) const {
    for (size_t i = 0; i < arrays.size(); ++i)
      if (!arrays[i].Same(other.arrays[i])) return false;
    return lag.Same(other.lag);
  }
  bool Intact() const {
    return std::all_of(arrays.begin(), arrays.end(), [](const Array<T>& a) { return a.Intact(); }) && lag.Intact();
  }
  UpdateArgs Args() const {
    UpdateArgs a;
    a.rule = rule;
    a.table_type = D::kType;
    a.num_rows = num_rows;
    a.dim = dim;
    a.table = arrays[0].data();
    for (size_t i = 1; i < arrays.size(); ++i) a.slots[i - 1] = arrays[i].data();
    a.lag = lag.or_null();
    a.counts = counts.or_null();
    a.hyper = hyper.data();
    return a;
  }
};

// After an update from `before` by the gradients' sums g [V, K], of rows that `found` says.
template <typename D>
void CheckUpdate(const char* where, const State<D>& before, const State<D>& after, const std::vector<double>& g,
                 const std::vector<int64_t>& found) {
  const Rule rule = before.rule;
  const int64_t V = before.num_rows, K = before.dim;
  const int slots = ShapeOf(rule).slots;
  const auto h = [&](int i) { return static_cast<double>(before.hyper[i]); };
  EXPECT(after.Intact(), "rule %d V=%ld K=%ld", static_cast<int>(rule), long(V), long(K));
  std::vector<double> squares(V);
  for (int64_t i = 0; i < V * K; ++i) squares[i / K] += g[i] * g[i] / static_cast<double>(K);
  for (int64_t i = 0; i < V * K; ++i) {
    const int64_t row = i / K, slot = rule == Rule::kRowWiseAdagrad ? row : i;
    const double old = D::Read(before.arrays[0][i]);
    double x = old, s0 = slots > 0 ? D::Read(before.arrays[1][slot]) : 0;
    double s1 = slots > 1 ? D::Read(before.arrays[2][slot]) : 0;
    if (found[row]) {
      x -= x * h(0);
      switch (rule) {
        case Rule::kSgd:
          x -= g[i] * h(1);
          break;
        case Rule::kAdagrad:
          s0 += g[i] * g[i];
          x -= h(1) * g[i] / std::sqrt(s0 + h(2));
          break;
        case Rule::kRowWiseAdagrad:
          s0 += squares[row];
          x -= h(1) / (std::sqrt(s0) + h(2)) * g[i];
          break;
        case Rule::kLazyAdam:
          s0 += (g[i] - s0) * h(2);
          s1 += (g[i] * g[i] - s1) * h(3);
          x -= s0 * h(1) / (std::sqrt(s1) + h(4));
          break;
        case Rule::kFtrl: {
          const double total = s0 + g[i] * g[i], powered = std::pow(total, -h(2));
          s1 += g[i] + 2 * h(5) * x - (powered - std::pow(s0, -h(2))) / h(1) * x;
          s0 = total;
          x = (std::min(std::max(s1, -h(3)), h(3)) - s1) / (powered / h(1) + 2 * h(4));
        }
      }
      if (before.counts.size()) x += (x - old) * 40 / (20 + 0.5 * before.counts[row]);
    }
    const double want[] = {x, s0, s1};
    const double bound = 1e-4 * (1 + static_cast<double>(found[row])) + 2 * D::kStored;
    for (int j = 0; j <= slots; ++j) {
      const double got = D::Read(after.arrays[j][j ? slot : i]);
      if (found[row]) {
        EXPECT(std::fabs(got - want[j]) <= bound * (1 + std::fabs(want[j])), "rule %d array %d: %g, %g",
               static_cast<int>(rule), j, got, want[j]);
      } else {
        EXPECT(got == want[j], "rule %d array %d moved", static_cast<int>(rule), j);
      }
    }
    if (after.lag.size()) {
      const double want_lag = found[row] ? 0.5 - 4 * (x - old) : 0.5;
      EXPECT(std::fabs(after.lag[i] - want_lag) <= (found[row] ? 4 * bound * (1 + std::fabs(want_lag)) : 0),
             "lag %ld: %g, %g", long(i), after.lag[i], want_lag);
    }
  }
}

// Row updates by given gradients: of pairs, in any order and any number of them a row, and of groups.
template <typename D, typename I>
void UpdateCase(const char* where, int64_t V, int64_t K, const Array<I>& indices, const Array<typename D::T>& table,
                const Array<int32_t>& counts) {
  typedef typename D::T T;
  const int64_t n = indices.size();
  const State<D> before(table, V, K, static_cast<Rule>(Uniform(0, 4)), Chance(50), counts);
  TestMemory memory;
  Report report = Fresh();
  const Groups groups = GroupRows(indices.data(), TypeOf(I{}), n, V, &report, &memory, kStream);
  const bool in_order = Chance(40);
  const int64_t m = in_order ? *groups.size : n;
  Array<T> gradient(m * K, Chance(80) ? 0 : 1);
  for (int64_t i = 0; i < gradient.size(); ++i) gradient[i] = D::Make(Random(-1, 1));
  std::vector<double> g(V * K);
  std::vector<int64_t> found(V);
  for (int64_t i = 0; i < m; ++i) {
    const int64_t row = in_order ? groups.rows[i] : static_cast<int64_t>(indices[i]);
    ++found[row];
    for (int64_t k = 0; k < K; ++k) g[row * K + k] += D::Read(gradient[i * K + k]);
  }
  State<D> after[2] = {before.Copy(), before.Copy()};
  for (State<D>& state : after) {
    UpdateArgs a = state.Args();
    a.gradient = gradient.data();
    a.in_order = in_order;
    SparseUpdate(a, groups, &report, &memory, kStream);
  }
  CheckUpdate(where, before, after[0], g, found);
  EXPECT(after[0].Same(after[1]), "two updates differ, n=%ld K=%ld", long(n), long(K));
  for (int error = 0; error < 2; ++error) {  // nothing is written after an error
    (error ? report.sample : report.pair) = 0;
    UpdateArgs a = after[0].Args();
    a.gradient = gradient.data();
    a.in_order = in_order;
    SparseUpdate(a, groups, &report, &memory, kStream);
    EXPECT(after[0].Same(after[1]), "an update in spite of an error, n=%ld", long(n));
  }
}

// The gradient and the updates by it in one pass, to the bits of the two apart.
template <typename D>
void FusedCase(const char* where, GradientArgs a, const Scalars& scalars, const Groups& groups,
               const Array<typename D::T>& table, const Array<typename D::T>& weights, const Array<int32_t>& counts) {
  typedef typename D::T T;
  const int64_t V = a.shape.num_rows, K = a.shape.dim, n = a.shape.num_pairs, U = *groups.size;
  const Rule rule = static_cast<Rule>(Uniform(0, 4));
  const bool with_lag = Chance(50), with_weights = weights.size() > 0;
  const State<D> before[2] = {State<D>(table, V, K, rule, with_lag, counts),
                              State<D>(with_weights ? weights : Array<T>(V), V, 1, rule, with_lag, counts)};
  State<D> fused[2] = {before[0].Copy(), before[1].Copy()}, apart[2] = {before[0].Copy(), before[1].Copy()};
  TestMemory memory;
  Report report = Fresh();
  auto fuse = [&](State<D>* states) {
    const UpdateArgs updates[2] = {states[0].Args(), states[1].Args()};
    a.table = updates[0].table;
    a.weights = with_weights ? updates[1].table : nullptr;
    FmUpdate(a, scalars, updates[0], with_weights ? &updates[1] : nullptr, groups, &report, &memory, kStream);
  };
  fuse(fused);
  Array<T> rows(n * K), weight_rows(n);
  GradientArgs g = a;
  g.table = apart[0].arrays[0].data();
  g.weights = with_weights ? apart[1].arrays[0].data() : nullptr;
  g.rows = rows.data();
  g.weight_rows = weight_rows.data();
  g.d_values = nullptr;
  FmGradient(g, scalars, groups, &report, &memory, kStream);
  // Of groups, or of pairs whose rows are unique.
  const bool in_order = Chance(50);
  const Groups unique = GroupRows(groups.rows, IndexType::kInt64, U, V, &report, &memory, kStream);
  for (int i = 0; i <= with_weights; ++i) {
    UpdateArgs update = apart[i].Args();
    update.gradient = i ? g.weight_rows : g.rows;
    update.in_order = in_order;
    SparseUpdate(update, in_order ? groups : unique, &report, &memory, kStream);
  }
  EXPECT(Good(report), "n=%ld", long(n));
  for (int i = 0; i < 2; ++i) {
    EXPECT(fused[i].Intact(), "V=%ld K=%ld", long(V), long(K));
    EXPECT(fused[i].Same(apart[i]), "rule %d array %d V=%ld K=%ld", static_cast<int>(rule), i, long(V), long(K));
  }
  report.pair = 0;
  fuse(fused);
  EXPECT(fused[0].Same(apart[0]) && fused[1].Same(apart[1]), "an update in spite of an error, n=%ld", long(n));
}

template <typename D, typename I>
void Case(const char* where) {
  typedef typename D::T T;
  const int64_t V = Chance(10) ? 1 : Chance(50) ? Uniform(1, 40) : Uniform(1, kSmall ? 200 : 3000);
  const int64_t K = Chance(40)   ? Uniform(1, 20)
                    : Chance(70) ? 8 * Uniform(1, 9)
                    : kSmall     ? Uniform(0, 40)
                    : Chance(80) ? Uniform(1, 140)
                                 : Uniform(0, 300);
  const bool big = Chance(kSmall ? 15 : 6);  // enough pairs of a row for many chunks
  const int64_t B = Chance(8) ? 0 : big ? (kSmall ? Uniform(4, 6) : Uniform(100, 300)) : Uniform(1, 12);
  const int64_t P = Chance(5)    ? 0
                    : big        ? (kSmall ? Uniform(40, 60) : Uniform(4, 12))
                    : Chance(10) ? Uniform(1, 50)
                                 : Uniform(1, 9);
  const bool ragged = Chance(40), pooled = !ragged && Chance(40);
  Array<int64_t> row_splits(ragged ? B + 1 : 0);
  if (ragged) row_splits[0] = 0;
  for (int64_t b = 0; ragged && b < B; ++b) row_splits[b + 1] = row_splits[b] + (Chance(20) ? 0 : Uniform(0, P));
  std::vector<int64_t> fields = {0};
  while (pooled && fields.back() < P) fields.push_back(Uniform(fields.back(), P));
  Array<int64_t> field_splits(pooled ? static_cast<int64_t>(fields.size()) : 0);
  std::copy_n(fields.begin(), field_splits.size(), field_splits.data());
  const int64_t n = ragged ? row_splits[B] : B * P;
  const Output output = static_cast<Output>(Uniform(0, 2));
  const int64_t width = output == Output::kScalar ? 1 : K;
  FmShape shape;
  shape.num_rows = V;
  shape.dim = K;
  shape.num_samples = B;
  shape.num_pairs = n;
  shape.pairs_per_sample = ragged ? 0 : P;
  shape.row_splits = ragged ? row_splits.data() : nullptr;
  shape.field_splits = pooled ? field_splits.data() : nullptr;
  shape.num_fields = pooled ? field_splits.size() - 1 : 0;
  const int64_t F = pooled ? shape.num_fields : ragged ? 0 : P;
  const int64_t num_embeddings = ragged ? n : B * F;

  auto shift = [] { return Chance(85) ? 0 : Uniform(1, 8); };
  Array<T> table(V * K, shift());
  Array<I> indices(n, shift());
  const bool with_values = Chance(70), with_embeddings = pooled || Chance(50), with_weights = K > 0 && Chance(50);
  Array<float> values(with_values ? n : 0, shift());
  Array<T> weights(with_weights ? V : 0);
  for (int64_t i = 0; i < table.size(); ++i) table[i] = D::Make(Random(-1, 1));
  for (int64_t i = 0; i < weights.size(); ++i) weights[i] = D::Make(Random(-1, 1));
  const int popular = Chance(30) ? 100 : big || Chance(30) ? 60 : 0;  // percent of the pairs that have one row
  for (int64_t p = 0; p < n; ++p) indices[p] = static_cast<I>(Chance(popular) ? V - 1 : Uniform(0, V - 1));
  for (int64_t p = 0; p < values.size(); ++p) values[p] = Chance(10) ? 0.f : static_cast<float>(Random(-2, 2));
  auto value = [&](int64_t p) { return with_values ? static_cast<double>(values[p]) : 1; };

  TestMemory memory;
  struct Outputs {
    Array<float> interaction, sums, embeddings, linear;
  };
  auto outputs = [&] {
    return Outputs{Array<float>(B * width, shift()), Array<float>(B * K, shift()),
                   Array<float>(with_embeddings ? num_embeddings * K : 0, shift()), Array<float>(with_weights ? B : 0)};
  };
  ForwardArgs f;
  f.shape = shape;
  f.table_type = D::kType;
  f.index_type = TypeOf(I{});
  f.output = output;
  f.table = table.data();
  f.indices = indices.data();
  f.values = with_values ? values.data() : nullptr;
  f.weights = with_weights ? weights.data() : nullptr;
  auto forward = [&](const Outputs& to, Report* report) {
    f.interaction = to.interaction.data();
    f.sums = to.sums.data();
    f.embeddings = with_embeddings ? to.embeddings.data() : nullptr;
    f.linear = with_weights ? to.linear.data() : nullptr;
    FmForward(f, report, &memory, kStream);
    EXPECT(to.interaction.Intact() && to.sums.Intact() && to.embeddings.Intact() && to.linear.Intact(), "B=%ld K=%ld",
           long(B), long(K));
  };
  const Outputs found = outputs();
  Report report = Fresh();
  forward(found, &report);
  EXPECT(Good(report), "n=%ld V=%ld", long(n), long(V));

  const Definition want_of(shape, value,
                           [&](int64_t p, int64_t k) { return D::Read(table[indices[p] * K + k]); });
  const std::vector<double>&e = want_of.e, &s = want_of.s;
  const double scale = 8e-6 * static_cast<double>((P + 1) * (P + 1) * (K + 1));  // |x| <= 2, |T| <= 1
  auto close = [&](double got, double want, double factor) { return std::fabs(got - want) <= scale * factor; };
  want_of.Check(where, output, found.interaction.data(), found.sums.data(), close);
  want_of.CheckEmbeddings(where, found.embeddings.data(), found.embeddings.size(), close);
  auto weight = [&](int64_t p) { return D::Read(weights[indices[p]]); };
  if (with_weights) want_of.CheckLinear(where, found.linear.data(), weight, close);

  const Groups groups = GroupRows(indices.data(), TypeOf(I{}), n, V, &report, &memory, kStream);
  EXPECT(Good(report), "n=%ld V=%ld", long(n), long(V));
  CheckGroups(where, groups, indices.data(), n);
  const int64_t U = *groups.size;

  // Gradient.
  const bool with_de = Chance(50), with_dx = Chance(50), on_device = Chance(50);
  Array<float> g(B * width, shift()), de(with_de ? num_embeddings * K : 0, shift()), d_linear(with_weights ? B : 0);
  for (const Array<float>& array : {g, de, d_linear})
    for (int64_t i = 0; i < array.size(); ++i) array[i] = static_cast<float>(Random(-1, 1));
  Array<int32_t> counts(Chance(50) ? V : 0);
  for (int64_t i = 0; i < counts.size(); ++i) counts[i] = static_cast<int32_t>(Uniform(0, 9));
  Array<float> penalty(1), priors(3);
  penalty[0] = Chance(50) ? 1.f : 0.5f;
  GradientArgs a;
  a.shape = shape;
  a.table_type = D::kType;
  a.output = output;
  a.table = f.table;
  a.values = f.values;
  a.sums = found.sums.data();
  a.embeddings = with_embeddings ? found.embeddings.data() : nullptr;
  a.d_interaction = g.data();
  a.d_embeddings = with_de ? de.data() : nullptr;
  a.weights = f.weights;
  a.d_linear = d_linear.or_null();
  a.l2 = Chance(50) ? 0 : 0.5;
  a.l2_linear = Chance(50) ? 0 : 0.25;
  double prior = Chance(50) ? 0 : 0.75, prior_linear = Chance(50) ? 0 : 0.5;
  const double softness = Chance(50) ? 0 : 4, factor = on_device ? penalty[0] : 1;
  if (counts.size()) {
    a.counts = counts.data();
    a.prior = on_device ? 100 : prior;  // which is not to be used then
    a.prior_linear = on_device ? 100 : prior_linear;
    a.prior_softness = on_device ? 100 : softness;
  }
  priors[0] = static_cast<float>(prior);
  priors[1] = static_cast<float>(prior_linear);
  priors[2] = static_cast<float>(softness);
  Scalars scalars;
  if (on_device) {
    scalars = {penalty.data(), counts.size() ? priors.data() : nullptr};
    prior /= static_cast<double>(std::max<int64_t>(1, B));
    prior_linear /= static_cast<double>(std::max<int64_t>(1, B));
  }
  struct Gradients {
    Array<T> rows, weight_rows;
    Array<float> d_values;
  };
  auto gradients = [&] {
    return Gradients{Array<T>(n * K, shift()), Array<T>(with_weights ? n : 0), Array<float>(with_dx ? n : 0)};
  };
  auto gradient = [&](const Gradients& to, Report* to_report) {
    a.rows = to.rows.data();
    a.weight_rows = to.weight_rows.data();
    a.d_values = with_dx ? to.d_values.data() : nullptr;
    FmGradient(a, scalars, groups, to_report, &memory, kStream);
    EXPECT(to.rows.Intact(U * K) && to.weight_rows.Intact(with_weights ? U : 0) && to.d_values.Intact(), "U=%ld K=%ld",
           long(U), long(K));
  };
  const Gradients got = gradients();
  gradient(got, &report);
  EXPECT(Good(report), "n=%ld", long(n));
  std::vector<double> want(V * K), want_weights(V), share(V);
  std::vector<int64_t> count(V);
  for (int64_t p = 0; p < n; ++p) {
    const int64_t b = want_of.sample[p], i = want_of.FieldOf(p), row = indices[p];
    double dot = 0;
    ++count[row];
    for (int64_t k = 0; k < K; ++k) {
      const double gk = output == Output::kScalar ? g[b] : g[b * K + k];
      double dk = output == Output::kSum ? gk : gk * (s[b * K + k] - e[i * K + k]);
      if (with_de) dk += de[i * K + k];
      want[row * K + k] += value(p) * dk;
      dot += dk * D::Read(table[row * K + k]);
    }
    if (with_weights) {
      want_weights[row] += value(p) * d_linear[b];
      dot += D::Read(weights[row]) * d_linear[b];
    }
    if (with_dx) EXPECT(close(got.d_values[p], dot, 4), "d_values %ld: %g, %g", long(p), got.d_values[p], dot);
    if (counts.size() && value(p) != 0) {
      const double c = std::max(1, counts[row]);
      share[row] += (softness > 0 ? softness / (softness + c) : 1) / c;
    }
  }
  for (int64_t u = 0; u < U; ++u) {
    const int64_t v = groups.rows[u];
    auto right = [&](double x, double expected) {
      return std::fabs(x - expected) <= scale * 4 * static_cast<double>(count[v]) + D::kStored * std::fabs(expected);
    };
    for (int64_t k = 0; k < K; ++k) {
      const double x = D::Read(got.rows[u * K + k]);
      const double expected = want[v * K + k] + factor * (2 * a.l2 + share[v] * prior) * D::Read(table[v * K + k]);
      EXPECT(right(x, expected), "row %ld k %ld: %g, %g", long(v), long(k), x, expected);
    }
    if (with_weights) {
      const double x = D::Read(got.weight_rows[u]);
      const double expected =
          want_weights[v] + factor * (2 * a.l2_linear + share[v] * prior_linear) * D::Read(weights[v]);
      EXPECT(right(x, expected), "weight row %ld: %g, %g", long(v), x, expected);
    }
  }

  // The same again, to the bit.
  const Outputs again = {found.interaction.Copy(), found.sums.Copy(), found.embeddings.Copy(), found.linear.Copy()};
  const Gradients got_again = {got.rows.Copy(), got.weight_rows.Copy(), got.d_values.Copy()};
  forward(found, &report);
  gradient(got, &report);
  EXPECT(found.interaction.Same(again.interaction) && found.sums.Same(again.sums) &&
             found.embeddings.Same(again.embeddings) && found.linear.Same(again.linear) &&
             got.rows.Same(got_again.rows) && got.weight_rows.Same(got_again.weight_rows) &&
             got.d_values.Same(got_again.d_values),
         "two runs differ, n=%ld K=%ld", long(n), long(K));

  const Array<int32_t> rare(Chance(50) ? V : 0);
  for (int64_t i = 0; i < rare.size(); ++i) rare[i] = static_cast<int32_t>(Uniform(0, 300));
  if (K > 0) {
    UpdateCase<D, I>(where, V, K, indices, table, rare);
    FusedCase<D>(where, a, scalars, groups, table, weights, rare);
  }

  if (n > 0) {  // bad indices: the first is reported, nothing is read outside
    const Array<I> bad = indices.Copy();
    int64_t first = n;
    for (int i = 0; i < 3; ++i) {
      const int64_t p = Uniform(0, n - 1);
      const int64_t evil[] = {V, -1, sizeof(I) == 4 ? INT32_MAX : INT64_MAX, sizeof(I) == 4 ? INT32_MIN : INT64_MIN};
      bad[p] = static_cast<I>(evil[Uniform(0, 3)]);
      first = std::min(first, p);
    }
    f.indices = bad.data();
    Report of_forward = Fresh(), of_groups = Fresh();
    forward(outputs(), &of_forward);
    const Groups none = GroupRows(bad.data(), TypeOf(I{}), n, V, &of_groups, &memory, kStream);
    EXPECT(*none.size == 0, "n=%ld", long(n));
    for (const Report& wrong : {of_forward, of_groups})
      EXPECT(wrong.pair == static_cast<uint64_t>(first) && wrong.index == bad[first], "pair %ld, got %ld", long(first),
             long(wrong.pair));
    f.indices = indices.data();
  }
  if (ragged) {  // bad splits: the first is reported
    const Array<int64_t> good = row_splits.Copy();
    const int64_t at = Uniform(0, B);
    const int64_t evil[] = {-1, n + 1, INT64_MAX, INT64_MIN};
    row_splits[at] = evil[Uniform(0, 3)];
    int64_t first = 0;
    while (first < B && row_splits[first] <= row_splits[first + 1] && row_splits[0] == 0) ++first;
    Report of_forward = Fresh(), of_gradient = Fresh();
    forward(outputs(), &of_forward);
    gradient(got, &of_gradient);
    for (const Report& wrong : {of_forward, of_gradient}) {
      EXPECT(wrong.sample == static_cast<uint64_t>(first), "sample %ld, got %ld", long(first), long(wrong.sample));
      EXPECT(wrong.begin == row_splits[first] && wrong.end == (first < B ? row_splits[first + 1] : n), "sample %ld",
             long(first));
    }
    std::copy_n(good.data(), good.size(), row_splits.data());
  }
}

}  // namespace
}  // namespace cuda
}  // namespace deepfm

int main(int argc, char** argv) {
  using namespace deepfm;
  using namespace deepfm::cuda;
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 500;
  rng.seed(argc > 2 ? std::atoll(argv[2]) : 1);
  void (*const kinds[])(const char*) = {Case<Float, int32_t>, Case<Brain, int32_t>, Case<Float, int64_t>,
                                        Case<Half, int64_t>,  Case<Brain, int64_t>, Case<Half, int32_t>,
                                        FarRowsCase};
  for (int64_t i = 0; i < cases; ++i) kinds[i % 7](("case " + std::to_string(i)).c_str());
  std::printf("fuzz_cuda: %ld passed, 0 failed\n", long(cases));
  return 0;
}
