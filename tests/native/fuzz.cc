// Drives the kernels over random and adversarial shapes, for sanitizers: fuzz [cases] [seed].
// Every case is checked against a double-precision loop, and sentinels stand past every output.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/kernels/cpu_kernels.h"
#include "../../csrc/kernels/fm.h"
#include "../../csrc/kernels/top_products.h"
#include "../../csrc/python/thread_pool.h"
#include "definition.h"
#include "fuzz.h"

namespace deepfm {
namespace {

// Memory of exactly n items (heap, so that a sanitizer sees its end) and, for outputs, sentinels behind.
template <typename T>
struct Array {
  static constexpr int kSentinels = 3;
  std::vector<T> data;
  int64_t size;
  bool guarded;
  Array(int64_t n, bool output) : data(n + (output ? kSentinels : 0)), size(n), guarded(output) {
    if (output) std::memset(static_cast<void*>(data.data()), 0xA5, data.size() * sizeof(T));
  }
  bool Intact() const {
    const unsigned char* p = reinterpret_cast<const unsigned char*>(data.data() + size);
    return !guarded || std::all_of(p, p + kSentinels * sizeof(T), [](unsigned char c) { return c == 0xA5; });
  }
};

uint16_t ToBFloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
}
float FromBFloat16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// What T (the stored type) and A (the accumulation type) are; Float16 is covered from Python.
struct Float {
  typedef float T;
  typedef float A;
  static constexpr TableType kType = TableType::kFloat32;
  static T Make(double x) { return static_cast<T>(x); }
  static double Read(T x) { return x; }
  static constexpr double kStored = 0;
};
struct Double {
  typedef double T;
  typedef double A;
  static constexpr TableType kType = TableType::kFloat64;
  static T Make(double x) { return x; }
  static double Read(T x) { return x; }
  static constexpr double kStored = 0;
};
struct Brain {
  typedef uint16_t T;
  typedef float A;
  static constexpr TableType kType = TableType::kBFloat16;
  static T Make(double x) { return ToBFloat16(static_cast<float>(x)); }
  static double Read(T x) { return FromBFloat16(x); }
  static constexpr double kStored = 0.01;
};

// A row update by every rule in turn, against double: rows without a pair keep every bit.
template <typename D, typename I>
void UpdateCase(const char* where, int64_t V, int64_t K, const Array<I>& indices, const RowGroups& groups,
                const Parallel& parallel) {
  typedef typename D::T T;
  typedef typename D::A A;
  const Rule rule = static_cast<Rule>(Uniform(0, 4));
  const RuleShape rule_shape = ShapeOf(rule);
  const int64_t n = indices.size;
  const bool row_wise = rule == Rule::kRowWiseAdagrad;
  Array<T> gradient(n * K, false);
  for (T& x : gradient.data) x = D::Make(std::uniform_real_distribution<double>(-1, 1)(rng));
  std::vector<Array<T>> state;  // the table and its slots
  for (int i = 0; i <= rule_shape.slots; ++i) {
    state.emplace_back(i > 0 && row_wise ? V : V * K, true);
    for (int64_t j = 0; j < state[i].size; ++j) state[i].data[j] = D::Make(std::uniform_real_distribution<double>(0.5, 1)(rng));
  }
  const std::vector<Array<T>> before = state;
  const double decay = Chance(50) ? 0 : 0.25, power = Chance(50) ? -0.5 : -0.75;
  const double numbers[5][kMostHyper] = {{decay, 0.5},
                                         {decay, 0.5, 0.125},
                                         {decay, 0.5, 0.125},
                                         {decay, 0.5, 0.25, 0.125, 0.125},
                                         {decay, 0.5, power, 0.25, 0.125, 0.25}};
  const double* h = numbers[static_cast<int>(rule)];
  Array<A> hyper(rule_shape.hyper + 3, false);
  for (int i = 0; i < rule_shape.hyper; ++i) hyper.data[i] = static_cast<A>(h[i]);
  const bool with_lag = sizeof(T) == sizeof(A) && Chance(50), with_counts = Chance(50);
  if (with_lag) hyper.data[rule_shape.hyper] = 4;
  hyper.data[rule_shape.hyper + with_lag] = 2;
  hyper.data[rule_shape.hyper + with_lag + 1] = 0.5;
  Array<int32_t> counts(with_counts ? V : 0, false);
  for (int32_t& x : counts.data) x = static_cast<int32_t>(Uniform(0, 300));
  Array<T> lag(with_lag ? V * K : 0, true);
  for (int64_t i = 0; i < lag.size; ++i) lag.data[i] = D::Make(0.5);
  UpdateArgs a;
  a.rule = rule;
  a.table_type = D::kType;
  a.num_rows = V;
  a.dim = K;
  a.table = state[0].data.data();
  for (int i = 0; i < rule_shape.slots; ++i) a.slots[i] = state[i + 1].data.data();
  a.gradient = gradient.data.data();
  a.hyper = hyper.data.data();
  a.counts = with_counts ? counts.data.data() : nullptr;
  a.lag = with_lag ? lag.data.data() : nullptr;
  a.groups = &groups;
  SparseUpdate(a, parallel);
  std::vector<double> g(V * K), squares(V);
  std::vector<int64_t> count(V);
  for (int64_t p = 0; p < n; ++p) {
    ++count[indices.data[p]];
    for (int64_t k = 0; k < K; ++k) g[indices.data[p] * K + k] += D::Read(gradient.data[p * K + k]);
  }
  for (int64_t i = 0; i < V * K; ++i) squares[i / K] += g[i] * g[i] / static_cast<double>(K);
  for (const Array<T>& array : state) EXPECT(array.Intact(), "V=%ld K=%ld", long(V), long(K));
  EXPECT(lag.Intact(), "V=%ld K=%ld", long(V), long(K));
  for (int64_t i = 0; i < lag.size; ++i) {
    const double want = 0.5 - 4 * (D::Read(state[0].data[i]) - D::Read(before[0].data[i]));
    EXPECT(std::fabs(D::Read(lag.data[i]) - want) <= 1e-6 * (1 + std::fabs(want)), "lag %ld", long(i));
  }
  for (int64_t i = 0; i < V * K; ++i) {
    const int64_t slot = row_wise ? i / K : i;
    double x = D::Read(before[0].data[i]), s0 = 0, s1 = 0;
    if (rule_shape.slots > 0) s0 = D::Read(before[1].data[slot]);
    if (rule_shape.slots > 1) s1 = D::Read(before[2].data[slot]);
    if (count[i / K]) {
      x -= x * decay;
      switch (rule) {
        case Rule::kSgd:
          x -= g[i] * h[1];
          break;
        case Rule::kAdagrad:
          s0 += g[i] * g[i];
          x -= h[1] * g[i] / std::sqrt(s0 + h[2]);
          break;
        case Rule::kRowWiseAdagrad:
          s0 += squares[i / K];
          x -= h[1] / (std::sqrt(s0) + h[2]) * g[i];
          break;
        case Rule::kLazyAdam:
          s0 += (g[i] - s0) * h[2];
          s1 += (g[i] * g[i] - s1) * h[3];
          x -= s0 * h[1] / (std::sqrt(s1) + h[4]);
          break;
        case Rule::kFtrl: {
          const double total = s0 + g[i] * g[i], powered = std::pow(total, -h[2]);
          s1 += g[i] + 2 * h[5] * x - (powered - std::pow(s0, -h[2])) / h[1] * x;
          s0 = total;
          x = (std::min(std::max(s1, -h[3]), h[3]) - s1) / (powered / h[1] + 2 * h[4]);
        }
      }
    }
    if (with_counts && count[i / K]) x += (x - D::Read(before[0].data[i])) * 40 / (20 + 0.5 * counts.data[i / K]);
    const double want[] = {x, s0, s1};
    for (int j = 0; j <= rule_shape.slots; ++j) {
      const double got = D::Read(state[j].data[j ? slot : i]);
      const double bound = (sizeof(A) == 4 ? 1e-4 : 1e-11) * (1 + static_cast<double>(count[i / K])) + D::kStored;
      if (count[i / K]) {
        EXPECT(std::fabs(got - want[j]) <= bound * (1 + std::fabs(want[j])), "rule %d array %d: %g, %g",
               static_cast<int>(rule), j, got, want[j]);
      } else {
        EXPECT(got == want[j], "rule %d array %d moved", static_cast<int>(rule), j);
      }
    }
  }
}

// The gradient and the updates by it in one pass, to the bits of the two apart.
template <typename D>
void FusedCase(const char* where, GradientArgs a, const Array<typename D::T>& table,
               const Array<typename D::T>& weights, const Parallel& parallel) {
  typedef typename D::T T;
  typedef typename D::A A;
  const int64_t V = a.shape.num_rows, K = a.shape.dim, U = a.groups->size();
  const bool with_weights = weights.size > 0, with_lag = sizeof(T) == sizeof(A) && Chance(50), rare = Chance(50);
  const Rule rule = static_cast<Rule>(Uniform(0, 4));
  const RuleShape rule_shape = ShapeOf(rule);
  Array<A> hyper(kMostHyper, false);
  for (A& x : hyper.data) x = static_cast<A>(0.25);
  if (rule == Rule::kFtrl) hyper.data[2] = static_cast<A>(-0.5);
  Array<int32_t> counts(rare ? V : 0, false);
  for (int32_t& x : counts.data) x = static_cast<int32_t>(Uniform(0, 300));
  Array<T> rows(U * K, true), weight_rows(with_weights ? U : 0, true);
  RowGroups unique;
  EXPECT(unique.Build(a.groups->rows(), IndexType::kInt64, U, V, parallel) == -1, "U=%ld", long(U));
  std::vector<Array<T>> found[2];  // table, its slots and lag; weights, theirs
  for (int fused = 0; fused < 2; ++fused) {
    std::vector<Array<T>>& state = found[fused];
    UpdateArgs updates[2];
    for (int of_weights = 0; of_weights <= with_weights; ++of_weights) {
      const int64_t columns = of_weights ? 1 : K;
      state.push_back(of_weights ? weights : table);
      for (int i = 0; i < rule_shape.slots + with_lag; ++i) {
        state.emplace_back(i < rule_shape.slots && rule == Rule::kRowWiseAdagrad ? V : V * columns, true);
        for (int64_t j = 0; j < state.back().size; ++j) state.back().data[j] = D::Make(0.5);
      }
      UpdateArgs& u = updates[of_weights];
      u.rule = rule;
      u.table_type = D::kType;
      u.num_rows = V;
      u.dim = columns;
      u.hyper = hyper.data.data();
      u.counts = rare ? counts.data.data() : nullptr;
    }
    for (int of_weights = 0; of_weights <= with_weights; ++of_weights) {
      Array<T>* of_this = &state[of_weights ? 1 + rule_shape.slots + with_lag : 0];
      UpdateArgs& u = updates[of_weights];
      u.table = of_this->data.data();
      for (int i = 0; i < rule_shape.slots; ++i) u.slots[i] = of_this[1 + i].data.data();
      if (with_lag) u.lag = of_this[1 + rule_shape.slots].data.data();
    }
    a.table = updates[0].table;
    a.weights = with_weights ? updates[1].table : nullptr;
    if (fused) {
      FmUpdate(a, updates[0], with_weights ? &updates[1] : nullptr, parallel);
      continue;
    }
    a.rows = rows.data.data();
    a.weight_rows = weight_rows.data.data();
    a.d_values = nullptr;
    FmGradient(a, parallel);
    for (int of_weights = 0; of_weights <= with_weights; ++of_weights) {
      updates[of_weights].gradient = of_weights ? a.weight_rows : a.rows;
      updates[of_weights].groups = &unique;
      SparseUpdate(updates[of_weights], parallel);
    }
  }
  for (size_t i = 0; i < found[0].size(); ++i) {
    EXPECT(found[1][i].Intact(), "array %ld", long(i));
    EXPECT(std::memcmp(found[0][i].data.data(), found[1][i].data.data(), found[0][i].data.size() * sizeof(T)) == 0,
           "rule %d array %ld V=%ld K=%ld", static_cast<int>(rule), long(i), long(V), long(K));
  }
}

template <typename D, typename I>
void Case(const char* where, const Parallel& parallel) {
  typedef typename D::T T;
  typedef typename D::A A;
  const int64_t V = Chance(10) ? 1 : Chance(50) ? Uniform(1, 40) : Uniform(1, 3000);
  const int64_t K = Chance(50) ? Uniform(1, 20) : Chance(80) ? Uniform(1, 140) : Uniform(0, 300);
  const bool big = Chance(2);  // enough pairs for the radix sort and for several threads
  const int64_t B = Chance(8) ? 0 : big ? Uniform(300, 900) : Uniform(1, 12);
  const int64_t P = Chance(5) ? 0 : big ? Uniform(20, 60) : Uniform(1, 9);
  const bool ragged = Chance(40), pooled = !ragged && Chance(40);
  std::vector<int64_t> row_splits = {0}, field_splits;
  if (ragged) {
    for (int64_t b = 0; b < B; ++b) row_splits.push_back(row_splits.back() + (Chance(20) ? 0 : Uniform(0, P)));
  }
  if (pooled) {
    field_splits = {0};
    while (field_splits.back() < P) field_splits.push_back(Uniform(field_splits.back(), P));
  }
  const int64_t n = ragged ? row_splits.back() : B * P;
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
  shape.num_fields = pooled ? static_cast<int64_t>(field_splits.size()) - 1 : 0;
  const int64_t F = pooled ? shape.num_fields : ragged ? 0 : P;
  const int64_t num_embeddings = ragged ? n : B * F;

  Array<T> table(V * K, false);
  Array<I> indices(n, false);
  Array<A> values(n, false);
  for (T& x : table.data) x = D::Make(std::uniform_real_distribution<double>(-1, 1)(rng));
  const bool one_row = Chance(10);
  for (I& i : indices.data) i = static_cast<I>(one_row ? V - 1 : Uniform(0, V - 1));
  for (A& x : values.data) x = Chance(10) ? A(0) : static_cast<A>(std::uniform_real_distribution<double>(-2, 2)(rng));
  const bool with_values = Chance(70), with_embeddings = pooled || Chance(50);
  const bool with_weights = K > 0 && Chance(50);
  Array<T> weights(with_weights ? V : 0, false);
  for (T& x : weights.data) x = D::Make(std::uniform_real_distribution<double>(-1, 1)(rng));
  Array<A> linear(with_weights ? B : 0, true);

  Array<A> interaction(B * width, true), sums(B * K, true), embeddings(with_embeddings ? num_embeddings * K : 0, true);
  ForwardArgs f;
  f.shape = shape;
  f.table_type = D::kType;
  f.index_type = sizeof(I) == 4 ? IndexType::kInt32 : IndexType::kInt64;
  f.output = output;
  f.table = table.data.data();
  f.indices = indices.data.data();
  f.values = with_values ? values.data.data() : nullptr;
  f.weights = with_weights ? weights.data.data() : nullptr;
  f.linear = with_weights ? linear.data.data() : nullptr;
  f.interaction = interaction.data.data();
  f.sums = sums.data.data();
  f.embeddings = with_embeddings ? embeddings.data.data() : nullptr;

  if (n > 0 && Chance(10)) {  // bad indices: the first one is reported, nothing is read outside
    std::vector<I> bad = indices.data;
    int64_t first = n;
    for (int i = 0; i < 3; ++i) {
      const int64_t p = Uniform(0, n - 1);
      const int64_t evil[] = {V, -1, sizeof(I) == 4 ? INT32_MAX : INT64_MAX, sizeof(I) == 4 ? INT32_MIN : INT64_MIN};
      bad[p] = static_cast<I>(evil[Uniform(0, 3)]);
      first = std::min(first, p);
    }
    ForwardArgs g = f;
    g.indices = bad.data();
    EXPECT(FmForward(g, parallel) == first, "n=%ld V=%ld", long(n), long(V));
    RowGroups groups;
    EXPECT(groups.Build(bad.data(), f.index_type, n, V, parallel) == first && groups.size() == 0, "n=%ld", long(n));
  }
  EXPECT(FmForward(f, parallel) == -1, "n=%ld V=%ld", long(n), long(V));
  EXPECT(interaction.Intact() && sums.Intact() && embeddings.Intact() && linear.Intact(), "B=%ld K=%ld", long(B),
         long(K));

  const Definition want_of(
      shape, [&](int64_t p) { return with_values ? static_cast<double>(values.data[p]) : 1.0; },
      [&](int64_t p, int64_t k) { return D::Read(table.data[indices.data[p] * K + k]); });
  const std::vector<double>&e = want_of.e, &s = want_of.s;
  const double eps = sizeof(A) == 4 ? 2e-6 : 1e-14;
  const double scale = 4.0 * (P + 1) * (P + 1) * (K + 1);  // |x| <= 2, |T| <= 1
  auto close = [&](double got, double want, double factor) { return std::fabs(got - want) <= eps * scale * factor; };
  want_of.Check(where, output, interaction.data.data(), sums.data.data(), close);
  want_of.CheckEmbeddings(where, embeddings.data.data(), embeddings.size, close);
  auto weight = [&](int64_t p) { return D::Read(weights.data[indices.data[p]]); };
  if (with_weights) want_of.CheckLinear(where, linear.data.data(), weight, close);

  // Gradient.
  RowGroups groups;
  EXPECT(groups.Build(indices.data.data(), f.index_type, n, V, parallel) == -1, "n=%ld", long(n));
  const int64_t U = groups.size();
  const bool with_de = Chance(50), with_dx = Chance(50);
  Array<A> g(B * width, false), de(with_de ? num_embeddings * K : 0, false), dx(with_dx ? n : 0, true);
  for (A& x : g.data) x = static_cast<A>(std::uniform_real_distribution<double>(-1, 1)(rng));
  for (A& x : de.data) x = static_cast<A>(std::uniform_real_distribution<double>(-1, 1)(rng));
  Array<T> rows(U * K, true), weight_rows(with_weights ? U : 0, true);
  Array<A> d_linear(with_weights ? B : 0, false);
  for (A& x : d_linear.data) x = static_cast<A>(std::uniform_real_distribution<double>(-1, 1)(rng));
  GradientArgs a;
  a.weights = f.weights;
  a.d_linear = d_linear.data.data();
  a.weight_rows = weight_rows.data.data();
  a.l2 = Chance(50) ? 0 : 0.5;
  a.l2_linear = Chance(50) ? 0 : 0.25;
  Array<int32_t> counts(Chance(50) ? V : 0, false);
  for (int32_t& x : counts.data) x = static_cast<int32_t>(Uniform(0, 9));
  if (counts.size) {
    a.counts = counts.data.data();
    a.prior = Chance(50) ? 0 : 0.75;
    a.prior_linear = Chance(50) ? 0 : 0.5;
    a.prior_softness = Chance(50) ? 0 : 4;
  }
  a.shape = shape;
  a.table_type = D::kType;
  a.output = output;
  a.table = f.table;
  a.values = f.values;
  a.sums = sums.data.data();
  a.embeddings = f.embeddings;
  a.d_interaction = g.data.data();
  a.d_embeddings = with_de ? de.data.data() : nullptr;
  a.groups = &groups;
  a.rows = rows.data.data();
  a.d_values = with_dx ? dx.data.data() : nullptr;
  FmGradient(a, parallel);
  EXPECT(rows.Intact() && dx.Intact() && weight_rows.Intact(), "U=%ld K=%ld", long(U), long(K));
  std::vector<double> want(V * K), want_weights(V);
  std::vector<int64_t> count(V);
  for (int64_t p = 0; p < n; ++p) {
    const int64_t b = want_of.sample[p], i = want_of.FieldOf(p);
    const double x = with_values ? values.data[p] : 1;
    double dot = 0;
    ++count[indices.data[p]];
    for (int64_t k = 0; k < K; ++k) {
      const double gk = output == Output::kScalar ? g.data[b] : g.data[b * K + k];
      double dk = output == Output::kSum ? gk : gk * (s[b * K + k] - e[i * K + k]);
      if (with_de) dk += de.data[i * K + k];
      want[indices.data[p] * K + k] += x * dk;
      dot += dk * D::Read(table.data[indices.data[p] * K + k]);
    }
    if (with_weights) {
      want_weights[indices.data[p]] += x * d_linear.data[b];
      dot += D::Read(weights.data[indices.data[p]]) * d_linear.data[b];
    }
    if (with_dx) EXPECT(close(dx.data[p], dot, 4), "d_values %ld", long(p));
  }
  std::vector<double> share(V);
  for (int64_t p = 0; p < n && counts.size; ++p) {
    if (!with_values || values.data[p] != 0) {
      const double c = std::max(1, counts.data[indices.data[p]]);
      share[indices.data[p]] += (a.prior_softness > 0 ? a.prior_softness / (a.prior_softness + c) : 1) / c;
    }
  }
  int64_t u = 0;
  for (int64_t v = 0; v < V; ++v) {
    if (!count[v]) continue;
    EXPECT(u < U && groups.rows()[u] == v && groups.starts()[u + 1] - groups.starts()[u] == count[v], "v=%ld", long(v));
    for (int64_t k = 0; k < K; ++k) {
      const double got = D::Read(rows.data[u * K + k]);
      const double expected = want[v * K + k] + (2 * a.l2 + share[v] * a.prior) * D::Read(table.data[v * K + k]);
      EXPECT(std::fabs(got - expected) <= eps * scale * 4 * count[v] + D::kStored * std::fabs(expected),
             "row %ld k %ld: %g, %g", long(v), long(k), got, expected);
    }
    if (with_weights) {
      const double expected = want_weights[v] + (2 * a.l2_linear + share[v] * a.prior_linear) * D::Read(weights.data[v]);
      EXPECT(std::fabs(D::Read(weight_rows.data[u]) - expected) <=
                 eps * scale * 4 * count[v] + D::kStored * std::fabs(expected),
             "weight row %ld", long(v));
    }
    ++u;
  }
  EXPECT(u == U && groups.starts()[U] == n, "U=%ld", long(U));
  UpdateCase<D, I>(where, V, K, indices, groups, parallel);
  if (K > 0) FusedCase<D>(where, a, table, weights, parallel);
}

// A forward over rows of kInt8, against one over the same numbers as floats.
template <typename I>
void QuantizedCase(const char* where, const Parallel& parallel) {
  const int64_t V = Uniform(1, 40), K = Chance(50) ? Uniform(1, 20) : Uniform(1, 140), row_bytes = K + kInt8Header;
  const int64_t B = Uniform(0, 12), P = Uniform(0, 9);
  const bool ragged = Chance(40), pooled = !ragged && Chance(40), with_embeddings = Chance(50), with_linear = Chance(50);
  Array<uint8_t> table(V * row_bytes, false);
  Array<float> floats(V * K, false), weights(V, false);
  for (int64_t v = 0; v < V; ++v) {
    uint8_t* row = table.data.data() + v * row_bytes;
    const uint16_t header[3] = {Brain::Make(1.0 / static_cast<double>(Uniform(100, 300))), Brain::Make(-0.5),
                                Brain::Make(static_cast<double>(Uniform(-8, 8)) / 8)};
    std::memcpy(row, header, kInt8Header);
    for (int64_t k = 0; k < K; ++k) {
      row[kInt8Header + k] = static_cast<uint8_t>(Uniform(0, 255));
      floats.data[v * K + k] = static_cast<float>(Brain::Read(header[1]) + Brain::Read(header[0]) * row[kInt8Header + k]);
    }
    weights.data[v] = FromBFloat16(header[2]);
  }
  std::vector<int64_t> row_splits = {0}, field_splits = {0, P};
  for (int64_t b = 0; ragged && b < B; ++b) row_splits.push_back(row_splits.back() + Uniform(0, P));
  const int64_t n = ragged ? row_splits.back() : B * P, num_embeddings = pooled ? B : n;
  Array<I> indices(n, false);
  Array<float> values(n, false);
  for (I& i : indices.data) i = static_cast<I>(Uniform(0, V - 1));
  for (float& x : values.data) x = static_cast<float>(Uniform(-4, 4)) / 2;
  ForwardArgs f;
  f.output = static_cast<Output>(Uniform(0, 2));
  f.shape.num_rows = V;
  f.shape.dim = K;
  f.shape.num_samples = B;
  f.shape.num_pairs = n;
  f.shape.pairs_per_sample = ragged ? 0 : P;
  f.shape.row_splits = ragged ? row_splits.data() : nullptr;
  f.shape.field_splits = pooled ? field_splits.data() : nullptr;
  f.shape.num_fields = pooled ? 1 : 0;
  f.index_type = sizeof(I) == 4 ? IndexType::kInt32 : IndexType::kInt64;
  f.indices = indices.data.data();
  f.values = Chance(70) ? values.data.data() : nullptr;
  std::vector<Array<float>> found[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t width = f.output == Output::kScalar ? 1 : K;
    for (int64_t size : {B * width, B * K, with_embeddings ? num_embeddings * K : 0, with_linear ? B : 0})
      found[i].emplace_back(size, true);
    f.table_type = i == 0 ? TableType::kInt8 : TableType::kFloat32;
    f.table = i == 0 ? static_cast<const void*>(table.data.data()) : floats.data.data();
    f.weights = i == 1 && with_linear ? weights.data.data() : nullptr;
    f.interaction = found[i][0].data.data();
    f.sums = found[i][1].data.data();
    f.embeddings = with_embeddings ? found[i][2].data.data() : nullptr;
    f.linear = with_linear ? found[i][3].data.data() : nullptr;
    EXPECT(FmForward(f, parallel) == -1, "n=%ld V=%ld", long(n), long(V));
  }
  const double bound = 1e-5 * static_cast<double>((P + 1) * (P + 1) * (K + 1));  // |x| <= 2, elements below 3
  for (int a = 0; a < 4; ++a) {
    EXPECT(found[0][a].Intact(), "array %d", a);
    for (int64_t i = 0; i < found[0][a].size; ++i)
      EXPECT(std::fabs(found[0][a].data[i] - found[1][a].data[i]) <= bound, "array %d, %ld: %g, %g", a, long(i),
             found[0][a].data[i], found[1][a].data[i]);
  }
  if (n > 0) {
    indices.data[n - 1] = static_cast<I>(V);
    f.table_type = TableType::kInt8;
    f.table = table.data.data();
    f.weights = nullptr;
    EXPECT(FmForward(f, parallel) == n - 1, "n=%ld V=%ld", long(n), long(V));
  }
}

// Rows of small integers, whose products are exact and often equal, against a sort of all of them.
void TopProductsCase(const char* where, const Parallel& parallel) {
  const int64_t n = Chance(90) ? Uniform(0, 700) : Uniform(0, 40000), dim = Uniform(0, 40), queries = Uniform(0, 3);
  const bool some = Chance(40);
  Array<float> rows(n * dim, false), query(queries * dim, false);
  for (float& x : rows.data) x = static_cast<float>(Uniform(-2, 2));
  for (float& x : query.data) x = static_cast<float>(Uniform(-2, 2));
  std::vector<int64_t> chosen;
  for (int64_t row = 0; row < n; ++row)
    if (!some || Chance(30)) chosen.push_back(row);
  const int64_t count = static_cast<int64_t>(chosen.size()), k = Uniform(1, Chance(50) ? 5 : count + 3);
  const int64_t most = std::min(k, count);
  const int64_t nan = dim > 0 && count > 0 && Chance(20) ? chosen[Uniform(0, count - 1)] : -1;
  if (nan >= 0) rows.data[nan * dim] = NAN;
  Array<int64_t> places(queries * most, true), first_nan(queries, true);
  Array<float> products(queries * most, true);
  TopProductsArgs a;
  a.rows = rows.data.data();
  a.num_rows = n;
  a.dim = dim;
  a.chosen = some ? chosen.data() : nullptr;
  a.num_chosen = some ? count : -1;
  a.queries = query.data.data();
  a.num_queries = queries;
  a.k = k;
  a.places = places.data.data();
  a.products = products.data.data();
  a.first_nan = first_nan.data.data();
  TopProducts(a, parallel);
  EXPECT(places.Intact() && products.Intact() && first_nan.Intact(), "n=%ld dim=%ld k=%ld", long(n), long(dim), long(k));
  for (int64_t b = 0; b < queries; ++b) {
    EXPECT(first_nan.data[b] == nan, "query %ld: %ld, %ld", long(b), long(first_nan.data[b]), long(nan));
    if (nan >= 0) continue;
    auto product = [&](int64_t row) {
      float sum = 0;
      for (int64_t d = 0; d < dim; ++d) sum += rows.data[row * dim + d] * query.data[b * dim + d];
      return sum;
    };
    std::vector<int64_t> order = chosen;
    std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return product(x) > product(y); });
    for (int64_t i = 0; i < most; ++i)
      EXPECT(places.data[b * most + i] == order[i] && products.data[b * most + i] == product(order[i]),
             "n=%ld dim=%ld k=%ld query %ld place %ld", long(n), long(dim), long(k), long(b), long(i));
  }
}

}  // namespace
}  // namespace deepfm

