// Drives the columns of text and the vocabulary's table over random cells, for sanitizers: fuzz_tables [cases] [seed].
// Every case is checked against the standard library, and arrays end where their last item does.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "../../csrc/python/thread_pool.h"
#include "../../csrc/tables/texts.h"
#include "../../csrc/tables/vocabulary.h"
#include "fuzz.h"

namespace deepfm {
namespace {

std::string RandomText(const std::string& alphabet, int64_t longest) {
  std::string text(Uniform(0, longest), 0);
  for (char& c : text) c = alphabet.empty() ? Uniform(0, 255) : alphabet[Uniform(0, alphabet.size() - 1)];
  return text;
}

// Heap memory of exactly n items.
template <typename T>
std::unique_ptr<T[]> Exactly(const T* data, int64_t n) {
  std::unique_ptr<T[]> copy(new T[n]);
  std::copy_n(data, n, copy.get());
  return copy;
}

// A column and what it holds, in Arrow's form or scattered.
struct Column {
  std::vector<std::string> cells;
  std::vector<char> is_there;
  std::unique_ptr<char[]> data;
  std::unique_ptr<uint8_t[]> validity;
  std::unique_ptr<int32_t[]> narrow;
  std::unique_ptr<int64_t[]> wide;
  Texts texts;

  Column(const std::vector<std::string>& some, int missing_percent) : cells(some) {
    const int64_t count = static_cast<int64_t>(cells.size());
    std::string joined = RandomText("x", 5);
    std::vector<int64_t> offsets = {static_cast<int64_t>(joined.size())};
    texts.empty_is_missing = Chance(20);
    texts.first_bit = Uniform(0, 20);
    std::vector<uint8_t> bits((texts.first_bit + count + 7) / 8);
    for (int64_t i = 0; i < count; ++i) {
      const bool there = !Chance(missing_percent);
      if (there) bits[(texts.first_bit + i) / 8] |= 1 << (texts.first_bit + i) % 8;
      joined += cells[i];
      offsets.push_back(static_cast<int64_t>(joined.size()));
      is_there.push_back((there || missing_percent == 0) && !(cells[i].empty() && texts.empty_is_missing));
    }
    data = Exactly(joined.data(), joined.size());
    texts.data = data.get();
    texts.size = static_cast<int64_t>(joined.size());
    if (missing_percent) {
      validity = Exactly(bits.data(), bits.size());
      texts.validity = validity.get();
    }
    texts.count = count;
    texts.wide = Chance(50);
    if (texts.wide) {
      wide = Exactly(offsets.data(), offsets.size());
      texts.starts = wide.get();
      texts.ends = wide.get() + 1;
    } else {
      const std::vector<int32_t> small(offsets.begin(), offsets.end());
      narrow = Exactly(small.data(), small.size());
      texts.starts = narrow.get();
      texts.ends = narrow.get() + 1;
    }
  }
};

bool IsBlank(char c) { return std::strchr(" \t\n\v\f\r", c) && c; }

bool NaiveUtf8(const std::string& text) {
  for (size_t i = 0; i < text.size();) {
    const auto byte = [&](size_t j) { return j < text.size() ? static_cast<unsigned char>(text[j]) : 0u; };
    const uint32_t c = byte(i);
    const int more = c < 0x80 ? 0 : c >> 5 == 6 ? 1 : c >> 4 == 14 ? 2 : c >> 3 == 30 ? 3 : -1;
    if (more < 0) return false;
    uint32_t point = more == 0 ? c : c & (0x3f >> more);
    for (int j = 1; j <= more; ++j) {
      if (byte(i + j) >> 6 != 2) return false;
      point = point << 6 | (byte(i + j) & 0x3f);
    }
    const uint32_t least[] = {0, 0x80, 0x800, 0x10000};
    if (point < least[more] || point > 0x10ffff || (point >= 0xd800 && point < 0xe000)) return false;
    i += more + 1;
  }
  return true;
}

// Characters with first bytes, and others, next to what is allowed.
std::string NearlyUtf8() {
  std::string text = RandomText("a", 9);
  for (int64_t i = Uniform(1, 3); i > 0; --i) {
    const uint32_t first =
        std::vector<uint32_t>{0xc1, 0xc2, 0xe0, 0xe1, 0xed, 0xef, 0xf0, 0xf1, 0xf4, 0xf5}[Uniform(0, 9)];
    text += static_cast<char>(first);
    for (int64_t more = (first >= 0xe0) + (first >= 0xf0) + 1 - Chance(3); more > 0; --more)
      text += "\x80\x8f\x90\x9f\xa0\xbf"[Uniform(0, 5)];
  }
  return text;
}

// Random bytes as numbers, UTF-8 and lists.
void BytesCase(const char* where) {
  static const char* const kAlphabets[] = {"", "0123456789.-+eE", "nNaAfFiItTyY()_+- ", "019. \t-+e_x\xff",
                                           "ab|: \t|:1.5"};
  const int64_t kind = Uniform(0, 5);
  const std::string text = kind == 5 ? NearlyUtf8() : RandomText(kAlphabets[kind], Chance(5) ? 900 : 14);
  const auto exact = Exactly(text.data(), text.size());
  const int64_t size = static_cast<int64_t>(text.size());

  double number = 77;
  const Spelled spelled = ReadNumber(exact.get(), size, &number);
  const auto first = std::find_if_not(text.begin(), text.end(), IsBlank);
  const std::string word(first, std::max(first, std::find_if_not(text.rbegin(), text.rend(), IsBlank).base()));
  char* stop = nullptr;
  const double expected = std::strtod(word.c_str(), &stop);
  const std::set<std::string> marks = {"", "NA", "N/A", "NaN", "nan", "NULL", "null", "None", "\\N", "-"};
  // strtod knows hexadecimal numbers too.
  const bool is_number = !word.empty() && stop == word.c_str() + word.size() && word.find_first_of("xX") == word.npos;
  const Spelled right = marks.count(word) || (is_number && std::isnan(expected)) ? Spelled::kMissing
                        : is_number                                              ? Spelled::kNumber
                                                                                 : Spelled::kNoNumber;
  EXPECT(spelled == right, "%d for '%s'", static_cast<int>(spelled), word.c_str());
  const double written = right == Spelled::kNumber ? expected : 77;
  EXPECT(std::memcmp(&number, &written, 8) == 0, "%g for '%s'", number, word.c_str());

  EXPECT(IsUtf8(exact.get(), size) == NaiveUtf8(text), "%ld bytes", long(size));

  static const char* const kSeparators[] = {"", "|", "||", ":", "a|b"};
  const std::string separator = kSeparators[Uniform(0, 4)];
  const bool weighted = Chance(50);
  const Column column({text, RandomText("ab|: \t|:1.5", 20), text}, Chance(50) ? 30 : 0);
  const Pieces pieces = Split(column.texts, separator, weighted);
  std::vector<std::string> names;
  std::vector<float> weights;
  int64_t bad_row = -1;
  for (int64_t row = 0; row < 3; ++row) {
    EXPECT(pieces.row_splits[row] == static_cast<int64_t>(names.size()), "row %ld", long(row));
    std::string rest = column.is_there[row] ? column.cells[row] : "";
    if (separator.empty()) std::replace_if(rest.begin(), rest.end(), IsBlank, ' ');
    const std::string by = separator.empty() ? " " : separator;
    while (!rest.empty()) {
      const size_t at = rest.find(by);
      std::string name = rest.substr(0, at);
      rest = at == rest.npos ? "" : rest.substr(at + by.size());
      double weight = 1;
      const size_t colon = name.rfind(':');
      if (weighted && colon != name.npos) {
        const Spelled spelled = ReadNumber(&name[colon + 1], name.size() - colon - 1, &weight);
        if (spelled != Spelled::kNumber || std::abs(weight) > 4294967296.0) {
          weight = 1;
          if (bad_row < 0) bad_row = row;
        }
        name.resize(colon);
      }
      if (name.empty()) continue;
      names.push_back(name);
      weights.push_back(static_cast<float>(weight));
    }
  }
  EXPECT(pieces.row_splits.size() == 4 && pieces.row_splits[3] == static_cast<int64_t>(names.size()), "%s",
         separator.c_str());
  EXPECT(pieces.bad_row == bad_row && pieces.starts.size() == names.size(), "%ld", long(pieces.bad_row));
  EXPECT(weighted ? pieces.weights == weights : pieces.weights.empty(), "%s", separator.c_str());
  for (size_t i = 0; i < names.size(); ++i)
    EXPECT(names[i] == std::string(column.data.get() + pieces.starts[i], column.data.get() + pieces.ends[i]), "%zu", i);
}

typedef std::map<std::string, uint64_t> Counts;

// Two columns through all of it: counted, ordered, put into slots, found, and counted with what is known.
void TableCase(const char* where, bool large, const Parallel& parallel) {
  std::vector<std::string> values;
  const int64_t num_values = large ? 3000 : Uniform(1, Chance(10) ? 300 : 20);
  const bool long_texts = !large && Chance(1);  // of several pieces of a counter's memory
  for (int64_t i = 0; i < num_values; ++i) {
    if (long_texts)
      values.push_back(std::string(Uniform(0, kLongestText), static_cast<char>('a' + i % 26)));
    else if (Chance(80) || large)
      values.push_back(RandomText("ab", 9));
    else if (Chance(98))
      values.push_back(RandomText("abcd", 100) + (Chance(5) ? "\xff" : ""));
    else
      values.push_back(std::string(kLongestText + Uniform(-1, 1), 'x'));
  }
  struct Value {
    int64_t count;
    uint32_t column;
    std::string text;
    uint64_t key;
  };
  const bool with_texts = Chance(80);
  const uint64_t least = Uniform(1, 3);
  std::vector<Column> columns;
  std::vector<Value> kept;
  std::vector<uint64_t> counts, keys, text_ends;
  std::vector<uint32_t> numbers;
  std::string texts;
  for (uint32_t number = 1; number <= 2; ++number) {
    std::vector<std::string> cells(large ? 60000 : Uniform(0, 100));
    for (std::string& cell : cells) cell = values[Uniform(0, Uniform(0, num_values - 1))];
    columns.emplace_back(cells, Chance(50) ? 20 : 0);
    const Column& column = columns.back();
    Counter counter(number, with_texts, nullptr, 1);
    Counts expected;
    int64_t missing = 0, bad_row = -1, total = 0;
    for (size_t i = 0; i < cells.size() && bad_row < 0; ++i) {
      if (column.is_there[i]) {
        ++total;
        if (cells[i].size() > kLongestText || !NaiveUtf8(cells[i]))
          bad_row = i;
        else
          ++expected[cells[i]];
      } else {
        ++missing;
      }
    }
    EXPECT(FirstBadText(column.texts, kLongestText) == bad_row, "column %u", number);
    const Found found = counter.Add(column.texts, nullptr, nullptr, 0);
    EXPECT(found.missing == missing && found.unknown == total && found.bad_row == bad_row, "column %u", number);
    EXPECT(counter.total() == total && counter.size() == static_cast<int64_t>(expected.size()), "column %u", number);
    const Counter::Values values_found = counter.Finish(least);
    EXPECT(values_found.text_ends.size() == (with_texts ? values_found.keys.size() : 0), "column %u", number);
    std::map<uint64_t, std::string> text_of;
    size_t frequent = 0;
    for (const auto& [text, count] : expected) {
      text_of[KeyOf(number, text.data(), text.size())] = text;
      frequent += count >= least;
    }
    EXPECT(frequent == values_found.keys.size(), "%zu, %zu", frequent, values_found.keys.size());
    for (size_t i = 0; i < values_found.keys.size(); ++i) {
      const std::string& text = text_of.at(values_found.keys[i]);
      EXPECT(values_found.counts[i] == expected[text], "column %u", number);
      if (with_texts) {
        const uint64_t start = i ? values_found.text_ends[i - 1] : 0;
        EXPECT(text == values_found.texts.substr(start, values_found.text_ends[i] - start), "%s", text.c_str());
        texts += text;
        text_ends.push_back(texts.size());
      }
      kept.push_back({-static_cast<int64_t>(expected[text]), number, with_texts ? text : "", values_found.keys[i]});
      keys.push_back(values_found.keys[i]);
      counts.push_back(values_found.counts[i]);
      numbers.push_back(number);
    }
  }

  const int64_t size = static_cast<int64_t>(keys.size());
  const auto exact = Exactly(texts.data(), texts.size());
  const std::vector<int64_t> order =
      OrderOf(counts.data(), numbers.data(), keys.data(), with_texts ? text_ends.data() : nullptr, exact.get(), size);
  std::vector<int64_t> sorted(size);
  for (int64_t i = 0; i < size; ++i) sorted[i] = i;
  std::sort(sorted.begin(), sorted.end(), [&](int64_t a, int64_t b) {
    const auto of = [&](int64_t i) {
      return std::make_tuple(kept[i].count, kept[i].column, std::cref(kept[i].text), with_texts ? 0 : kept[i].key);
    };
    return of(a) < of(b);
  });
  EXPECT(order == sorted, "%ld values", long(size));

  std::map<uint64_t, uint32_t> ids;
  std::vector<uint64_t> keys_in_order;
  std::vector<uint32_t> ids_in_order;
  for (int64_t i : order) {
    keys_in_order.push_back(keys[i]);
    ids_in_order.push_back(ids[keys[i]] = static_cast<uint32_t>(ids.size()) + 1);
  }
  // All slots but one taken, at times.
  const int64_t capacity = Chance(30) ? size + 1 : CapacityFor(size);
  std::unique_ptr<Slot[]> slots(new Slot[capacity]());
  Fill(slots.get(), capacity, keys_in_order.data(), ids_in_order.data(), size);
  const int64_t bytes = capacity * static_cast<int64_t>(sizeof(Slot));
  char* raw = reinterpret_cast<char*>(slots.get());
  const std::vector<uint64_t> sums = CheckedBlocks::Sums(raw, bytes);
  CheckedBlocks blocks(raw, bytes, sums.data());
  const bool damaged = Chance(20);
  if (damaged) raw[Uniform(0, bytes - 1)] ^= 1 << Uniform(0, 7);
  Vocabulary vocabulary{slots.get(), capacity, damaged || Chance(50) ? &blocks : nullptr};
  for (uint32_t number = 1; number <= 2; ++number) {
    const Column& column = columns[number - 1];
    const int64_t count = column.texts.count, stride = Uniform(1, 3), value_stride = Uniform(1, 3);
    std::unique_ptr<int64_t[]> found_ids(new int64_t[count * stride + 1]);
    std::unique_ptr<float[]> found_values(new float[count * value_stride + 1]);
    std::fill_n(found_ids.get(), count * stride + 1, -7);
    const uint32_t unseen = Uniform(0, 1) * 9999;
    float* values_to = Chance(50) ? found_values.get() : nullptr;
    const bool backwards = count > 0 && Chance(20);
    const Found found =
        vocabulary.Find(number, column.texts, unseen, found_ids.get() + (backwards ? (count - 1) * stride : 0),
                        backwards ? -stride : stride, values_to, value_stride, parallel);
    EXPECT(damaged || !found.damaged, "column %u", number);
    if (found.damaged) continue;
    int64_t missing = 0, unknown = 0;
    for (int64_t i = 0; i < count; ++i) {
      uint32_t id = 0;
      if (column.is_there[i]) {
        const auto known = ids.find(KeyOf(number, column.cells[i].data(), column.cells[i].size()));
        unknown += known == ids.end();
        id = known == ids.end() ? unseen : known->second;
      } else {
        ++missing;
      }
      const int64_t at = (backwards ? count - 1 - i : i) * stride;
      EXPECT(found_ids[at] == id, "row %ld: %ld, not %u", long(i), long(found_ids[at]), id);
      for (int64_t j = 1; j < stride; ++j) EXPECT(found_ids[at + j] == -7, "row %ld", long(i));
      EXPECT(!values_to || values_to[i * value_stride] == (id != 0), "row %ld", long(i));
    }
    EXPECT(found.missing == missing && found.unknown == unknown, "column %u", number);
    if (damaged) continue;

    std::unique_ptr<int64_t[]> again(new int64_t[size + 1]());
    Counter counter(number, with_texts, nullptr, 1);
    const Found added = counter.Add(column.texts, &vocabulary, again.get(), size + 1);
    if (added.bad_row < 0) {
      EXPECT(added.missing == missing && added.unknown == unknown && counter.total() == unknown, "column %u", number);
      for (int64_t i = 0; i < size; ++i)
        EXPECT(numbers[order[i]] != number || again[i + 1] == static_cast<int64_t>(counts[order[i]]), "%ld", long(i));
    }
  }
}

// What a sketch lets pass was seen so often, or more; many threads share it.
void SketchCase(const char* where, const Parallel& parallel) {
  Sketch sketch(Uniform(-5, 300));
  const uint32_t least = static_cast<uint32_t>(Chance(10) ? Uniform(250, 400) : Uniform(1, 9));
  std::vector<std::string> cells(Uniform(0, 2000));
  Counts expected;
  for (std::string& cell : cells) ++expected[cell = std::to_string(Uniform(0, Uniform(0, 300)))];
  const Column column(cells, 0);
  std::vector<std::unique_ptr<Counter>> counters;
  for (uint32_t i = 0; i < 3; ++i) counters.emplace_back(new Counter(i, true, &sketch, least));
  parallel.Run(6, [&](int64_t i) { counters[i / 2]->Add(column.texts, nullptr, nullptr, 0); });
  for (uint32_t i = 0; i < 3; ++i) {
    std::map<uint64_t, uint64_t> found;
    const Counter::Values values = counters[i]->Finish(1);
    for (size_t j = 0; j < values.keys.size(); ++j) found[values.keys[j]] = values.counts[j];
    for (const auto& [text, count] : expected)
      if (2 * count >= least)
        EXPECT(found[KeyOf(i, text.data(), text.size())] >= 2 * count, "%s of column %u", text.c_str(), i);
  }
}

// Every flipped bit is found, in its block; slots of which none is empty end a search.
void BlocksCase(const char* where, const Parallel& parallel) {
  std::string content = RandomText("", Chance(50) ? 20000 : 200);
  const int64_t size = static_cast<int64_t>(content.size()), block = int64_t{1} << CheckedBlocks::kBits;
  if (Chance(30)) content.resize(size / block * block);
  const auto data = Exactly(content.data(), content.size());
  const int64_t n = static_cast<int64_t>(content.size());
  const std::vector<uint64_t> sums = CheckedBlocks::Sums(data.get(), n);
  CheckedBlocks good(data.get(), n, sums.data());
  parallel.Run(4, [&](int64_t) { EXPECT(good.FirstBad(0, n) == -1, "%ld bytes", long(n)); });
  if (n) {
    const int64_t at = Uniform(0, n - 1);
    data[at] ^= 1 << Uniform(0, 7);
    CheckedBlocks bad(data.get(), n, sums.data());
    EXPECT(bad.FirstBad(0, n) == at / block * block, "byte %ld of %ld", long(at), long(n));
    EXPECT(!bad.Good(&data[at]) && bad.FirstBad(0, at / block * block) == -1, "byte %ld of %ld", long(at), long(n));
  }
  std::vector<Slot> full(Uniform(1, 20));
  for (Slot& slot : full) slot = {rng() | 1, 5, 0};
  const Vocabulary foreign{full.data(), static_cast<int64_t>(full.size()), nullptr};
  bool damaged = false;
  EXPECT(foreign.IdOf(full[0].key, &damaged) == 5 && foreign.IdOf(rng() & ~uint64_t{1}, &damaged) == 0, "%zu",
         full.size());
}

}  // namespace
}  // namespace deepfm

int main(int argc, char** argv) {
  using namespace deepfm;
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 10000;
  rng.seed(argc > 2 ? std::atoll(argv[2]) : 1);
  for (int64_t i = 0; i < cases; ++i) {
    const std::string name = "case " + std::to_string(i);
    const char* where = name.c_str();
    const Parallel parallel = ThreadPool::Get().Lend(static_cast<int>(1 + i % 3));
    if (i % 10 == 0)
      TableCase(where, i % 2000 == 10, parallel);
    else if (i % 100 == 1)
      SketchCase(where, parallel);
    else if (i % 100 == 2)
      BlocksCase(where, parallel);
    else
      BytesCase(where);
  }
  std::printf("fuzz_tables: %ld passed, 0 failed\n", long(cases));
  return 0;
}
