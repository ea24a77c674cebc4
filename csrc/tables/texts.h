// Columns of text, where they lie: Arrow's buffers, or what was packed or split from them.
//
//   cell i         the bytes [starts[i], ends[i]) of data; missing where its bit of `validity` is 0, or where they lie
//                  outside the data: whoever owns the arrays may change them at any time
//   of Arrow       ends = starts + 1: one array of offsets
#ifndef DEEPFM_TABLES_TEXTS_H_
#define DEEPFM_TABLES_TEXTS_H_

#include <cstdint>
#include <string>
#include <vector>

namespace deepfm {

struct Texts {
  const void* starts = nullptr;  // int32 or, if wide, int64
  const void* ends = nullptr;
  bool wide = false;
  const char* data = nullptr;
  int64_t size = 0;                   // of the data
  const uint8_t* validity = nullptr;  // Arrow's bits, or null: all are there
  int64_t first_bit = 0;              // of cell 0 in `validity`
  int64_t count = 0;
  bool empty_is_missing = false;

  struct Cell {
    const char* text;  // null: missing
    int64_t size;
  };
  Cell At(int64_t i) const {
    if (validity) {
      const int64_t bit = first_bit + i;
      if (!(validity[bit >> 3] >> (bit & 7) & 1)) return {nullptr, 0};
    }
    const int64_t start = ReadOnce(starts, i), end = ReadOnce(ends, i);
    if ((start == end && empty_is_missing) || start < 0 || start > end || end > size) return {nullptr, 0};
    return {data + start, end - start};
  }

 private:
  int64_t ReadOnce(const void* offsets, int64_t i) const {
    return wide ? __atomic_load_n(static_cast<const int64_t*>(offsets) + i, __ATOMIC_RELAXED)
                : __atomic_load_n(static_cast<const int32_t*>(offsets) + i, __ATOMIC_RELAXED);
  }
};

// The pieces of every cell between separators, empty ones left out; of a blank separator ("") between runs of blanks.
struct Pieces {
  std::vector<int64_t> row_splits, starts, ends;
  std::vector<float> weights;  // of "name:weight", if asked for; 1 where there is none
  int64_t bad_row = -1;        // the first with a weight that is no number
};
Pieces Split(const Texts& texts, const std::string& separator, bool weighted);

// The number that a cell spells, with blanks around it or not; written if it is one.
//   kMissing: nothing, or one of the marks that say so (NA, N/A, NaN, nan, NULL, null, None, \N, -)
enum class Spelled { kNumber, kMissing, kNoNumber };
Spelled ReadNumber(const char* text, int64_t size, double* number);

// The first cell in [0, count) that is not UTF-8 or is longer than `longest` bytes, or -1.
int64_t FirstBadText(const Texts& texts, int64_t longest);
bool IsUtf8(const char* text, int64_t size);

}  // namespace deepfm

#endif  // DEEPFM_TABLES_TEXTS_H_
