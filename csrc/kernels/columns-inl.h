// A block of a row's columns in registers, and loads of rows. Included after vec-inl.h, in the namespace of one
// instruction set.

// The registers of a block: so many hold sums, squares and a row of it at once. Builds under sanitizers, whose code is
// many times as large, have smaller blocks.
#ifndef DEEPFM_MAX_VECS
#define DEEPFM_MAX_VECS (kVecBytes == 64 ? 8 : 4)
#endif
constexpr int kMaxVecs = DEEPFM_MAX_VECS;

#define DEEPFM_INLINE __attribute__((always_inline)) inline
#define DEEPFM_EACH _Pragma("GCC unroll 8") for (int n = 0; n < kVecs; ++n)

// One element, by way of a register's first lane.
template <typename T>
static inline AccOf<T> LoadOne(const T* p) {
  return Load<true>(p, 1)[0];
}
template <typename T>
static inline void StoreOne(T* p, AccOf<T> x) {
  VecOf<T> v = {};
  v[0] = x;
  Store<true>(p, v, 1);
}

template <typename T>
static inline int64_t RowBytes(int64_t dim, T) {
  return dim * static_cast<int64_t>(sizeof(T));
}
static inline int64_t RowBytes(int64_t dim, Int8) { return dim + kInt8Header; }

static inline float HeaderAt(const char* row, int position) {
  BFloat16 number;  // rows lie at any byte
  __builtin_memcpy(&number, row + position * sizeof(number), sizeof(number));
  return LoadOne(&number);
}

// The first-order weight of a feature.
template <typename T>
static inline AccOf<T> WeightOf(const T* weights, int64_t index, const char*, T) {
  return LoadOne(weights + index);
}
static inline float WeightOf(const Int8*, int64_t, const char* row, Int8) { return HeaderAt(row, 2); }

// kVecs registers; if kPartial, the last of them holds `tail` columns and zeros behind.
template <typename A, int kVecs, bool kPartial>
struct Columns {
  typedef VecOf<A> V;
  static constexpr int kLanesOfOne = kLanes<A>;
  V v[kVecs];

  template <typename T>
  static DEEPFM_INLINE Columns Load(const T* p, int tail) {
    Columns loaded;
    DEEPFM_EACH loaded.v[n] = kPartial && n == kVecs - 1 ? DEEPFM_ISA::Load<true>(p + n * kLanesOfOne, tail)
                                                         : DEEPFM_ISA::Load<false>(p + n * kLanesOfOne, kLanesOfOne);
    return loaded;
  }

  // Columns [first, ...) of the row at `row`.
  template <typename T>
  static DEEPFM_INLINE Columns LoadRow(const char* row, int64_t first, int tail, T) {
    return Load(reinterpret_cast<const T*>(row) + first, tail);
  }
  static DEEPFM_INLINE Columns LoadRow(const char* row, int64_t first, int tail, Int8) {
    const float scale = HeaderAt(row, 0), offset = HeaderAt(row, 1);
    Columns e = Load(reinterpret_cast<const Int8*>(row) + kInt8Header + first, tail);
    DEEPFM_EACH {
      V shift = {};
      if (kPartial && n == kVecs - 1) {
        for (int i = 0; i < kLanesOfOne; ++i) shift[i] = i < tail ? offset : 0.f;
      } else {
        shift += offset;
      }
      e.v[n] = e.v[n] * scale + shift;
    }
    return e;
  }

  template <typename T>
  DEEPFM_INLINE void Store(T* p, int tail) const {
    DEEPFM_EACH {
      if (kPartial && n == kVecs - 1) {
        DEEPFM_ISA::Store<true>(p + n * kLanesOfOne, v[n], tail);
      } else {
        DEEPFM_ISA::Store<false>(p + n * kLanesOfOne, v[n], kLanesOfOne);
      }
    }
  }

  DEEPFM_INLINE void Scale(A x) { DEEPFM_EACH v[n] *= x; }
  DEEPFM_INLINE void Multiply(const Columns& x) { DEEPFM_EACH v[n] *= x.v[n]; }
  DEEPFM_INLINE void Add(const Columns& x) { DEEPFM_EACH v[n] += x.v[n]; }
  DEEPFM_INLINE void AddSquare(const Columns& x) { DEEPFM_EACH v[n] += x.v[n] * x.v[n]; }
  DEEPFM_INLINE void AddProduct(const Columns& x, const Columns& y) { DEEPFM_EACH v[n] += x.v[n] * y.v[n]; }
  DEEPFM_INLINE void AddScaled(const Columns& x, A scale) { DEEPFM_EACH v[n] += x.v[n] * scale; }
  DEEPFM_INLINE void Subtract(const Columns& x) { DEEPFM_EACH v[n] -= x.v[n]; }
  DEEPFM_INLINE void SubtractScaled(const Columns& x, A scale) { DEEPFM_EACH v[n] -= x.v[n] * scale; }

  // All columns added up.
  DEEPFM_INLINE A Total() const {
    V total = v[0];
    DEEPFM_EACH if (n > 0) total += v[n];
    return HorizontalSum(total);
  }

  // The products of columns, those of all registers added up lane by lane.
  friend DEEPFM_INLINE V LanesOfDot(const Columns& x, const Columns& y) {
    V total = {};
    DEEPFM_EACH total += x.v[n] * y.v[n];
    return total;
  }
  friend DEEPFM_INLINE A Dot(const Columns& x, const Columns& y) { return HorizontalSum(LanesOfDot(x, y)); }

  // The same, left in lanes.
  friend DEEPFM_INLINE void AddDot(V* total, const Columns& x, const Columns& y) {
    DEEPFM_EACH* total += x.v[n] * y.v[n];
  }

  friend DEEPFM_INLINE Columns HalfOfSquareMinus(const Columns& x, const Columns& y) {
    Columns half;
    DEEPFM_EACH half.v[n] = (x.v[n] * x.v[n] - y.v[n]) * A(0.5);
    return half;
  }
};

#undef DEEPFM_EACH

template <int n>
struct Int {
  static constexpr int value = n;
};

// Calls fn(Int<vecs>, Int<partial>) for each block of columns, with its first column and the lanes
// of its last register: the run-time K becomes compile-time register counts here and nowhere else.
template <typename T, typename Fn>
static inline void ForColumnBlocks(int64_t dim, const Fn& fn) {
  constexpr int lanes = kLanes<T>;
  for (int64_t first = 0; first < dim; first += kMaxVecs * lanes) {
    const int64_t rest = dim - first, columns = rest < kMaxVecs * lanes ? rest : kMaxVecs * lanes;
    const int vecs = static_cast<int>((columns + lanes - 1) / lanes);
    const int tail = static_cast<int>(columns - (vecs - 1) * lanes);
#define DEEPFM_CASE(n)                         \
  case n:                                      \
    if (n <= kMaxVecs) {                       \
      constexpr int m = n <= kMaxVecs ? n : 1; \
      if (tail == lanes) {                     \
        fn(Int<m>(), Int<0>(), first, tail);   \
      } else {                                 \
        fn(Int<m>(), Int<1>(), first, tail);   \
      }                                        \
    }                                          \
    break;
    switch (vecs) {
      DEEPFM_CASE(1)
      DEEPFM_CASE(2)
      DEEPFM_CASE(3)
      DEEPFM_CASE(4)
      DEEPFM_CASE(5)
      DEEPFM_CASE(6)
      DEEPFM_CASE(7)
      DEEPFM_CASE(8)
    }
#undef DEEPFM_CASE
  }
}
