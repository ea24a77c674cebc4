// Columns of text and vocabularies on NumPy arrays, whose memory is used where it lies. The GIL is released in loops.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <charconv>
#include <limits>
#include <memory>
#include <optional>
#include <string>

#include "../kernels/scratch.h"
#include "../tables/fingerprint.h"
#include "../tables/texts.h"
#include "../tables/vocabulary.h"
#include "release_gil.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace deepfm {
namespace {

template <typename T>
py::array_t<T> Copied(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

template <typename T>
void CheckVector(const char* name, const py::array& array, bool contiguous = true) {
  if (!py::isinstance<py::array_t<T>>(array) || array.ndim() != 1 ||
      (array.size() > 1 && (contiguous ? array.strides(0) != sizeof(T) : array.strides(0) % sizeof(T) != 0)) ||
      reinterpret_cast<uintptr_t>(array.data()) % sizeof(T))
    throw py::type_error(std::string(name) + " must be a vector of " + std::string(py::str(py::dtype::of<T>())) +
                         ", got " + std::string(py::str(array.dtype())) + " of shape " +
                         std::string(py::str(array.attr("shape"))));
}

// A column of text, and the arrays that hold it.
class Column {
 public:
  Column(const py::array& starts, const py::array& ends, const py::array& data,
         const std::optional<py::array>& validity, int64_t first_bit, bool empty_is_missing)
      : held_{starts, ends, data} {
    texts_.wide = py::isinstance<py::array_t<int64_t>>(starts);
    if (texts_.wide) {
      Fit<int64_t>(starts, ends, data);
    } else {
      Fit<int32_t>(starts, ends, data);
    }
    texts_.starts = starts.data();
    texts_.ends = ends.data();
    texts_.data = data.size() ? static_cast<const char*>(data.data()) : "";  // null would be missing
    texts_.size = data.size();
    texts_.count = starts.size();
    texts_.empty_is_missing = empty_is_missing;
    if (validity) {
      CheckVector<uint8_t>("validity", *validity);
      if (first_bit < 0 || first_bit > validity->size() * 8 - texts_.count)
        throw py::value_error("validity has not enough bits");
      held_.push_back(*validity);
      texts_.validity = static_cast<const uint8_t*>(validity->data());
      texts_.first_bit = first_bit;
    }
  }

 private:
  // Cells one after the other, to a column of its own memory; a cell that nothing was appended to is missing.
  class Packer {
   public:
    explicit Packer(py::ssize_t count) : offsets_(count + 1), validity_((count + 7) / 8) {
      offset_ = offsets_.mutable_data();
      bits_ = validity_.mutable_data();
      std::fill_n(bits_, validity_.size(), 0);
      offset_[0] = 0;
    }
    void Append(py::ssize_t i, const char* text, py::ssize_t size) {
      data_.append(text, size);
      bits_[i >> 3] |= 1 << (i & 7);
    }
    void End(py::ssize_t i) { offset_[i + 1] = static_cast<int64_t>(data_.size()); }
    std::unique_ptr<Column> Pack() const {
      const py::array_t<uint8_t> bytes(static_cast<py::ssize_t>(data_.size()),
                                       reinterpret_cast<const uint8_t*>(data_.data()));
      const py::ssize_t count = offsets_.size() - 1;
      const py::array starts(offsets_.dtype(), {count}, {sizeof(int64_t)}, offsets_.data(), offsets_);
      const py::array ends(offsets_.dtype(), {count}, {sizeof(int64_t)}, offsets_.data() + 1, offsets_);
      return std::make_unique<Column>(starts, ends, bytes, validity_, 0, false);
    }

   private:
    std::string data_;
    py::array_t<int64_t> offsets_;
    py::array_t<uint8_t> validity_;
    int64_t* offset_;
    uint8_t* bits_;
  };

 public:
  // Packs cells: str, bytes, or None, which is missing.
  static std::unique_ptr<Column> OfList(const py::list& cells) {
    const py::ssize_t count = static_cast<py::ssize_t>(cells.size());
    Packer packer(count);
    for (py::ssize_t i = 0; i < count; ++i) {
      PyObject* cell = PyList_GET_ITEM(cells.ptr(), i);
      if (cell != Py_None) {
        py::ssize_t size = 0;
        const char* text = nullptr;
        if (PyUnicode_Check(cell)) {
          text = PyUnicode_AsUTF8AndSize(cell, &size);
          if (!text) {  // surrogates, which UTF-8 has no bytes for: kept apart from every text
            PyErr_Clear();
            const py::bytes odd =
                py::reinterpret_steal<py::bytes>(PyUnicode_AsEncodedString(cell, "utf-8", "surrogatepass"));
            if (!odd) throw py::error_already_set();
            packer.Append(i, PyBytes_AS_STRING(odd.ptr()), PyBytes_GET_SIZE(odd.ptr()));
          }
        } else if (PyBytes_Check(cell)) {
          text = PyBytes_AS_STRING(cell);
          size = PyBytes_GET_SIZE(cell);
        } else {
          throw py::type_error("cell " + std::to_string(i) + " must be str, bytes or None, got " +
                               std::string(Py_TYPE(cell)->tp_name));
        }
        if (text) packer.Append(i, text, size);
      }
      packer.End(i);
    }
    return packer.Pack();
  }

  // The canonical texts of integers; `missing`, if given, says which are not there.
  static std::unique_ptr<Column> OfIntegers(const py::array_t<int64_t, py::array::c_style>& numbers,
                                            const std::optional<py::array_t<bool, py::array::c_style>>& missing) {
    if (numbers.ndim() != 1) throw py::value_error("numbers must be a vector");
    const py::ssize_t count = numbers.size();
    if (missing && missing->size() != count) throw py::value_error("missing must be as long as numbers");
    Packer packer(count);
    const int64_t* number = numbers.data();
    const bool* gone = missing ? missing->data() : nullptr;
    for (py::ssize_t i = 0; i < count; ++i) {
      if (!gone || !gone[i]) {
        char digits[24];
        const auto end = std::to_chars(digits, digits + sizeof(digits), number[i]).ptr;
        packer.Append(i, digits, end - digits);
      }
      packer.End(i);
    }
    return packer.Pack();
  }

  // (row_splits [rows + 1], the pieces as a column, weights or None, the first row whose weight is no number or -1).
  py::tuple SplitAt(const std::string& separator, bool weighted) const {
    Pieces pieces;
    {
      const ReleaseGil release;
      pieces = Split(texts_, separator, weighted);
    }
    auto column =
        std::make_unique<Column>(Copied(pieces.starts), Copied(pieces.ends), held_[2], std::nullopt, 0, false);
    py::object weights = py::none();
    if (weighted) weights = Copied(pieces.weights);
    return py::make_tuple(Copied(pieces.row_splits), std::move(column), weights, pieces.bad_row);
  }

  // (float64 [rows], NaN where a cell is missing; the first row that is no number, or -1).
  py::tuple Numbers() const {
    py::array_t<double> numbers(texts_.count);
    double* number = numbers.mutable_data();
    int64_t bad = -1;
    {
      const ReleaseGil release;
      for (int64_t i = 0; i < texts_.count; ++i) {
        const Texts::Cell cell = texts_.At(i);
        const Spelled spelled = cell.text ? ReadNumber(cell.text, cell.size, &number[i]) : Spelled::kMissing;
        if (spelled != Spelled::kNumber) number[i] = std::numeric_limits<double>::quiet_NaN();
        if (spelled == Spelled::kNoNumber && bad < 0) bad = i;
      }
    }
    return py::make_tuple(numbers, bad);
  }

  int64_t BadText() const {
    const ReleaseGil release;
    return FirstBadText(texts_, kLongestText);
  }

  py::object Cell(int64_t i) const {
    if (i < 0 || i >= texts_.count) throw py::index_error();
    const Texts::Cell cell = texts_.At(i);
    if (!cell.text) return py::none();
    return py::bytes(cell.text, cell.size);
  }

  py::array_t<int64_t> Buckets(int64_t buckets) const {
    if (buckets < 1) throw py::value_error("buckets must be at least 1, got " + std::to_string(buckets));
    py::array_t<int64_t> found(texts_.count);
    int64_t* bucket = found.mutable_data();
    const ReleaseGil release;
    for (int64_t i = 0; i < texts_.count; ++i) {
      const Texts::Cell cell = texts_.At(i);
      bucket[i] =
          cell.text ? static_cast<int64_t>(Fingerprint::Of(cell.text, cell.size) % static_cast<uint64_t>(buckets)) : -1;
    }
    return found;
  }

  const Texts& texts() const { return texts_; }
  int64_t longest() const { return longest_; }

 private:
  template <typename T>
  void Fit(const py::array& starts, const py::array& ends, const py::array& data) {
    CheckVector<T>("starts", starts);
    CheckVector<T>("ends", ends);
    CheckVector<uint8_t>("data", data);
    if (ends.size() != starts.size()) throw py::value_error("starts and ends must be equally long");
    const T *start = static_cast<const T*>(starts.data()), *end = static_cast<const T*>(ends.data());
    bool good = true;
    for (py::ssize_t i = 0; i < starts.size(); ++i) {
      good &= start[i] >= 0 && start[i] <= end[i] && end[i] <= data.size();
      longest_ = std::max<int64_t>(longest_, end[i] - start[i]);
    }
    if (!good) throw py::value_error("a cell lies outside the data");
  }

  std::vector<py::array> held_;
  Texts texts_;
  int64_t longest_ = 0;
};

class Blocks {
 public:
  Blocks(const py::array& content, const py::array& sums)
      : content_(content),
        sums_(sums),
        blocks_(static_cast<const char*>(content.data()), content.size(), static_cast<const uint64_t*>(sums.data())) {
    CheckVector<uint8_t>("content", content);
    CheckVector<uint64_t>("sums", sums);
    if (sums.size() != (content.size() + 4095) / 4096) throw py::value_error("one sum per block is needed");
  }
  int64_t FirstBad(int64_t begin, int64_t end) {
    if (begin < 0 || end > content_.size()) throw py::index_error();
    const ReleaseGil release;
    return blocks_.FirstBad(begin, end);
  }
  CheckedBlocks* get() { return &blocks_; }
  const py::array& content() const { return content_; }

 private:
  py::array content_, sums_;
  CheckedBlocks blocks_;
};

class Table {
 public:
  Table(const py::array& slots, std::shared_ptr<Blocks> blocks) : slots_(slots), blocks_(std::move(blocks)) {
    CheckVector<uint8_t>("slots", slots);
    if (slots.size() % sizeof(Slot) || slots.size() < static_cast<py::ssize_t>(sizeof(Slot)) ||
        reinterpret_cast<uintptr_t>(slots.data()) % alignof(Slot))
      throw py::value_error("slots must be whole ones of 16 bytes, aligned");
    vocabulary_.slots = static_cast<const Slot*>(slots.data());
    vocabulary_.capacity = slots.size() / static_cast<py::ssize_t>(sizeof(Slot));
    if (blocks_) {
      const char *base = static_cast<const char*>(blocks_->content().data()),
                 *here = static_cast<const char*>(slots.data());
      if (here < base || here + slots.size() > base + blocks_->content().size() || (here - base) % sizeof(Slot))
        throw py::value_error("slots must lie in the blocks, at a multiple of 16");  // each in one block
      vocabulary_.blocks = blocks_->get();
    }
  }

  // Writes the ids of cells to `ids`, and to `values` 1 where one is not 0, else 0. Returns (missing, unknown).
  py::tuple Find(uint32_t column, const Column& texts, py::array ids, std::optional<py::array> values, uint32_t unseen,
                 int threads) const {
    CheckVector<int64_t>("ids", ids, false);
    if (values) CheckVector<float>("values", *values, false);
    const int64_t count = texts.texts().count;
    if (threads < 1) throw py::value_error("threads must be at least 1, got " + std::to_string(threads));
    if (ids.size() != count || (values && values->size() != count))
      throw py::value_error("ids and values must be as long as the column");
    int64_t* id = static_cast<int64_t*>(ids.mutable_data());
    float* value = values ? static_cast<float*>(values->mutable_data()) : nullptr;
    const int64_t stride = ids.strides(0) / static_cast<py::ssize_t>(sizeof(int64_t));
    const int64_t value_stride = values ? values->strides(0) / static_cast<py::ssize_t>(sizeof(float)) : 0;
    Found found;
    {
      const ReleaseGil release;
      found = vocabulary_.Find(column, texts.texts(), unseen, id, stride, value, value_stride,
                               ThreadPool::Get().Lend(threads));
    }
    CheckDamage(found.damaged);
    return py::make_tuple(found.missing, found.unknown);
  }

  uint32_t IdOf(uint32_t column, const std::string& text) const {
    bool damaged = false;
    const uint32_t id = vocabulary_.IdOf(KeyOf(column, text.data(), static_cast<int64_t>(text.size())), &damaged);
    CheckDamage(damaged);
    return id;
  }

  static void CheckDamage(bool damaged) {
    if (damaged) throw std::runtime_error("the vocabulary's file is damaged: a block is not what its checksum says");
  }
  const Vocabulary& get() const { return vocabulary_; }

 private:
  py::array slots_;
  std::shared_ptr<Blocks> blocks_;
  Vocabulary vocabulary_;
};

// Counts the cells of a column; (missing, unknown, the first row whose text is not UTF-8 or too long, or -1).
py::tuple Count(Counter& counter, const Column& texts, const Table* known, std::optional<py::array> counts) {
  int64_t *count = nullptr, num_counts = 0;
  if (known) {
    if (!counts) throw py::type_error("counts are needed where values are known");
    CheckVector<int64_t>("counts", *counts);
    count = static_cast<int64_t*>(counts->mutable_data());
    num_counts = counts->size();
  }
  Found found;
  {
    const ReleaseGil release;
    found = counter.Add(texts.texts(), known ? &known->get() : nullptr, count, num_counts);
  }
  Table::CheckDamage(found.damaged);
  return py::make_tuple(found.missing, found.unknown, found.bad_row);
}

py::tuple Finish(const Counter& counter, uint64_t least) {
  Counter::Values values;
  {
    const ReleaseGil release;
    values = counter.Finish(least);
  }
  return py::make_tuple(Copied(values.keys), Copied(values.counts), Copied(values.text_ends),
                        py::array_t<uint8_t>(static_cast<py::ssize_t>(values.texts.size()),
                                             reinterpret_cast<const uint8_t*>(values.texts.data())));
}

// An array that nobody changes while it is sorted by: one that may be written to, or belongs to another, is copied.
template <typename T>
py::array_t<T, py::array::c_style> Steady(const py::array_t<T, py::array::c_style>& array) {
  if (!array.writeable() && array.owndata()) return array;
  return py::array_t<T, py::array::c_style>(array.size(), array.data());
}

// The slots of keys and ids, as bytes [capacity * 16].
py::array_t<uint8_t> Slots(const py::array_t<uint64_t, py::array::c_style>& keys,
                           const py::array_t<uint32_t, py::array::c_style>& ids) {
  if (keys.size() != ids.size()) throw py::value_error("keys and ids must be equally long");
  if (std::count(keys.data(), keys.data() + keys.size(), 0))
    throw py::value_error("a key of 0 is that of a missing cell");
  const int64_t capacity = CapacityFor(keys.size());
  const py::array_t<uint64_t> whole(capacity * 2);  // for its alignment
  py::array_t<uint8_t> slots({capacity * static_cast<py::ssize_t>(sizeof(Slot))}, {1},
                             reinterpret_cast<const uint8_t*>(whole.data()), whole);
  void* data = const_cast<uint8_t*>(slots.data());
  const uint64_t* key = keys.data();
  const uint32_t* id = ids.data();
  const int64_t count = keys.size();
  const ReleaseGil release;
  std::fill_n(static_cast<uint64_t*>(data), capacity * 2, 0);
  Fill(static_cast<Slot*>(data), capacity, key, id, count);
  return slots;
}

py::array_t<uint64_t> Keys(uint32_t column, const Column& texts) {
  py::array_t<uint64_t> keys(texts.texts().count);
  uint64_t* key = keys.mutable_data();
  const ReleaseGil release;
  for (int64_t i = 0; i < texts.texts().count; ++i) {
    const Texts::Cell cell = texts.texts().At(i);
    key[i] = cell.text ? KeyOf(column, cell.text, cell.size) : 0;
  }
  return keys;
}

py::array_t<int64_t> Order(py::array_t<uint64_t, py::array::c_style> counts,
                           py::array_t<uint32_t, py::array::c_style> columns,
                           py::array_t<uint64_t, py::array::c_style> keys,
                           std::optional<py::array_t<uint64_t, py::array::c_style>> text_ends,
                           py::array_t<uint8_t, py::array::c_style> texts) {
  counts = Steady(counts);
  columns = Steady(columns);
  keys = Steady(keys);
  if (text_ends) text_ends = Steady(*text_ends);
  texts = Steady(texts);
  const int64_t count = counts.size();
  bool good = columns.size() == count && keys.size() == count && (!text_ends || text_ends->size() == count);
  for (int64_t i = 0; good && text_ends && i < count; ++i)
    good = text_ends->at(i) <= static_cast<uint64_t>(texts.size()) && (!i || text_ends->at(i - 1) <= text_ends->at(i));
  if (!good) throw py::value_error("counts, columns, keys and texts do not fit");
  const uint64_t* ends = text_ends ? text_ends->data() : nullptr;
  std::vector<int64_t> order;
  {
    const ReleaseGil release;
    order =
        OrderOf(counts.data(), columns.data(), keys.data(), ends, reinterpret_cast<const char*>(texts.data()), count);
  }
  return Copied(order);
}

// Writes rows' first ids that are not 0 to the matrices [rows, size]; a value is its weight, or 1 / their number.
void FillBags(const py::array_t<int64_t, py::array::c_style>& row_splits,
              const py::array_t<int64_t, py::array::c_style>& ids,
              const std::optional<py::array_t<float, py::array::c_style>>& weights, py::array indices,
              py::array values) {
  const int aligned = py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if (!py::isinstance<py::array_t<int64_t>>(indices) || !py::isinstance<py::array_t<float>>(values) ||
      !(indices.flags() & values.flags() & aligned) || indices.ndim() != 2 || values.ndim() != 2 ||
      indices.shape(0) != row_splits.size() - 1 || values.shape(0) != indices.shape(0) ||
      values.shape(1) != indices.shape(1))
    throw py::type_error("indices and values must be int64 and float32 [rows, size]");
  const int64_t rows = row_splits.size() - 1, size = indices.shape(1);
  const std::vector<int64_t> split(row_splits.data(),
                                   row_splits.data() + row_splits.size());  // its owner may change it
  bool good = split[0] >= 0 && split[rows] <= ids.size() && (!weights || weights->size() == ids.size());
  for (int64_t row = 0; good && row < rows; ++row) good = split[row] <= split[row + 1];
  if (!good) throw py::value_error("row_splits do not fit the ids");
  auto index = indices.mutable_unchecked<int64_t, 2>();
  auto value = values.mutable_unchecked<float, 2>();
  const int64_t* id = ids.data();
  const float* weight = weights ? weights->data() : nullptr;
  const ReleaseGil release;
  for (int64_t row = 0; row < rows; ++row) {
    int64_t count = 0;
    for (int64_t i = split[row]; i < split[row + 1] && count < size; ++i) {
      if (!id[i]) continue;
      index(row, count) = id[i];
      value(row, count++) = weight ? weight[i] : 0.0f;
    }
    for (int64_t i = 0; i < size; ++i) {
      if (i >= count) index(row, i) = 0;
      if (i >= count)
        value(row, i) = 0;
      else if (!weight)
        value(row, i) = static_cast<float>(1.0 / static_cast<double>(count));
    }
  }
}

}  // namespace

// In memory that is kept for the next one when it dies: no page is faulted in afresh.
template <typename T>
py::array Uninitialized(int64_t rows, int64_t columns) {
  int64_t bytes = sizeof(T);
  if (__builtin_mul_overflow(bytes, rows, &bytes) || __builtin_mul_overflow(bytes, columns, &bytes))
    throw std::bad_alloc();
  void* data = TakeScratch(bytes);
  return py::array(py::dtype::of<T>(), {rows, columns}, static_cast<T*>(data), py::capsule(data, GiveBackScratch));
}

void BindTables(py::module_& parent) {
  using namespace pybind11::literals;
  py::module_ m = parent.def_submodule("tables", "Columns of text and vocabularies; csrc/tables is their contract.");
  const auto none = py::none();
  m.attr("LONGEST_TEXT") = kLongestText;
  py::class_<Column>(m, "Column")
      .def(py::init<py::array, py::array, py::array, std::optional<py::array>, int64_t, bool>(), "starts"_a, "ends"_a,
           "data"_a, "validity"_a = none, "first_bit"_a = 0, "empty_is_missing"_a = false)
      .def_static("of_list", &Column::OfList, "cells"_a)
      .def_static("of_integers", &Column::OfIntegers, "numbers"_a, "missing"_a = none)
      .def("split", &Column::SplitAt, "separator"_a, "weighted"_a = false)
      .def("numbers", &Column::Numbers)
      .def("buckets", &Column::Buckets, "buckets"_a)
      .def("first_bad", &Column::BadText)
      .def_property_readonly("longest", &Column::longest)
      .def("__getitem__", &Column::Cell)
      .def("__len__", [](const Column& column) { return column.texts().count; });
  py::class_<Blocks, std::shared_ptr<Blocks>>(m, "Blocks")
      .def(py::init<py::array, py::array>(), "content"_a, "sums"_a)
      .def("first_bad", &Blocks::FirstBad, "begin"_a, "end"_a);
  py::class_<Table>(m, "Table")
      .def(py::init<py::array, std::shared_ptr<Blocks>>(), "slots"_a, "blocks"_a = nullptr)
      .def("find", &Table::Find, "column"_a, "texts"_a, "ids"_a, "values"_a = none, "unseen"_a = 0, "threads"_a = 1)
      .def("id", &Table::IdOf, "column"_a, "text"_a);
  py::class_<Sketch>(m, "Sketch").def(py::init<int64_t>(), "bytes"_a);
  py::class_<Counter>(m, "Counter")
      .def(py::init<uint32_t, bool, Sketch*, uint32_t>(), "column"_a, "keep_texts"_a = true, "sketch"_a = nullptr,
           "least"_a = 1, py::keep_alive<1, 4>())
      .def("add", &Count, "texts"_a, "known"_a = nullptr, "counts"_a = none)
      .def("finish", &Finish, "least"_a = 1)
      .def_property_readonly("nbytes", &Counter::Bytes)
      .def_property_readonly("total", &Counter::total)
      .def("__len__", &Counter::size);
  m.def(
      "matrices",
      [](int64_t rows, int64_t columns) {
        if (rows < 0 || columns < 0) throw py::value_error("rows and columns must not be negative");
        return py::make_tuple(Uninitialized<int64_t>(rows, columns), Uninitialized<float>(rows, columns));
      },
      "rows"_a, "columns"_a,
      "(int64, float32) [rows, columns], uninitialized and aligned to a cache line: TensorFlow uses such an array "
      "where it "
      "lies, and copies others.");
  m.def(
      "is_utf8",
      [](const py::bytes& content) {
        return IsUtf8(PyBytes_AS_STRING(content.ptr()), PyBytes_GET_SIZE(content.ptr()));
      },
      "content"_a, "Whether bytes are UTF-8.");
  m.def("slots", &Slots, "keys"_a, "ids"_a);
  m.def("keys", &Keys, "column"_a, "texts"_a);
  m.def("order", &Order, "counts"_a, "columns"_a, "keys"_a, "text_ends"_a, "texts"_a);
  m.def("fill_bags", &FillBags, "row_splits"_a, "ids"_a, "weights"_a, "indices"_a, "values"_a);
  m.def(
      "sums",
      [](const py::array& content) {
        CheckVector<uint8_t>("content", content);
        std::vector<uint64_t> sums;
        {
          const ReleaseGil release;
          sums = CheckedBlocks::Sums(static_cast<const char*>(content.data()), content.size());
        }
        return Copied(sums);
      },
      "content"_a, "uint64 [blocks]: the checksums of the blocks of 4 KiB.");
}

}  // namespace deepfm
