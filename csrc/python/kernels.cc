// The kernels on NumPy arrays, without TensorFlow. Inputs are read in place (row_splits from a copy): an array
// in another dtype, order or alignment is an error that says so. The GIL is released while a kernel runs.
#include <pybind11/numpy.h>

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
#include "calls.h"
#include "release_gil.h"
#include "thread_pool.h"

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
std::string Check(const char* name, const py::array& array, const Dtypes& dtypes) {
  const std::string dtype = NativeDtype(array);
  if (!IsOneOf(dtype, dtypes)) FailDtype(name, DtypeOf(array), dtypes);
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

int CheckThreads(std::optional<int> threads) {
  if (threads && *threads < 1) Fail("threads must be at least 1, got " + std::to_string(*threads));
  return threads.value_or(ThreadPool::cores());
}

// NumPy's arrays.
class Host : public Place {
 public:
  explicit Host(std::optional<int> threads) : threads_(CheckThreads(threads)) {}

  Dtypes TableDtypes() const override { return {"float32", "float64", "bfloat16", "float16", "uint8", "uint16"}; }
  bool OnHost() const override { return true; }

  Array Read(const char* name, py::handle given, const Dtypes& dtypes, bool written) override {
    // NumPy takes a tenth of a microsecond to see that an array is one.
    const py::array array =
        py::isinstance<py::array>(given) ? py::reinterpret_borrow<py::array>(given) : py::array::ensure(given);
    if (!array) {
      PyErr_Clear();
      throw py::type_error(std::string(name) + " must be an array, got " +
                           std::string(py::str(py::type::handle_of(given).attr("__name__"))));
    }
    const std::string dtype = Check(name, array, dtypes);
    // Of something that is no array yet a copy would be written to.
    if (written && !(array.writeable() && array.is(given))) Fail(std::string(name) + " must be an array to write to");
    return {array, const_cast<void*>(array.data()), SizesOf(array), dtype};
  }

  Array ReadNumbers(const char* name, py::handle numbers, const char* dtype) override {
    const bool wide = std::string(dtype) == "float64";
    const py::array array =
        wide ? py::array(py::array_t<double, py::array::c_style | py::array::forcecast>::ensure(numbers))
             : py::array(py::array_t<float, py::array::c_style | py::array::forcecast>::ensure(numbers));
    if (!array) throw py::error_already_set();
    return Read(name, array, {dtype}, false);
  }

  const int64_t* Splits(const std::vector<int64_t>& splits) override { return splits.data(); }

  Array Make(const Array& like, const char* dtype, const Sizes& sizes) override {
    const std::string name = dtype;
    const py::dtype made = name.empty()        ? py::reinterpret_borrow<py::array>(like.owner).dtype()
                           : name == "float32" ? py::dtype::of<float>()
                           : name == "float64" ? py::dtype::of<double>()
                                               : py::dtype::of<int64_t>();
    py::array array = MakeArray(made, sizes);
    void* data = array.mutable_data();
    return {std::move(array), data, sizes, name.empty() ? like.dtype : name};
  }

  void Forward(const ForwardArgs& args, const PairInputs& in) override {
    int64_t bad;
    {
      const ReleaseGil release;
      bad = FmForward(args, Pool());
    }
    CheckIndices(bad, in);
  }

  void Group(const PairInputs& in) override {
    int64_t bad;
    {
      const ReleaseGil release;
      bad = groups_.Build(in.indices.data, in.index_type, in.num_pairs, in.table.sizes[0], Pool());
    }
    CheckIndices(bad, in);
  }

  Array UniqueRows() override {
    Array unique = Make({}, "int64", {groups_.size()});
    const ReleaseGil release;
    std::copy_n(groups_.rows(), groups_.size(), static_cast<int64_t*>(unique.data));
    return unique;
  }

  void Gradient(GradientArgs args) override {
    args.groups = &groups_;
    const ReleaseGil release;
    FmGradient(args, Pool());
  }

  void Update(UpdateArgs args) override {
    args.groups = &groups_;
    const ReleaseGil release;
    SparseUpdate(args, Pool());
  }

  void GradientAndUpdate(GradientArgs gradient, UpdateArgs table, const UpdateArgs* weights) override {
    gradient.groups = table.groups = &groups_;
    std::optional<UpdateArgs> of_weights;
    if (weights) {
      of_weights = *weights;
      of_weights->groups = &groups_;
    }
    const ReleaseGil release;
    FmUpdate(gradient, table, weights ? &*of_weights : nullptr, Pool());
  }

  void Finish(const PairInputs&) override {}

 private:
  Parallel Pool() const { return ThreadPool::Get().Lend(threads_); }
  static void CheckIndices(int64_t bad, const PairInputs& in) {
    deepfm::CheckIndices(bad, in.indices.data, in.index_type, in.indices.sizes, in.table.sizes[0]);
  }

  const int threads_;
  RowGroups groups_;
};

// A call on NumPy arrays, which says at its end how many threads may do it.
template <typename Result, typename... Args>
auto OnHost(Result (*call)(Place&, Args...)) {
  return [call](Args... args, std::optional<int> threads) {
    Host host(threads);
    return call(host, args...);
  };
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
  Host host(threads);
  const CallInputs in(host, {"float32", "float64", "bfloat16", "float16"}, table, indices, py::none(), py::none(),
                      std::nullopt, "scalar");
  if (in.index_type != IndexType::kInt64) throw py::type_error("indices must be int64 here");
  if (distance < 0) Fail("distance must not be negative, got " + std::to_string(distance));
  const Parallel pool = ThreadPool::Get().Lend(CheckThreads(threads));
  CheckIndices(FirstOutOfRange(indices.data(), in.index_type, in.shape.num_pairs, in.shape.num_rows, pool),
               indices.data(), in.index_type, in.indices.sizes, in.shape.num_rows);
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
  const auto none = pybind11::none();
  const char* const docs[4] = {
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
    order: 2, or 3: the sum over triples of fields is added to that over pairs.
    field_weights: a weight for every pair of fields f > h, at f * (f - 1) / 2 + h; float64 for a float64 table, else
        float32. None: all ones.
    return_embeddings: also return [B, F, K] or [nnz, K].
    threads: at most so many; None: all of the machine's.

Returns:
    interaction [B, 1] or [B, K], sums [B, K], embeddings, linear [B, 1] (with weights or uint8 rows); float64 for a
    float64 table, else float32.

Raises:
    TypeError: a dtype that is not one of these, or in the other byte order.
    ValueError: a shape that does not fit; an array that is not C-contiguous or not aligned.
    IndexError: an index outside [0, V).
    MemoryError: a result that cannot be allocated.)",
      R"(The gradient: (unique, rows, d_values or None), with weights their rows' after them, with field_weights theirs.

Args:
    table, indices, values, row_splits, field_splits, output, order, field_weights, threads: as for fm_forward.
    sums: [B, K], from fm_forward.
    d_interaction: the gradient of the interaction.
    embeddings: from fm_forward; needed with field_splits, an order of 3 and field_weights.
    d_embeddings: the gradient of the embeddings, or None.
    weights, d_linear: [V, 1] of the table's dtype and the gradient of the linear part [B, 1], together or None.
    need_values: also return the gradient of the values.
    l2, l2_linear: strengths of a penalty on the rows of the batch, once per row.
    counts: int32 [V], how often the features occur, of a prior.
    prior, prior_linear, prior_softness: its strengths per sample, and its softness; see csrc/kernels/fm.h.

Returns:
    unique int64 [U], ascending; rows [U, K] of the table's dtype; d_values; weight rows [U, 1]; the gradient of the
    field weights.

Raises: what fm_forward raises.)",
      R"(An optimizer's update of the rows that `indices` names, in place; duplicates are added up first.

Args:
    table: [V, K] float32, float64, float16 or bfloat16, which is written to.
    indices: int32 or int64 [n].
    gradient: [n, K] of the table's dtype.
    update: the deepfm_ops.kernels.Update: the rule, its numbers, its slots, which are written to.
    threads: at most so many; None: all of the machine's.

Raises: what fm_forward raises, before anything is written.)",
      R"(fm_gradient and the updates by it in one, in place, to the same bits.

Args:
    table, indices, values, sums, d_interaction, and the keywords: as for fm_gradient.
    update: the deepfm_ops.kernels.Update of the table.
    weights_update: that of the weights, with weights; of the same rule.

Raises: what fm_forward raises, before anything is written.)"};
  deepfm::DefineCalls(m, [](auto call) { return deepfm::OnHost(call); }, docs);
  m.def("head", &deepfm::Head, "parts"_a, "bias"_a, "sigmoid"_a,
        R"(float32 [B]: the sum of the bias and float32 arrays [B, 1], through a sigmoid if so asked.

Raises: TypeError, ValueError: arrays that are not that.)");
  m.def("top_products", &deepfm::Top, "rows"_a, "queries"_a, "k"_a, "chosen"_a = none, pybind11::kw_only(),
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
