// The body of the row updates. Included by fm_cpu-inl.h, in the namespace of one instruction set.

// What a row's move does to the lag of its average. A product that is rounded before it is subtracted, as everybody
// computes who does not fuse the two: the asm keeps the compiler from doing so.
template <typename V, typename A>
static inline V LagAfter(V lag, V before, V after, A scale) {
  V move = (after - before) * scale;
#if defined(__AVX512F__)
  asm("" : "+v"(move));
#else
  asm("" : "+x"(move));
#endif
  return lag - move;
}

// Calls fn(Int<partial>, first column, lanes) for each register of a row.
template <typename T, typename Fn>
static inline void ForRegisters(int64_t dim, const Fn& fn) {
  constexpr int lanes = kLanes<T>;
  int64_t c = 0;
  for (; c + lanes <= dim; c += lanes) fn(Int<0>(), c, lanes);
  if (c < dim) fn(Int<1>(), c, static_cast<int>(dim - c));
}

// What every rule works with: the rows and the gradients of the groups, and the parts that all rules share.
template <typename T, int kSlots>
struct Updated {
  typedef AccOf<T> A;
  typedef VecOf<T> V;
  static constexpr int64_t kSize = sizeof(T);
  const UpdateArgs& a;
  const A* const hyper = static_cast<const A*>(a.hyper);
  const int64_t dim = a.dim, slot_dim = a.rule == Rule::kRowWiseAdagrad ? 1 : dim;
  T* const table = static_cast<T*>(a.table);
  T* const slots[kMostSlots] = {static_cast<T*>(a.slots[0]), static_cast<T*>(a.slots[1])};
  T* const lag = static_cast<T*>(a.lag);
  const A decay = hyper[0];
  const A* const more = hyper + ShapeOf(a.rule).hyper;  // the numbers behind those of the rule
  const A lag_scale = lag ? more[0] : A(0);
  const A rare = a.counts ? more[lag ? 1 : 0] : A(0), seen = a.counts ? more[lag ? 2 : 1] : A(0);
  const int64_t* const row_of = a.groups->rows();
  const int64_t* const starts = a.groups->starts();
  const PairPositions positions = a.groups->positions();

  const int64_t num_rows = a.num_rows;
  const Prefetcher fetch_row{table, num_rows, dim * kSize}, fetch_lag{lag, num_rows, dim * kSize},
      fetch_count{a.counts, num_rows, sizeof(int32_t)},
      fetch_gradient{static_cast<const T*>(a.gradient), a.groups->num_pairs(), dim * kSize};
  const Prefetcher fetch_slots[kMostSlots] = {{slots[0], num_rows, slot_dim * kSize},
                                              {slots[1], num_rows, slot_dim * kSize}};

  DEEPFM_INLINE void Fetch(int64_t row) const {
    fetch_row.Fetch(row);
    for (int i = 0; i < kSlots; ++i) fetch_slots[i].Fetch(row);
    fetch_lag.Fetch(row);
    fetch_count.Fetch(row);
  }
  // Of the pairs `distance` behind those of group u, before pair `stop`. What lies in order needs no fetching.
  DEEPFM_INLINE void FetchGradients(int64_t u, int64_t distance, int64_t stop) const {
    if (a.in_order) return;
    for (int64_t j = starts[u]; j < starts[u + 1] && j + distance < stop; ++j)
      fetch_gradient.Fetch(PositionOf(positions, j + distance));
  }
  // The sum of the gradients of group u, columns [c, c + tail).
  template <bool kPartial>
  DEEPFM_INLINE V GroupSum(int64_t u, int64_t c, int tail) const {
    const T* gradient = static_cast<const T*>(a.gradient) + c;
    if (a.in_order) return Load<kPartial>(gradient + (u - a.first_group) * dim, tail);
    V sum = {};
    for (int64_t j = starts[u]; j < starts[u + 1]; ++j)
      sum += Load<kPartial>(gradient + PositionOf(positions, j) * dim, tail);
    return sum;
  }
  // How much farther than by its rule a row moves.
  DEEPFM_INLINE A Farther(int64_t row) const {
    return a.counts ? rare * A(kRareCount) / (A(kRareCount) + seen * static_cast<A>(a.counts[row])) : A(0);
  }
  // Moves columns p of a row by a rule's step(p), after the decay, and its average's lag along.
  template <typename F, typename Step>
  DEEPFM_INLINE void Move(V* p, V* late, const F& farther, const Step& step) const {
    const V before = *p;
    if (decay != 0) *p -= *p * decay;
    step(*p);
    if (a.counts) *p += (*p - before) * farther;
    if (lag) *late = LagAfter(*late, before, *p, lag_scale);
  }
};

