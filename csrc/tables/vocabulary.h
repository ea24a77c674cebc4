// (column, text) to id, by open addressing over 64-bit keys in one flat array that can be written, mapped and shared.
//
//   key of (column, text)   Fingerprint64(text) ^ (column + 1) * 2^64 / golden ratio, 0 becoming 1
//   slots [capacity]        a value stands at Home(key) or in one of the slots behind it, before the first empty one
//   Home(key)               key * capacity / 2^64: slots are in the order of their keys, so that any capacity will do
//
// Two values of one key are one to us. Of n values any two are so with a probability near n^2 / 2^65: 3e-5 for the 33.8
// million of Criteo's log.
#ifndef DEEPFM_TABLES_VOCABULARY_H_
#define DEEPFM_TABLES_VOCABULARY_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../kernels/parallel.h"
#include "fingerprint.h"
#include "texts.h"

namespace deepfm {

struct Slot {
  uint64_t key;    // 0: empty
  uint32_t id;     // of the value; while counting, the number of its entry
  uint32_t count;  // while counting
};

constexpr int64_t kLongestText = 65535;

inline uint64_t KeyOf(uint32_t column, const char* text, int64_t size) {
  const uint64_t key = Fingerprint::Of(text, static_cast<uint64_t>(size)) ^ (uint64_t{column} + 1) * 0x9e3779b97f4a7c15;
  return key ? key : 1;
}
inline uint64_t Home(uint64_t key, uint64_t capacity) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(key) * capacity >> 64);
}
// The number of slots for so many values: at most two thirds are taken.
int64_t CapacityFor(int64_t values);

// Bytes of a mapped file, which are compared with their checksums when a block of them is first used.
class CheckedBlocks {
 public:
  static constexpr int kBits = 12;  // blocks of 4 KiB: a page
  static uint64_t Sum(const char* data, int64_t size);
  static std::vector<uint64_t> Sums(const char* data, int64_t size);

  CheckedBlocks(const char* base, int64_t size, const uint64_t* sums)
      : base_(base), size_(size), sums_(sums), good_(((size >> kBits) + 64) / 64) {}
  // Whether the block that holds *p is what was written.
  bool Good(const void* p) {
    const int64_t block = (static_cast<const char*>(p) - base_) >> kBits;
    return (good_[block >> 6].load(std::memory_order_relaxed) >> (block & 63) & 1) || Compare(block);
  }
  // The first damaged byte range's start in [begin, end), or -1.
  int64_t FirstBad(int64_t begin, int64_t end);

 private:
  bool Compare(int64_t block);
  const char* base_;
  int64_t size_;
  const uint64_t* sums_;
  std::vector<std::atomic<uint64_t>> good_;
};

// What was found of a column's cells.
struct Found {
  int64_t missing = 0, unknown = 0;
  bool damaged = false;  // a block of the mapped file
  int64_t bad_row = -1;  // of Counter::Add: the first new text that is not UTF-8, or longer than kLongestText
};

// A finished vocabulary's slots.
struct Vocabulary {
  const Slot* slots = nullptr;
  int64_t capacity = 0;
  CheckedBlocks* blocks = nullptr;  // null: nothing to check

  // The id of each cell, at ids[i * stride]: 0 where it is missing, `unseen` where it is unknown; and 1 at
  // values[i * value_stride] where the id is not 0, else 0, if values is not null.
  Found Find(uint32_t column, const Texts& texts, uint32_t unseen, int64_t* ids, int64_t stride, float* values,
             int64_t value_stride, const Parallel& parallel) const;
  // The id of a key, 0 if it is unknown. `damaged` is set, never cleared. Of slots that somebody else made perhaps none
  // is empty: one round, then it is unknown.
  uint32_t IdOf(uint64_t key, bool* damaged) const {
    const uint64_t home = Home(key, capacity);
    uint64_t j = home;
    do {
      if (blocks && !blocks->Good(&slots[j])) {
        *damaged = true;
        return 0;
      }
      if (slots[j].key == key) return slots[j].id;
      if (!slots[j].key) return 0;
      if (++j == static_cast<uint64_t>(capacity)) j = 0;
    } while (j != home);
    return 0;
  }
};

// Puts values into empty slots, of which there must be enough: keys[i], not 0, has id ids[i].
void Fill(Slot* slots, int64_t capacity, const uint64_t* keys, const uint32_t* ids, int64_t count);

// Counters that a value must pass before it gets memory of its own: two bytes of one cache line, of which the smaller
// is raised (Estan and Varghese 2002, conservative update). It never counts too little.
class Sketch {
 public:
  static constexpr uint32_t kMost = 255;  // it counts no further
  explicit Sketch(int64_t bytes);
  Sketch(const Sketch&) = delete;
  ~Sketch();
  uint32_t Add(uint64_t key);
  // Fetches what Add(key) will read.
  void Fetch(uint64_t key) const { __builtin_prefetch(&counts_[Home(key, lines_) * 64], 1); }
  std::mutex mutex;  // Counters of many threads may share it

 private:
  uint64_t lines_;
  uint8_t* counts_;  // in huge pages: else every Add searched for its page too
};

// Counts the values of one column that a vocabulary does not have. Calls from many threads take turns.
class Counter {
 public:
  // sketch: null, or what values pass after `least` sightings, or kMost of them; its owner keeps it.
  Counter(uint32_t column, bool keep_texts, Sketch* sketch, uint32_t least);
  // Counts the cells, up to one whose text cannot be a value; one of `known`'s values (null: none) is counted in
  // counts[id] instead, an id beyond them is an exception.
  Found Add(const Texts& texts, const Vocabulary* known, int64_t* counts, int64_t num_counts);

  int64_t size() const { return size_; }
  int64_t total() const { return total_; }  // cells that were no known values
  int64_t Bytes() const;
  // The values that were seen `least` times, in the order in which they came: keys, counts, and their texts one after
  // the other.
  struct Values {
    std::vector<uint64_t> keys, counts, text_ends;
    std::string texts;
  };
  Values Finish(uint64_t least) const;

 private:
  bool Count(uint64_t key, const char* text, int64_t size);
  void Grow();
  mutable std::mutex mutex_;
  uint32_t column_;
  bool keep_texts_;
  Sketch* sketch_;
  uint32_t least_;
  int64_t size_ = 0, total_ = 0;
  std::vector<Slot> slots_;
  std::vector<uint16_t> sizes_;                  // of the texts
  std::vector<std::unique_ptr<char[]>> pieces_;  // of kPiece bytes: nothing is copied when they grow
  uint64_t used_ = 0;
};

// The order of ids: falling counts; of equal counts columns ascending, then texts by their bytes, or keys without
// texts, then as they came.
std::vector<int64_t> OrderOf(const uint64_t* counts, const uint32_t* columns, const uint64_t* keys,
                             const uint64_t* text_ends, const char* texts, int64_t count);

}  // namespace deepfm

#endif  // DEEPFM_TABLES_VOCABULARY_H_
