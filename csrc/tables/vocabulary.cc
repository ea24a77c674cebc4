#include "vocabulary.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>
#include <stdexcept>

#include "fingerprint.h"

namespace deepfm {
namespace {

constexpr int kAhead = 64;                      // cells whose slots are fetched before they are read
constexpr uint64_t kPiece = uint64_t{1} << 20;  // bytes

// Where a text goes behind `used` bytes of pieces: it does not reach from one piece into the next.
uint64_t PlaceFor(uint64_t bytes, uint64_t used) {
  return used % kPiece + bytes > kPiece ? (used / kPiece + 1) * kPiece : used;
}

}  // namespace

int64_t CapacityFor(int64_t values) { return std::max<int64_t>(8, values + values / 2 + 1); }

uint64_t CheckedBlocks::Sum(const char* data, int64_t size) { return Fingerprint::Of(data, size); }

std::vector<uint64_t> CheckedBlocks::Sums(const char* data, int64_t size) {
  std::vector<uint64_t> sums;
  constexpr int64_t block = int64_t{1} << kBits;
  sums.reserve((size + block - 1) / block);
  for (int64_t at = 0; at < size; at += block) sums.push_back(Sum(data + at, std::min(block, size - at)));
  return sums;
}

bool CheckedBlocks::Compare(int64_t block) {
  const int64_t start = block << kBits, size = std::min(int64_t{1} << kBits, size_ - start);
  if (size <= 0 || Sum(base_ + start, size) != sums_[block]) return false;
  good_[block >> 6].fetch_or(uint64_t{1} << (block & 63), std::memory_order_relaxed);
  return true;
}

int64_t CheckedBlocks::FirstBad(int64_t begin, int64_t end) {
  for (int64_t at = begin >> kBits << kBits; at < end; at += int64_t{1} << kBits)
    if (!Good(base_ + at)) return at;
  return -1;
}

Found Vocabulary::Find(uint32_t column, const Texts& texts, uint32_t unseen, int64_t* ids, int64_t stride,
                       float* values, int64_t value_stride, const Parallel& parallel) const {
  std::atomic<int64_t> missing{0}, unknown{0};
  std::atomic<bool> damaged{false};
  parallel.For(texts.count, 16384, [&](int64_t begin, int64_t end) {
    uint64_t keys[kAhead];
    int64_t missing_here = 0, unknown_here = 0;
    bool damaged_here = false;
    for (int64_t first = begin; first < end; first += kAhead) {
      const int64_t last = std::min(end, first + kAhead);
      for (int64_t i = first; i < last; ++i) {
        const Texts::Cell cell = texts.At(i);
        const uint64_t key = keys[i - first] = cell.text ? KeyOf(column, cell.text, cell.size) : 0;
        if (key) __builtin_prefetch(&slots[Home(key, capacity)]);
      }
      for (int64_t i = first; i < last; ++i) {
        int64_t id = 0;
        if (keys[i - first]) {
          id = IdOf(keys[i - first], &damaged_here);
          if (!id) {
            ++unknown_here;
            id = unseen;
          }
        } else {
          ++missing_here;
        }
        ids[i * stride] = id;
        if (values) values[i * value_stride] = id ? 1.0f : 0.0f;
      }
    }
    missing += missing_here;
    unknown += unknown_here;
    if (damaged_here) damaged = true;
  });
  Found found;
  found.missing = missing;
  found.unknown = unknown;
  found.damaged = damaged;
  return found;
}

void Fill(Slot* slots, int64_t capacity, const uint64_t* keys, const uint32_t* ids, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) __builtin_prefetch(&slots[Home(keys[i + kAhead], capacity)], 1);
    uint64_t j = Home(keys[i], capacity);
    while (slots[j].key) j = j + 1 == static_cast<uint64_t>(capacity) ? 0 : j + 1;
    slots[j] = {keys[i], ids[i], 0};
  }
}

