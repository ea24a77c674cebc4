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

// Each build's flags in _build.py, asked one by one: a machine may hide any of them from its guests.
const bool kRunsAvx2 =
    __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
const bool kRunsAvx512 = kRunsAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
const Build kBuilds[] = {
    // widest first
    {"avx512", &avx512::kKernels, kRunsAvx512},
    {"avx2", &avx2::kKernels, kRunsAvx2},
    {"baseline", &baseline::kKernels, true},
};

// The widest build of this name, or of any, that runs here.
const Build* Find(const char* name) {
  for (const Build& build : kBuilds)
    if (build.runs_here && (!name || std::strcmp(build.name, name) == 0)) return &build;
  return nullptr;
}

const Build* Choose() {
  const Build* named = Find(std::getenv("DEEPFM_OPS_ISA"));
  return named ? named : Find(nullptr);
}

// Made when the library is loaded, not at the first use: a child that is forked during that would wait for ever.
std::atomic<const Build*> in_use{Choose()};

}  // namespace

const CpuKernels& Kernels() { return *in_use.load(std::memory_order_relaxed)->kernels; }

const char* Isa() { return in_use.load()->name; }

bool SetIsa(const char* name) {
  const Build* build = Find(name);
  if (build) in_use.store(build);
  return build != nullptr;
}

}  // namespace deepfm
