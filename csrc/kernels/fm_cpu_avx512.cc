#define DEEPFM_ISA avx512
#include "fm_cpu-inl.h"
