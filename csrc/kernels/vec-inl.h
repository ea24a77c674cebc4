// One register of floats or doubles, and loads and stores that convert from and to the table's type.
// Included inside the namespace of one instruction set, after <immintrin.h>; it uses no shared
// templates, so the linker cannot keep this instruction set's code for another one.

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Int8 {  // a byte of a kInt8 row
  uint8_t code;
};

template <typename T>
struct Traits;
template <>
struct Traits<float> {
  typedef float Acc;
  typedef float Vec __attribute__((vector_size(kVecBytes)));
};
template <>
struct Traits<double> {
  typedef double Acc;
  typedef double Vec __attribute__((vector_size(kVecBytes)));
};
template <>
struct Traits<BFloat16> : Traits<float> {};
template <>
struct Traits<Float16> : Traits<float> {};
template <>
struct Traits<Int8> : Traits<float> {};

template <typename T>
using AccOf = typename Traits<T>::Acc;
template <typename T>
using VecOf = typename Traits<T>::Vec;
template <typename T>
constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(AccOf<T>));

typedef uint8_t ByteBits __attribute__((vector_size(kVecBytes / 4)));
typedef uint16_t HalfBits __attribute__((vector_size(kVecBytes / 2)));
typedef uint32_t WordBits __attribute__((vector_size(kVecBytes)));
typedef int32_t WordMask __attribute__((vector_size(kVecBytes)));

static inline VecOf<float> Widen(HalfBits h, BFloat16) {
  const WordBits wide = __builtin_convertvector(h, WordBits) << 16;
  return (VecOf<float>)wide;
}

static inline HalfBits Narrow(VecOf<float> v, BFloat16) {
  const WordBits w = (WordBits)v;
  const WordBits rounded = (w + 0x7fff + (w >> 16 & 1)) >> 16;  // to nearest, ties to even
  const WordMask is_nan = v != v;
  const WordBits quiet = w >> 16 | 0x40;
  const WordBits bits = is_nan ? quiet : rounded;
  return __builtin_convertvector(bits, HalfBits);
}

#if defined(__AVX512F__)
static inline VecOf<float> Widen(HalfBits h, Float16) {
  return (VecOf<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);
}
static inline HalfBits Narrow(VecOf<float> v, Float16) {
  return (HalfBits)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__AVX2__)
