// What needs all fields of a sample at once, when their embeddings lie in the first cache. Included by fm_cpu-inl.h, in
// the namespace of one instruction set.

// The number of a sample's first field among those of all; that of the sample behind the last is their number.
static inline int64_t FirstField(const FmShape& shape, int64_t b) {
  if (shape.row_splits) return shape.row_splits[b];
  return b * (shape.field_splits ? shape.num_fields : shape.pairs_per_sample);
}

// So many fields are added up at a time that their sums fill the registers.
template <int kVecs>
constexpr int kFieldsAtOnce = kVecs < kFieldPadding ? kFieldPadding / kVecs : 1;

// Sums over sets of one, two and three fields of the products of their embeddings. Each field extends the sets of the
// fields before it: nothing large cancels, as it does where powers of the sum are subtracted. Some fields each make
// sums of their own at first, as a sum waits for the one before.
template <typename Block, int kVecs>
struct Orders {
  Block one = {}, two = {}, three = {};

  template <typename A>
  DEEPFM_INLINE Orders(const A* e, int64_t fields, int64_t dim, int tail) {
    constexpr int kParts = kVecs < 4 ? 4 / kVecs : 1;
    Orders parts[kParts];
    int64_t f = 0;
    for (; f + kParts <= fields; f += kParts)
      _Pragma("GCC unroll 4") for (int i = 0; i < kParts; ++i) parts[i].AddField(Block::Load(e + (f + i) * dim, tail));
    for (; f < fields; ++f) parts[0].AddField(Block::Load(e + f * dim, tail));
    *this = parts[0];
    _Pragma("GCC unroll 4") for (int i = 1; i < kParts; ++i) Merge(parts[i]);
  }

 private:
  DEEPFM_INLINE Orders() {}

  DEEPFM_INLINE void AddField(const Block& x) {
    three.AddProduct(two, x);
    two.AddProduct(one, x);
    one.Add(x);
  }
  DEEPFM_INLINE void Merge(const Orders& other) {
    three.Add(other.three);
    three.AddProduct(two, other.one);
    three.AddProduct(one, other.two);
    two.Add(other.two);
    two.AddProduct(one, other.one);
    one.Add(other.one);
  }
};

// Calls fn(f, sum over h < fields of matrix[h, f] * e[h, :]) for every field f; where the matrix is that of f > h, its
// zeros are not read.
template <bool kAll, typename Block, int kVecs, typename A, typename Fn>
static DEEPFM_INLINE void ForMixed(const A* matrix, const A* e, int64_t fields, int64_t dim, int tail, const Fn& fn) {
  constexpr int kAtOnce = kFieldsAtOnce<kVecs>;
  const int64_t stride = PaddedFields(fields);
  for (int64_t first = 0; first < fields; first += kAtOnce) {
    Block mixed[kAtOnce] = {};
    const int64_t last = kAll ? fields : Min(first + kAtOnce, fields);
    for (int64_t h = 0; h < last; ++h) {
      const Block x = Block::Load(e + h * dim, tail);
      const A* weights = matrix + h * stride + first;
      _Pragma("GCC unroll 8") for (int i = 0; i < kAtOnce; ++i) mixed[i].AddScaled(x, weights[i]);
    }
    _Pragma("GCC unroll 8") for (int i = 0; i < kAtOnce; ++i) if (first + i < fields) fn(first + i, mixed[i]);
  }
}

// A block of columns of sample b's interaction; e: its embeddings, from the block's first column on.
template <typename A, int kVecs, bool kPartial>
static Columns<A, kVecs, kPartial> InteractionOf(const ForwardArgs& a, const A* e, int64_t b, int tail) {
  typedef Columns<A, kVecs, kPartial> Block;
  const int64_t dim = a.shape.dim, fields = FirstField(a.shape, b + 1) - FirstField(a.shape, b);
  if (a.order == 3) {
    Orders<Block, kVecs> orders(e, fields, dim, tail);
    orders.two.Add(orders.three);
    return orders.two;
  }
  Block total = {};
  ForMixed<false, Block, kVecs>(static_cast<const A*>(a.field_weights), e, fields, dim, tail,
                                [&](int64_t f, const Block& mixed) __attribute__((always_inline)) {
                                  total.AddProduct(mixed, Block::Load(e + f * dim, tail));
                                });
  return total;
}

