// fm_forward, fm_gradient, sparse_update and fm_update as Python calls them, for arrays of any place: NumPy's in memory
// (kernels.cc) or others' on a GPU (gpu/cuda.cc). What they check and say is the same there and here.
#ifndef DEEPFM_PYTHON_CALLS_H_
#define DEEPFM_PYTHON_CALLS_H_

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "../kernels/checks.h"
#include "../kernels/fm.h"
#include "../kernels/sparse_update.h"

namespace deepfm {

namespace py = pybind11;

typedef std::vector<const char*> Dtypes;  // names, as NumPy has them

// A dense array in native byte order; its owner holds the memory.
struct Array {
  py::object owner;
  void* data = nullptr;
  Sizes sizes;
  std::string dtype;
};

struct PairInputs;

// Where the arrays of a call are: how they are read and made, and what runs the kernels on them. One object, one call.
class Place {
 public:
  virtual ~Place() = default;
  // The types of tables that the kernels know.
  virtual Dtypes TableDtypes() const = 0;
  virtual bool OnHost() const = 0;  // whether row_splits and indices can be read here
  // Throws TypeError or ValueError for an array that is not what it must be.
  virtual Array Read(const char* name, py::handle array, const Dtypes& dtypes, bool written = false) = 0;
  // A vector of numbers, given as an array or as a sequence.
  virtual Array ReadNumbers(const char* name, py::handle numbers, const char* dtype) = 0;
  virtual const int64_t* Splits(const std::vector<int64_t>& splits) = 0;             // lives as long as this
  virtual Array Make(const Array& like, const char* dtype, const Sizes& sizes) = 0;  // "": the dtype of `like`

  virtual void Forward(const ForwardArgs& args, const PairInputs& in) = 0;
  virtual void Group(const PairInputs& in) = 0;  // what the calls below are about
  virtual Array UniqueRows() = 0;                // int64 [U]
  virtual void Gradient(GradientArgs args) = 0;
  virtual void Update(UpdateArgs args) = 0;
  virtual void GradientAndUpdate(GradientArgs gradient, UpdateArgs table, const UpdateArgs* weights) = 0;
  virtual void Finish(const PairInputs& in) = 0;  // throws what the kernels found wrong, if nobody did yet
};

// The rows of a table that pairs name.
struct PairInputs {
  Place& place;
  const Array table, indices;
  const TableType table_type;
  const IndexType index_type;
  const char* const acc;  // the dtype of sums
  int64_t num_pairs = 1, num_samples = 0;

  PairInputs(Place& place, const Dtypes& table_dtypes, py::handle table, py::handle indices, bool table_is_written);
};

// The arguments that the forward and the gradient share, checked.
struct CallInputs : PairInputs {
  const Output output;
  const Array values, row_splits;
  const CheckedShape checked;
  const FmShape shape;  // with the splits where the kernels read them

  CallInputs(Place& place, const Dtypes& table_dtypes, py::handle table, py::handle indices, py::handle values,
             py::handle row_splits, const std::optional<std::vector<int64_t>>& field_splits, const std::string& output,
             bool table_is_written = false);

 private:
  CheckedShape Check(const std::optional<std::vector<int64_t>>& field_splits) const;
};

// What they are made of, for a place's Read.
bool IsOneOf(const std::string& dtype, const Dtypes& dtypes);
[[noreturn]] void FailDtype(const char* name, const std::string& shown, const Dtypes& dtypes);
TableType TableTypeOf(const std::string& dtype);

// The calls; the docstrings in kernels.cc are about them.
typedef const py::object& Given;
typedef const std::optional<std::vector<int64_t>>& MaybeSplits;

py::tuple Forward(Place& place, Given table, Given indices, Given values, Given weights, Given row_splits,
                  MaybeSplits field_splits, const std::string& output, int order, Given field_weights,
                  bool return_embeddings);

py::tuple Gradient(Place& place, Given table, Given indices, Given values, Given sums, Given d_interaction,
                   Given embeddings, Given d_embeddings, Given weights, Given d_linear, Given row_splits,
                   MaybeSplits field_splits, const std::string& output, int order, Given field_weights,
                   bool need_values, double l2, double l2_linear, Given counts, double prior, double prior_linear,
                   double prior_softness);

void SparseUpdateCall(Place& place, Given table, Given indices, Given gradient, Given update);

void FusedUpdate(Place& place, Given table, Given indices, Given values, Given sums, Given d_interaction, Given update,
                 Given embeddings, Given d_embeddings, Given weights, Given d_linear, Given weights_update,
                 Given row_splits, MaybeSplits field_splits, const std::string& output, double l2, double l2_linear,
                 Given counts, double prior, double prior_linear, double prior_softness);

// Defines them in a module. `wrap` makes of a call a function without the place, with arguments `first` in front that
// say where it is, and `threads` at the end.
template <typename Wrap, typename... First>
void DefineCalls(py::module_& m, Wrap wrap, const char* const (&docs)[4], const First&... first) {
  using namespace pybind11::literals;
  const auto none = py::none();
  m.def("fm_forward", wrap(&Forward), docs[0], first..., "table"_a, "indices"_a, "values"_a = none, py::kw_only(),
        "weights"_a = none, "row_splits"_a = none, "field_splits"_a = none, "output"_a = "scalar", "order"_a = 2,
        "field_weights"_a = none, "return_embeddings"_a = false, "threads"_a = none);
  m.def("fm_gradient", wrap(&Gradient), docs[1], first..., "table"_a, "indices"_a, "values"_a, "sums"_a,
        "d_interaction"_a, py::kw_only(), "embeddings"_a = none, "d_embeddings"_a = none, "weights"_a = none,
        "d_linear"_a = none, "row_splits"_a = none, "field_splits"_a = none, "output"_a = "scalar", "order"_a = 2,
        "field_weights"_a = none, "need_values"_a = false, "l2"_a = 0.0, "l2_linear"_a = 0.0, "counts"_a = none,
        "prior"_a = 0.0, "prior_linear"_a = 0.0, "prior_softness"_a = 0.0, "threads"_a = none);
  m.def("sparse_update", wrap(&SparseUpdateCall), docs[2], first..., "table"_a, "indices"_a, "gradient"_a, "update"_a,
        py::kw_only(), "threads"_a = none);
  m.def("fm_update", wrap(&FusedUpdate), docs[3], first..., "table"_a, "indices"_a, "values"_a, "sums"_a,
        "d_interaction"_a, "update"_a, py::kw_only(), "embeddings"_a = none, "d_embeddings"_a = none,
        "weights"_a = none, "d_linear"_a = none, "weights_update"_a = none, "row_splits"_a = none,
        "field_splits"_a = none, "output"_a = "scalar", "l2"_a = 0.0, "l2_linear"_a = 0.0, "counts"_a = none,
        "prior"_a = 0.0, "prior_linear"_a = 0.0, "prior_softness"_a = 0.0, "threads"_a = none);
}

}  // namespace deepfm

#endif  // DEEPFM_PYTHON_CALLS_H_