Sketch::Sketch(int64_t bytes) : lines_(static_cast<uint64_t>(std::max<int64_t>(1, bytes / 64))) {
  void* memory = mmap(nullptr, lines_ * 64, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  madvise(memory, lines_ * 64, MADV_HUGEPAGE);
  counts_ = static_cast<uint8_t*>(memory);
}

Sketch::~Sketch() { munmap(counts_, lines_ * 64); }

uint32_t Sketch::Add(uint64_t key) {
  uint8_t* line = &counts_[Home(key, lines_) * 64];
  uint8_t &a = line[key & 63], &b = line[key >> 6 & 63];
  const uint8_t least = std::min(a, b);
  if (least == kMost) return kMost;
  if (a == least) ++a;
  if (&b != &a && b == least) ++b;
  return least + 1u;
}

Counter::Counter(uint32_t column, bool keep_texts, Sketch* sketch, uint32_t least)
    : column_(column),
      keep_texts_(keep_texts),
      sketch_(sketch),
      least_(std::min<uint32_t>(least, Sketch::kMost)),
      slots_(64) {}

int64_t Counter::Bytes() const {
  return static_cast<int64_t>(slots_.size() * sizeof(Slot) + sizes_.capacity() * sizeof(sizes_[0]) +
                              pieces_.size() * kPiece);
}

void Counter::Grow() {
  std::vector<Slot> fresh(slots_.size() * 2);
  for (const Slot& slot : slots_) {
    if (!slot.key) continue;
    uint64_t j = Home(slot.key, fresh.size());
    while (fresh[j].key) j = j + 1 == fresh.size() ? 0 : j + 1;
    fresh[j] = slot;
  }
  slots_ = std::move(fresh);
}

bool Counter::Count(uint64_t key, const char* text, int64_t size) {
  uint64_t j = Home(key, slots_.size());
  while (slots_[j].key && slots_[j].key != key) j = j + 1 == slots_.size() ? 0 : j + 1;
  if (!slots_[j].key) {
    uint32_t seen = 1;
    if (sketch_ && (seen = sketch_->Add(key)) < least_) return true;
    if (size > kLongestText || !IsUtf8(text, size)) return false;
    if ((size_ + 1) * 3 > static_cast<int64_t>(slots_.size()) * 2) {
      Grow();
      for (j = Home(key, slots_.size()); slots_[j].key;) j = j + 1 == slots_.size() ? 0 : j + 1;
    }
    if (size_ > UINT32_MAX) throw std::length_error("a column has more than 2^32 values");
    if (keep_texts_) {
      const uint64_t bytes = static_cast<uint64_t>(size), place = PlaceFor(bytes, used_);
      if (place + bytes > pieces_.size() * kPiece) pieces_.emplace_back(new char[kPiece]);
      if (bytes) std::memcpy(&pieces_[place / kPiece][place % kPiece], text, bytes);
      sizes_.push_back(static_cast<uint16_t>(bytes));
      used_ = place + bytes;
    }
    slots_[j] = {key, static_cast<uint32_t>(size_++), seen};  // last: nothing above it that throws leaves half a value
  } else if (slots_[j].count != UINT32_MAX) {
    ++slots_[j].count;
  }
  return true;
}

Found Counter::Add(const Texts& texts, const Vocabulary* known, int64_t* counts, int64_t num_counts) {
  Found found;
  const std::lock_guard<std::mutex> lock(mutex_);
  std::unique_lock<std::mutex> sketch_lock;
  if (sketch_) sketch_lock = std::unique_lock<std::mutex>(sketch_->mutex);
  Texts::Cell cells[kAhead];
  uint64_t keys[kAhead];
  for (int64_t first = 0; first < texts.count; first += kAhead) {
    const int64_t last = std::min(texts.count, first + kAhead);
    for (int64_t i = first; i < last; ++i) {
      const Texts::Cell cell = cells[i - first] = texts.At(i);
      const uint64_t key = keys[i - first] = cell.text ? KeyOf(column_, cell.text, cell.size) : 0;
      if (!key) continue;
      if (known) __builtin_prefetch(&known->slots[Home(key, known->capacity)]);
      __builtin_prefetch(&slots_[Home(key, slots_.size())], 1);
      if (sketch_) sketch_->Fetch(key);
    }
    for (int64_t i = first; i < last; ++i) {
      const uint64_t key = keys[i - first];
      if (!key) {
        ++found.missing;
      } else if (const uint32_t id = known ? known->IdOf(key, &found.damaged) : 0) {
        if (id >= num_counts) throw std::invalid_argument("counts must have an entry for every id");
        ++counts[id];
      } else {
        ++total_;
        ++found.unknown;
        if (!Count(key, cells[i - first].text, cells[i - first].size)) {
          found.bad_row = i;
          return found;
        }
      }
    }
  }
  return found;
}

Counter::Values Counter::Finish(uint64_t least) const {
  Values values;
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Slot> entries(size_);
  for (const Slot& slot : slots_)
    if (slot.key) entries[slot.id] = slot;
  uint64_t place = 0, bytes = 0;
  for (int64_t i = 0; i < size_; ++i, place += bytes) {
    if (keep_texts_) place = PlaceFor(bytes = sizes_[i], place);
    if (entries[i].count < least) continue;
    values.keys.push_back(entries[i].key);
    values.counts.push_back(entries[i].count);
    if (!keep_texts_) continue;
    if (bytes) values.texts.append(&pieces_[place / kPiece][place % kPiece], bytes);
    values.text_ends.push_back(values.texts.size());
  }
  return values;
}

std::vector<int64_t> OrderOf(const uint64_t* counts, const uint32_t* columns, const uint64_t* keys,
                             const uint64_t* text_ends, const char* texts, int64_t count) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), int64_t{0});
  // Most counts are small: those above are few enough to be sorted, those below are dealt out by column and count.
  constexpr uint64_t kSmall = 64;
  const auto middle = std::stable_partition(order.begin(), order.end(), [&](int64_t i) { return counts[i] >= kSmall; });
  const auto before = [&](int64_t a, int64_t b) {
    return counts[a] != counts[b] ? counts[a] > counts[b] : columns[a] < columns[b];
  };
  std::stable_sort(order.begin(), middle, before);
  std::vector<int64_t> dealt[kSmall];
  for (auto i = middle; i != order.end(); ++i) dealt[counts[*i]].push_back(*i);
  auto next = middle;
  for (uint64_t times = kSmall; times-- > 0;) {
    std::vector<int64_t>& some = dealt[times];
    if (!std::is_sorted(some.begin(), some.end(), before)) std::stable_sort(some.begin(), some.end(), before);
    next = std::copy(some.begin(), some.end(), next);
  }
  // The first eight bytes of a text decide nearly always, and lie next to its number.
  struct Entry {
    uint64_t prefix;
    int64_t number;
  };
  auto start = [&](int64_t i) { return i ? text_ends[i - 1] : 0; };
  std::vector<Entry> equal;
  for (int64_t first = 0, last; first < count; first = last) {
    equal.clear();
    const uint64_t times = counts[order[first]];
    const uint32_t column = columns[order[first]];
    for (last = first; last < count && counts[order[last]] == times && columns[order[last]] == column; ++last) {
      const int64_t i = order[last];
      uint64_t prefix = keys[i];
      if (text_ends) {
        unsigned char bytes[8] = {};
        std::memcpy(bytes, texts + start(i), std::min<uint64_t>(8, text_ends[i] - start(i)));
        prefix = 0;
        for (unsigned char byte : bytes) prefix = prefix << 8 | byte;
      }
      equal.push_back({prefix, i});
    }
    std::sort(equal.begin(), equal.end(), [&](const Entry& a, const Entry& b) {
      if (a.prefix != b.prefix || !text_ends) return a.prefix != b.prefix ? a.prefix < b.prefix : a.number < b.number;
      const uint64_t x = start(a.number), y = start(b.number);
      const uint64_t nx = text_ends[a.number] - x, ny = text_ends[b.number] - y;
      const int result = std::memcmp(texts + x, texts + y, std::min(nx, ny));
      if (result) return result < 0;
      return nx != ny ? nx < ny : a.number < b.number;
    });
    for (int64_t i = first; i < last; ++i) order[i] = equal[i - first].number;
  }
  return order;
}

}  // namespace deepfm
