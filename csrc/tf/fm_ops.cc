// The TensorFlow side: registration, shape functions, validation, allocation. No arithmetic.
#include <cstring>
#include <string>
#include <vector>

#include "../kernels/cpu_kernels.h"
#include "fm_common.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace deepfm {
namespace {

using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

// ---------------------------------------------------------------------------------------------
// Shape functions

Status RankError(const char* name, const char* want, InferenceContext* c, ShapeHandle got) {
  return InvalidArgument(name, " must be ", want, ", got shape ", c->DebugString(got));
}

struct InferredShape {
  ShapeHandle indices;
  DimensionHandle dim, num_samples, fields_or_pairs;
  bool ragged = false;
  bool pooled = false;
  bool weighted = false;
};

// A variable's shape and dtype travel with its handle, when they are known at all.
Status TableShape(InferenceContext* c, bool resource, ShapeHandle* table) {
  *table = c->input(0);
  if (resource) {
    *table = c->UnknownShape();
    const auto* handle = c->input_handle_shapes_and_types(0);
    if (handle != nullptr && !handle->empty()) {
      DataType dtype;
      TF_RETURN_IF_ERROR(c->GetAttr("T", &dtype));
      if ((*handle)[0].dtype != dtype)
        return InvalidArgument("table holds ", tensorflow::DataTypeString((*handle)[0].dtype), ", the op was made for ",
                               tensorflow::DataTypeString(dtype));
      *table = (*handle)[0].shape;
    }
  }
  if (c->RankKnown(*table) && c->Rank(*table) != 2) return RankError("table", "rank 2 [V, K]", c, *table);
  return c->WithRank(*table, 2, table);
}

Status InferCommon(InferenceContext* c, bool resource, InferredShape* s) {
  ShapeHandle table;
  TF_RETURN_IF_ERROR(TableShape(c, resource, &table));
  s->dim = c->Dim(table, 1);
  std::vector<ShapeHandle> values, row_splits;
  TF_RETURN_IF_ERROR(c->input("values", &values));
  TF_RETURN_IF_ERROR(c->input("row_splits", &row_splits));
  std::vector<int64_t> field_splits;
  TF_RETURN_IF_ERROR(c->GetAttr("field_splits", &field_splits));
  s->indices = c->input(1);
  s->ragged = !row_splits.empty();
  s->pooled = !field_splits.empty();
  int num_weights;
  TF_RETURN_IF_ERROR(c->GetAttr("num_weights", &num_weights));
  s->weighted = num_weights > 0;
  const int rank = s->ragged ? 1 : 2;
  if (c->RankKnown(s->indices) && c->Rank(s->indices) != rank)
    return RankError("indices", s->ragged ? "rank 1 [nnz] with row_splits" : "rank 2 [B, F], or rank 1 with row_splits",
                     c, s->indices);
  TF_RETURN_IF_ERROR(c->WithRank(s->indices, rank, &s->indices));
  if (!values.empty()) {
    ShapeHandle merged;
    if (!c->Merge(s->indices, values[0], &merged).ok())
      return InvalidArgument("values must have the shape of indices, ", c->DebugString(s->indices), ", got ",
                             c->DebugString(values[0]));
    s->indices = merged;
  }
  if (s->ragged) {
    ShapeHandle splits = row_splits[0];
    if (c->RankKnown(splits) && c->Rank(splits) != 1) return RankError("row_splits", "rank 1 [B + 1]", c, splits);
    TF_RETURN_IF_ERROR(c->WithRank(splits, 1, &splits));
    if (c->ValueKnown(c->Dim(splits, 0)) && c->Value(c->Dim(splits, 0)) < 1)
      return InvalidArgument("row_splits must have at least one element, got shape ", c->DebugString(splits));
    TF_RETURN_IF_ERROR(c->Subtract(c->Dim(splits, 0), 1, &s->num_samples));
    s->fields_or_pairs = c->Dim(s->indices, 0);
  } else {
    s->num_samples = c->Dim(s->indices, 0);
    s->fields_or_pairs = s->pooled ? c->MakeDim(field_splits.size() - 1) : c->Dim(s->indices, 1);
  }
  return absl::OkStatus();
}

template <bool resource>
Status ForwardShape(InferenceContext* c) {
  InferredShape s;
  TF_RETURN_IF_ERROR(InferCommon(c, resource, &s));
  std::string output;
  bool return_embeddings;
  TF_RETURN_IF_ERROR(c->GetAttr("output", &output));
  TF_RETURN_IF_ERROR(c->GetAttr("return_embeddings", &return_embeddings));
  c->set_output(0, c->Matrix(s.num_samples, output == "scalar" ? c->MakeDim(1) : s.dim));
  c->set_output(1, c->Matrix(s.num_samples, s.dim));
  if (!return_embeddings) {
    c->set_output(2, c->Vector(int64_t{0}));
  } else if (s.ragged) {
    c->set_output(2, c->Matrix(s.fields_or_pairs, s.dim));
  } else {
    c->set_output(2, c->MakeShape({s.num_samples, s.fields_or_pairs, s.dim}));
  }
  c->set_output(3, s.weighted ? c->Matrix(s.num_samples, 1) : c->Vector(int64_t{0}));
  c->set_output(4, c->Scalar());
  return absl::OkStatus();
}

template <bool resource>
Status GradientShape(InferenceContext* c) {
  InferredShape s;
  TF_RETURN_IF_ERROR(InferCommon(c, resource, &s));
  bool need_values;
  TF_RETURN_IF_ERROR(c->GetAttr("need_values", &need_values));
  const DimensionHandle unique = c->UnknownDim();
  c->set_output(0, c->Vector(unique));
  c->set_output(1, c->Matrix(unique, s.dim));
  c->set_output(2, need_values ? s.indices : c->Vector(int64_t{0}));
  c->set_output(3, s.weighted ? c->Matrix(unique, 1) : c->Vector(int64_t{0}));
  std::vector<ShapeHandle> field_weights;
  TF_RETURN_IF_ERROR(c->input("field_weights", &field_weights));
  c->set_output(4, field_weights.empty() ? c->Vector(int64_t{0}) : field_weights[0]);
  return absl::OkStatus();
}

// ---------------------------------------------------------------------------------------------
// Kernels

class FmInteractionOp : public Kernel {
 public:
  explicit FmInteractionOp(OpKernelConstruction* ctx) : Kernel(ctx), call_(ctx) {}

