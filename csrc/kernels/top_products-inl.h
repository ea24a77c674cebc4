// Inner products of rows with a query, the loop of top_products.h. Included in the namespace of one instruction set.

static constexpr int kAhead = 1024;  // floats: a page

// out[j - begin] = < rows[chosen ? chosen[j] : j, :], query >, j in [begin, end). Four rows at a time, the last ones
// with zeros beside them, so that each is added up in the same order wherever it lies. All rows come from memory in its
// order, but hardware prefetching ends with a page: asking for the numbers of the next one takes a tenth off a pass.
static void Products(const float* rows, int64_t dim, const int64_t* chosen, int64_t begin, int64_t end,
                     const float* query, float* out) {
  if (dim == 0) {
    for (int64_t j = begin; j < end; ++j) out[j - begin] = 0;
  }
  ForColumnBlocks<float>(dim, [&](auto vecs, auto partial, int64_t first, int tail) {
    typedef Columns<float, decltype(vecs)::value, decltype(partial)::value != 0> Block;
    const Block x = Block::Load(query + first, tail);
    auto lanes = [&](int64_t j) __attribute__((always_inline)) {
      const float* row = rows + (chosen ? chosen[j] : j) * dim + first;
      if (!chosen) __builtin_prefetch(row + kAhead);
      return LanesOfDot(Block::Load(row, tail), x);
    };
    int64_t j = begin;
    auto store = [&](FourFloats sums, int64_t count) __attribute__((always_inline)) {
      for (int64_t i = 0; i < count; ++i) out[j - begin + i] = first == 0 ? sums[i] : out[j - begin + i] + sums[i];
    };
    for (; j + 4 <= end; j += 4) store(HorizontalSums(lanes(j), lanes(j + 1), lanes(j + 2), lanes(j + 3)), 4);
    if (j < end) {
      const VecOf<float> none = {};
      store(HorizontalSums(lanes(j), j + 1 < end ? lanes(j + 1) : none, j + 2 < end ? lanes(j + 2) : none, none),
            end - j);
    }
  });
}
