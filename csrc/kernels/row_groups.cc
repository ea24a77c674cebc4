#include "row_groups.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <vector>

namespace deepfm {
namespace {

constexpr int64_t kGrain = 1 << 14;  // pairs per task: below this a second thread costs more than it brings
constexpr int64_t kSmall = 1 << 10;  // below this a comparison sort beats clearing the histograms
constexpr int kMaxDigitBits = 11;    // 2048 counters and open cache lines per task

// Key and position in one word: half the memory traffic of a struct, and distinct values, so that
// any sort of them is stable.
struct Packed {
  uint64_t word;
  Packed() {}
  Packed(uint64_t key, int64_t position) : word(key << 32 | static_cast<uint64_t>(position)) {}
  uint64_t key() const { return word >> 32; }
  static PairPositions Positions(const char* items) { return {items, sizeof(Packed), 0xffffffffu}; }
  bool operator<(const Packed& other) const { return word < other.word; }
};

struct Wide {
  uint64_t k;
  int64_t p;
  Wide() {}
  Wide(uint64_t key, int64_t position) : k(key), p(position) {}
  uint64_t key() const { return k; }
  static PairPositions Positions(const char* items) { return {items + offsetof(Wide, p), sizeof(Wide), ~uint64_t{0}}; }
  bool operator<(const Wide& other) const { return k != other.k ? k < other.k : p < other.p; }
};

int BitsOf(uint64_t max_key) {
  int bits = 0;
  while (max_key) ++bits, max_key >>= 1;
  return bits;
}

template <typename I>
int64_t FirstOutOfRangeTyped(const I* indices, int64_t n, int64_t num_rows, const Parallel& parallel) {
  std::atomic<int64_t> first{n};
  parallel.For(n, 4 * kGrain, [&](int64_t begin, int64_t end) {
    constexpr int64_t kBlock = 4096;
    for (int64_t block = begin; block < end; block += kBlock) {
      const int64_t stop = std::min(block + kBlock, end);
      bool bad = false;
      for (int64_t p = block; p < stop; ++p)
        bad |= static_cast<uint64_t>(static_cast<int64_t>(indices[p])) >= static_cast<uint64_t>(num_rows);
      if (!bad) continue;
      int64_t p = block;
      while (static_cast<uint64_t>(static_cast<int64_t>(indices[p])) < static_cast<uint64_t>(num_rows)) ++p;
      int64_t seen = first.load();
      while (p < seen && !first.compare_exchange_weak(seen, p)) {
      }
      return;
    }
  });
  return first.load() == n ? -1 : first.load();
}

}  // namespace

int64_t FirstOutOfRange(const void* indices, IndexType type, int64_t n, int64_t num_rows, const Parallel& parallel) {
  return type == IndexType::kInt32 ? FirstOutOfRangeTyped(static_cast<const int32_t*>(indices), n, num_rows, parallel)
                                   : FirstOutOfRangeTyped(static_cast<const int64_t*>(indices), n, num_rows, parallel);
}

int64_t RowGroups::Build(const void* indices, IndexType type, int64_t n, int64_t num_rows, const Parallel& parallel) {
  size_ = num_pairs_ = 0;
  const int64_t bad = FirstOutOfRange(indices, type, n, num_rows, parallel);
  if (bad >= 0) return bad;
  return type == IndexType::kInt32 ? BuildTyped(static_cast<const int32_t*>(indices), n, num_rows, parallel)
                                   : BuildTyped(static_cast<const int64_t*>(indices), n, num_rows, parallel);
}

template <typename I>
int64_t RowGroups::BuildTyped(const I* indices, int64_t n, int64_t num_rows, const Parallel& parallel) {
  num_pairs_ = n;
  int64_t ascending = 1;  // how far the indices are as the groups will be
  while (ascending < n && indices[ascending - 1] < indices[ascending]) ++ascending;
  if (ascending >= n) return Adopt(indices, n, parallel);
  constexpr int64_t kWord = int64_t{1} << 32;
  if (n <= kWord && num_rows <= kWord) {
    Sort<Packed>(indices, n, num_rows, parallel);
  } else {
    Sort<Wide>(indices, n, num_rows, parallel);
  }
  return -1;
}

template <typename I>
int64_t RowGroups::Adopt(const I* indices, int64_t n, const Parallel& parallel) {
  size_ = n;
  rows_ = Scratch<int64_t>(n);
  starts_ = Scratch<int64_t>(n + 1);
  starts_[n] = n;
  parallel.For(n, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      rows_[p] = indices[p];
      starts_[p] = p;
    }
  });
  positions_ = {reinterpret_cast<const char*>(starts_.get()), sizeof(int64_t), ~uint64_t{0}};
  return -1;
}

