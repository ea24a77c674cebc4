// The kernels on NumPy arrays, without TensorFlow. Inputs are read in place and never copied: an array
// in another dtype, order or alignment is an error that says so. The GIL is released while a kernel runs.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <chrono>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "../kernels/cpu_kernels.h"
#include "../kernels/fm.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace deepfm {
namespace {

std::string ShapeOf(const py::array& array) { return py::str(array.attr("shape")); }
std::string DtypeOf(const py::array& array) { return py::str(array.dtype()); }

[[noreturn]] void Fail(const std::string& text) { throw py::value_error(text); }

// The array's name for a dtype in native byte order, "" for one in the other order.
std::string NativeDtype(const py::array& array) {
  const std::string name = py::str(array.dtype().attr("name"));
  const bool native = py::cast<bool>(array.dtype().attr("isnative"));
  return native ? name : "";
}

// Checks what every array must be, and returns its dtype's name.
std::string Check(const char* name, const py::array& array, const std::vector<std::string>& dtypes) {
  const std::string dtype = NativeDtype(array);
  bool known = false;
  std::string all;
  for (const std::string& allowed : dtypes) {
    known |= allowed == dtype;
    all += (all.empty() ? "" : ", ") + allowed;
  }
  if (!known)
    throw py::type_error(std::string(name) + " must be " + all + " in native byte order, got " + DtypeOf(array));
  const int flags = array.flags();
  if (!(flags & py::array::c_style))
    Fail(std::string(name) + " must be C-contiguous, got strides " + std::string(py::str(array.attr("strides"))));
  if (reinterpret_cast<uintptr_t>(array.data()) % array.itemsize())
    Fail(std::string(name) + " must be aligned to its items of " + std::to_string(array.itemsize()) + " bytes");
  return dtype;
}

void CheckShape(const char* name, const py::array& array, const std::vector<int64_t>& want) {
  bool same = array.ndim() == static_cast<py::ssize_t>(want.size());
  for (size_t i = 0; same && i < want.size(); ++i) same = array.shape(i) == want[i];
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
  if (dtype == "float64") return TableType::kFloat64;
  if (dtype == "bfloat16") return TableType::kBFloat16;
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
  std::string acc;
  const void* values = nullptr;
  std::vector<int64_t> field_splits;
  int threads;

  Inputs(const py::array& table, const py::array& indices, const std::optional<py::array>& values_array,
         const std::optional<py::array>& row_splits, const std::optional<std::vector<int64_t>>& splits,
         const std::string& output_name, std::optional<int> num_threads) {
    const std::string dtype = Check("table", table, {"float32", "float64", "bfloat16", "float16"});
    if (table.ndim() != 2) Fail("table must be rank 2 [V, K], got shape " + ShapeOf(table));
    index_type = Check("indices", indices, {"int32", "int64"}) == "int32" ? IndexType::kInt32 : IndexType::kInt64;
    table_type = TableTypeOf(dtype);
    acc = dtype == "float64" ? "float64" : "float32";
    output = OutputOf(output_name);
    shape.num_rows = table.shape(0);
    shape.dim = table.shape(1);
    shape.num_pairs = indices.size();
    if (values_array) {
      Check("values", *values_array, {acc});
      CheckShape("values", *values_array, {indices.shape(), indices.shape() + indices.ndim()});
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
    threads = num_threads.value_or(static_cast<int>(std::thread::hardware_concurrency()));
    if (threads < 1) Fail("threads must be at least 1, got " + std::to_string(threads));
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
                  const std::optional<py::array>& row_splits, const std::optional<std::vector<int64_t>>& field_splits,
                  const std::string& output, bool return_embeddings, std::optional<int> threads) {
  Inputs in(table, indices, values, row_splits, field_splits, output, threads);
  const py::dtype acc(in.acc);
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
  int64_t bad;
  {
    py::gil_scoped_release release;
    bad = FmForward(args, ThreadPool::Get().Lend(in.threads));
  }
  CheckIndex(bad, indices, in);
  py::object maybe = py::none();
  if (return_embeddings) maybe = embeddings;
  return py::make_tuple(interaction, sums, maybe);
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
      MakeArray(py::dtype(in.acc), need_values ? std::vector<int64_t>{indices.shape(), indices.shape() + indices.ndim()}
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
  m.def("fm_forward", &deepfm::Forward, "table"_a, "indices"_a, "values"_a = none, py::kw_only(), "row_splits"_a = none,
        "field_splits"_a = none, "output"_a = "scalar", "return_embeddings"_a = false, "threads"_a = none,
        R"(The forward: (interaction, sums, embeddings or None).

Args:
    table: [V, K] float32, float64, float16, or bfloat16 of ml_dtypes.
    indices: int32 or int64 [B, P], or [nnz] with row_splits.
    values: float64 for a float64 table, else float32; the shape of indices. None: all ones.
    row_splits: int64 [B + 1].
    field_splits: ints [F + 1] over the P columns, which are summed into F fields. None: a column is a field.
    output: "scalar", "vector" or "sum".
    return_embeddings: also return [B, F, K] or [nnz, K].
    threads: at most so many; None: all of the machine's.

Returns:
    interaction [B, 1] or [B, K], sums [B, K], embeddings; float64 for a float64 table, else float32.

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
}
