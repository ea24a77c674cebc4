// The TensorFlow side: registration, shape functions, validation, allocation. No arithmetic.
#include <cstring>
#include <string>
#include <vector>

#include "../kernels/cpu_kernels.h"
#include "op_common.h"
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
  return absl::OkStatus();
}

// ---------------------------------------------------------------------------------------------
// What forward and gradient share

// Attributes and validated inputs of the forward and of its gradient.
class FmKernel : public Kernel {
 public:
  explicit FmKernel(OpKernelConstruction* ctx) : Kernel(ctx) {
    std::string output;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("T", &dtype_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("Tacc", &acc_dtype_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("output", &output));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("field_splits", &field_splits_));
    output_ = output == "sum" ? Output::kSum : output == "scalar" ? Output::kScalar : Output::kVector;
    OP_REQUIRES_OK(ctx, RequireAcc(ctx, dtype_));
    for (size_t i = 0; i < field_splits_.size(); ++i) {
      OP_REQUIRES(ctx, i == 0 ? field_splits_[0] == 0 : field_splits_[i] >= field_splits_[i - 1],
                  InvalidArgument("field_splits must start at 0 and not decrease, got field_splits[", i,
                                  "] = ", field_splits_[i]));
    }
  }

 protected:
  // The first-order weights, if there are any: they follow the values and the row_splits.
  Status OpenWeights(OpKernelContext* ctx, const FmShape& shape, Table* weights, const void** data) const {
    OpInputList list;
    TF_RETURN_IF_ERROR(ctx->input_list("weights", &list));
    if (list.size() == 0) return absl::OkStatus();
    if (list.size() > 1) return InvalidArgument("weights must be one tensor, got ", list.size());
    int first, last;
    TF_RETURN_IF_ERROR(ctx->op_kernel().InputRange("weights", &first, &last));
    TF_RETURN_IF_ERROR(weights->Open(ctx, first, "weights", dtype_));
    if (shape.dim == 0) return InvalidArgument("weights need a table with at least one column");
    *data = Data(weights->tensor());
    return CheckShape("weights", weights->tensor(), {shape.num_rows, 1});
  }

  static Status CheckCounts(const OpInputList& counts, const OpInputList& priors, const FmShape& shape) {
    if (counts.size() == 0) return absl::OkStatus();
    if (counts.size() > 1) return InvalidArgument("counts must be one tensor, got ", counts.size());
    TF_RETURN_IF_ERROR(CheckShape("counts", counts[0], {shape.num_rows}));
    return CheckShape("priors", priors[0], {3});
  }

  Status ReadShape(OpKernelContext* ctx, const Tensor& table, FmShape* shape) {
    const Tensor& indices = ctx->input(1);
    OpInputList values, row_splits;
    TF_RETURN_IF_ERROR(ctx->input_list("values", &values));
    TF_RETURN_IF_ERROR(ctx->input_list("row_splits", &row_splits));
    if (values.size() > 1 || row_splits.size() > 1)
      return InvalidArgument("values and row_splits must be one tensor each, got ", values.size(), " and ",
                             row_splits.size());
    shape->num_rows = table.dim_size(0);
    shape->dim = table.dim_size(1);
    shape->num_pairs = indices.NumElements();
    if (values.size()) {
      if (values[0].dtype() != acc_dtype_)
        return InvalidArgument("values must be ", tensorflow::DataTypeString(acc_dtype_), " for this table, got ",
                               tensorflow::DataTypeString(values[0].dtype()));
      if (values[0].shape() != indices.shape())
        return InvalidArgument("values must have the shape of indices, ", indices.shape().DebugString(), ", got ",
                               values[0].shape().DebugString());
    }
    if (row_splits.size()) {
      if (!field_splits_.empty()) return InvalidArgument("field_splits needs indices of rank 2, not row_splits");
      if (indices.dims() != 1)
        return InvalidArgument("indices must be rank 1 [nnz] with row_splits, got shape ",
                               indices.shape().DebugString());
      return ReadRowSplits(row_splits[0], shape);
    }
    if (indices.dims() != 2)
      return InvalidArgument("indices must be rank 2 [B, F], or rank 1 with row_splits, got shape ",
                             indices.shape().DebugString());
    shape->num_samples = indices.dim_size(0);
    shape->pairs_per_sample = indices.dim_size(1);
    if (!field_splits_.empty()) {
      if (field_splits_.back() != shape->pairs_per_sample)
        return InvalidArgument("field_splits must end at the ", shape->pairs_per_sample, " columns of indices, got ",
                               field_splits_.back());
      shape->field_splits = field_splits_.data();
      shape->num_fields = static_cast<int64_t>(field_splits_.size()) - 1;
    }
    return absl::OkStatus();
  }

