// The kernels on NumPy arrays, without TensorFlow. Inputs are read in place and never copied: an array
// in another dtype, order or alignment is an error that says so. The GIL is released while a kernel runs.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "../kernels/cpu_kernels.h"
#include "../kernels/fm.h"
#include "../tables/fingerprint.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace deepfm {

void BindTables(py::module_& parent);  // tables.cc
void BindLibsvm(py::module_& parent);  // libsvm.cc

namespace {

std::string ShapeOf(const py::array& array) { return py::str(array.attr("shape")); }
std::string DtypeOf(const py::array& array) { return py::str(array.dtype()); }

[[noreturn]] void Fail(const std::string& text) { throw py::value_error(text); }

// The name of the array's dtype in native byte order, "" for one in the other order. NumPy's own are known by
// their numbers: names are Python objects, and a call for one sample takes but a few microseconds.
std::string NativeDtype(const py::array& array) {
  const py::dtype dtype = array.dtype();
  const char order = dtype.byteorder();
  if (order != '=' && order != '|') return "";
  switch (dtype.num()) {
    case py::detail::npy_api::NPY_FLOAT_:
      return "float32";
    case py::detail::npy_api::NPY_DOUBLE_:
      return "float64";
    case py::detail::npy_api::NPY_UBYTE_:
      return "uint8";
    case py::detail::npy_api::NPY_USHORT_:
      return "uint16";
    case py::detail::npy_api::NPY_INT_:
    case py::detail::npy_api::NPY_LONG_:
    case py::detail::npy_api::NPY_LONGLONG_:
      return dtype.itemsize() == 4 ? "int32" : "int64";
  }
  return py::str(dtype.attr("name"));
}

// Checks what every array must be, and returns its dtype's name.
std::string Check(const char* name, const py::array& array, std::initializer_list<const char*> dtypes) {
  const std::string dtype = NativeDtype(array);
  if (std::find(dtypes.begin(), dtypes.end(), dtype) == dtypes.end()) {
    std::string all;
    for (const char* allowed : dtypes) all += (all.empty() ? "" : ", ") + std::string(allowed);
    throw py::type_error(std::string(name) + " must be " + all + " in native byte order, got " + DtypeOf(array));
  }
  const int flags = array.flags();
  if (!(flags & py::array::c_style))
    Fail(std::string(name) + " must be C-contiguous, got strides " + std::string(py::str(array.attr("strides"))));
  if (reinterpret_cast<uintptr_t>(array.data()) % array.itemsize())
    Fail(std::string(name) + " must be aligned to its items of " + std::to_string(array.itemsize()) + " bytes");
  return dtype;
}

template <typename Shape>
void CheckShape(const char* name, const py::array& array, const Shape& want) {
  bool same = array.ndim() == static_cast<py::ssize_t>(want.size());
  for (py::ssize_t i = 0; same && i < array.ndim(); ++i) same = array.shape(i) == *(want.begin() + i);
  if (same) return;
  std::string text = "(";
  for (int64_t size : want) text += std::to_string(size) + ", ";
  Fail(std::string(name) + " must have shape " + text + "), got " + ShapeOf(array));
}

// An uninitialized array whose memory is kept for the next one when it dies: no page is faulted in afresh.
py::array MakeArray(const py::dtype& dtype, const std::vector<int64_t>& shape) {
  int64_t bytes = dtype.itemsize();
  for (int64_t size : shape)
    if (__builtin_mul_overflow(bytes, size, &bytes)) throw std::bad_alloc();
  void* data = TakeScratch(bytes);
  return py::array(dtype, shape, data, py::capsule(data, GiveBackScratch));
}

TableType TableTypeOf(const std::string& dtype) {
  if (dtype == "uint8") return TableType::kInt8;
  if (dtype == "float64") return TableType::kFloat64;
  if (dtype == "bfloat16" || dtype == "uint16") return TableType::kBFloat16;
  if (dtype == "float16") return TableType::kFloat16;
  return TableType::kFloat32;
}

Output OutputOf(const std::string& output) {
  if (output == "sum") return Output::kSum;
  if (output == "scalar") return Output::kScalar;
  if (output == "vector") return Output::kVector;
  Fail("output must be one of sum, scalar, vector, got '" + output + "'");
}

// The arguments that forward and gradient share, validated.
struct Inputs {
  FmShape shape;
  TableType table_type;
  IndexType index_type;
  Output output;
  const char* acc;
  const void* values = nullptr;
  std::vector<int64_t> field_splits;
  int threads;