// Rows of one element, a register of them at a time: one division and square root serve them all.
template <typename T, int kSlots, typename Step>
static void UpdateElements(const UpdateArgs& a, int64_t begin, int64_t end, int64_t last, const Step& step) {
  typedef AccOf<T> A;
  typedef VecOf<T> V;
  constexpr int lanes = kLanes<T>, distance = 2 * lanes;
  const Updated<T, kSlots> rows{a};
  T* arrays[2 + kMostSlots] = {rows.table, rows.slots[0], rows.slots[1]};
  arrays[1 + kSlots] = rows.lag;
  const int count = rows.lag ? 2 + kSlots : 1 + kSlots;
  for (int64_t u = begin; u < end; u += lanes) {
    const int n = static_cast<int>(Min(lanes, end - u));
    A g[lanes] = {}, farther[lanes] = {}, x[2 + kMostSlots][lanes] = {};
    for (int l = 0; l < n; ++l) {
      const int64_t row = rows.row_of[u + l], ahead = rows.row_of[Min(u + l + distance, last - 1)];
      if (a.counts) __builtin_prefetch(a.counts + ahead);
      for (int i = 0; i < count; ++i) {
        __builtin_prefetch(arrays[i] + ahead);
        x[i][l] = LoadOne(arrays[i] + row);
      }
      g[l] = rows.template GroupSum<true>(u + l, 0, 1)[0];
      farther[l] = rows.Farther(row);
    }
    V gradient, more, v[2 + kMostSlots];
    __builtin_memcpy(&gradient, g, sizeof(gradient));
    __builtin_memcpy(&more, farther, sizeof(more));
    __builtin_memcpy(v, x, sizeof(v));
    rows.Move(&v[0], &v[1 + kSlots], more, [&](V& p) __attribute__((always_inline)) { step(gradient, p, v + 1); });
    __builtin_memcpy(x, v, sizeof(v));
    for (int l = 0; l < n; ++l)
      for (int i = 0; i < count; ++i) StoreOne(arrays[i] + rows.row_of[u + l], x[i][l]);
  }
}

// Groups [begin, end), fetching ahead up to group `last`; step(g, p, s) updates a register of the row, p, and of its
// slots, s.
template <typename T, int kSlots, typename Step>
static void UpdateRows(const UpdateArgs& a, int64_t begin, int64_t end, int64_t last, const Step& step) {
  typedef VecOf<T> V;
  if (a.dim == 1) return UpdateElements<T, kSlots>(a, begin, end, last, step);
  const Updated<T, kSlots> rows{a};
  const int64_t row_bytes = a.dim * static_cast<int64_t>(sizeof(T));
  const int64_t distance = PrefetchDistance(row_bytes * (1 + kSlots + (rows.lag ? 1 : 0)));
  const int64_t stop = rows.starts[last];
  for (int64_t u = begin; u < end; ++u) {
    if (u + distance < last) rows.Fetch(rows.row_of[u + distance]);
    rows.FetchGradients(u, distance, stop);
    const int64_t row = rows.row_of[u] * a.dim;
    const AccOf<T> farther = rows.Farther(rows.row_of[u]);
    ForRegisters<T>(a.dim, [&](auto partial, int64_t c, int tail) {
      constexpr bool kPartial = decltype(partial)::value != 0;
      const V g = rows.template GroupSum<kPartial>(u, c, tail);
      V p = Load<kPartial>(rows.table + row + c, tail), late = {}, s[kMostSlots];
      for (int i = 0; i < kSlots; ++i) s[i] = Load<kPartial>(rows.slots[i] + row + c, tail);
      if (rows.lag) late = Load<kPartial>(rows.lag + row + c, tail);
      rows.Move(&p, &late, farther, [&](V& p) __attribute__((always_inline)) { step(g, p, s); });
      Store<kPartial>(rows.table + row + c, p, tail);
      for (int i = 0; i < kSlots; ++i) Store<kPartial>(rows.slots[i] + row + c, s[i], tail);
      if (rows.lag) Store<kPartial>(rows.lag + row + c, late, tail);
    });
  }
}

