#include "row_groups.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <utility>
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

int64_t PiecesOf(int64_t n, const Parallel& parallel) {
  return std::max<int64_t>(1, std::min<int64_t>(parallel.threads, n / kGrain));
}

int BitsOf(uint64_t max_key) {
  int bits = 0;
  while (max_key) ++bits, max_key >>= 1;
  return bits;
}

// One read of an index that its owner may change at any time: what was checked is what is used.
template <typename I>
uint64_t ReadOnce(const I* index) {
  return static_cast<uint64_t>(static_cast<int64_t>(__atomic_load_n(index, __ATOMIC_RELAXED)));
}

template <typename I>
int64_t FirstOutOfRangeTyped(const I* indices, int64_t n, int64_t num_rows, const Parallel& parallel) {
  std::atomic<int64_t> first{n};
  parallel.For(n, 4 * kGrain, [&](int64_t begin, int64_t end) {
    int64_t p = begin;
    while (p < end && ReadOnce(indices + p) < static_cast<uint64_t>(num_rows)) ++p;
    if (p < end) AtomicMin(&first, p);
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
  const int64_t bad = type == IndexType::kInt32
                          ? BuildTyped(static_cast<const int32_t*>(indices), n, num_rows, parallel)
                          : BuildTyped(static_cast<const int64_t*>(indices), n, num_rows, parallel);
  if (bad < 0) num_pairs_ = n;
  return bad;
}

template <typename I>
int64_t RowGroups::BuildTyped(const I* indices, int64_t n, int64_t num_rows, const Parallel& parallel) {
  if (TakeAscending(indices, n, num_rows, parallel)) return -1;
  constexpr int64_t kWord = int64_t{1} << 32;
  return n <= kWord && num_rows <= kWord ? Sort<Packed>(indices, n, num_rows, parallel)
                                         : Sort<Wide>(indices, n, num_rows, parallel);
}

// Makes a group of every pair, and returns true, if the indices ascend strictly.
template <typename I>
bool RowGroups::TakeAscending(const I* indices, int64_t n, int64_t num_rows, const Parallel& parallel) {
  if (n > 1 && ReadOnce(indices) >= ReadOnce(indices + 1)) return false;  // most batches end here
  rows_ = Scratch<int64_t>(n);
  starts_ = Scratch<int64_t>(n + 1);
  std::atomic<bool> ascending{true};
  parallel.For(n, kGrain, [&](int64_t begin, int64_t end) {
    int64_t last = begin > 0 ? static_cast<int64_t>(ReadOnce(indices + begin - 1)) : -1;
    for (int64_t p = begin; p < end && ascending.load(std::memory_order_relaxed); ++p) {
      const uint64_t row = ReadOnce(indices + p);
      if (row >= static_cast<uint64_t>(num_rows) || static_cast<int64_t>(row) <= last) ascending = false;
      rows_[p] = last = static_cast<int64_t>(row);
      starts_[p] = p;
    }
  });
  if (!ascending) return false;
  size_ = starts_[n] = n;
  positions_ = {reinterpret_cast<const char*>(starts_.get()), sizeof(int64_t), ~uint64_t{0}};
  return true;
}

template <typename Item, typename I>
int64_t RowGroups::Sort(const I* indices, int64_t n, int64_t num_rows, const Parallel& parallel) {
  const int64_t bytes = n * static_cast<int64_t>(sizeof(Item));
  const bool small = n <= kSmall;
  const int bits = BitsOf(static_cast<uint64_t>(num_rows - 1));
  const int passes = small ? 0 : std::max(1, (bits + kMaxDigitBits - 1) / kMaxDigitBits);
  const int digit_bits = small ? 0 : (bits + passes - 1) / passes;
  const int64_t buckets = small ? 0 : int64_t{1} << digit_bits;
  const uint64_t mask = static_cast<uint64_t>(buckets - 1);
  // The pieces are as many as the threads; a stable sort's result does not depend on where they cut.
  const int64_t pieces = PiecesOf(n, parallel);
  std::vector<int64_t> counts(pieces * buckets);
  items_ = Scratch<char>(bytes);
  const Scratch<char> other(small ? 0 : bytes);
  Item* from = reinterpret_cast<Item*>(items_.get());
  Item* to = reinterpret_cast<Item*>(other.get());
  if (passes % 2 == 1) std::swap(from, to);  // so that the last pass writes to items_

  std::atomic<int64_t> first_bad{n};
  parallel.Run(pieces, [&](int64_t piece) {
    int64_t* count = counts.data() + piece * buckets;
    for (int64_t p = Parallel::Cut(n, pieces, piece), end = Parallel::Cut(n, pieces, piece + 1); p < end; ++p) {
      const uint64_t row = ReadOnce(indices + p);
      if (row >= static_cast<uint64_t>(num_rows)) return AtomicMin(&first_bad, p);
      from[p] = Item(row, p);
      if (!small) ++count[row & mask];
    }
  });
  if (first_bad.load() < n) return first_bad.load();
  if (small) std::sort(from, from + n);

  // Stable passes over a digit each: make offsets of the counts, move.
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = pass * digit_bits;
    if (pass > 0) {
      std::fill(counts.begin(), counts.end(), 0);
      parallel.Run(pieces, [&](int64_t piece) {
        int64_t* count = counts.data() + piece * buckets;
        for (int64_t p = Parallel::Cut(n, pieces, piece), end = Parallel::Cut(n, pieces, piece + 1); p < end; ++p)
          ++count[from[p].key() >> shift & mask];
      });
    }
    int64_t total = 0;
    for (int64_t bucket = 0; bucket < buckets; ++bucket)
      for (int64_t piece = 0; piece < pieces; ++piece) total += std::exchange(counts[piece * buckets + bucket], total);
    parallel.Run(pieces, [&](int64_t piece) {
      int64_t* next = counts.data() + piece * buckets;
      for (int64_t p = Parallel::Cut(n, pieces, piece), end = Parallel::Cut(n, pieces, piece + 1); p < end; ++p)
        to[next[from[p].key() >> shift & mask]++] = from[p];
    });
    std::swap(from, to);
  }
  FindGroups(from, n, parallel);
  return -1;
}

template <typename Item>
void RowGroups::FindGroups(const Item* items, int64_t n, const Parallel& parallel) {
  const int64_t pieces = PiecesOf(n, parallel);
  auto is_first = [&](int64_t j) { return j == 0 || items[j].key() != items[j - 1].key(); };
  std::vector<int64_t> before(pieces + 1, 0);
  parallel.Run(pieces, [&](int64_t piece) {
    int64_t found = 0;
    for (int64_t j = Parallel::Cut(n, pieces, piece), end = Parallel::Cut(n, pieces, piece + 1); j < end; ++j)
      found += is_first(j);
    before[piece + 1] = found;
  });
  positions_ = Item::Positions(items_.get());
  for (int64_t piece = 0; piece < pieces; ++piece) before[piece + 1] += before[piece];
  size_ = before[pieces];
  rows_ = Scratch<int64_t>(size_);
  starts_ = Scratch<int64_t>(size_ + 1);
  starts_[size_] = n;
  // Backwards and without a branch: every pair writes its group's entry, the group's first pair last.
  parallel.Run(pieces, [&](int64_t piece) {
    int64_t lead = Parallel::Cut(n, pieces, piece);
    const int64_t end = Parallel::Cut(n, pieces, piece + 1);
    while (lead < end && !is_first(lead)) ++lead;  // of a group that an earlier piece writes
    int64_t u = before[piece + 1] - 1;
    for (int64_t j = end - 1; j >= lead; --j) {
      rows_[u] = static_cast<int64_t>(items[j].key());
      starts_[u] = j;
      u -= is_first(j);
    }
  });
}

}  // namespace deepfm
