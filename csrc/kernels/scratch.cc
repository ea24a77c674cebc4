#include "scratch.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <new>
#include <vector>

namespace deepfm {
namespace {

constexpr int64_t kHeader = 64;                    // holds the block's size, keeps the alignment
constexpr int64_t kMostKept = int64_t{256} << 20;  // bytes in the free list, over all threads
constexpr int64_t kPage = 4096;
constexpr int64_t kHugePage = int64_t{2} << 20;

struct Block {
  int64_t bytes;
  char* start;
};

std::mutex& Mutex() {
  static std::mutex mutex;
  return mutex;
}

std::vector<Block>& Free() {
  static auto* blocks = new std::vector<Block>;  // never destroyed: threads may outlive static objects
  return *blocks;
}

}  // namespace

void* TakeScratch(int64_t bytes) {
  if (bytes < 0 || bytes > std::numeric_limits<int64_t>::max() - 2 * kHugePage) throw std::bad_alloc();
  int64_t needed = (bytes + kHeader + kPage - 1) / kPage * kPage;
  Block block = {0, nullptr};
  {
    std::lock_guard<std::mutex> lock(Mutex());
    auto& free = Free();
    size_t best = free.size();
    for (size_t i = 0; i < free.size(); ++i) {
      // The smallest that fits, unless it is so large that another caller will miss it.
      if (free[i].bytes >= needed && free[i].bytes <= 4 * needed &&
          (best == free.size() || free[i].bytes < free[best].bytes))
        best = i;
    }
    if (best < free.size()) {
      block = free[best];
      free[best] = free.back();
      free.pop_back();
    }
  }
  if (!block.start) {
    const bool huge = needed >= 2 * kHugePage;
    if (huge) needed = (needed + kHugePage - 1) / kHugePage * kHugePage;
    block = {needed, static_cast<char*>(std::aligned_alloc(huge ? kHugePage : 64, static_cast<size_t>(needed)))};
    if (!block.start) throw std::bad_alloc();
    if (huge) madvise(block.start, static_cast<size_t>(needed), MADV_HUGEPAGE);
    *reinterpret_cast<int64_t*>(block.start) = needed;
  }
  return block.start + kHeader;
}

void PreferHugePages(void* data, int64_t bytes) {
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, Linux 6.1
  const uintptr_t mask = kHugePage - 1, start = (reinterpret_cast<uintptr_t>(data) + mask) & ~mask,
                  stop = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~mask;
  if (start >= stop) return;
  madvise(reinterpret_cast<void*>(start), stop - start, MADV_HUGEPAGE);
  madvise(reinterpret_cast<void*>(start), stop - start, kCollapse);
}

void GiveBackScratch(void* data) {
  char* start = static_cast<char*>(data) - kHeader;
  const int64_t bytes = *reinterpret_cast<int64_t*>(start);
  {
    std::lock_guard<std::mutex> lock(Mutex());
    auto& free = Free();
    int64_t kept = bytes;
    for (const Block& block : free) kept += block.bytes;
    if (kept <= kMostKept) {
      free.push_back({bytes, start});
      return;
    }
  }
  std::free(start);
}

}  // namespace deepfm