template <typename Item, typename I>
void RowGroups::Sort(const I* indices, int64_t n, int64_t num_rows, const Parallel& parallel) {
  const int64_t bytes = n * static_cast<int64_t>(sizeof(Item));
  items_ = Scratch<char>(bytes);
  Item* to = reinterpret_cast<Item*>(items_.get());
  if (n <= kSmall) {
    for (int64_t p = 0; p < n; ++p) to[p] = Item(static_cast<uint64_t>(indices[p]), p);
    std::sort(to, to + n);
    return FindGroups(to, n, parallel);
  }
  const int bits = BitsOf(static_cast<uint64_t>(num_rows - 1));
  const int passes = std::max(1, (bits + kMaxDigitBits - 1) / kMaxDigitBits);
  const int digit_bits = (bits + passes - 1) / passes;
  const int64_t buckets = int64_t{1} << digit_bits;
  const uint64_t mask = static_cast<uint64_t>(buckets - 1);
  // The pieces are as many as the threads; a stable sort's result does not depend on where they cut.
  const int64_t pieces = std::max<int64_t>(1, std::min<int64_t>(parallel.threads, n / kGrain));
  auto cut = [&](int64_t i) { return n / pieces * i + n % pieces * i / pieces; };
  std::vector<int64_t> offsets(pieces * buckets);
  // One stable pass over the digit at `shift`: count, make offsets of the counts, move.
  auto pass = [&](auto item, Item* out, int shift) {
    parallel.run(pieces, [&](int64_t piece) {
      int64_t* counts = &offsets[piece * buckets];
      std::fill(counts, counts + buckets, 0);
      for (int64_t p = cut(piece), end = cut(piece + 1); p < end; ++p) ++counts[item(p).key() >> shift & mask];
    });
    int64_t total = 0;
    for (int64_t bucket = 0; bucket < buckets; ++bucket) {
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t count = offsets[piece * buckets + bucket];
        offsets[piece * buckets + bucket] = total;
        total += count;
      }
    }
    parallel.run(pieces, [&](int64_t piece) {
      int64_t* next = &offsets[piece * buckets];
      for (int64_t p = cut(piece), end = cut(piece + 1); p < end; ++p) {
        const Item it = item(p);
        out[next[it.key() >> shift & mask]++] = it;
      }
    });
  };
  Scratch<char> other(passes > 1 ? bytes : 0);
  Item* from = reinterpret_cast<Item*>(other.get());
  if (passes % 2 == 0) std::swap(from, to);  // so that the last pass writes to items_
  pass([&](int64_t p) { return Item(static_cast<uint64_t>(indices[p]), p); }, to, 0);
  for (int i = 1; i < passes; ++i) {
    std::swap(from, to);
    pass([from](int64_t p) { return from[p]; }, to, i * digit_bits);
  }
  FindGroups(to, n, parallel);
}

template <typename Item>
void RowGroups::FindGroups(const Item* items, int64_t n, const Parallel& parallel) {
  const int64_t pieces = std::max<int64_t>(1, std::min<int64_t>(parallel.threads, n / kGrain));
  auto cut = [&](int64_t i) { return n / pieces * i + n % pieces * i / pieces; };
  auto is_first = [&](int64_t j) { return j == 0 || items[j].key() != items[j - 1].key(); };
  std::vector<int64_t> before(pieces + 1, 0);
  parallel.run(pieces, [&](int64_t piece) {
    int64_t count = 0;
    for (int64_t j = cut(piece); j < cut(piece + 1); ++j) count += is_first(j);
    before[piece + 1] = count;
  });
  positions_ = Item::Positions(items_.get());
  for (int64_t piece = 0; piece < pieces; ++piece) before[piece + 1] += before[piece];
  size_ = before[pieces];
  rows_ = Scratch<int64_t>(size_);
  starts_ = Scratch<int64_t>(size_ + 1);
  starts_[size_] = n;
  // Backwards and without a branch: every pair writes its group's entry, the group's first pair last.
  parallel.run(pieces, [&](int64_t piece) {
    int64_t lead = cut(piece);
    while (lead < cut(piece + 1) && !is_first(lead)) ++lead;  // of a group that an earlier piece writes
    int64_t u = before[piece + 1] - 1;
    for (int64_t j = cut(piece + 1) - 1; j >= lead; --j) {
      rows_[u] = static_cast<int64_t>(items[j].key());
      starts_[u] = j;
      u -= is_first(j);
    }
  });
}

}  // namespace deepfm
