// A small pool for callers without one of their own (NumPy, the fuzzers).
#ifndef DEEPFM_PYTHON_THREAD_POOL_H_
#define DEEPFM_PYTHON_THREAD_POOL_H_

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

#include "../kernels/parallel.h"

namespace deepfm {

class ThreadPool {
 public:
  // One pool per process. It is never destroyed: its threads may still be waiting when static objects go away.
  static ThreadPool& Get() {
    ThreadPool* pool = current_.load();
    if (pool) return *pool;
    auto* fresh = new ThreadPool;
    if (current_.compare_exchange_strong(pool, fresh)) return *fresh;
    delete fresh;
    return *pool;
  }

  // Lends at most `threads` threads, the caller's included, and no more than the machine has.
  Parallel Lend(int threads) {
    Parallel parallel;
    parallel.threads = std::min(threads, kCores);
    if (parallel.threads > 1) parallel.schedule = [this](std::function<void()> call) { Schedule(std::move(call)); };
    return parallel;
  }

  static int cores() { return kCores; }

 private:
  static constexpr std::chrono::seconds kIdle{5};  // a thread that had nothing to do for so long ends

  void Schedule(std::function<void()> call) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      waiting_.push_back(std::move(call));
      num_waiting_.store(waiting_.size());
      if (free_ < waiting_.size() && workers_ < kCores - 1) {
        try {
          std::thread([this] { Work(); }).detach();
          ++workers_;
          ++free_;
        } catch (const std::exception&) {  // no more threads: the caller does the work
          if (workers_ == 0) waiting_.clear();
          num_waiting_.store(waiting_.size());
        }
      }
    }
    wake_.notify_one();
  }

  void Work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      lock.unlock();
      // A short spin: jobs of one call follow each other within microseconds.
      for (int i = 0; i < 4000 && num_waiting_.load() == 0; ++i) __builtin_ia32_pause();
      lock.lock();
      if (!wake_.wait_for(lock, kIdle, [this] { return !waiting_.empty(); })) break;
      const std::function<void()> call = std::move(waiting_.front());
      waiting_.pop_front();
      num_waiting_.store(waiting_.size());
      --free_;
      lock.unlock();
      call();
      lock.lock();
      ++free_;
    }
    --free_;
    --workers_;
  }

  // A forked child has none of its parent's threads, and locks as they were at that moment: it makes a pool of its own.
  static void ForgetInChild() { current_.store(nullptr); }

  static inline const int kCores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  static inline std::atomic<ThreadPool*> current_{nullptr};
  static inline const int kRegistered = pthread_atfork(nullptr, nullptr, ForgetInChild);

  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_;
  std::deque<std::function<void()>> waiting_;
  std::atomic<size_t> num_waiting_{0};
  size_t free_ = 0;  // threads that run no call
  int workers_ = 0;
};

}  // namespace deepfm

#endif  // DEEPFM_PYTHON_THREAD_POOL_H_
