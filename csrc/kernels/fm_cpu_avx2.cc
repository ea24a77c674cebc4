#define DEEPFM_ISA avx2
#include "fm_cpu-inl.h"
