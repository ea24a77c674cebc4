// How the kernels ask for threads: the caller lends a pool, the kernels never own one.
#ifndef DEEPFM_KERNELS_PARALLEL_H_
#define DEEPFM_KERNELS_PARALLEL_H_

#include <cstdint>
#include <functional>

namespace deepfm {

struct Parallel {
  int threads = 1;
  // Calls fn(0) ... fn(tasks - 1), in any order and on any thread, and returns when all are done.
  std::function<void(int64_t tasks, const std::function<void(int64_t)>& fn)> run =
      [](int64_t tasks, const std::function<void(int64_t)>& fn) {
        for (int64_t i = 0; i < tasks; ++i) fn(i);
      };

  // Splits [0, n) into pieces of at least `grain` and calls fn(begin, end) on each. Pieces outnumber
  // threads a little, so that a thread that is held up does not hold up the rest.
  template <typename Fn>
  void For(int64_t n, int64_t grain, const Fn& fn) const {
    if (n <= 0) return;
    int64_t pieces = threads > 1 ? n / (grain < 1 ? 1 : grain) : 1;
    if (pieces > 4 * threads) pieces = 4 * threads;
    if (pieces <= 1) {
      fn(int64_t{0}, n);
      return;
    }
    run(pieces, [&](int64_t i) {
      fn(n / pieces * i + n % pieces * i / pieces, n / pieces * (i + 1) + n % pieces * (i + 1) / pieces);
    });
  }
};

}  // namespace deepfm

#endif  // DEEPFM_KERNELS_PARALLEL_H_