// The same with one slot per row, which depends on the whole row's gradient.
template <typename T>
static void UpdateRowWiseAdagrad(const UpdateArgs& a, int64_t begin, int64_t end, int64_t last) {
  typedef AccOf<T> A;
  typedef VecOf<T> V;
  const Updated<T, 1> rows{a};
  const A rate = rows.hyper[1], epsilon = rows.hyper[2];
  const int64_t distance = PrefetchDistance(a.dim * static_cast<int64_t>(sizeof(T)));
  const int64_t stop = rows.starts[last];
  for (int64_t u = begin; u < end; ++u) {
    if (u + distance < last) rows.Fetch(rows.row_of[u + distance]);
    rows.FetchGradients(u, distance, stop);
    V squares = {};
    ForRegisters<T>(a.dim, [&](auto partial, int64_t c, int tail) {
      const V g = rows.template GroupSum<decltype(partial)::value != 0>(u, c, tail);
      squares += g * g;
    });
    T* const slot = rows.slots[0] + rows.row_of[u];
    const A s = LoadOne(slot) + HorizontalSum(squares) / static_cast<A>(a.dim);
    StoreOne(slot, s);
    const A scale = rate / (Sqrt(V{} + s)[0] + epsilon), farther = rows.Farther(rows.row_of[u]);
    ForRegisters<T>(a.dim, [&](auto partial, int64_t c, int tail) {
      constexpr bool kPartial = decltype(partial)::value != 0;
      T* const here = rows.table + rows.row_of[u] * a.dim + c;
      T* const lag = rows.lag ? rows.lag + rows.row_of[u] * a.dim + c : nullptr;
      const V g = rows.template GroupSum<kPartial>(u, c, tail);
      V p = Load<kPartial>(here, tail), late = {};
      if (lag) late = Load<kPartial>(lag, tail);
      rows.Move(&p, &late, farther, [&](V& p) __attribute__((always_inline)) { p -= g * scale; });
      Store<kPartial>(here, p, tail);
      if (lag) Store<kPartial>(lag, late, tail);
    });
  }
}

// x^power, per lane; the square root where it is one.
static inline float Power(float x, float power) { return __builtin_powf(x, power); }
static inline double Power(double x, double power) { return __builtin_pow(x, power); }
template <typename V, typename A>
static inline V PowerOf(V x, A power) {
  if (power == A(0.5)) return Sqrt(x);
  for (unsigned i = 0; i < sizeof(V) / sizeof(A); ++i) x[i] = Power(x[i], power);
  return x;
}

template <typename T>
static void Update(const UpdateArgs& a, int64_t begin, int64_t end, int64_t last) {
  typedef AccOf<T> A;
  typedef VecOf<T> V;
  const A* hyper = static_cast<const A*>(a.hyper) + 1;
  switch (a.rule) {
    case Rule::kSgd: {
      const A rate = hyper[0];
      return UpdateRows<T, 0>(a, begin, end, last, [=](V g, V& p, V*) { p -= g * rate; });
    }
    case Rule::kAdagrad: {
      const A rate = hyper[0], epsilon = hyper[1];
      return UpdateRows<T, 1>(a, begin, end, last, [=](V g, V& p, V* s) {
        s[0] += g * g;
        p -= g * rate / Sqrt(s[0] + epsilon);
      });
    }
    case Rule::kRowWiseAdagrad:
      return UpdateRowWiseAdagrad<T>(a, begin, end, last);
    case Rule::kLazyAdam: {
      const A rate = hyper[0], one_minus_beta_1 = hyper[1], one_minus_beta_2 = hyper[2], epsilon = hyper[3];
      return UpdateRows<T, 2>(a, begin, end, last, [=](V g, V& p, V* s) {
        s[0] += (g - s[0]) * one_minus_beta_1;
        s[1] += (g * g - s[1]) * one_minus_beta_2;
        p -= s[0] * rate / (Sqrt(s[1]) + epsilon);
      });
    }
    case Rule::kFtrl: {
      const A rate = hyper[0], power = -hyper[1], l1 = hyper[2], l2 = hyper[3], shrinkage = hyper[4];
      return UpdateRows<T, 2>(a, begin, end, last, [=](V g, V& p, V* s) {
        const V n = s[0] + g * g;
        const V powered = PowerOf(n, power);
        s[1] += g + 2 * shrinkage * p - (powered - PowerOf(s[0], power)) / rate * p;
        V clipped = s[1] > l1 ? V{} + l1 : s[1];
        clipped = clipped < -l1 ? V{} - l1 : clipped;
        p = (clipped - s[1]) / (powered / rate + 2 * l2);
        s[0] = n;
      });
    }
  }
}
