// The kernels on NumPy arrays, without TensorFlow. Inputs are read in place (row_splits from a copy): an array
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
#include <vector>

#include "../kernels/checks.h"
#include "../kernels/cpu_kernels.h"
#include "../kernels/fm.h"
#include "../kernels/top_products.h"
#include "../tables/fingerprint.h"
#include "release_gil.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace deepfm {

void BindTables(py::module_& parent);  // tables.cc
void BindLibsvm(py::module_& parent);  // libsvm.cc

namespace {

Sizes SizesOf(const py::array& array) { return {array.shape(), array.shape() + array.ndim()}; }
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

// An uninitialized array whose memory is kept for the next one when it dies: no page is faulted in afresh.
py::array MakeArray(const py::dtype& dtype, const Sizes& shape) {
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

std::string CheckTable(const py::array& table, bool forward) {
  if (forward) return Check("table", table, {"float32", "float64", "bfloat16", "float16", "uint8", "uint16"});
  return Check("table", table, {"float32", "float64", "bfloat16", "float16"});
}

int CheckThreads(std::optional<int> threads) {
  if (threads && *threads < 1) Fail("threads must be at least 1, got " + std::to_string(*threads));
  return threads.value_or(ThreadPool::cores());
}

// The arguments that forward and gradient share, checked.
struct Inputs {
  const py::array &table, &indices;
  const TableType table_type;
  const IndexType index_type;
  const Output output;
  const char* const acc;  // the dtype of sums
  const void* values = nullptr;
  const CheckedShape checked;
  const FmShape& shape;
  const int threads;

  Inputs(const py::array& table, const py::array& indices, const std::optional<py::array>& values_array,
         const std::optional<py::array>& row_splits, const std::optional<std::vector<int64_t>>& field_splits,
         const std::string& output_name, std::optional<int> num_threads, bool forward = false)
      : table(table),
        indices(indices),
        table_type(TableTypeOf(CheckTable(table, forward))),
        index_type(Check("indices", indices, {"int32", "int64"}) == "int32" ? IndexType::kInt32 : IndexType::kInt64),
        output(OutputOf(output_name)),
        acc(table_type == TableType::kFloat64 ? "float64" : "float32"),
        checked(CheckArrays(values_array, row_splits, field_splits)),
        shape(checked.shape),
        threads(CheckThreads(num_threads)) {}

  Parallel Pool() const { return ThreadPool::Get().Lend(threads); }
  py::dtype AccDtype() const {
    return table_type == TableType::kFloat64 ? py::dtype::of<double>() : py::dtype::of<float>();
  }
  void CheckIndices(int64_t bad) const {
    deepfm::CheckIndices(bad, indices.data(), index_type, SizesOf(indices), shape.num_rows);
  }

 private:
  CheckedShape CheckArrays(const std::optional<py::array>& values_array, const std::optional<py::array>& row_splits,
                           const std::optional<std::vector<int64_t>>& field_splits) {
    Sizes values_sizes;
    if (values_array) {
      Check("values", *values_array, {acc});
      values_sizes = SizesOf(*values_array);
      values = values_array->data();
    }
    if (row_splits) Check("row_splits", *row_splits, {"int64"});
    const Sizes splits_sizes = row_splits ? SizesOf(*row_splits) : Sizes{};
    return CheckedShape(table_type, SizesOf(table), SizesOf(indices), values_array ? &values_sizes : nullptr,
                        row_splits ? static_cast<const int64_t*>(row_splits->data()) : nullptr,
                        row_splits ? &splits_sizes : nullptr, field_splits ? &*field_splits : nullptr);
  }
};

py::tuple Forward(const py::array& table, const py::array& indices, const std::optional<py::array>& values,
                  const std::optional<py::array>& weights, const std::optional<py::array>& row_splits,
                  const std::optional<std::vector<int64_t>>& field_splits, const std::string& output,
                  bool return_embeddings, std::optional<int> threads) {
  Inputs in(table, indices, values, row_splits, field_splits, output, threads, true);
  const py::dtype acc = in.AccDtype();
  py::array interaction(acc, in.checked.Interaction(in.output)), sums(acc, Sizes{in.shape.num_samples, in.shape.dim});
  py::array embeddings = MakeArray(acc, return_embeddings ? in.checked.Embeddings() : Sizes{0});
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
    if (weights && in_rows) Fail("a table of uint8 holds the weights in its rows");
    const Sizes weights_sizes = weights ? SizesOf(*weights) : Sizes{};
    in.checked.CheckWeights(weights ? &weights_sizes : nullptr);
    if (weights) {
      if (NativeDtype(*weights) != NativeDtype(table))
        throw py::type_error("weights must have the dtype of table, " + DtypeOf(table) + ", got " + DtypeOf(*weights));
      Check("weights", *weights, {"float32", "float64", "bfloat16", "float16", "uint16"});
      args.weights = weights->data();
    }
    py::array found(acc, Sizes{in.shape.num_samples, 1});
    args.linear = found.mutable_data();
    linear = found;
  }
  int64_t bad;
  {
    const ReleaseGil release;
    bad = FmForward(args, in.Pool());
  }
  in.CheckIndices(bad);
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
  Check("sums", sums, {in.acc});
  Check("d_interaction", d_interaction, {in.acc});
  if (embeddings) Check("embeddings", *embeddings, {in.acc});
  if (d_embeddings) Check("d_embeddings", *d_embeddings, {in.acc});
  const Sizes embeddings_sizes = embeddings ? SizesOf(*embeddings) : Sizes{},
              d_embeddings_sizes = d_embeddings ? SizesOf(*d_embeddings) : Sizes{};
  in.checked.CheckGradient(in.output, SizesOf(sums), SizesOf(d_interaction), embeddings ? &embeddings_sizes : nullptr,
                           d_embeddings ? &d_embeddings_sizes : nullptr);
  GradientArgs args;
  args.shape = in.shape;
  args.table_type = in.table_type;
  args.output = in.output;
  args.table = table.data();
  args.values = in.values;
  args.sums = sums.data();
  args.d_interaction = d_interaction.data();
  args.embeddings = embeddings ? embeddings->data() : nullptr;
  args.d_embeddings = d_embeddings ? d_embeddings->data() : nullptr;
  RowGroups groups;
  int64_t bad;
  {
    const ReleaseGil release;
    bad = groups.Build(indices.data(), in.index_type, in.shape.num_pairs, in.shape.num_rows, in.Pool());
  }
  in.CheckIndices(bad);
  py::array unique = MakeArray(py::dtype::of<int64_t>(), {groups.size()});
  py::array rows = MakeArray(table.dtype(), {groups.size(), in.shape.dim});
  py::array d_values = MakeArray(in.AccDtype(), need_values ? SizesOf(indices) : Sizes{0});
  args.groups = &groups;
  args.rows = rows.mutable_data();
  args.d_values = need_values ? d_values.mutable_data() : nullptr;
  int64_t* unique_data = static_cast<int64_t*>(unique.mutable_data());
  {
    const ReleaseGil release;
    std::copy_n(groups.rows(), groups.size(), unique_data);
    FmGradient(args, in.Pool());
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
    CheckShape("parts", SizesOf(part), {batch, 1});
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

py::tuple Top(const py::array& rows, const py::array& queries, int64_t k, const std::optional<py::array>& chosen,
              std::optional<int> threads) {
  Check("rows", rows, {"float32"});
  Check("queries", queries, {"float32"});
  if (rows.ndim() != 2) Fail("rows must have two dimensions, got shape " + TextOf(SizesOf(rows)));
  TopProductsArgs args;
  args.num_rows = rows.shape(0);
  args.dim = rows.shape(1);
  args.num_queries = queries.ndim() ? queries.shape(0) : 0;
  CheckShape("queries", SizesOf(queries), {args.num_queries, args.dim});
  if (k < 1) Fail("k must be at least 1, got " + std::to_string(k));
  const Parallel pool = ThreadPool::Get().Lend(CheckThreads(threads));
  Scratch<int64_t> copy;  // its owner may change it at any time
  if (chosen) {
    Check("chosen", *chosen, {"int64"});
    args.num_chosen = chosen->size();
    CheckShape("chosen", SizesOf(*chosen), {args.num_chosen});
    copy = Scratch<int64_t>(args.num_chosen);
    std::copy_n(static_cast<const int64_t*>(chosen->data()), args.num_chosen, copy.get());
    int64_t before = -1;
    for (int64_t j = 0; j < args.num_chosen; ++j) {
      if (copy[j] <= before || copy[j] >= args.num_rows)
        throw py::index_error("chosen[" + std::to_string(j) + "] = " + std::to_string(copy[j]) +
                              " is not above the one before it and in [0, " + std::to_string(args.num_rows) + ")");
      before = copy[j];
    }
    args.chosen = copy.get();
  }
  args.k = k;
  const int64_t most = std::min(k, chosen ? args.num_chosen : args.num_rows);
  py::array_t<int64_t> places(Sizes{args.num_queries, most}), first_nan(args.num_queries);
  py::array_t<float> products(Sizes{args.num_queries, most});
  args.rows = static_cast<const float*>(rows.data());
  args.queries = static_cast<const float*>(queries.data());
  args.places = places.mutable_data();
  args.products = products.mutable_data();
  args.first_nan = first_nan.mutable_data();
  {
    const ReleaseGil release;
    TopProducts(args, pool);
  }
  return py::make_tuple(places, products, first_nan);
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

double ReadRows(const py::array& table, const py::array& indices, int64_t distance, std::optional<int> threads) {
  const Inputs in(table, indices, std::nullopt, std::nullopt, std::nullopt, "scalar", threads);
  if (in.index_type != IndexType::kInt64) throw py::type_error("indices must be int64 here");
  if (distance < 0) Fail("distance must not be negative, got " + std::to_string(distance));
  const Parallel pool = in.Pool();
  in.CheckIndices(FirstOutOfRange(indices.data(), in.index_type, in.shape.num_pairs, in.shape.num_rows, pool));
  const int64_t row_bytes = in.shape.dim * table.itemsize(), n = in.shape.num_pairs;
  if (row_bytes == 0) return 0;
  const char* rows = static_cast<const char*>(table.data());
  const int64_t* index = static_cast<const int64_t*>(indices.data());
  std::atomic<uint64_t> seen{0};  // what was read must be used, or the compiler drops the reads
  const ReleaseGil release;
  const auto start = std::chrono::steady_clock::now();
  pool.For(n, 4096, [&](int64_t begin, int64_t end) {
    seen ^= Kernels().read_rows(rows, in.shape.num_rows, row_bytes, index, begin, end, n, distance);
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
  m.def("top_products", &deepfm::Top, "rows"_a, "queries"_a, "k"_a, "chosen"_a = none, py::kw_only(),
        "threads"_a = none,
        R"(The rows with the largest inner products: (places, products, first_nan). One pass over the rows.

Args:
    rows: float32 [N, D].
    queries: float32 [B, D].
    k: how many, from 1 on; where it is more than there are, all of them.
    chosen: int64 [n], ascending: the rows that count. None: all.
    threads: at most so many; None: all of the machine's.

Returns:
    places int64 [B, min(k, n)] and products float32, the largest first, of equal ones the row that lies first;
    first_nan int64 [B]: the first row whose product is NaN, or -1. Where there is one, the others say nothing.

Raises:
    TypeError, ValueError: arrays that are not that, or k below 1.
    IndexError: chosen that do not ascend, or leave the rows.)");
  m.def("hash_buckets", &deepfm::HashBuckets, "texts"_a, "buckets"_a,
        R"(int64 [n] in [0, buckets): what tf.strings.to_hash_bucket_fast gives for each text, str or bytes.

Raises:
    TypeError: something that is not text.
    ValueError: buckets below 1, or text that UTF-8 cannot hold.)");
  m.def(
      "read_rows", &deepfm::ReadRows, "table"_a, "indices"_a, "distance"_a, "threads"_a = none,
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
