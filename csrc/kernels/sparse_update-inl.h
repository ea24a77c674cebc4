// The body of the row updates. Included by fm_cpu-inl.h, in the namespace of one instruction set.

// The sum of the gradients of group u, columns [c, c + tail).
template <bool kPartial, typename T>
static inline VecOf<T> GroupSum(const UpdateArgs& a, const int64_t* starts, const PairPositions& positions, int64_t u,
                                int64_t c, int tail) {
  const T* gradient = static_cast<const T*>(a.gradient) + c;
  VecOf<T> sum = {};
  for (int64_t j = starts[u]; j < starts[u + 1]; ++j)
    sum += Load<kPartial>(gradient + PositionOf(positions, j) * a.dim, tail);
  return sum;
}

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

template <typename A>
static inline A LagScale(const UpdateArgs& a) {
  return a.lag ? static_cast<const A*>(a.hyper)[ShapeOf(a.rule).hyper] : A(0);
}

// How much farther than by its rule a row moves.
template <typename A>
static inline A Farther(const UpdateArgs& a, int64_t row) {
  const A* hyper = static_cast<const A*>(a.hyper) + ShapeOf(a.rule).hyper + (a.lag ? 1 : 0);
  const A rare = hyper[0], seen = hyper[1];
  return rare * A(kRareCount) / (A(kRareCount) + seen * static_cast<A>(a.counts[row]));
}

// Calls fn(Int<partial>, first column, lanes) for each register of a row.
template <typename T, typename Fn>
static inline void ForRegisters(int64_t dim, const Fn& fn) {
  constexpr int lanes = kLanes<T>;
  int64_t c = 0;
  for (; c + lanes <= dim; c += lanes) fn(Int<0>(), c, lanes);
  if (c < dim) fn(Int<1>(), c, static_cast<int>(dim - c));
}

// Rows of one element, a register of them at a time: one division and square root serve them all.
template <typename T, int kSlots, typename Step>
static void UpdateElements(const UpdateArgs& a, int64_t begin, int64_t end, const Step& step) {
  typedef AccOf<T> A;
  typedef VecOf<T> V;
  constexpr int lanes = kLanes<T>, distance = 2 * lanes;
  constexpr int most = 2 + kMostSlots;
  T* arrays[most] = {static_cast<T*>(a.table), static_cast<T*>(a.slots[0]), static_cast<T*>(a.slots[1])};
  arrays[1 + kSlots] = static_cast<T*>(a.lag);
  const int count = a.lag ? 2 + kSlots : 1 + kSlots;
  const int64_t* row_of = a.groups->rows();
  const int64_t* starts = a.groups->starts();
  const PairPositions positions = a.groups->positions();
  const A decay = static_cast<const A*>(a.hyper)[0], lag_scale = LagScale<A>(a);
  for (int64_t u = begin; u < end; u += lanes) {
    const int n = static_cast<int>(Min(lanes, end - u));
    A g[lanes] = {}, x[most][lanes] = {}, farther[lanes] = {};
    for (int l = 0; l < n; ++l) {
      if (a.counts) {
        if (u + l + distance < end) __builtin_prefetch(a.counts + row_of[u + l + distance]);
        farther[l] = Farther<A>(a, row_of[u + l]);
      }
      for (int i = 0; i < count; ++i) {
        if (u + l + distance < end) __builtin_prefetch(arrays[i] + row_of[u + l + distance]);
        x[i][l] = LoadOne(arrays[i] + row_of[u + l]);
      }
      g[l] = GroupSum<true, T>(a, starts, positions, u + l, 0, 1)[0];
    }
    V v[most], gradient;
    __builtin_memcpy(&gradient, g, sizeof(gradient));
    __builtin_memcpy(v, x, sizeof(v));
    const V before = v[0];
    if (decay != 0) v[0] -= v[0] * decay;
    step(gradient, v[0], v + 1);
    if (a.counts) {
      V more;
      __builtin_memcpy(&more, farther, sizeof(more));
      v[0] += (v[0] - before) * more;
    }
    if (a.lag) v[1 + kSlots] = LagAfter(v[1 + kSlots], before, v[0], lag_scale);
    __builtin_memcpy(x, v, sizeof(v));
    for (int l = 0; l < n; ++l)
      for (int i = 0; i < count; ++i) StoreOne(arrays[i] + row_of[u + l], x[i][l]);
  }
}

