// What the fuzzers share.
#ifndef DEEPFM_TESTS_FUZZ_H_
#define DEEPFM_TESTS_FUZZ_H_

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

namespace deepfm {

inline std::mt19937_64 rng;
inline int64_t Uniform(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }
inline bool Chance(int percent) { return Uniform(0, 99) < percent; }

#define EXPECT(condition, ...)                        \
  if (!(condition)) {                                 \
    std::printf("FAILED %s: " #condition " ", where); \
    std::printf(__VA_ARGS__);                         \
    std::printf("\n");                                \
    std::exit(1);                                     \
  }

}  // namespace deepfm

#endif  // DEEPFM_TESTS_FUZZ_H_