  Sizes EmbeddingsShape(const FmShape& shape) const {
    if (shape.row_splits) return {shape.num_pairs, shape.dim};
    const int64_t fields = shape.field_splits ? shape.num_fields : shape.pairs_per_sample;
    return {shape.num_samples, fields, shape.dim};
  }

  Sizes InteractionShape(const FmShape& shape) const {
    return {shape.num_samples, output_ == Output::kScalar ? 1 : shape.dim};
  }

  DataType dtype_, acc_dtype_;
  Output output_;
  std::vector<int64_t> field_splits_;

 private:
  static Status ReadRowSplits(const Tensor& row_splits, FmShape* shape) {
    if (row_splits.dims() != 1 || row_splits.NumElements() < 1)
      return InvalidArgument("row_splits must be rank 1 [B + 1], got shape ", row_splits.shape().DebugString());
    const auto splits = row_splits.flat<int64_t>();
    const int64_t last = splits.size() - 1;
    if (splits(0) != 0) return InvalidArgument("row_splits must start at 0, got row_splits[0] = ", splits(0));
    for (int64_t i = 0; i < last; ++i) {
      if (splits(i + 1) < splits(i))
        return InvalidArgument("row_splits must not decrease, got row_splits[", i, "] = ", splits(i),
                               " and row_splits[", i + 1, "] = ", splits(i + 1));
    }
    if (splits(last) != shape->num_pairs)
      return InvalidArgument("row_splits must end at nnz = ", shape->num_pairs, ", got row_splits[", last,
                             "] = ", splits(last));
    shape->num_samples = last;
    shape->row_splits = splits.data();
    return absl::OkStatus();
  }
};

// ---------------------------------------------------------------------------------------------
// Kernels

class FmInteractionOp : public FmKernel {
 public:
  explicit FmInteractionOp(OpKernelConstruction* ctx) : FmKernel(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("return_embeddings", &return_embeddings_));
  }

  void Run(OpKernelContext* ctx) override {
    Table table, weights;
    ForwardArgs args;
    OpInputList values;
    OP_REQUIRES_OK(ctx, table.Open(ctx, 0, "table", dtype_));
    OP_REQUIRES_OK(ctx, ReadShape(ctx, table.tensor(), &args.shape));
    OP_REQUIRES_OK(ctx, ctx->input_list("values", &values));
    const FmShape& shape = args.shape;
    OP_REQUIRES_OK(ctx, OpenWeights(ctx, shape, &weights, &args.weights));
    Tensor *interaction, *sums, *embeddings, *linear;
    OP_REQUIRES_OK(ctx, Allocate(ctx, 0, InteractionShape(shape), &interaction));
    OP_REQUIRES_OK(ctx, Allocate(ctx, 1, {shape.num_samples, shape.dim}, &sums));
    OP_REQUIRES_OK(ctx, Allocate(ctx, 2, return_embeddings_ ? EmbeddingsShape(shape) : Sizes{0}, &embeddings));
    OP_REQUIRES_OK(ctx, Allocate(ctx, 3, args.weights ? Sizes{shape.num_samples, 1} : Sizes{0}, &linear));
    const Tensor& indices = ctx->input(1);
    args.table_type = TableTypeOf(dtype_);
    args.index_type = IndexTypeOf(indices);
    args.output = output_;
    args.table = Data(table.tensor());
    args.indices = Data(indices);
    args.values = DataOrNull(values);
    args.interaction = MutableData(interaction);
    args.sums = MutableData(sums);
    args.embeddings = return_embeddings_ ? MutableData(embeddings) : nullptr;
    args.linear = args.weights ? MutableData(linear) : nullptr;
    Tensor* penalty;
    OP_REQUIRES_OK(ctx, Allocate(ctx, 4, {}, &penalty));
    std::memset(MutableData(penalty), 0, penalty->tensor_data().size());
    const int64_t bad = FmForward(args, PoolOf(ctx));
    OP_REQUIRES(ctx, bad < 0, IndexError(indices, bad, shape.num_rows));
  }

 private:
  bool return_embeddings_;
};

