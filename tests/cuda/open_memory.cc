// Linked with the emulated kernels: they run with device.cc's memory open, if that is loaded.
#include <dlfcn.h>

#include "../../csrc/cuda/emulation.h"

namespace {
const bool kSet = [] {
  deepfm::cuda::emulation::open_memory = reinterpret_cast<void (*)(bool)>(dlsym(RTLD_DEFAULT, "open_device_memory"));
  return true;
}();
}  // namespace

// From now on it stays closed while a kernel runs.
extern "C" void keep_device_memory_closed() { deepfm::cuda::emulation::open_memory = nullptr; }
