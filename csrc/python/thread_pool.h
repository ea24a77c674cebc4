// A small pool for callers without one of their own (NumPy, the fuzzer).
#ifndef DEEPFM_PYTHON_THREAD_POOL_H_
#define DEEPFM_PYTHON_THREAD_POOL_H_

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

#include "../kernels/parallel.h"

namespace deepfm {

class ThreadPool {
 public:
  // One pool per process. It is never destroyed: its threads may still be waiting when static objects
  // go away. A forked child has none of its parent's threads, so it gets a pool of its own.
  static ThreadPool& Get() {
    static std::mutex mutex;
    static ThreadPool* pool = nullptr;
    static pid_t owner = 0;
    std::lock_guard<std::mutex> lock(mutex);
    if (!pool || owner != getpid()) {
      pool = new ThreadPool;
      owner = getpid();
    }
    return *pool;
  }

  // Lends `threads` threads, the caller's included. A call that finds the pool busy runs on its own.
  Parallel Lend(int threads) {
    Parallel parallel;
    parallel.threads = threads;
    if (threads > 1) {
      parallel.run = [this, threads](int64_t tasks, const std::function<void(int64_t)>& fn) {
        Run(threads, tasks, fn);
      };
    }
    return parallel;
  }

 private:
  void Run(int threads, int64_t tasks, const std::function<void(int64_t)>& fn) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (tasks <= 1 || !turn.owns_lock()) {
      for (int64_t i = 0; i < tasks; ++i) fn(i);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; workers_ < threads - 1; ++workers_) std::thread([this, id = workers_] { Work(id); }).detach();
      fn_ = &fn;
      tasks_ = tasks;
      helpers_ = threads - 1;
      next_.store(0, std::memory_order_relaxed);
      job_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    DoTasks(fn, tasks);
    std::unique_lock<std::mutex> lock(mutex_);
    fn_ = nullptr;  // who wakes up only now finds no job
    done_.wait(lock, [this] { return active_ == 0; });
  }

  void DoTasks(const std::function<void(int64_t)>& fn, int64_t tasks) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks;) fn(i);
  }

  void Work(int id) {
    uint64_t seen = 0;
    while (true) {
      // A short spin: jobs of one call follow each other within microseconds.
      for (int i = 0; i < 4000 && job_.load(std::memory_order_acquire) == seen; ++i) __builtin_ia32_pause();
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return job_.load(std::memory_order_relaxed) != seen; });
      seen = job_.load(std::memory_order_relaxed);
      if (!fn_ || id >= helpers_) continue;
      ++active_;
      const auto* fn = fn_;
      const int64_t tasks = tasks_;
      lock.unlock();
      DoTasks(*fn, tasks);
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_;   // held by the call whose job it is
  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_, done_;
  int workers_ = 0, helpers_ = 0, active_ = 0;
  const std::function<void(int64_t)>* fn_ = nullptr;
  int64_t tasks_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<uint64_t> job_{0};
};

}  // namespace deepfm

#endif  // DEEPFM_PYTHON_THREAD_POOL_H_
