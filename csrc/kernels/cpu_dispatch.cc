#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu_kernels.h"

namespace deepfm {
namespace baseline {
extern const CpuKernels kKernels;
}
namespace avx2 {
extern const CpuKernels kKernels;
}
namespace avx512 {
extern const CpuKernels kKernels;
}

namespace {

struct Build {
  const char* name;
  const CpuKernels* kernels;
  bool runs_here;
};

const Build* Builds() {  // widest last
  static const Build builds[] = {
      {"baseline", &baseline::kKernels, true},
      {"avx2", &avx2::kKernels,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
      {"avx512", &avx512::kKernels,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl")},
  };
  return builds;
}

const Build* Find(const char* name) {
  for (int i = 0; i < 3; ++i) {
    if (Builds()[i].runs_here && std::strcmp(Builds()[i].name, name) == 0) return &Builds()[i];
  }
  return nullptr;
}

const Build* Choose() {
  if (const char* name = std::getenv("DEEPFM_OPS_ISA")) {
    if (const Build* build = Find(name)) return build;
  }
  int widest = 2;
  while (!Builds()[widest].runs_here) --widest;
  return &Builds()[widest];
}

std::atomic<const Build*>& InUse() {
  static std::atomic<const Build*> build{Choose()};
  return build;
}

}  // namespace

const CpuKernels& Kernels() { return *InUse().load(std::memory_order_relaxed)->kernels; }

const char* Isa() { return InUse().load()->name; }

bool SetIsa(const char* name) {
  const Build* build = Find(name);
  if (build) InUse().store(build);
  return build != nullptr;
}

}  // namespace deepfm