  void Run(OpKernelContext* ctx) override {
    const FmInputs in(call_, ctx);
    ForwardArgs args = call_.Read(in);
    call_.Outputs(in, &args, [ctx](int output, const Sizes& sizes) { return Allocate(ctx, output, sizes); });
    std::memset(Allocate(ctx, 4, {}), 0, tensorflow::DataTypeSize(call_.acc_dtype));  // the penalty
    CheckIndices(FmForward(args, PoolOf(ctx)), args.indices, args.index_type, SizesOf(in.indices), in.shape.num_rows);
  }

 private:
  const FmForwardCall call_;
};

// What the two kernels below have to do on a CPU with what was read: the groups, and the numbers.
GradientArgs OnHost(const FmInputs& in, const GradientInputs& read, const Parallel& pool, RowGroups* groups) {
  Group(in.indices, in.shape.num_rows, pool, groups);
  GradientArgs args = read.args;
  args.groups = groups;
  const double scale = read.d_penalty->dtype() == tensorflow::DT_DOUBLE ? read.d_penalty->scalar<double>()()
                                                                        : read.d_penalty->scalar<float>()();
  args.l2 *= scale;
  args.l2_linear *= scale;
  if (read.priors) {
    const auto priors = read.priors->flat<float>();
    args.prior = priors(0) * scale / in.shape.num_samples;
    args.prior_linear = priors(1) * scale / in.shape.num_samples;
    args.prior_softness = priors(2);
  }
  return args;
}

class FmInteractionGradOp : public Kernel {
 public:
  explicit FmInteractionGradOp(OpKernelConstruction* ctx) : Kernel(ctx), call_(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("need_values", &need_values_));
  }

