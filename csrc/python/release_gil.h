// Lets other Python threads run while a kernel does.
#ifndef DEEPFM_PYTHON_RELEASE_GIL_H_
#define DEEPFM_PYTHON_RELEASE_GIL_H_

#include <Python.h>
#include <cxxabi.h>
#include <unistd.h>

namespace deepfm {

// pybind11's own, but for what happens when the interpreter ends while a daemon thread is in a kernel: Python then ends
// the thread by unwinding it from here, where nothing may throw, and the process would abort. The thread sleeps
// instead.
class ReleaseGil {
 public:
  ReleaseGil() : state_(PyEval_SaveThread()) {}
  ~ReleaseGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (abi::__forced_unwind&) {
      for (;;) pause();
    }
  }
  ReleaseGil(const ReleaseGil&) = delete;
  ReleaseGil& operator=(const ReleaseGil&) = delete;

 private:
  PyThreadState* const state_;
};

}  // namespace deepfm

#endif  // DEEPFM_PYTHON_RELEASE_GIL_H_
