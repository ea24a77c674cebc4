// Rows of pairs in text: libsvm (`label index:value ...`) and libffm (`label field:index:value ...`).
//
//   line = [separators] [label {separators pair}] [separators] ["#" comment] "\n"
//   separators = blanks, tabs, commas and carriage returns, as many as there are
//   label, value = [+-] digits with or without a point [exponent], finite as float32
//   index = digits, at most 2^63 - 1; field = digits, at most 2^31 - 1
//
// A line without a label is no row. A number is the nearest double, rounded to float32: what Python's float and NumPy
// give. deepfm_ops/data/libsvm_python.py reads the same, for where this is not compiled and for the tests.
#ifndef DEEPFM_TABLES_LIBSVM_H_
#define DEEPFM_TABLES_LIBSVM_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "plain_number.h"

namespace deepfm {

// An array that grows. Of a large one realloc moves the pages instead of copying them: there never are two of it, and
// pages that were not written yet take no memory.
template <typename T>
class Growing {
 public:
  Growing() = default;
  Growing(const Growing&) = delete;
  Growing& operator=(const Growing&) = delete;
  ~Growing() { std::free(data_); }

  int64_t size() const { return size_; }
  const T* data() const { return data_; }

  // Where n more items may be written; Add makes the first of them part of the array.
  T* Room(int64_t n) {
    if (size_ + n > capacity_) Allocate(size_ + n + size_ / 2);
    return data_ + size_;
  }
  void Add(int64_t n) { size_ += n; }

  // Hands the memory over, to be freed with std::free. The array is empty then.
  T* Release() {
    Allocate(size_);
    size_ = capacity_ = 0;
    return std::exchange(data_, nullptr);
  }

 private:
  void Allocate(int64_t capacity) {
    void* data = std::realloc(static_cast<void*>(data_), (capacity + 1) * sizeof(T));
    if (!data) throw std::bad_alloc();
    data_ = static_cast<T*>(data);
    capacity_ = capacity;
  }

  T* data_ = nullptr;
  int64_t size_ = 0, capacity_ = 0;
};

class LibsvmParser {
 public:
  // The first token that no row can have.
  struct Bad {
    int64_t line, column;  // from 1; the column counts bytes
    bool is_label;
    std::string token;
  };

  // has_fields: libffm. skip: leave out and count lines with a bad token, instead of stopping at the first.
  LibsvmParser(bool has_fields, bool skip) : has_fields_(has_fields), skip_(skip) { StartRows(); }

  // Reads the lines of [p, end), until there are max_rows rows. end[-1] is '\n'. Returns where the first line begins
  // that was not read, which is the bad line if `bad` is set now.
  const char* Parse(const char* p, const char* end, int64_t max_rows) {
    while (p < end && labels.size() < max_rows) {
      const char* line_end = static_cast<const char*>(std::memchr(p, '\n', end - p));
      if (!line_end) line_end = end - 1;  // it was there before
      line_.assign(p, line_end);  // the bytes' owner may change them at any time, and the loops end at '\n' only
      line_ += '\n';
      const char *line = line_.data(), *last = line + line_.size() - 1;
      const char* token = has_fields_ ? ReadLine<true>(line, last) : ReadLine<false>(line, last);
      if (token && !skip_) {
        SetBad(line, token);
        break;
      }
      skipped += token != nullptr;
      ++lines;
      p = line_end + 1;
    }
    return p;
  }

  // The rows so far. Once all five have been released, StartRows makes way for more.
  Growing<float> labels;        // [B]
  Growing<int64_t> row_splits;  // [B + 1], from 0
  Growing<int32_t> fields;      // [nnz], or empty without fields
  Growing<int64_t> indices;     // [nnz]
  Growing<float> values;        // [nnz]
  void StartRows() { Append(0, &row_splits); }

  int64_t lines = 0;         // that were read
  int64_t skipped = 0;       // of these
  mutable std::mutex mutex;  // for callers that share a parser
  bool has_fields() const { return has_fields_; }
  const Bad* bad() const { return is_bad_ ? &bad_ : nullptr; }

 private:
  static bool IsDigit(char c) { return static_cast<unsigned char>(c - '0') < 10; }
  static bool IsSeparator(char c) { return c == ' ' || c == '\t' || c == ',' || c == '\r'; }
  static bool IsEnd(char c) { return c == '\n' || c == '#'; }

  static void Append(int64_t item, Growing<int64_t>* array) {
    *array->Room(1) = item;
    array->Add(1);
  }

  // Both return what stands behind the number, or nullptr where there is none that can be used.
  template <typename T>
  static const char* ReadInteger(const char* p, T* integer) {
    const char* first = p;
    uint64_t n = 0;
    for (; IsDigit(*p); ++p) n = n * 10 + (*p - '0');
    if (p - first > 19)  // n has wrapped, unless zeros lead
      while (p - first > 19 && *first == '0') ++first;
    if (p == first || p - first > 19 || n > static_cast<uint64_t>(std::numeric_limits<T>::max())) return nullptr;
    *integer = static_cast<T>(n);
    return p;
  }