class FmInteractionGradOp : public FmKernel {
 public:
  explicit FmInteractionGradOp(OpKernelConstruction* ctx) : FmKernel(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("need_values", &need_values_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("l2", &l2_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("l2_linear", &l2_linear_));
  }

  void Run(OpKernelContext* ctx) override {
    Table table, weights;
    GradientArgs args;
    OpInputList values, embeddings, d_embeddings, d_linear, counts, priors;
    const Tensor *sums, *d_interaction, *d_penalty;
    OP_REQUIRES_OK(ctx, table.Open(ctx, 0, "table", dtype_));
    OP_REQUIRES_OK(ctx, ReadShape(ctx, table.tensor(), &args.shape));
    OP_REQUIRES_OK(ctx, ctx->input_list("values", &values));
    OP_REQUIRES_OK(ctx, ctx->input_list("counts", &counts));
    OP_REQUIRES_OK(ctx, ctx->input_list("priors", &priors));
    OP_REQUIRES_OK(ctx, ctx->input("sums", &sums));
    OP_REQUIRES_OK(ctx, ctx->input_list("embeddings", &embeddings));
    OP_REQUIRES_OK(ctx, ctx->input("d_interaction", &d_interaction));
    OP_REQUIRES_OK(ctx, ctx->input_list("d_embeddings", &d_embeddings));
    OP_REQUIRES_OK(ctx, ctx->input_list("d_linear", &d_linear));
    OP_REQUIRES_OK(ctx, ctx->input("d_penalty", &d_penalty));
    OP_REQUIRES_OK(ctx, CheckShape("d_penalty", *d_penalty, {}));
    const FmShape& shape = args.shape;
    OP_REQUIRES_OK(ctx, OpenWeights(ctx, shape, &weights, &args.weights));
    OP_REQUIRES_OK(ctx, CheckCounts(counts, priors, shape));
    OP_REQUIRES(ctx, embeddings.size() <= 1 && d_embeddings.size() <= 1,
                InvalidArgument("embeddings and d_embeddings must be one tensor each"));
    if (d_linear.size()) OP_REQUIRES_OK(ctx, CheckShape("d_linear", d_linear[0], {shape.num_samples, 1}));
    OP_REQUIRES_OK(ctx, CheckShape("sums", *sums, {shape.num_samples, shape.dim}));
    OP_REQUIRES_OK(ctx, CheckShape("d_interaction", *d_interaction, InteractionShape(shape)));
    if (embeddings.size()) OP_REQUIRES_OK(ctx, CheckShape("embeddings", embeddings[0], EmbeddingsShape(shape)));
    if (d_embeddings.size()) OP_REQUIRES_OK(ctx, CheckShape("d_embeddings", d_embeddings[0], EmbeddingsShape(shape)));
    OP_REQUIRES(ctx, embeddings.size() || !shape.field_splits || output_ == Output::kSum,
                InvalidArgument("embeddings are needed with field_splits"));

    const Tensor& indices = ctx->input(1);
    const Parallel pool = PoolOf(ctx);
    RowGroups groups;
    const int64_t bad = groups.Build(Data(indices), IndexTypeOf(indices), shape.num_pairs, shape.num_rows, pool);
    OP_REQUIRES(ctx, bad < 0, IndexError(indices, bad, shape.num_rows));
    Tensor *unique, *rows, *d_values, *weight_rows;
    OP_REQUIRES_OK(ctx, Allocate(ctx, 0, {groups.size()}, &unique));
    OP_REQUIRES_OK(ctx, Allocate(ctx, 1, {groups.size(), shape.dim}, &rows));
    OP_REQUIRES_OK(ctx, ctx->allocate_output(2, need_values_ ? indices.shape() : TensorShape({0}), &d_values));
    pool.For(groups.size(), 1 << 15, [&](int64_t begin, int64_t end) {
      std::copy(groups.rows() + begin, groups.rows() + end, unique->flat<int64_t>().data() + begin);
    });
    args.table_type = TableTypeOf(dtype_);
    args.output = output_;
    args.table = Data(table.tensor());
    args.values = DataOrNull(values);
    args.sums = Data(*sums);
    args.embeddings = DataOrNull(embeddings);
    args.d_interaction = Data(*d_interaction);
    args.d_embeddings = DataOrNull(d_embeddings);
    OP_REQUIRES_OK(ctx, Allocate(ctx, 3, args.weights ? Sizes{groups.size(), 1} : Sizes{0}, &weight_rows));
    args.d_linear = DataOrNull(d_linear);
    args.weight_rows = MutableData(weight_rows);
    const double scale =
        acc_dtype_ == tensorflow::DT_DOUBLE ? d_penalty->scalar<double>()() : d_penalty->scalar<float>()();
    args.l2 = l2_ * scale;
    args.l2_linear = l2_linear_ * scale;
    if (counts.size()) {
      args.counts = counts[0].flat<int32_t>().data();
      args.prior = priors[0].flat<float>()(0) * scale / shape.num_samples;
      args.prior_linear = priors[0].flat<float>()(1) * scale / shape.num_samples;
      args.prior_softness = priors[0].flat<float>()(2);
    }
    args.groups = &groups;
    args.rows = MutableData(rows);
    args.d_values = need_values_ ? MutableData(d_values) : nullptr;
    FmGradient(args, pool);
  }

 private:
  bool need_values_;
  float l2_, l2_linear_;
};

// The output `penalty` is zero; its gradient, which a loss that it is added to gives, scales the penalty's.
// Values have a type attribute of their own because there may be none of them to take it from.
// A table by value and a table by variable differ in their first input only.
#define DEEPFM_ATTRS                               \
  Attr("T: {float, double, bfloat16, half}")       \
      .Attr("Tacc: {float, double}")               \
      .Attr("Tvalues: {float, double} = DT_FLOAT") \
      .Attr("Tindices: {int32, int64}")            \
      .Attr("num_values: int >= 0")                \
      .Attr("num_row_splits: int >= 0")            \
      .Attr("num_weights: int >= 0")               \
      .Attr("l2: float = 0")                       \
      .Attr("l2_linear: float = 0")                \
      .Attr("num_counts: int >= 0 = 0")            \
      .Attr("output: {'sum', 'scalar', 'vector'}") \
      .Attr("field_splits: list(int) = []")

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

#define DEEPFM_REGISTER(prefix, table_type, is_resource)                                                 \
  REGISTER_OP(prefix "FmInteraction")                                                                    \
      .DEEPFM_ATTRS.Attr("return_embeddings: bool")                                                      \
      .Input("table: " table_type)                                                                       \
      .Input("indices: Tindices")                                                                        \
      .Input("values: num_values * Tvalues")                                                             \
      .Input("row_splits: num_row_splits * int64")                                                       \
      .Input("weights: num_weights * " table_type)                                                       \
      .Input("counts: num_counts * int32")                                                               \
      .Input("priors: num_counts * float")                                                               \
      .Output("interaction: Tacc")                                                                       \
      .Output("sums: Tacc")                                                                              \
      .Output("embeddings: Tacc")                                                                        \
      .Output("linear: Tacc")                                                                            \
      .Output("penalty: Tacc")                                                                           \
      .SetShapeFn(ForwardShape<is_resource>);                                                            \
  REGISTER_OP(prefix "FmInteractionGrad")                                                                \
      .DEEPFM_ATTRS.Attr("num_embeddings: int >= 0")                                                     \
      .Attr("num_d_embeddings: int >= 0")                                                                \
      .Attr("need_values: bool")                                                                         \
      .Input("table: " table_type)                                                                       \
      .Input("indices: Tindices")                                                                        \
      .Input("values: num_values * Tvalues")                                                             \
      .Input("row_splits: num_row_splits * int64")                                                       \
      .Input("weights: num_weights * " table_type)                                                       \
      .Input("counts: num_counts * int32")                                                               \
      .Input("priors: num_counts * float")                                                               \
      .Input("sums: Tacc")                                                                               \
      .Input("embeddings: num_embeddings * Tacc")                                                        \
      .Input("d_interaction: Tacc")                                                                      \
      .Input("d_embeddings: num_d_embeddings * Tacc")                                                    \
      .Input("d_linear: num_weights * Tacc")                                                             \
      .Input("d_penalty: Tacc")                                                                          \
      .Output("unique: int64")                                                                           \
      .Output("rows: T")                                                                                 \
      .Output("d_values: Tacc")                                                                          \
      .Output("weight_rows: T")                                                                          \
      .SetShapeFn(GradientShape<is_resource>);                                                           \
  REGISTER_KERNEL_BUILDER(Name(prefix "FmInteraction").Device(tensorflow::DEVICE_CPU), FmInteractionOp); \
  REGISTER_KERNEL_BUILDER(Name(prefix "FmInteractionGrad").Device(tensorflow::DEVICE_CPU), FmInteractionGradOp);

DEEPFM_REGISTER("DeepfmOps", "T", false)
DEEPFM_REGISTER("DeepfmOpsResource", "resource", true)

}  // namespace
}  // namespace deepfm

// For tests and native_info(): the instruction set in use, and a way to force one (0: not possible here).
extern "C" const char* deepfm_ops_isa() { return deepfm::Isa(); }
extern "C" int deepfm_ops_set_isa(const char* name) { return deepfm::SetIsa(name); }
