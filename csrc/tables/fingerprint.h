// FarmHash's Fingerprint64 (Pike, google/farmhash): the hash behind TensorFlow's to_hash_bucket_fast, whose
// values are fixed for ever. Written from the published algorithm; the tests compare it with TensorFlow's.
#ifndef DEEPFM_TABLES_FINGERPRINT_H_
#define DEEPFM_TABLES_FINGERPRINT_H_

#include <cstdint>
#include <cstring>
#include <utility>

namespace deepfm {

class Fingerprint {
 public:
  // Short texts are hashed where they are read: the loops for long ones stay out of the way.
  static uint64_t Of(const char* s, uint64_t n) {
    if (n > 64) return Long(s, n);
    const uint64_t mul = kC + n * 2;
    if (n > 32) return Middle(s, n, mul);
    if (n > 16) {
      const auto [u, v] = Ends(s, n, mul, kB);
      return Mix(u, v, mul);
    }
    if (n >= 8) {
      const uint64_t a = Word(s) + kC, b = Word(s + n - 8);
      return Mix(Rotate(b, 37) * mul + a, (Rotate(a, 25) + b) * mul, mul);
    }
    if (n >= 4) return Mix(n + (uint64_t{Word32(s)} << 3), Word32(s + n - 4), mul);
    if (n == 0) return kC;
    const auto byte = [s](uint64_t i) { return uint64_t{static_cast<uint8_t>(s[i])}; };
    return Fold((byte(0) + (byte(n / 2) << 8)) * kC ^ (n + (byte(n - 1) << 2)) * kA) * kC;
  }

 private:
  typedef std::pair<uint64_t, uint64_t> Pair;
  static constexpr uint64_t kA = 0xc3a5c85c97cb3127, kB = 0xb492b66fbe98f273, kC = 0x9ae16a3b2f90404f;

  static uint64_t Word(const char* s) {
    uint64_t word;
    std::memcpy(&word, s, sizeof(word));
    return word;
  }
  static uint32_t Word32(const char* s) {
    uint32_t word;
    std::memcpy(&word, s, sizeof(word));
    return word;
  }
  static uint64_t Rotate(uint64_t x, int by) { return x >> by | x << (64 - by); }
  static uint64_t Fold(uint64_t x) { return x ^ x >> 47; }
  static uint64_t Mix(uint64_t u, uint64_t v, uint64_t mul) { return Fold((v ^ Fold((u ^ v) * mul)) * mul) * mul; }

  // Two words of the first and last 16 bytes.
  static Pair Ends(const char* s, uint64_t n, uint64_t mul, uint64_t first_mul) {
    const uint64_t a = Word(s) * first_mul, b = Word(s + 8), c = Word(s + n - 8) * mul, d = Word(s + n - 16) * kC;
    return {Rotate(a + b, 43) + Rotate(c, 30) + d, a + Rotate(b + kC, 18) + c};
  }

  [[gnu::noinline]] static uint64_t Middle(const char* s, uint64_t n, uint64_t mul) {
    const auto [y, v] = Ends(s, n, mul, kC);
    const uint64_t z = Mix(y, v, mul);
    const uint64_t e = Word(s + 16) * mul, f = Word(s + 24);
    const uint64_t g = (y + Word(s + n - 32)) * mul, h = (z + Word(s + n - 24)) * mul;
    return Mix(Rotate(e + f, 43) + Rotate(g, 30) + h, e + Rotate(f + Word(s) * kC, 18) + g, mul);
  }

  static Pair Weak(const char* s, uint64_t a, uint64_t b) {
    a += Word(s);
    b = Rotate(b + a + Word(s + 24), 21);
    const uint64_t sum = a + Word(s + 8) + Word(s + 16);
    return {sum + Word(s + 24), b + Rotate(sum, 44) + a};
  }

  struct State {
    uint64_t x, y, z;
    Pair v, w;
    // Takes 64 bytes in.
    void Step(const char* s, uint64_t mul, uint64_t times) {
      x = Rotate(x + y + v.first + Word(s + 8), 37) * mul;
      y = Rotate(y + v.second + Word(s + 48), 42) * mul;
      x ^= w.second * times;
      y += v.first * times + Word(s + 40);
      z = Rotate(z + w.first, 33) * mul;
      v = Weak(s, v.second * mul, x + w.first);
      w = Weak(s + 32, z + w.second, y + Word(s + 16));
      std::swap(z, x);
    }
  };

  [[gnu::noinline]] static uint64_t Long(const char* s, uint64_t n) {
    constexpr uint64_t seed = 81;
    const uint64_t y = seed * kB + 113;
    State h = {seed * kC + Word(s), y, Fold(y * kC + 113) * kC, {0, 0}, {0, 0}};
    const uint64_t rest = (n - 1) % 64;
    const char* end = s + (n - 1) / 64 * 64;
    for (; s != end; s += 64) h.Step(s, kB, 1);
    const uint64_t mul = kB + ((h.z & 0xff) << 1);
    h.w.first += rest;
    h.v.first += h.w.first;
    h.w.first += h.v.first;
    h.Step(end + rest - 63, mul, 9);
    return Mix(Mix(h.v.first, h.w.first, mul) + Fold(h.y) * kA + h.z, Mix(h.v.second, h.w.second, mul) + h.x, mul);
  }
};

}  // namespace deepfm

#endif  // DEEPFM_TABLES_FINGERPRINT_H_