// Replaces the plain interaction of sample b, from its embeddings e; returns how many numbers these are.
template <typename A>
static int64_t Interact(const ForwardArgs& a, int64_t b, const A* e) {
  const int64_t dim = a.shape.dim;
  A total = 0;
  ForColumnBlocks<A>(dim, [&](auto vecs, auto partial, int64_t first, int tail) {
    const auto vector = InteractionOf<A, decltype(vecs)::value, decltype(partial)::value != 0>(a, e + first, b, tail);
    if (a.output == Output::kVector) {
      vector.Store(static_cast<A*>(a.interaction) + b * dim + first, tail);
    } else {
      total += vector.Total();
    }
  });
  if (a.output == Output::kScalar) static_cast<A*>(a.interaction)[b] = total;
  return (FirstField(a.shape, b + 1) - FirstField(a.shape, b)) * dim;
}

// The gradient of an interaction by a sample's embeddings, times that of what it is part of, for samples [begin, end).
template <typename A, int kVecs, bool kPartial>
static void FieldGradientBlock(const GradientArgs& a, int64_t begin, int64_t end, A* d_fields, int64_t first,
                               int tail) {
  typedef Columns<A, kVecs, kPartial> Block;
  const int64_t dim = a.shape.dim;
  const A* g = static_cast<const A*>(a.d_interaction);
  const A* de = static_cast<const A*>(a.d_embeddings);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t start = FirstField(a.shape, b) * dim + first,
                  fields = FirstField(a.shape, b + 1) - FirstField(a.shape, b);
    const A* e = static_cast<const A*>(a.embeddings) + start;
    auto store = [&](int64_t f, Block d) __attribute__((always_inline)) {
      if (a.output == Output::kScalar) {
        d.Scale(g[b]);
      } else {
        d.Multiply(Block::Load(g + b * dim + first, tail));
      }
      if (de) d.Add(Block::Load(de + start + f * dim, tail));
      d.Store(d_fields + start + f * dim, tail);
    };
    if (a.order == 3) {  // the others' sum, and theirs over sets of two, which is that of all without those of this one
      const Orders<Block, kVecs> orders(e, fields, dim, tail);
      for (int64_t f = 0; f < fields; ++f) {
        const Block x = Block::Load(e + f * dim, tail);
        Block others = orders.one, d = orders.two;
        others.Subtract(x);
        d.Add(others);
        others.Multiply(x);
        d.Subtract(others);
        store(f, d);
      }
    } else {
      ForMixed<true, Block, kVecs>(static_cast<const A*>(a.field_weights), e, fields, dim, tail, store);
    }
  }
}

// What the columns of a block add to the gradient of the field weights, in samples [begin, end): few, so that their
// embeddings stay in cache.
template <typename A, int kVecs, bool kPartial>
static void FieldWeightsGradientBlock(const GradientArgs& a, int64_t begin, int64_t end, int64_t first, int tail) {
  typedef Columns<A, kVecs, kPartial> Block;
  constexpr int kAtOnce = kFieldsAtOnce<kVecs>;
  const int64_t dim = a.shape.dim, fields = FirstField(a.shape, 1);
  const A* g = static_cast<const A*>(a.d_interaction);
  const A* embeddings = static_cast<const A*>(a.embeddings) + first;
  A* found = static_cast<A*>(a.d_field_weights);
  for (int64_t from = 0; from < fields; from += kAtOnce) {
    for (int64_t h = 0; h < Min(from + kAtOnce, fields); ++h) {
      VecOf<A> products[kAtOnce] = {};
      for (int64_t b = begin; b < end; ++b) {
        const A* e = embeddings + b * fields * dim;
        Block x = Block::Load(e + h * dim, tail);
        if (a.output == Output::kScalar) {
          x.Scale(g[b]);
        } else {
          x.Multiply(Block::Load(g + b * dim + first, tail));
        }
        _Pragma("GCC unroll 8") for (int i = 0; i < kAtOnce; ++i)
            AddDot(&products[i], x, Block::Load(e + Min(from + i, fields - 1) * dim, tail));
      }
      for (int64_t f = from; f < Min(from + kAtOnce, fields); ++f)
        if (h < f) found[f * (f - 1) / 2 + h] += HorizontalSum(products[f - from]);
    }
  }
}

template <typename A>
static void FieldGradient(const GradientArgs& a, int64_t begin, int64_t end, void* d_fields) {
  constexpr int64_t kAtOnce = 32;
  for (int64_t b = begin; b < end; b += kAtOnce) {
    const int64_t last = Min(b + kAtOnce, end);
    ForColumnBlocks<A>(a.shape.dim, [&](auto vecs, auto partial, int64_t first, int tail) {
      constexpr int kVecs = decltype(vecs)::value;
      constexpr bool kPartial = decltype(partial)::value != 0;
      FieldGradientBlock<A, kVecs, kPartial>(a, b, last, static_cast<A*>(d_fields), first, tail);
      if (a.d_field_weights) FieldWeightsGradientBlock<A, kVecs, kPartial>(a, b, last, first, tail);
    });
  }
}
