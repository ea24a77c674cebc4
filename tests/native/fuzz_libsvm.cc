// Drives the libsvm and libffm parser over damaged text, for sanitizers: fuzz_libsvm [cases] [seed].
// Text and results lie on the heap, with nothing behind. What the rows are is checked from Python (tests/data).
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/tables/libsvm.h"

namespace deepfm {
namespace {

std::mt19937_64 rng;
int64_t Uniform(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }
bool Chance(int percent) { return Uniform(0, 99) < percent; }

#define EXPECT(condition)                                                                   \
  if (!(condition)) {                                                                       \
    std::printf("FAILED: " #condition " for fields %d, text:\n%s\n", fields, text.c_str()); \
    std::exit(1);                                                                           \
  }

std::string Digits(int64_t most) {
  std::string text;
  for (int64_t n = Uniform(1, most); n > 0; --n) text += static_cast<char>('0' + Uniform(0, 9));
  return text;
}

std::string Number() {
  std::string text = Chance(20) ? (Chance(50) ? "-" : "+") : "";
  text += Digits(Chance(5) ? 60 : 4);
  if (Chance(40)) text += "." + Digits(Chance(10) ? 60 : 8);
  if (Chance(10)) text += (Chance(50) ? "e" : "E-") + Digits(2);
  return text;
}

std::string Line(bool fields) {
  if (Chance(5)) return Chance(50) ? "\n" : "# comment\n";
  std::string text = Number();
  for (int64_t n = Uniform(0, 6); n > 0; --n) {
    text += " \t,"[Uniform(0, 2)];
    if (fields) text += std::to_string(Uniform(0, 5)) + ":";
    text += Digits(Chance(5) ? 40 : 7) + ":" + Number();
  }
  return text + (Chance(10) ? "\r" : "") + "\n";
}

std::string Text(bool fields) {
  static const char kMarks[] = "0123456789:::.-+eE ,\t\r\n#q\0\xff";
  std::string text;
  for (int64_t n = Uniform(1, 12); n > 0; --n) text += Line(fields);
  for (int64_t n = Chance(70) ? Uniform(0, 8) : 0; n > 0; --n) {
    const int64_t at = Uniform(0, text.size() - 1);
    const char mark = kMarks[Uniform(0, sizeof(kMarks) - 2)];
    if (Chance(40))
      text[at] = mark;
    else if (Chance(50))
      text.insert(at, 1, mark);
    else if (text.size() > 1)
      text.erase(at, Uniform(1, 3));
    if (text.empty()) text = "\n";
  }
  if (text.back() != '\n') text += '\n';
  return text;
}

struct Rows {
  std::vector<float> labels, values;
  std::vector<int64_t> row_splits, indices;
  std::vector<int32_t> fields;
  int64_t lines = 0, skipped = 0;
  bool operator==(const Rows& other) const {
    return labels == other.labels && values == other.values && row_splits == other.row_splits &&
           indices == other.indices && fields == other.fields && lines == other.lines && skipped == other.skipped;
  }
};

template <typename T>
void Move(Growing<T>* from, std::vector<T>* to, T shift = 0) {
  const int64_t size = from->size();
  T* data = from->Release();
  for (int64_t i = 0; i < size; ++i) to->push_back(data[i] + shift);
  std::free(data);
}

// Parses lines of a buffer of exactly their size, and takes the rows every `chunk` of them.
Rows Parse(const std::string& text, bool fields, bool skip, int64_t chunk) {
  const std::unique_ptr<char[]> buffer(new char[text.size()]);
  std::copy(text.begin(), text.end(), buffer.get());
  LibsvmParser parser(fields, skip);
  Rows rows;
  rows.row_splits = {0};
  const char *p = buffer.get(), *end = p + text.size();
  for (;;) {
    p = parser.Parse(p, end, chunk);
    EXPECT(parser.labels.size() <= chunk && parser.row_splits.size() == parser.labels.size() + 1);
    EXPECT(parser.fields.size() == (fields ? parser.indices.size() : 0));
    EXPECT(parser.values.size() == parser.indices.size());
    const int64_t before = rows.indices.size();
    rows.row_splits.pop_back();
    Move(&parser.labels, &rows.labels);
    Move(&parser.row_splits, &rows.row_splits, before);
    Move(&parser.fields, &rows.fields);
    Move(&parser.indices, &rows.indices);
    Move(&parser.values, &rows.values);
    parser.StartRows();
    if (p == end || parser.bad()) break;
  }
  rows.lines = parser.lines;
  rows.skipped = parser.skipped;
  EXPECT(rows.lines == std::count(text.begin(), text.end() - (end - p), '\n'));
  if (const LibsvmParser::Bad* bad = parser.bad()) {
    EXPECT(!skip && bad->line == rows.lines + 1 && bad->column >= 1 && !bad->token.empty());
    EXPECT(std::equal(bad->token.begin(), bad->token.end(), p + bad->column - 1));
  }
  EXPECT(skip || rows.skipped == 0);
  return rows;
}

void Pad(const std::string& text, const Rows& rows, bool fields) {
  const int64_t num_rows = rows.labels.size();
  const int64_t num_fields = fields ? Uniform(1, 7) : 1;
  const PairRows pairs{num_rows, rows.row_splits.data(), fields ? rows.fields.data() : nullptr, rows.indices.data(),
                       rows.values.data()};
  std::vector<int64_t> most(num_fields), splits = {0};
  const bool known = MostPairs(pairs, num_fields, most.data());
  for (int64_t f = 0; f < num_fields; ++f)
    splits.push_back(splits.back() + (Chance(90) || !most[f] ? most[f] : most[f] - 1));
  std::vector<int64_t> indices(num_rows * splits.back());
  std::vector<float> values(num_rows * splits.back());
  const int64_t bad = PadRows(pairs, num_fields, splits.data(), indices.data(), values.data());
  bool enough = known;
  for (int64_t f = 0; f < num_fields; ++f) enough = enough && splits[f + 1] - splits[f] == most[f];
  EXPECT(bad >= -1 && bad < num_rows && (bad == -1) == enough);
}

void Run(int64_t cases) {
  for (int64_t i = 0; i < cases; ++i) {
    const bool fields = Chance(50);
    const std::string text = Text(fields);
    for (const bool skip : {false, true}) {
      const Rows whole = Parse(text, fields, skip, int64_t{1} << 60);
      EXPECT(whole == Parse(text, fields, skip, Uniform(1, 3)));
      Pad(text, whole, fields);
    }
    Parse(text, !fields, Chance(50), 5);
  }
  std::printf("%lld cases\n", static_cast<long long>(cases));
}

}  // namespace
}  // namespace deepfm

int main(int argc, char** argv) {
  deepfm::rng.seed(argc > 2 ? std::atoll(argv[2]) : 1);
  deepfm::Run(argc > 1 ? std::atoll(argv[1]) : 20000);
}
