#include "texts.h"

#include <charconv>
#include <cmath>
#include <cstring>
#include <string_view>

#include "plain_number.h"

namespace deepfm {
namespace {

constexpr double kLargestWeight = 4294967296.0;  // as of every number: features/cells.py says why

bool IsBlank(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

// Most numbers of a log are short and have no exponent: digits that fit a double exactly are one division away.
bool ReadShort(const char* p, const char* end, double* number) {
  static const double kTens[] = {1, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15};
  const bool negative = *p == '-';
  p += negative;
  if (end - p > 16 || p == end) return false;  // 15 digits and a point
  uint64_t digits = 0;
  int count = 0, decimals = 0;
  bool point = false;
  for (; p < end; ++p) {
    if (static_cast<unsigned char>(*p - '0') < 10) {
      digits = digits * 10 + static_cast<uint64_t>(*p - '0');
      ++count;
      decimals += point;
    } else if (*p == '.' && !point) {
      point = true;
    } else {
      return false;
    }
  }
  if (count == 0 || count > 15) return false;
  *number = static_cast<double>(digits) / kTens[decimals];
  if (negative) *number = -*number;
  return true;
}

}  // namespace

Pieces Split(const Texts& texts, const std::string& separator, bool weighted) {
  Pieces found;
  found.row_splits.reserve(texts.count + 1);
  found.row_splits.push_back(0);
  for (int64_t row = 0; row < texts.count; ++row) {
    const Texts::Cell cell = texts.At(row);
    const char *p = cell.text, *end = p + cell.size;
    while (p && p < end) {
      const char *stop, *next;
      if (separator.empty()) {
        while (p < end && IsBlank(*p)) ++p;
        for (stop = p; stop < end && !IsBlank(*stop);) ++stop;
        next = stop;
      } else {
        const size_t at = std::string_view(p, end - p).find(separator);
        stop = at == std::string_view::npos ? end : p + at;
        next = at == std::string_view::npos ? end : stop + separator.size();
      }
      const char* last = stop;
      if (weighted) {
        double weight = 1;
        for (const char* colon = stop; colon-- > p;) {
          if (*colon != ':') continue;
          if (ReadNumber(colon + 1, stop - colon - 1, &weight) != Spelled::kNumber ||
              std::abs(weight) > kLargestWeight) {
            weight = 1;
            if (found.bad_row < 0) found.bad_row = row;
          }
          last = colon;
          break;
        }
        if (last > p) found.weights.push_back(static_cast<float>(weight));
      }
      if (last > p) {
        found.starts.push_back(p - texts.data);
        found.ends.push_back(last - texts.data);
      }
      p = next;
    }
    found.row_splits.push_back(static_cast<int64_t>(found.starts.size()));
  }
  return found;
}

Spelled ReadNumber(const char* text, int64_t size, double* number) {
  const char *p = text, *end = text + size;
  while (p < end && IsBlank(*p)) ++p;
  while (p < end && IsBlank(end[-1])) --end;
  if (p == end) return Spelled::kMissing;
  if (ReadShort(p, end, number)) return Spelled::kNumber;
  const std::string_view word(p, end - p);
  for (const char* mark : {"NA", "N/A", "NaN", "nan", "NULL", "null", "None", "\\N", "-"})
    if (word == mark) return Spelled::kMissing;
  if (*p == '+' && end - p > 1 && p[1] != '-') ++p;
  double read = 0;
  const auto [stop, error] = std::from_chars(p, end, read);
  if (stop != end) return Spelled::kNoNumber;
  if (error == std::errc::result_out_of_range) {  // zero or infinity; the process's locale may not know the point
    read = PlainNumber(p, end);
  } else if (error != std::errc()) {
    return Spelled::kNoNumber;
  }
  if (std::isnan(read)) return Spelled::kMissing;
  *number = read;
  return Spelled::kNumber;
}

bool IsUtf8(const char* text, int64_t size) {
  const unsigned char *p = reinterpret_cast<const unsigned char*>(text), *end = p + size;
  while (p < end) {
    if (end - p >= 8) {
      uint64_t word;
      std::memcpy(&word, p, 8);
      if (!(word & 0x8080808080808080u)) {
        p += 8;
        continue;
      }
    }
    const unsigned char c = *p++;
    if (c < 0x80) continue;
    const int more = c >= 0xf0 ? 3 : c >= 0xe0 ? 2 : 1;
    if (c < 0xc2 || c > 0xf4 || end - p < more) return false;
    // The second byte excludes what is written too long, surrogates, and what is beyond U+10FFFF.
    const unsigned char low = c == 0xe0   ? 0xa0
                              : c == 0xf0 ? 0x90
                                          : 0x80,
                        high = c == 0xed   ? 0x9f
                               : c == 0xf4 ? 0x8f
                                           : 0xbf;
    if (p[0] < low || p[0] > high) return false;
    for (int i = 1; i < more; ++i)
      if ((p[i] & 0xc0) != 0x80) return false;
    p += more;
  }
  return true;
}

int64_t FirstBadText(const Texts& texts, int64_t longest) {
  for (int64_t i = 0; i < texts.count; ++i) {
    const Texts::Cell cell = texts.At(i);
    if (cell.text && (cell.size > longest || !IsUtf8(cell.text, cell.size))) return i;
  }
  return -1;
}

}  // namespace deepfm