int main(int argc, char** argv) {
  using namespace deepfm;
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 10000;
  const uint64_t seed = argc > 2 ? std::atoll(argv[2]) : 1;
  int64_t total = 0;
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    if (!SetIsa(isa)) continue;
    rng.seed(seed);
    for (int64_t i = 0; i < cases; ++i) {
      const std::string where = std::string(isa) + " case " + std::to_string(i);
      const Parallel parallel = ThreadPool::Get().Lend(static_cast<int>(1 + i % 4));
      switch (i % 9) {
        case 0:
          Case<Float, int32_t>(where.c_str(), parallel);
          break;
        case 1:
          Case<Float, int64_t>(where.c_str(), parallel);
          break;
        case 2:
          Case<Double, int64_t>(where.c_str(), parallel);
          break;
        case 3:
          Case<Brain, int32_t>(where.c_str(), parallel);
          break;
        case 4:
          Case<Double, int32_t>(where.c_str(), parallel);
          break;
        case 5:
          Case<Brain, int64_t>(where.c_str(), parallel);
          break;
        case 6:
          QuantizedCase<int32_t>(where.c_str(), parallel);
          break;
        case 7:
          QuantizedCase<int64_t>(where.c_str(), parallel);
          break;
        default:
          TopProductsCase(where.c_str(), parallel);
      }
    }
    total += cases;
    std::printf("%s: %ld cases\n", isa, long(cases));
  }
  std::printf("fuzz: %ld passed, 0 failed\n", long(total));
  return 0;
}