// Groups [begin, end); step(g, p, s) updates a register of the row, p, and of its slots, s.
template <typename T, int kSlots, typename Step>
static void UpdateRows(const UpdateArgs& a, int64_t begin, int64_t end, const Step& step) {
  typedef AccOf<T> A;
  typedef VecOf<T> V;
  if (a.dim == 1) return UpdateElements<T, kSlots>(a, begin, end, step);
  T* arrays[2 + kMostSlots] = {static_cast<T*>(a.table), static_cast<T*>(a.slots[0]), static_cast<T*>(a.slots[1])};
  T* const lag = static_cast<T*>(a.lag);
  arrays[1 + kSlots] = lag;
  const int count = lag ? 2 + kSlots : 1 + kSlots;
  const int64_t* row_of = a.groups->rows();
  const int64_t* starts = a.groups->starts();
  const PairPositions positions = a.groups->positions();
  const A decay = static_cast<const A*>(a.hyper)[0], lag_scale = LagScale<A>(a);
  const int64_t row_bytes = a.dim * static_cast<int64_t>(sizeof(T));
  const int64_t distance = PrefetchDistance(row_bytes * count);
  const int64_t stop = starts[end];
  for (int64_t u = begin; u < end; ++u) {
    if (u + distance < end) {
      if (a.counts) __builtin_prefetch(a.counts + row_of[u + distance]);
      for (int i = 0; i < count; ++i)
        PrefetchRow(reinterpret_cast<const char*>(arrays[i] + row_of[u + distance] * a.dim), row_bytes);
    }
    for (int64_t j = starts[u]; j < starts[u + 1] && j + distance < stop; ++j)
      PrefetchRow(static_cast<const char*>(a.gradient) + PositionOf(positions, j + distance) * row_bytes, row_bytes);
    const int64_t row = row_of[u] * a.dim;
    const A farther = a.counts ? Farther<A>(a, row_of[u]) : A(0);
    ForRegisters<T>(a.dim, [&](auto partial, int64_t c, int tail) {
      constexpr bool kPartial = decltype(partial)::value != 0;
      const V g = GroupSum<kPartial, T>(a, starts, positions, u, c, tail);
      V v[1 + kMostSlots];
      for (int i = 0; i <= kSlots; ++i) v[i] = Load<kPartial>(arrays[i] + row + c, tail);
      const V before = v[0];
      if (decay != 0) v[0] -= v[0] * decay;
      step(g, v[0], v + 1);
      if (a.counts) v[0] += (v[0] - before) * farther;
      if (lag) {
        const V late = LagAfter(Load<kPartial>(lag + row + c, tail), before, v[0], lag_scale);
        Store<kPartial>(lag + row + c, late, tail);
      }
      for (int i = 0; i <= kSlots; ++i) Store<kPartial>(arrays[i] + row + c, v[i], tail);
    });
  }
}