  static const char* ReadNumber(const char* p, float* number) {
    static constexpr double kTens[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                                       1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};
    const bool negative = *p == '-';
    p += negative || *p == '+';
    uint64_t digits = 0;
    const char *begin = p, *first = p;
    for (; IsDigit(*p); ++p) digits = digits * 10 + (*p - '0');
    int64_t num_digits = p - first, exponent = 0;
    if (*p == '.') {
      const char* point = p++;
      for (; IsDigit(*p); ++p) digits = digits * 10 + (*p - '0');
      exponent = point + 1 - p;
      num_digits -= exponent;
    }
    if (num_digits == 0) return nullptr;
    if (*p == 'e' || *p == 'E') {
      ++p;
      const bool down = *p == '-';
      p += down || *p == '+';
      if (!IsDigit(*p)) return nullptr;
      int64_t written = 0;
      for (; IsDigit(*p); ++p)
        if (written < int64_t{1} << 50) written = written * 10 + (*p - '0');  // more than any line has digits
      exponent += down ? -written : written;
    }
    if (num_digits > 19)  // digits has wrapped, unless zeros lead
      for (; *first == '0' || *first == '.'; ++first) num_digits -= *first == '0';
    // The digits are rounded to a double, and so is their product with a power of ten: no more than 2^-52 off. Where
    // both ends of four times that give one float32, the nearest double, which lies between, gives it too.
    if (num_digits <= 19 && exponent >= -22 && exponent <= 22) {
      constexpr double kSlack = 1.0 / (1ull << 50);
      double x = static_cast<double>(digits);
      x = exponent < 0 ? x / kTens[-exponent] : x * kTens[exponent];
      *number = static_cast<float>(x * (1 - kSlack));
      if (*number != static_cast<float>(x * (1 + kSlack))) *number = static_cast<float>(PlainNumber(begin, p));
    } else {
      *number = static_cast<float>(PlainNumber(begin, p));
    }
    if (negative) *number = -*number;
    return std::isfinite(*number) ? p : nullptr;
  }

  // Appends the line's row, if it is one. Returns its first bad token, in which case nothing is appended, or nullptr.
  // '\n' is part of nothing, so that no loop passes line_end.
  template <bool kFields>
  const char* ReadLine(const char* p, const char* line_end) {
    while (IsSeparator(*p)) ++p;
    if (IsEnd(*p)) return nullptr;
    const char* token = p;
    p = ReadNumber(p, labels.Room(1));
    if (!p || !(IsSeparator(*p) || IsEnd(*p))) return token;
    // A separator and a pair are four bytes, and one more may turn out to be bad after it was written.
    const int64_t most = (line_end - p) / 4 + 1;
    int32_t* field = kFields ? fields.Room(most) : nullptr;
    int64_t* index = indices.Room(most);
    float* value = values.Room(most);
    int64_t n = 0;
    for (;; ++n) {
      while (IsSeparator(*p)) ++p;
      if (IsEnd(*p)) break;
      token = p;
      if (kFields) {
        p = ReadInteger(p, field + n);
        if (!p || *p++ != ':') return token;
      }
      p = ReadInteger(p, index + n);
      if (!p || *p++ != ':') return token;
      p = ReadNumber(p, value + n);
      if (!p || !(IsSeparator(*p) || IsEnd(*p))) return token;
    }
    labels.Add(1);
    if (kFields) fields.Add(n);
    indices.Add(n);
    values.Add(n);
    Append(indices.size(), &row_splits);
    return nullptr;
  }

  void SetBad(const char* line, const char* token) {
    const char* first = line;
    while (IsSeparator(*first)) ++first;
    const char* end = token;
    while (!IsSeparator(*end) && !IsEnd(*end)) ++end;
    bad_ = {lines + 1, token - line + 1, token == first, std::string(token, end)};
    is_bad_ = true;
  }

  const bool has_fields_, skip_;
  bool is_bad_ = false;
  Bad bad_;
  std::string line_;
};

// Rows of pairs. Without fields, all pairs are of field 0.
struct PairRows {
  int64_t num_rows;
  const int64_t* row_splits;  // [num_rows + 1], ascending from 0
  const int32_t* fields;      // [nnz] or nullptr
  const int64_t* indices;     // [nnz]
  const float* values;        // [nnz]

  int64_t FieldOf(int64_t pair) const { return fields ? fields[pair] : 0; }
};

// most[f]: the most pairs of field f in a row. Fields are in [0, num_fields), else returns false.
inline bool MostPairs(const PairRows& rows, int64_t num_fields, int64_t* most) {
  std::vector<int64_t> count(num_fields);
  for (int64_t f = 0; f < num_fields; ++f) most[f] = 0;
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    for (int64_t j = rows.row_splits[r]; j < rows.row_splits[r + 1]; ++j) {
      const int64_t f = rows.FieldOf(j);
      if (f < 0 || f >= num_fields) return false;
      if (++count[f] > most[f]) most[f] = count[f];
    }
    for (int64_t j = rows.row_splits[r]; j < rows.row_splits[r + 1]; ++j) count[rows.FieldOf(j)] = 0;
  }
  return true;
}

// Writes the pairs of field f, in order, into the columns from field_splits[f] of matrices [num_rows, P], where P is
// field_splits[num_fields]; what is not written stays. Returns the first row that does not fit, or -1.
inline int64_t PadRows(const PairRows& rows, int64_t num_fields, const int64_t* field_splits, int64_t* indices,
                       float* values) {
  std::vector<int64_t> next(field_splits, field_splits + num_fields);
  const int64_t width = field_splits[num_fields];
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    for (int64_t j = rows.row_splits[r]; j < rows.row_splits[r + 1]; ++j) {
      const int64_t f = rows.FieldOf(j);
      if (f < 0 || f >= num_fields || next[f] == field_splits[f + 1]) return r;
      const int64_t to = r * width + next[f]++;
      indices[to] = rows.indices[j];
      values[to] = rows.values[j];
    }
    for (int64_t j = rows.row_splits[r]; j < rows.row_splits[r + 1]; ++j) {
      const int64_t f = rows.FieldOf(j);
      next[f] = field_splits[f];
    }
  }
  return -1;
}

}  // namespace deepfm

#endif  // DEEPFM_TABLES_LIBSVM_H_