static inline VecOf<float> Widen(HalfBits h, Float16) { return (VecOf<float>)_mm256_cvtph_ps((__m128i)h); }
static inline HalfBits Narrow(VecOf<float> v, Float16) {
  return (HalfBits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
#else
static inline VecOf<float> Widen(HalfBits h, Float16) {
  // No arithmetic on subnormal floats: TensorFlow's threads treat them as zero.
  const WordBits wide = __builtin_convertvector(h, WordBits);
  const WordBits magnitude = wide & 0x7fff;
  const WordMask is_subnormal = magnitude < 0x400u;
  const WordMask is_special = magnitude >= 0x7c00u;  // infinity or NaN
  const VecOf<float> scaled = __builtin_convertvector((WordMask)magnitude, VecOf<float>) * 0x1p-24f;
  const WordBits normal = (magnitude << 13) + (112u << 23);
  WordBits bits = is_subnormal ? (WordBits)scaled : normal;
  bits = is_special ? (magnitude << 13 | 0x7f800000u) : bits;
  return (VecOf<float>)(bits | (wide & 0x8000) << 16);
}
static inline HalfBits Narrow(VecOf<float> v, Float16) {
  const WordBits w = (WordBits)v;
  const WordBits magnitude = w & 0x7fffffffu;
  const WordBits sign = w >> 16 & 0x8000;
  // Subnormal halves: adding 0.5 aligns the mantissa so that the addition itself rounds to even.
  VecOf<float> aligned = (VecOf<float>)magnitude + 0.5f;
  const WordBits subnormal = (WordBits)aligned - 0x3f000000u;
  const WordBits normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const WordMask is_small = magnitude < (113u << 23);
  const WordMask is_large = magnitude >= 0x477ff000u;  // rounds to infinity
  const WordMask is_nan = v != v;
  WordBits bits = is_small ? subnormal : normal;
  bits = is_large ? (WordBits{} + 0x7c00) : bits;
  bits = is_nan ? (WordBits{} + 0x7e00) : bits;
  return __builtin_convertvector(bits | sign, HalfBits);
}
#endif

// Loads lanes [0, lanes) and zeros behind them. With kPartial false, lanes is the whole register.
template <bool kPartial, typename T>
static inline VecOf<T> Load(const T* p, int lanes) {
  HalfBits half = {};
  if (!kPartial) {
    __builtin_memcpy(&half, p, sizeof(half));
  } else {
    for (int i = 0; i < lanes; ++i) half[i] = p[i].bits;
  }
  return Widen(half, T{});
}

template <bool kPartial, typename T>
static inline void Store(T* p, VecOf<T> v, int lanes) {
  const HalfBits half = Narrow(v, T{});
  if (!kPartial) {
    __builtin_memcpy(p, &half, sizeof(half));
  } else {
    for (int i = 0; i < lanes; ++i) p[i].bits = half[i];
  }
}

// The codes as numbers.
template <bool kPartial>
static inline VecOf<float> Load(const Int8* p, int lanes) {
  ByteBits codes = {};
  if (!kPartial) {
    __builtin_memcpy(&codes, p, sizeof(codes));
  } else {
#if defined(__AVX512F__)
    codes = (ByteBits)_mm_maskz_loadu_epi8((__mmask16)((1u << lanes) - 1), p);
#else
    for (int i = 0; i < lanes; ++i) codes[i] = p[i].code;
#endif
  }
  return __builtin_convertvector(__builtin_convertvector(codes, WordMask), VecOf<float>);
}

template <bool kPartial>
static inline VecOf<float> Load(const float* p, int lanes) {
  VecOf<float> v = {};
  if (!kPartial) {
    __builtin_memcpy(&v, p, sizeof(v));
  } else {
#if defined(__AVX512F__)
    v = (VecOf<float>)_mm512_maskz_loadu_ps((__mmask16)((1u << lanes) - 1), p);
#elif defined(__AVX2__)
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    v = (VecOf<float>)_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), lane));
#else
    for (int i = 0; i < lanes; ++i) v[i] = p[i];
#endif
  }
  return v;
}

template <bool kPartial>
static inline VecOf<double> Load(const double* p, int lanes) {
  VecOf<double> v = {};
  if (!kPartial) {
    __builtin_memcpy(&v, p, sizeof(v));
  } else {
#if defined(__AVX512F__)
    v = (VecOf<double>)_mm512_maskz_loadu_pd((__mmask8)((1u << lanes) - 1), p);
#elif defined(__AVX2__)
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    v = (VecOf<double>)_mm256_maskload_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(lanes), lane));
#else
    for (int i = 0; i < lanes; ++i) v[i] = p[i];
#endif
  }
  return v;
}

// Masked stores to float and double are microcoded on some AVX2 machines; a loop is not.
template <bool kPartial>
static inline void Store(float* p, VecOf<float> v, int lanes) {
  if (!kPartial) {
    __builtin_memcpy(p, &v, sizeof(v));
  } else {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << lanes) - 1), (__m512)v);
#else
    for (int i = 0; i < lanes; ++i) p[i] = v[i];
#endif
  }
}

template <bool kPartial>
static inline void Store(double* p, VecOf<double> v, int lanes) {
  if (!kPartial) {
    __builtin_memcpy(p, &v, sizeof(v));
  } else {
#if defined(__AVX512F__)
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << lanes) - 1), (__m512d)v);
#else
    for (int i = 0; i < lanes; ++i) p[i] = v[i];
#endif
  }
}

