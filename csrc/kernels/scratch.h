// Working memory that is kept for the next call: fresh pages cost more than the work done in them.
#ifndef DEEPFM_KERNELS_SCRATCH_H_
#define DEEPFM_KERNELS_SCRATCH_H_

#include <cstdint>

namespace deepfm {

// At least `bytes` bytes, aligned to a cache line. Blocks that were given back are kept, a few of each size, and serve
// all threads. There is no lock, so that a forked child can use what it has of them. Throws std::bad_alloc.
void* TakeScratch(int64_t bytes);
void GiveBackScratch(void* block);

// Asks the system to keep these bytes in huge pages, now if it can: random rows of a large table then
// cost fewer TLB misses. A wish only; the contents stay as they are.
void PreferHugePages(const void* data, int64_t bytes);

// The same, unless it was asked for as many bytes at this place before: asking takes microseconds, and the first time
// about two milliseconds per megabyte. Of memory that was freed and mapped again meanwhile nothing is known.
void PreferHugePagesOnce(const void* data, int64_t bytes);

// An uninitialized array.
template <typename T>
class Scratch {
 public:
  Scratch() {}
  explicit Scratch(int64_t n) : data_(static_cast<T*>(TakeScratch(n * static_cast<int64_t>(sizeof(T))))) {}
  Scratch(Scratch&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Scratch& operator=(Scratch&& other) noexcept {
    T* mine = data_;
    data_ = other.data_;
    other.data_ = mine;
    return *this;
  }
  ~Scratch() {
    if (data_) GiveBackScratch(data_);
  }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
};

}  // namespace deepfm

#endif  // DEEPFM_KERNELS_SCRATCH_H_
