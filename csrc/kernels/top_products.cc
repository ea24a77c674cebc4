#include "top_products.h"

#include <algorithm>
#include <new>

#include "cpu_kernels.h"
#include "scratch.h"

namespace deepfm {
namespace {

constexpr int64_t kTile = 256;       // rows whose products are made, and looked through, at a time: in the first cache
constexpr int64_t kGrain = 1 << 13;  // rows per task, about 20 microseconds of work

struct Found {
  float product;
  int64_t place;
};

bool Before(const Found& x, const Found& y) {
  return x.product > y.product || (x.product == y.product && x.place < y.place);
}

// The k best of what a piece of the rows has, in memory for twice as many: when that is full the worse half goes. From
// then on only what is better than the worst one kept is taken in, which hardly any row is.
class Best {
 public:
  Best(Found* memory, int64_t room, int64_t k) : found_(memory), room_(room), k_(k) {}

  // Places ascend from call to call.
  void Add(const float* products, const int64_t* chosen, int64_t begin, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      while (is_full_ && i + kStep <= count && NoneOf(products + i)) i += kStep;
      if (i == count) return;
      const float x = products[i];
      if (is_full_ && x <= least_) continue;  // of equal ones the earlier stays; not for NaN
      const int64_t place = chosen ? chosen[begin + i] : begin + i;
      if (x != x) {
        if (first_nan < 0) first_nan = place;
        continue;
      }
      found_[size++] = {x, place};
      if (size == room_ && size > k_) Shrink();
    }
  }

  int64_t size = 0, first_nan = -1;

 private:
  static constexpr int kStep = 16;

  bool NoneOf(const float* products) const {
    bool any = false;
    for (int i = 0; i < kStep; ++i) any |= !(products[i] <= least_);
    return !any;
  }

  void Shrink() {
    std::nth_element(found_, found_ + k_ - 1, found_ + size, Before);
    least_ = found_[k_ - 1].product;
    size = k_;
    is_full_ = true;
  }

  Found* const found_;
  const int64_t room_, k_;
  float least_ = 0;
  bool is_full_ = false;
};

}  // namespace

void TopProducts(const TopProductsArgs& args, const Parallel& parallel) {
  const int64_t n = args.num_chosen < 0 ? args.num_rows : args.num_chosen, queries = args.num_queries;
  const int64_t most = std::min(args.k, n);
  std::fill_n(args.first_nan, queries, int64_t{-1});
  if (most == 0 || queries == 0) return;
  const int64_t pieces = std::max<int64_t>(1, std::min(n / kGrain, parallel.MostPieces()));
  const int64_t longest = n / pieces + 1, room = std::min(2 * most, longest);
  const Scratch<Found> memory(queries * pieces * room);
  const Scratch<int64_t> sizes(queries * pieces), nans(queries * pieces);
  const Scratch<char> workers(queries * pieces * static_cast<int64_t>(sizeof(Best)));
  auto* products = Kernels().products;
  parallel.Run(pieces, [&](int64_t piece) {
    const int64_t begin = Parallel::Cut(n, pieces, piece), end = Parallel::Cut(n, pieces, piece + 1);
    Best* best = reinterpret_cast<Best*>(workers.get()) + queries * piece;
    for (int64_t b = 0; b < queries; ++b) new (best + b) Best(memory.get() + (b * pieces + piece) * room, room, most);
    float tile[kTile];
    for (int64_t start = begin; start < end; start += kTile) {
      const int64_t stop = std::min(start + kTile, end);
      for (int64_t b = 0; b < queries; ++b) {
        products(args.rows, args.dim, args.chosen, start, stop, args.queries + b * args.dim, tile);
        best[b].Add(tile, args.chosen, start, stop - start);
      }
    }
    for (int64_t b = 0; b < queries; ++b) {
      sizes[b * pieces + piece] = best[b].size;
      nans[b * pieces + piece] = best[b].first_nan;
    }
  });
  parallel.Run(queries, [&](int64_t b) {
    Found* found = memory.get() + b * pieces * room;
    int64_t size = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      if (args.first_nan[b] < 0) args.first_nan[b] = nans[b * pieces + piece];
      for (int64_t i = 0; i < sizes[b * pieces + piece]; ++i) found[size++] = found[piece * room + i];
    }
    const int64_t kept = std::min(most, size);  // fewer where some are NaN
    std::partial_sort(found, found + kept, found + size, Before);
    for (int64_t i = 0; i < most; ++i) {
      args.places[b * most + i] = i < kept ? found[i].place : -1;
      args.products[b * most + i] = i < kept ? found[i].product : 0;
    }
  });
}

}  // namespace deepfm