  void Run(OpKernelContext* ctx) override {
    const FmInputs in(call_, ctx);
    const Parallel pool = PoolOf(ctx);
    RowGroups groups;
    GradientArgs args = OnHost(in, call_.Read(ctx, in), pool, &groups);
    auto* unique = static_cast<int64_t*>(Allocate(ctx, 0, {groups.size()}));
    pool.For(groups.size(), 1 << 15, [&](int64_t begin, int64_t end) {
      std::copy(groups.rows() + begin, groups.rows() + end, unique + begin);
    });
    args.rows = Allocate(ctx, 1, {groups.size(), in.shape.dim});
    void* d_values = Allocate(ctx, 2, need_values_ ? SizesOf(in.indices) : Sizes{0});
    args.d_values = need_values_ ? d_values : nullptr;
    args.weight_rows = Allocate(ctx, 3, in.weights ? Sizes{groups.size(), 1} : Sizes{0});
    void* d_field_weights = Allocate(ctx, 4, {in.field_weights ? in.checked.NumFieldWeights() : 0});
    args.d_field_weights = in.field_weights ? d_field_weights : nullptr;
    FmGradient(args, pool);
  }

 private:
  const FmGradientCall call_;
  bool need_values_;
};

// The gradient and the update of the table and the weights by it, in one pass over their rows.
class FmUpdateOp : public Kernel {
 public:
  explicit FmUpdateOp(OpKernelConstruction* ctx) : Kernel(ctx), call_(ctx) {}

  void Run(OpKernelContext* ctx) override {
    const FmInputs in(call_, ctx, call_.Updated(ctx), true);
    UpdateArgs updates[2];
    call_.Read(ctx, in, updates);
    const Parallel pool = PoolOf(ctx);
    RowGroups groups;
    GradientArgs gradient = OnHost(in, call_.FmGradientCall::Read(ctx, in), pool, &groups);
    call_.Own(in, updates, &gradient, [ctx](tensorflow::Var* var) { OwnBuffer(ctx, var); });
    FmUpdate(gradient, updates[0], in.weights ? &updates[1] : nullptr, pool);
  }

 private:
  const FmUpdateCall call_;
};

// The output `penalty` is zero; its gradient, which a loss that it is added to gives, scales the penalty's.
// Values and field weights have type attributes of their own because there may be none of them to take it from.
// A table by value and a table by variable differ in their first input only.
#define DEEPFM_ATTRS                                      \
  Attr("T: {float, double, bfloat16, half}")              \
      .Attr("Tacc: {float, double}")                      \
      .Attr("Tvalues: {float, double} = DT_FLOAT")        \
      .Attr("Tfield_weights: {float, double} = DT_FLOAT") \
      .Attr("Tindices: {int32, int64}")                   \
      .Attr("num_values: int >= 0")                       \
      .Attr("num_row_splits: int >= 0")                   \
      .Attr("num_weights: int >= 0")                      \
      .Attr("l2: float = 0")                              \
      .Attr("l2_linear: float = 0")                       \
      .Attr("num_counts: int >= 0 = 0")                   \
      .Attr("output: {'sum', 'scalar', 'vector'}")        \
      .Attr("field_splits: list(int) = []")               \
      .Attr("num_field_weights: int >= 0 = 0")            \
      .Attr("order: int = 2")

// Stands first in a graph that is exported with these ops: who loads it without them is told this name.
REGISTER_OP("Import_deepfm_ops_dot_ops_before_loading_this_model")
    .SetShapeFn(tensorflow::shape_inference::UnknownShape);
class ImportFirst : public OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(OpKernelContext*) override {}
};
REGISTER_KERNEL_BUILDER(Name("Import_deepfm_ops_dot_ops_before_loading_this_model").Device(tensorflow::DEVICE_CPU),
                        ImportFirst);

