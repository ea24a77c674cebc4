// The reader of libsvm and libffm lines on Python's buffers and NumPy arrays. deepfm_ops/data/libsvm.py is its user,
// and deepfm_ops/data/libsvm_python.py the same in Python.
#include "../tables/libsvm.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "release_gil.h"

namespace py = pybind11;

namespace deepfm {
namespace {

typedef std::vector<py::ssize_t> Sizes;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
Array<T> ToArray(Growing<T>* from) {
  const int64_t size = from->size();
  T* data = from->Release();
  return Array<T>(size, data, py::capsule(data, [](void* memory) { std::free(memory); }));
}

int64_t Parse(LibsvmParser* parser, const py::buffer& buffer, int64_t begin, int64_t max_rows) {
  const py::buffer_info info = buffer.request();
  const char* data = static_cast<const char*>(info.ptr);
  if (info.ndim != 1 || info.itemsize != 1 || info.strides[0] != 1)
    throw py::value_error("data must be bytes in a row");
  if (begin < 0 || begin >= info.size || data[info.size - 1] != '\n')
    throw py::value_error("data must hold lines from begin on, the last with its end");
  const ReleaseGil release;
  const std::lock_guard<std::mutex> lock(parser->mutex);
  return parser->Parse(data + begin, data + info.size, max_rows) - data;
}

py::object Bad(const LibsvmParser& parser) {
  const std::lock_guard<std::mutex> lock(parser.mutex);
  const LibsvmParser::Bad* bad = parser.bad();
  if (!bad) return py::none();
  return py::make_tuple(bad->line, bad->column, bad->is_label, py::bytes(bad->token));
}

py::tuple Take(LibsvmParser* parser) {
  const std::lock_guard<std::mutex> lock(parser->mutex);
  py::object fields = py::none();
  if (parser->has_fields()) fields = ToArray(&parser->fields);
  py::tuple taken = py::make_tuple(ToArray(&parser->labels), ToArray(&parser->row_splits), fields,
                                   ToArray(&parser->indices), ToArray(&parser->values));
  parser->StartRows();
  return taken;
}

// An array of our own: who owns the other may change it at any time.
template <typename T>
Array<T> CopyOf(const Array<T>& array) {
  return Array<T>(Sizes(array.shape(), array.shape() + array.ndim()), array.data());
}

// Throws unless every pair that row_splits speak of is there.
PairRows CheckedRows(const Array<int64_t>& row_splits, const std::optional<Array<int32_t>>& fields,
                     const int64_t* indices, const float* values, int64_t num_pairs) {
  const PairRows rows{row_splits.size() - 1, row_splits.data(), fields ? fields->data() : nullptr, indices, values};
  bool fits = rows.num_rows >= 0 && rows.row_splits[0] == 0 && rows.row_splits[rows.num_rows] == num_pairs;
  for (int64_t r = 0; fits && r < rows.num_rows; ++r) fits = rows.row_splits[r] <= rows.row_splits[r + 1];
  if (!fits || (fields && fields->size() != num_pairs))
    throw py::value_error("row_splits must ascend from 0 to the number of pairs, and fields have one for each");
  return rows;
}

Array<int64_t> MostPairsOf(const Array<int64_t>& row_splits, const Array<int32_t>& fields, int64_t num_fields) {
  const auto kept_splits = CopyOf(row_splits);
  const auto kept_fields = CopyOf(fields);
  const PairRows rows = CheckedRows(kept_splits, kept_fields, nullptr, nullptr, fields.size());
  Array<int64_t> most(num_fields);
  int64_t* data = most.mutable_data();
  bool fits;
  {
    const ReleaseGil release;
    fits = MostPairs(rows, num_fields, data);
  }
  if (!fits) throw py::value_error("fields must be in [0, " + std::to_string(num_fields) + ")");
  return most;
}

int64_t Pad(const Array<int64_t>& row_splits, const std::optional<Array<int32_t>>& fields,
            const Array<int64_t>& indices, const Array<float>& values, const Array<int64_t>& field_splits,
            Array<int64_t> to_indices, Array<float> to_values) {
  if (values.size() != indices.size()) throw py::value_error("indices and values must be equally many");
  const auto kept_splits = CopyOf(row_splits), kept_field_splits = CopyOf(field_splits);
  std::optional<Array<int32_t>> kept_fields;
  if (fields) kept_fields = CopyOf(*fields);
  const PairRows rows = CheckedRows(kept_splits, kept_fields, indices.data(), values.data(), indices.size());
  const int64_t num_fields = kept_field_splits.size() - 1;
  const int64_t* splits = kept_field_splits.data();
  bool fits = num_fields >= 0 && splits[0] == 0;
  for (int64_t f = 0; fits && f < num_fields; ++f) fits = splits[f] <= splits[f + 1];
  for (const py::array& to : {py::array(to_indices), py::array(to_values)})
    fits = fits && to.ndim() == 2 && to.shape(0) == rows.num_rows && to.shape(1) == splits[num_fields];
  if (!fits) throw py::value_error("field_splits must ascend from 0 to the columns of the matrices, of a row each");
  int64_t* index = to_indices.mutable_data();
  float* value = to_values.mutable_data();
  const ReleaseGil release;
  return PadRows(rows, num_fields, splits, index, value);
}

}  // namespace

void BindLibsvm(py::module_& m) {
  using namespace pybind11::literals;
  py::class_<LibsvmParser>(m, "LibsvmParser",
                           R"(Reads lines of libsvm, or of libffm, and keeps their rows until they are taken.

Args:
    has_fields: whether pairs are field:index:value (libffm), or index:value.
    skip: whether to leave out and count lines that cannot be read, instead of stopping at the first.

Attributes:
    num_rows: rows that are kept.
    lines: lines that were read; to be set to 0 where a file begins.
    skipped: lines that were left out.
    bad: what the parser stopped at: (line and column from 1, whether it stands where the label does, the bytes), or
        None.)")
      .def(py::init<bool, bool>(), "has_fields"_a, "skip"_a)
      .def("parse", &Parse, "data"_a, "begin"_a, "max_rows"_a,
           R"(Reads the lines of `data` from `begin` on, until max_rows rows are kept or one is bad.

Args:
    data: bytes-like, with the end of its last line.
    begin: where a line begins.
    max_rows: int.

Returns:
    Where the first line begins that was not read; the length of data after the last.

Raises:
    ValueError: data that does not end with a line.)")
      .def(
          "take", &Take,
          R"(The rows, which are kept no longer: labels float32 [B], row_splits int64 [B + 1], fields int32 [nnz] or None,
indices int64 [nnz], values float32 [nnz].)")
      .def_property_readonly("num_rows", [](const LibsvmParser& parser) { return parser.labels.size(); })
      .def_readwrite("lines", &LibsvmParser::lines)
      .def_readonly("skipped", &LibsvmParser::skipped)
      .def_property_readonly("bad", &Bad);
  m.def("most_pairs", &MostPairsOf, "row_splits"_a, "fields"_a, "num_fields"_a,
        R"(int64 [num_fields]: the most pairs of each field in a row.

Args:
    row_splits: int64 [B + 1].
    fields: int32 [nnz], in [0, num_fields).
    num_fields: int.

Raises:
    ValueError: arrays that do not fit.)");
  m.def("pad_rows", &Pad, "row_splits"_a, "fields"_a.none(true), "indices"_a, "values"_a, "field_splits"_a,
        "to_indices"_a.noconvert(), "to_values"_a.noconvert(),
        R"(Writes rows of any length into matrices; elements that no pair is for stay.

Args:
    row_splits: int64 [B + 1].
    fields: int32 [nnz], or None: all pairs are of field 0.
    indices, values: int64 and float32 [nnz].
    field_splits: int64 [F + 1]: the pairs of field f go into the columns from field_splits[f] on.
    to_indices, to_values: int64 and float32 [B, field_splits[F]].

Returns:
    The first row with more pairs of a field than columns, or with a field that is not in [0, F); -1: all fit.

Raises:
    ValueError: arrays that do not fit each other.)");
}

}  // namespace deepfm