// The same with one slot per row, which depends on the whole row's gradient.
template <typename T>
static void UpdateRowWiseAdagrad(const UpdateArgs& a, int64_t begin, int64_t end) {
  typedef AccOf<T> A;
  typedef VecOf<T> V;
  T* table = static_cast<T*>(a.table);
  T* slot = static_cast<T*>(a.slots[0]);
  T* lag = static_cast<T*>(a.lag);
  const int64_t* row_of = a.groups->rows();
  const int64_t* starts = a.groups->starts();
  const PairPositions positions = a.groups->positions();
  const A* hyper = static_cast<const A*>(a.hyper);
  const A decay = hyper[0], rate = hyper[1], epsilon = hyper[2], lag_scale = LagScale<A>(a);
  const int64_t row_bytes = a.dim * static_cast<int64_t>(sizeof(T));
  const int64_t distance = PrefetchDistance(row_bytes);
  const int64_t stop = starts[end];
  for (int64_t u = begin; u < end; ++u) {
    if (u + distance < end) {
      PrefetchRow(reinterpret_cast<const char*>(table + row_of[u + distance] * a.dim), row_bytes);
      __builtin_prefetch(slot + row_of[u + distance]);
      if (a.counts) __builtin_prefetch(a.counts + row_of[u + distance]);
      if (lag) PrefetchRow(reinterpret_cast<const char*>(lag + row_of[u + distance] * a.dim), row_bytes);
    }
    for (int64_t j = starts[u]; j < starts[u + 1] && j + distance < stop; ++j)
      PrefetchRow(static_cast<const char*>(a.gradient) + PositionOf(positions, j + distance) * row_bytes, row_bytes);
    V squares = {};
    ForRegisters<T>(a.dim, [&](auto partial, int64_t c, int tail) {
      const V g = GroupSum<decltype(partial)::value != 0, T>(a, starts, positions, u, c, tail);
      squares += g * g;
    });
    const A s = LoadOne(slot + row_of[u]) + HorizontalSum(squares) / static_cast<A>(a.dim);
    StoreOne(slot + row_of[u], s);
    const A scale = rate / (Sqrt(V{} + s)[0] + epsilon);
    const A farther = a.counts ? Farther<A>(a, row_of[u]) : A(0);
    ForRegisters<T>(a.dim, [&](auto partial, int64_t c, int tail) {
      constexpr bool kPartial = decltype(partial)::value != 0;
      V p = Load<kPartial>(table + row_of[u] * a.dim + c, tail);
      const V before = p;
      if (decay != 0) p -= p * decay;
      p -= GroupSum<kPartial, T>(a, starts, positions, u, c, tail) * scale;
      if (a.counts) p += (p - before) * farther;
      if (lag) {
        T* here = lag + row_of[u] * a.dim + c;
        Store<kPartial>(here, LagAfter(Load<kPartial>(here, tail), before, p, lag_scale), tail);
      }
      Store<kPartial>(table + row_of[u] * a.dim + c, p, tail);
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
static void Update(const UpdateArgs& a, int64_t begin, int64_t end) {
  typedef AccOf<T> A;
  typedef VecOf<T> V;
  const A* hyper = static_cast<const A*>(a.hyper) + 1;
  switch (a.rule) {
    case Rule::kSgd: {
      const A rate = hyper[0];
      return UpdateRows<T, 0>(a, begin, end, [=](V g, V& p, V*) { p -= g * rate; });
    }
    case Rule::kAdagrad: {
      const A rate = hyper[0], epsilon = hyper[1];
      return UpdateRows<T, 1>(a, begin, end, [=](V g, V& p, V* s) {
        s[0] += g * g;
        p -= g * rate / Sqrt(s[0] + epsilon);
      });
    }
    case Rule::kRowWiseAdagrad:
      return UpdateRowWiseAdagrad<T>(a, begin, end);
    case Rule::kLazyAdam: {
      const A rate = hyper[0], one_minus_beta_1 = hyper[1], one_minus_beta_2 = hyper[2], epsilon = hyper[3];
      return UpdateRows<T, 2>(a, begin, end, [=](V g, V& p, V* s) {
        s[0] += (g - s[0]) * one_minus_beta_1;
        s[1] += (g * g - s[1]) * one_minus_beta_2;
        p -= s[0] * rate / (Sqrt(s[1]) + epsilon);
      });
    }
    case Rule::kFtrl: {
      const A rate = hyper[0], power = -hyper[1], l1 = hyper[2], l2 = hyper[3], shrinkage = hyper[4];
      return UpdateRows<T, 2>(a, begin, end, [=](V g, V& p, V* s) {
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