#define DEEPFM_INPUTS(table_type)                  \
  Input("table: " table_type)                      \
      .Input("indices: Tindices")                  \
      .Input("values: num_values * Tvalues")       \
      .Input("row_splits: num_row_splits * int64") \
      .Input("weights: num_weights * " table_type) \
      .Input("counts: num_counts * int32")         \
      .Input("priors: num_counts * float")         \
      .Input("field_weights: num_field_weights * Tfield_weights")

#define DEEPFM_GRADIENT_ATTRS DEEPFM_ATTRS.Attr("num_embeddings: int >= 0").Attr("num_d_embeddings: int >= 0")

#define DEEPFM_GRADIENT_INPUTS(table_type)            \
  DEEPFM_INPUTS(table_type)                           \
      .Input("sums: Tacc")                            \
      .Input("embeddings: num_embeddings * Tacc")     \
      .Input("d_interaction: Tacc")                   \
      .Input("d_embeddings: num_d_embeddings * Tacc") \
      .Input("d_linear: num_weights * Tacc")          \
      .Input("d_penalty: Tacc")

#define DEEPFM_REGISTER(prefix, table_type, is_resource)                                                 \
  REGISTER_OP(prefix "FmInteraction")                                                                    \
      .DEEPFM_ATTRS.Attr("return_embeddings: bool")                                                      \
      .DEEPFM_INPUTS(table_type)                                                                         \
      .Output("interaction: Tacc")                                                                       \
      .Output("sums: Tacc")                                                                              \
      .Output("embeddings: Tacc")                                                                        \
      .Output("linear: Tacc")                                                                            \
      .Output("penalty: Tacc")                                                                           \
      .SetShapeFn(ForwardShape<is_resource>);                                                            \
  REGISTER_OP(prefix "FmInteractionGrad")                                                                \
      .DEEPFM_GRADIENT_ATTRS.Attr("need_values: bool")                                                   \
      .DEEPFM_GRADIENT_INPUTS(table_type)                                                                \
      .Output("unique: int64")                                                                           \
      .Output("rows: T")                                                                                 \
      .Output("d_values: Tacc")                                                                          \
      .Output("weight_rows: T")                                                                          \
      .Output("d_field_weights: Tacc")                                                                   \
      .SetShapeFn(GradientShape<is_resource>);                                                           \
  REGISTER_KERNEL_BUILDER(Name(prefix "FmInteraction").Device(tensorflow::DEVICE_CPU), FmInteractionOp); \
  REGISTER_KERNEL_BUILDER(Name(prefix "FmInteractionGrad").Device(tensorflow::DEVICE_CPU), FmInteractionGradOp);

DEEPFM_REGISTER("DeepfmOps", "T", false)
DEEPFM_REGISTER("DeepfmOpsResource", "resource", true)

REGISTER_OP("DeepfmOpsResourceFmUpdate")
    .DEEPFM_GRADIENT_ATTRS.DEEPFM_UPDATE_ATTRS.Attr("num_tables: int >= 1")
    .Attr("num_variables: int >= 0")
    .DEEPFM_GRADIENT_INPUTS("resource")
    .Input("variables: num_variables * resource")
    .Input("hyper: num_tables * Tacc")
    .Input("counts_of_rare: num_counts_of_rare * int32")
    .SetShapeFn(tensorflow::shape_inference::NoOutputs);
REGISTER_KERNEL_BUILDER(Name("DeepfmOpsResourceFmUpdate").Device(tensorflow::DEVICE_CPU), FmUpdateOp);

}  // namespace
}  // namespace deepfm

// For tests and native_info(): the instruction set in use, and a way to force one (0: not possible here).
extern "C" const char* deepfm_ops_isa() { return deepfm::Isa(); }
extern "C" int deepfm_ops_set_isa(const char* name) { return deepfm::SetIsa(name); }