  Inputs(const py::array& table, const py::array& indices, const std::optional<py::array>& values_array,
         const std::optional<py::array>& row_splits, const std::optional<std::vector<int64_t>>& splits,
         const std::string& output_name, std::optional<int> num_threads, bool forward = false) {
    const std::string dtype =
        forward ? Check("table", table, {"float32", "float64", "bfloat16", "float16", "uint8", "uint16"})
                : Check("table", table, {"float32", "float64", "bfloat16", "float16"});
    if (table.ndim() != 2) Fail("table must be rank 2 [V, K], got shape " + ShapeOf(table));
    index_type = Check("indices", indices, {"int32", "int64"}) == "int32" ? IndexType::kInt32 : IndexType::kInt64;
    table_type = TableTypeOf(dtype);
    acc = dtype == "float64" ? "float64" : "float32";
    output = OutputOf(output_name);
    shape.num_rows = table.shape(0);
    shape.dim = table.shape(1) - (table_type == TableType::kInt8 ? kInt8Header : 0);
    if (shape.dim < 0) Fail("a row of uint8 must have at least 6 bytes, got shape " + ShapeOf(table));
    shape.num_pairs = indices.size();
    if (values_array) {
      Check("values", *values_array, {acc});
      CheckShape("values", *values_array, std::vector<int64_t>{indices.shape(), indices.shape() + indices.ndim()});
      values = values_array->data();
    }
    if (row_splits) {
      if (splits) Fail("field_splits needs indices of rank 2, not row_splits");
      if (indices.ndim() != 1) Fail("indices must be rank 1 [nnz] with row_splits, got shape " + ShapeOf(indices));
      Check("row_splits", *row_splits, {"int64"});
      ReadRowSplits(*row_splits);
    } else {
      if (indices.ndim() != 2)
        Fail("indices must be rank 2 [B, F], or rank 1 with row_splits, got shape " + ShapeOf(indices));
      shape.num_samples = indices.shape(0);
      shape.pairs_per_sample = indices.shape(1);
      if (splits) ReadFieldSplits(*splits);
    }
    // Asked once: the answer takes a file of the operating system's.
    static const int cores = static_cast<int>(std::thread::hardware_concurrency());
    threads = num_threads.value_or(cores);
    if (threads < 1) Fail("threads must be at least 1, got " + std::to_string(threads));
  }

  py::dtype AccDtype() const {
    return table_type == TableType::kFloat64 ? py::dtype::of<double>() : py::dtype::of<float>();
  }
  int64_t fields() const { return shape.field_splits ? shape.num_fields : shape.pairs_per_sample; }
  std::vector<int64_t> InteractionShape() const {
    return {shape.num_samples, output == Output::kScalar ? 1 : shape.dim};
  }
  std::vector<int64_t> EmbeddingsShape() const {
    if (shape.row_splits) return {shape.num_pairs, shape.dim};
    return {shape.num_samples, fields(), shape.dim};
  }

 private:
  void ReadRowSplits(const py::array& array) {
    if (array.ndim() != 1 || array.size() < 1) Fail("row_splits must be rank 1 [B + 1], got shape " + ShapeOf(array));
    const int64_t* splits = static_cast<const int64_t*>(array.data());
    const int64_t last = array.size() - 1;
    auto at = [&](int64_t i) { return "row_splits[" + std::to_string(i) + "] = " + std::to_string(splits[i]); };
    if (splits[0] != 0) Fail("row_splits must start at 0, got " + at(0));
    for (int64_t i = 0; i < last; ++i)
      if (splits[i + 1] < splits[i]) Fail("row_splits must not decrease, got " + at(i) + " and " + at(i + 1));
    if (splits[last] != shape.num_pairs)
      Fail("row_splits must end at nnz = " + std::to_string(shape.num_pairs) + ", got " + at(last));
    shape.num_samples = last;
    shape.row_splits = splits;
  }

