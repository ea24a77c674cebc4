// How the kernels ask for threads: the caller lends a pool, the kernels never own one.
#ifndef DEEPFM_KERNELS_PARALLEL_H_
#define DEEPFM_KERNELS_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

namespace deepfm {

// One call's tasks, taken one by one by the caller and by helpers. A helper that comes too late finds none left and
// touches nothing of the caller's, so the caller never waits for a thread to wake up.
class Job {
 public:
  // The task is called with 0 ... tasks - 1, in any order, and must not throw.
  Job(int64_t tasks, const std::function<void(int64_t)>* task) : tasks_(tasks), task_(task) {}

  void Work() {
    for (int64_t i; (i = next_.fetch_add(1)) < tasks_;) {
      (*task_)(i);
      if (done_.fetch_add(1) + 1 < tasks_) continue;
      {
        std::lock_guard<std::mutex> lock(mutex_);
      }  // who looked too early is waiting now
      finished_.notify_one();
    }
  }

  void Wait() {
    // A short spin: the last tasks end within microseconds of each other.
    for (int i = 0; i < 4000; ++i) {
      if (done_.load() == tasks_) return;
      __builtin_ia32_pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [this] { return done_.load() == tasks_; });
  }

 private:
  const int64_t tasks_;
  const std::function<void(int64_t)>* const task_;  // valid while a task is left
  std::atomic<int64_t> next_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable finished_;
};

inline void AtomicMin(std::atomic<int64_t>* least, int64_t x) {
  int64_t seen = least->load();
  while (x < seen && !least->compare_exchange_weak(seen, x)) {
  }
}

struct Parallel {
  int threads = 1;  // the caller's included
  // Calls the function on another thread, some time. Null: there are no others.
  std::function<void(std::function<void()>)> schedule;

  // Calls task(0) ... task(tasks - 1), in any order and on any thread, and returns when all are done.
  void Run(int64_t tasks, const std::function<void(int64_t)>& task) const {
    const int64_t helpers = schedule ? std::min<int64_t>(tasks, threads) - 1 : 0;
    if (helpers < 1) {
      for (int64_t i = 0; i < tasks; ++i) task(i);
      return;
    }
    const auto job = std::make_shared<Job>(tasks, &task);
    for (int64_t i = 0; i < helpers; ++i) schedule([job] { job->Work(); });
    job->Work();
    job->Wait();
  }

  // That For makes.
  int64_t MostPieces() const { return threads > 1 ? 4 * static_cast<int64_t>(threads) : 1; }

  // Splits [0, n) into pieces of at least `grain` and calls fn(begin, end) on each. Pieces outnumber
  // threads a little, so that a thread that is held up does not hold up the rest.
  template <typename Fn>
  void For(int64_t n, int64_t grain, const Fn& fn) const {
    if (n <= 0) return;
    const int64_t pieces = std::min(n / std::max<int64_t>(1, grain), MostPieces());
    if (pieces <= 1) return fn(int64_t{0}, n);
    Run(pieces, [&](int64_t i) { fn(Cut(n, pieces, i), Cut(n, pieces, i + 1)); });
  }

  // Where piece i of [0, n) begins.
  static int64_t Cut(int64_t n, int64_t pieces, int64_t i) { return n / pieces * i + n % pieces * i / pieces; }
};

}  // namespace deepfm

#endif  // DEEPFM_KERNELS_PARALLEL_H_
