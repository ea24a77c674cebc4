#include "scratch.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace deepfm {
namespace {

constexpr int64_t kHeader = 64;                    // holds the block's size class, keeps the alignment
constexpr int64_t kMostKept = int64_t{256} << 20;  // bytes, over all threads
constexpr int64_t kHugePage = int64_t{2} << 20;

// Sizes go up in quarters of a power of two, from 256 bytes to kMostKept; larger blocks are not kept.
constexpr int kSmallest = 8, kLargest = 28, kClasses = 4 * (kLargest - kSmallest) + 1, kKeptPerClass = 8;
constexpr int64_t SizeOf(int size_class) { return int64_t{4 + size_class % 4} << (kSmallest - 2 + size_class / 4); }

std::atomic<char*> kept[kClasses][kKeptPerClass];
std::atomic<int64_t> kept_bytes{0};
std::atomic<unsigned> next_look{0};  // where to look for blocks that nobody came back for

int ClassFor(int64_t bytes) {
  if (bytes <= SizeOf(0)) return 0;
  const int power = 63 - __builtin_clzll(static_cast<uint64_t>(bytes - 1));  // 2^power < bytes <= 2^(power + 1)
  return 4 * (power - kSmallest) + static_cast<int>((bytes - 1) >> (power - 2)) - 3;
}

char* TakeFrom(std::atomic<char*>* place, int size_class) {
  char* block = place->load(std::memory_order_relaxed) ? place->exchange(nullptr) : nullptr;
  if (block) kept_bytes.fetch_sub(SizeOf(size_class));
  return block;
}

// Frees kept blocks, class by class, as long as there is no room for so many bytes; it looks at a few places a call.
void MakeRoom(int64_t bytes) {
  for (int looks = 0; looks < 4 * kKeptPerClass && kept_bytes.load() + bytes > kMostKept; ++looks) {
    const unsigned i = next_look.fetch_add(1) % (kClasses * kKeptPerClass);
    std::free(TakeFrom(&kept[i / kKeptPerClass][i % kKeptPerClass], static_cast<int>(i / kKeptPerClass)));
  }
}

}  // namespace

void* TakeScratch(int64_t bytes) {
  int64_t needed;
  if (bytes < 0 || __builtin_add_overflow(bytes, kHeader + kHugePage, &needed)) throw std::bad_alloc();
  needed -= kHugePage;
  const int size_class = ClassFor(needed);
  if (size_class < kClasses) {
    for (std::atomic<char*>& place : kept[size_class])
      if (char* block = TakeFrom(&place, size_class)) return block + kHeader;
    needed = SizeOf(size_class);
  }
  const bool huge = needed >= 2 * kHugePage;
  const int64_t alignment = huge ? kHugePage : kHeader;
  needed = (needed + alignment - 1) / alignment * alignment;
  char* block = static_cast<char*>(std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(needed)));
  if (!block) throw std::bad_alloc();
  if (huge) madvise(block, static_cast<size_t>(needed), MADV_HUGEPAGE);
  *reinterpret_cast<int*>(block) = size_class;
  return block + kHeader;
}

void GiveBackScratch(void* data) {
  char* block = static_cast<char*>(data) - kHeader;
  const int size_class = *reinterpret_cast<int*>(block);
  if (size_class < kClasses) {
    const int64_t bytes = SizeOf(size_class);
    MakeRoom(bytes);
    for (std::atomic<char*>& place : kept[size_class]) {
      char* none = nullptr;
      if (kept_bytes.load() + bytes > kMostKept || !place.compare_exchange_strong(none, block)) continue;
      kept_bytes.fetch_add(bytes);  // now, so that a child forked before it counts too little, not too much for good
      return;
    }
  }
  std::free(block);
}

void PreferHugePages(const void* data, int64_t bytes) {
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, Linux 6.1
  const uintptr_t mask = kHugePage - 1, start = (reinterpret_cast<uintptr_t>(data) + mask) & ~mask,
                  stop = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~mask;
  if (start >= stop) return;
  madvise(reinterpret_cast<void*>(start), stop - start, MADV_HUGEPAGE);
  madvise(reinterpret_cast<void*>(start), stop - start, kCollapse);
}

void PreferHugePagesOnce(const void* data, int64_t bytes) {
  if (bytes < kHugePage) return;
  static std::atomic<uintptr_t> asked[1024];  // by hash
  const uintptr_t key = reinterpret_cast<uintptr_t>(data) ^ static_cast<uintptr_t>(bytes);
  if (asked[(key >> 6) * 0x9e3779b97f4a7c15u >> 54].exchange(key) != key) PreferHugePages(data, bytes);
}

}  // namespace deepfm