#if defined(__AVX512F__)
static inline VecOf<float> Sqrt(VecOf<float> v) { return (VecOf<float>)_mm512_maskz_sqrt_ps(0xffff, (__m512)v); }
static inline VecOf<double> Sqrt(VecOf<double> v) { return (VecOf<double>)_mm512_maskz_sqrt_pd(0xff, (__m512d)v); }
#elif defined(__AVX2__)
static inline VecOf<float> Sqrt(VecOf<float> v) { return (VecOf<float>)_mm256_sqrt_ps((__m256)v); }
static inline VecOf<double> Sqrt(VecOf<double> v) { return (VecOf<double>)_mm256_sqrt_pd((__m256d)v); }
#else
static inline VecOf<float> Sqrt(VecOf<float> v) { return (VecOf<float>)_mm_sqrt_ps((__m128)v); }
static inline VecOf<double> Sqrt(VecOf<double> v) { return (VecOf<double>)_mm_sqrt_pd((__m128d)v); }
#endif

// Halves are added to each other until one lane is left.
template <typename A, int kBytes>
static inline A HorizontalSumOf(const void* lanes) {
  if constexpr (kBytes == sizeof(A)) {
    return *static_cast<const A*>(lanes);
  } else {
    typedef A Half __attribute__((vector_size(kBytes / 2)));
    Half low, high;
    __builtin_memcpy(&low, lanes, sizeof(Half));
    __builtin_memcpy(&high, static_cast<const char*>(lanes) + sizeof(Half), sizeof(Half));
    low += high;
    return HorizontalSumOf<A, kBytes / 2>(&low);
  }
}

static inline float HorizontalSum(VecOf<float> v) { return HorizontalSumOf<float, kVecBytes>(&v); }
static inline double HorizontalSum(VecOf<double> v) { return HorizontalSumOf<double, kVecBytes>(&v); }

// The sums of four registers at once, each added up in the same order: a third of the work of four times one.
#if defined(__AVX512F__)
#define DEEPFM_UNPACK(half, x, y) (VecOf<float>)_mm512_maskz_unpack##half##_ps(0xffff, (__m512)(x), (__m512)(y))
#define DEEPFM_UNPACK_PAIRS(half, x, y) (VecOf<float>)_mm512_maskz_unpack##half##_pd(0xff, (__m512d)(x), (__m512d)(y))
#elif defined(__AVX2__)
#define DEEPFM_UNPACK(half, x, y) (VecOf<float>)_mm256_unpack##half##_ps((__m256)(x), (__m256)(y))
#define DEEPFM_UNPACK_PAIRS(half, x, y) (VecOf<float>)_mm256_unpack##half##_pd((__m256d)(x), (__m256d)(y))
#else
#define DEEPFM_UNPACK(half, x, y) (VecOf<float>)_mm_unpack##half##_ps((__m128)(x), (__m128)(y))
#define DEEPFM_UNPACK_PAIRS(half, x, y) (VecOf<float>)_mm_unpack##half##_pd((__m128d)(x), (__m128d)(y))
#endif
typedef float FourFloats __attribute__((vector_size(16)));
static inline FourFloats HorizontalSums(VecOf<float> a, VecOf<float> b, VecOf<float> c, VecOf<float> d) {
  const VecOf<float> ab = DEEPFM_UNPACK(lo, a, b) + DEEPFM_UNPACK(hi, a, b);
  const VecOf<float> cd = DEEPFM_UNPACK(lo, c, d) + DEEPFM_UNPACK(hi, c, d);
  const VecOf<float> abcd = DEEPFM_UNPACK_PAIRS(lo, ab, cd) + DEEPFM_UNPACK_PAIRS(hi, ab, cd);
  FourFloats parts[kVecBytes / 16], total;
  __builtin_memcpy(parts, &abcd, sizeof(parts));
  total = parts[0];
  for (int i = 1; i < kVecBytes / 16; ++i) total += parts[i];
  return total;
}
#undef DEEPFM_UNPACK
#undef DEEPFM_UNPACK_PAIRS
