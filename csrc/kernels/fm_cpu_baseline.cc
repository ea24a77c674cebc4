#define DEEPFM_ISA baseline
#include "fm_cpu-inl.h"