  void ReadFieldSplits(const std::vector<int64_t>& splits) {
    bool good = !splits.empty() && splits.front() == 0 && splits.back() == shape.pairs_per_sample;
    for (size_t i = 1; i < splits.size(); ++i) good &= splits[i] >= splits[i - 1];
    if (!good)
      Fail("field_splits must go from 0 to the " + std::to_string(shape.pairs_per_sample) +
           " columns of indices and not decrease");
    field_splits = splits;
    shape.field_splits = field_splits.data();
    shape.num_fields = static_cast<int64_t>(splits.size()) - 1;
  }
};

void CheckIndex(int64_t bad, const py::array& indices, const Inputs& in) {
  if (bad < 0) return;
  const int64_t index = in.index_type == IndexType::kInt32 ? static_cast<const int32_t*>(indices.data())[bad]
                                                           : static_cast<const int64_t*>(indices.data())[bad];
  std::string where = std::to_string(bad);
  if (indices.ndim() == 2)
    where = std::to_string(bad / indices.shape(1)) + "," + std::to_string(bad % indices.shape(1));
  throw py::index_error("indices[" + where + "] = " + std::to_string(index) + " is not in [0, " +
                        std::to_string(in.shape.num_rows) + ")");
}

py::tuple Forward(const py::array& table, const py::array& indices, const std::optional<py::array>& values,
                  const std::optional<py::array>& weights, const std::optional<py::array>& row_splits,
                  const std::optional<std::vector<int64_t>>& field_splits, const std::string& output,
                  bool return_embeddings, std::optional<int> threads) {
  Inputs in(table, indices, values, row_splits, field_splits, output, threads, true);
  const py::dtype acc = in.AccDtype();
  py::array interaction(acc, in.InteractionShape()),
      sums(acc, std::vector<int64_t>{in.shape.num_samples, in.shape.dim});
  py::array embeddings = MakeArray(acc, return_embeddings ? in.EmbeddingsShape() : std::vector<int64_t>{0});
  ForwardArgs args;
  args.shape = in.shape;
  args.table_type = in.table_type;
  args.index_type = in.index_type;
  args.output = in.output;
  args.table = table.data();
  args.indices = indices.data();
  args.values = in.values;
  args.interaction = interaction.mutable_data();
  args.sums = sums.mutable_data();
  args.embeddings = return_embeddings ? embeddings.mutable_data() : nullptr;
  py::object linear = py::none();
  const bool in_rows = in.table_type == TableType::kInt8;
  if (weights || in_rows) {
    if (in.shape.dim == 0) Fail("weights need a table with at least one column");
    if (weights && in_rows) Fail("a table of uint8 holds the weights in its rows");
    if (weights) {
      if (NativeDtype(*weights) != NativeDtype(table))
        throw py::type_error("weights must have the dtype of table, " + DtypeOf(table) + ", got " + DtypeOf(*weights));
      Check("weights", *weights, {"float32", "float64", "bfloat16", "float16", "uint16"});
      CheckShape("weights", *weights, std::vector<int64_t>{in.shape.num_rows, 1});
      args.weights = weights->data();
    }
    py::array found(acc, std::vector<int64_t>{in.shape.num_samples, 1});
    args.linear = found.mutable_data();
    linear = found;
  }
  int64_t bad;
  {
    py::gil_scoped_release release;
    bad = FmForward(args, ThreadPool::Get().Lend(in.threads));
  }
  CheckIndex(bad, indices, in);
  py::object maybe = py::none();
  if (return_embeddings) maybe = embeddings;
  return py::make_tuple(interaction, sums, maybe, linear);
}

py::tuple Gradient(const py::array& table, const py::array& indices, const std::optional<py::array>& values,
                   const py::array& sums, const py::array& d_interaction, const std::optional<py::array>& embeddings,
                   const std::optional<py::array>& d_embeddings, const std::optional<py::array>& row_splits,
                   const std::optional<std::vector<int64_t>>& field_splits, const std::string& output, bool need_values,
                   std::optional<int> threads) {
  Inputs in(table, indices, values, row_splits, field_splits, output, threads);
  auto check = [&](const char* name, const py::array& array, const std::vector<int64_t>& shape) {
    Check(name, array, {in.acc});
    CheckShape(name, array, shape);
    return array.data();
  };
  GradientArgs args;
  args.shape = in.shape;
  args.table_type = in.table_type;
  args.output = in.output;
  args.table = table.data();
  args.values = in.values;
  args.sums = check("sums", sums, {in.shape.num_samples, in.shape.dim});
  args.d_interaction = check("d_interaction", d_interaction, in.InteractionShape());
  if (embeddings) args.embeddings = check("embeddings", *embeddings, in.EmbeddingsShape());
  if (d_embeddings) args.d_embeddings = check("d_embeddings", *d_embeddings, in.EmbeddingsShape());
  if (!embeddings && in.shape.field_splits && in.output != Output::kSum)
    Fail("embeddings are needed with field_splits");
  RowGroups groups;
  int64_t bad;
  {
    py::gil_scoped_release release;
    bad = groups.Build(indices.data(), in.index_type, in.shape.num_pairs, in.shape.num_rows,
                       ThreadPool::Get().Lend(in.threads));
  }
  CheckIndex(bad, indices, in);
  py::array unique = MakeArray(py::dtype::of<int64_t>(), {groups.size()});
  py::array rows = MakeArray(table.dtype(), {groups.size(), in.shape.dim});
  py::array d_values =
      MakeArray(in.AccDtype(), need_values ? std::vector<int64_t>{indices.shape(), indices.shape() + indices.ndim()}
                                           : std::vector<int64_t>{0});
  args.groups = &groups;
  args.rows = rows.mutable_data();
  args.d_values = need_values ? d_values.mutable_data() : nullptr;
  int64_t* unique_data = static_cast<int64_t*>(unique.mutable_data());
  {
    py::gil_scoped_release release;
    std::copy_n(groups.rows(), groups.size(), unique_data);
    FmGradient(args, ThreadPool::Get().Lend(in.threads));
  }
  py::object maybe = py::none();
  if (need_values) maybe = d_values;
  return py::make_tuple(unique, rows, maybe);
}

py::array Head(const std::vector<py::array>& parts, float bias, bool sigmoid) {
  if (parts.empty()) Fail("parts must hold an array at least");
  const int64_t batch = parts[0].size();
  for (const py::array& part : parts) {
    Check("parts", part, {"float32"});
    CheckShape("parts", part, std::vector<int64_t>{batch, 1});
  }
  py::array_t<float> scores(batch);
  float* score = scores.mutable_data();
  std::fill_n(score, batch, bias);
  for (const py::array& part : parts) {
    const float* x = static_cast<const float*>(part.data());
    for (int64_t b = 0; b < batch; ++b) score[b] += x[b];
  }
  if (sigmoid)
    for (int64_t b = 0; b < batch; ++b) score[b] = 1 / (1 + std::exp(-score[b]));
  return scores;
}

py::array HashBuckets(const std::vector<py::object>& texts, int64_t buckets) {
  if (buckets < 1) Fail("buckets must be at least 1, got " + std::to_string(buckets));
  py::array_t<int64_t> found(static_cast<py::ssize_t>(texts.size()));
  for (size_t i = 0; i < texts.size(); ++i) {
    py::ssize_t size = 0;
    const char* text = nullptr;
    if (PyBytes_Check(texts[i].ptr())) {
      char* bytes = nullptr;
      PyBytes_AsStringAndSize(texts[i].ptr(), &bytes, &size);
      text = bytes;
    } else if (PyUnicode_Check(texts[i].ptr())) {
      text = PyUnicode_AsUTF8AndSize(texts[i].ptr(), &size);
      if (!text) throw py::error_already_set();
    } else {
      throw py::type_error("texts[" + std::to_string(i) + "] must be str or bytes, got " +
                           std::string(py::str(py::type::handle_of(texts[i]).attr("__name__"))));
    }
    found.mutable_at(i) = static_cast<int64_t>(Fingerprint::Of(text, size) % static_cast<uint64_t>(buckets));
  }
  return found;
}

double Touch(const py::array& table, const py::array& indices, int64_t distance, std::optional<int> threads) {
  Inputs in(table, indices, std::nullopt, std::nullopt, std::nullopt, "scalar", threads);
  if (in.index_type != IndexType::kInt64) throw py::type_error("indices must be int64 here");
  if (distance < 0) Fail("distance must not be negative, got " + std::to_string(distance));
  const Parallel pool = ThreadPool::Get().Lend(in.threads);
  CheckIndex(FirstOutOfRange(indices.data(), in.index_type, in.shape.num_pairs, in.shape.num_rows, pool), indices, in);
  const int64_t row_bytes = in.shape.dim * table.itemsize(), n = in.shape.num_pairs;
  const char* rows = static_cast<const char*>(table.data());
  const int64_t* index = static_cast<const int64_t*>(indices.data());
  std::atomic<uint64_t> seen{0};  // what was read must be used, or the compiler drops the reads
  py::gil_scoped_release release;
  const auto start = std::chrono::steady_clock::now();
  pool.For(n, 4096, [&](int64_t begin, int64_t end) {
    seen ^= Kernels().touch(rows, row_bytes, index, begin, end, n, distance);
  });
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

}  // namespace deepfm

PYBIND11_MODULE(_kernels, m) {
  using namespace pybind11::literals;
  m.doc() = "The factorization-machine kernels on NumPy arrays, without TensorFlow; the contract is csrc/kernels/fm.h.";
  const auto none = py::none();
  m.def("fm_forward", &deepfm::Forward, "table"_a, "indices"_a, "values"_a = none, py::kw_only(), "weights"_a = none,
        "row_splits"_a = none, "field_splits"_a = none, "output"_a = "scalar", "return_embeddings"_a = false,
        "threads"_a = none,
        R"(The forward: (interaction, sums, embeddings or None, linear or None).

Args:
    table: [V, K] float32, float64, float16, bfloat16 of ml_dtypes or its bits as uint16; or uint8 [V, K + 6]:
        rows of scale, offset and first-order weight as bfloat16, then the K codes.
    indices: int32 or int64 [B, P], or [nnz] with row_splits.
    values: float64 for a float64 table, else float32; the shape of indices. None: all ones.
    weights: [V, 1] of the table's dtype, for the first order.
    row_splits: int64 [B + 1].
    field_splits: ints [F + 1] over the P columns, which are summed into F fields. None: a column is a field.
    output: "scalar", "vector" or "sum".
    return_embeddings: also return [B, F, K] or [nnz, K].
    threads: at most so many; None: all of the machine's.

Returns:
    interaction [B, 1] or [B, K], sums [B, K], embeddings, linear [B, 1] (with weights or uint8 rows); float64 for a
    float64 table, else float32.

Raises:
    TypeError: a dtype that is not one of these, or in the other byte order.
    ValueError: a shape that does not fit; an array that is not C-contiguous or not aligned.
    IndexError: an index outside [0, V).
    MemoryError: a result that cannot be allocated.)");
  m.def("fm_gradient", &deepfm::Gradient, "table"_a, "indices"_a, "values"_a, "sums"_a, "d_interaction"_a,
        py::kw_only(), "embeddings"_a = none, "d_embeddings"_a = none, "row_splits"_a = none, "field_splits"_a = none,
        "output"_a = "scalar", "need_values"_a = false, "threads"_a = none,
        R"(The gradient: (unique, rows, d_values or None).

Args:
    table, indices, values, row_splits, field_splits, output, threads: as for fm_forward.
    sums: [B, K], from fm_forward.
    d_interaction: the gradient of the interaction.
    embeddings: from fm_forward; needed with field_splits.
    d_embeddings: the gradient of the embeddings, or None.
    need_values: also return the gradient of the values.

Returns:
    unique int64 [U], ascending; rows [U, K] of the table's dtype; d_values.

Raises: what fm_forward raises.)");
  m.def("head", &deepfm::Head, "parts"_a, "bias"_a, "sigmoid"_a,
        R"(float32 [B]: the sum of the bias and float32 arrays [B, 1], through a sigmoid if so asked.

Raises: TypeError, ValueError: arrays that are not that.)");
  m.def("hash_buckets", &deepfm::HashBuckets, "texts"_a, "buckets"_a,
        R"(int64 [n] in [0, buckets): what tf.strings.to_hash_bucket_fast gives for each text, str or bytes.

Raises:
    TypeError: something that is not text.
    ValueError: buckets below 1, or text that UTF-8 cannot hold.)");
  m.def(
      "touch", &deepfm::Touch, "table"_a, "indices"_a, "distance"_a, "threads"_a = none,
      "Reads every byte of the rows and does nothing with them, prefetching `distance` rows ahead: the floor that the "
      "bench compares with. Returns the seconds that the loop took; checking the indices is not in them.");
  m.def("isa", &deepfm::Isa, "The instruction set in use: 'baseline', 'avx2' or 'avx512'.");
  m.def(
      "set_isa",
      [](const std::string& name) {
        if (!deepfm::SetIsa(name.c_str())) deepfm::Fail("this machine cannot run the '" + name + "' build");
      },
      "name"_a,
      "Uses that build of the loops from now on, in this module. Raises ValueError if the machine cannot run it.");
  deepfm::BindTables(m);
  deepfm::BindLibsvm(m);
}
