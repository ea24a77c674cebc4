// What the ops of the interaction share on every device: attributes, and inputs that are checked. No arithmetic.
#ifndef DEEPFM_TF_FM_COMMON_H_
#define DEEPFM_TF_FM_COMMON_H_

#include <string>
#include <vector>

#include "update_common.h"

namespace deepfm {

// The attributes of the forward and of its gradient.
struct FmCall {
  explicit FmCall(OpKernelConstruction* ctx) : on_device(IsOnDevice(ctx)) {
    std::string name;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("T", &dtype));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("Tacc", &acc_dtype));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("output", &name));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("field_splits", &field_splits));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("order", &order));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("num_field_weights", &num_field_weights));
    OP_REQUIRES(ctx, !on_device || (order == 2 && num_field_weights == 0),
                tensorflow::errors::Unimplemented("an order of 3 and field_weights are for the CPU"));
    output = name == "sum" ? Output::kSum : name == "scalar" ? Output::kScalar : Output::kVector;
    OP_REQUIRES_OK(ctx, RequireAcc(ctx, dtype));
  }

  std::vector<Tables::Input> TableInputs(OpKernelContext* ctx, const std::vector<Tables::Input>& more) const {
    int first = 0, last = 0;
    OrFail(ctx->op_kernel().InputRange("weights", &first, &last));
    Require(last - first <= 1, "weights must be one tensor, got ", last - first);
    std::vector<Tables::Input> inputs = {{0, "table"}};
    if (first < last) inputs.push_back({first, "weights"});
    inputs.insert(inputs.end(), more.begin(), more.end());
    return inputs;
  }

  CheckedShape Check(const Tensor& table, const Tensor& indices, const Tensor* values, const Tensor* splits) const {
    Sizes values_sizes, splits_sizes = splits ? SizesOf(*splits) : Sizes{};
    if (values) {
      Require(values->dtype() == acc_dtype, "values must be ", tensorflow::DataTypeString(acc_dtype),
              " for this table, got ", tensorflow::DataTypeString(values->dtype()));
      values_sizes = SizesOf(*values);
    }
    return CheckedShape(TableTypeOf(dtype), SizesOf(table), SizesOf(indices), values ? &values_sizes : nullptr,
                        splits ? splits->flat<int64_t>().data() : nullptr, splits ? &splits_sizes : nullptr,
                        field_splits.empty() ? nullptr : &field_splits, !on_device);
  }

  const bool on_device;
  int order, num_field_weights;
  DataType dtype, acc_dtype;
  Output output;
  std::vector<int64_t> field_splits;
};

// What every call brings.
struct FmInputs {
  // Whoever updates the tables names what goes with them, too.
  FmInputs(const FmCall& call, OpKernelContext* ctx, const std::vector<Tables::Input>& updated = {},
           bool exclusive = false)
      : tables(ctx, call.dtype, call.TableInputs(ctx, updated), exclusive),
        num_tables(tables.size() - updated.size()),
        indices(ctx->input(1)),
        values(Optional(ctx, "values")),
        checked(call.Check(tables[0], indices, values, Optional(ctx, "row_splits"))),
        shape(ShapeOf(call, ctx)) {
    if (num_tables > 1) {
      const Sizes weights_sizes = SizesOf(tables[1]);
      checked.CheckWeights(&weights_sizes);
      weights = Data(tables[1]);
    }
    const Tensor* of_fields = Optional(ctx, "field_weights");
    const Sizes of_fields_sizes = of_fields ? SizesOf(*of_fields) : Sizes{};
    checked.CheckInteraction(call.order, of_fields ? &of_fields_sizes : nullptr);
    Require(!of_fields || of_fields->dtype() == call.acc_dtype, "field_weights must be ",
            tensorflow::DataTypeString(call.acc_dtype), " for this table");
    field_weights = DataOrNull(of_fields);
    // The reader of a table that is never updated gains by them as much as others.
    for (size_t i = 0; i < num_tables && !call.on_device; ++i)
      if (tables.variable(i)) PreferHugePagesOnce(Data(tables[i]), tables[i].tensor_data().size());
  }

  const Tables tables;
  const size_t num_tables;  // 1, or 2 with first-order weights
  const Tensor& indices;
  const Tensor* const values;
  const CheckedShape checked;
  const FmShape shape;
  const void* weights = nullptr;
  const void* field_weights = nullptr;

 private:
  FmShape ShapeOf(const FmCall& call, OpKernelContext* ctx) const {
    FmShape shape = checked.shape;
    if (checked.ragged && call.on_device) shape.row_splits = Optional(ctx, "row_splits")->flat<int64_t>().data();
    return shape;
  }
};

struct FmForwardCall : FmCall {
  explicit FmForwardCall(OpKernelConstruction* ctx) : FmCall(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("return_embeddings", &return_embeddings));
  }

  ForwardArgs Read(const FmInputs& in) const {
    ForwardArgs args;
    args.shape = in.shape;
    args.table_type = TableTypeOf(dtype);
    args.index_type = IndexTypeOf(in.indices);
    args.output = output;
    args.table = Data(in.tables[0]);
    args.indices = Data(in.indices);
    args.values = DataOrNull(in.values);
    args.weights = in.weights;
    args.order = order;
    args.field_weights = in.field_weights;
    return args;
  }

  // All outputs but the penalty; allocate(number, sizes) makes one.
  template <typename Allocate>
  void Outputs(const FmInputs& in, ForwardArgs* args, Allocate allocate) const {
    args->interaction = allocate(0, in.checked.Interaction(output));
    args->sums = allocate(1, {in.shape.num_samples, in.shape.dim});
    void* embeddings = allocate(2, return_embeddings ? in.checked.Embeddings() : Sizes{0});
    args->embeddings = return_embeddings ? embeddings : nullptr;
    void* linear = allocate(3, in.weights ? Sizes{in.shape.num_samples, 1} : Sizes{0});
    args->linear = in.weights ? linear : nullptr;
  }

  bool return_embeddings;
};

// The inputs of a gradient, as a device that does not read them sees them: without groups and outputs, the strengths of
// the penalty not multiplied with d_penalty yet, nor those of the priors read.
struct GradientInputs {
  GradientArgs args;
  const Tensor *d_penalty, *priors;  // priors: null without counts
};

struct FmGradientCall : FmCall {
  explicit FmGradientCall(OpKernelConstruction* ctx) : FmCall(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("l2", &l2));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("l2_linear", &l2_linear));
  }

  GradientInputs Read(OpKernelContext* ctx, const FmInputs& in) const {
    const FmShape& shape = in.shape;
    const Tensor *sums, *d_interaction, *d_penalty;
    OrFail(ctx->input("sums", &sums));
    OrFail(ctx->input("d_interaction", &d_interaction));
    OrFail(ctx->input("d_penalty", &d_penalty));
    const Tensor *embeddings = Optional(ctx, "embeddings"), *d_embeddings = Optional(ctx, "d_embeddings"),
                 *d_linear = Optional(ctx, "d_linear"), *counts = Optional(ctx, "counts"),
                 *priors = Optional(ctx, "priors");
    const Sizes embeddings_sizes = embeddings ? SizesOf(*embeddings) : Sizes{},
                d_embeddings_sizes = d_embeddings ? SizesOf(*d_embeddings) : Sizes{};
    in.checked.CheckGradient(output, SizesOf(*sums), SizesOf(*d_interaction), embeddings ? &embeddings_sizes : nullptr,
                             d_embeddings ? &d_embeddings_sizes : nullptr, order == 3 || in.field_weights);
    CheckShape("d_penalty", SizesOf(*d_penalty), {});
    if (d_linear) CheckShape("d_linear", SizesOf(*d_linear), {shape.num_samples, 1});
    if (counts) CheckShape("counts", SizesOf(*counts), {shape.num_rows});
    if (counts) CheckShape("priors", SizesOf(*priors), {3});
    GradientArgs args;
    args.shape = shape;
    args.table_type = TableTypeOf(dtype);
    args.output = output;
    args.table = Data(in.tables[0]);
    args.values = DataOrNull(in.values);
    args.sums = Data(*sums);
    args.embeddings = DataOrNull(embeddings);
    args.d_interaction = Data(*d_interaction);
    args.d_embeddings = DataOrNull(d_embeddings);
    args.weights = in.weights;
    args.d_linear = DataOrNull(d_linear);
    args.order = order;
    args.field_weights = in.field_weights;
    args.l2 = l2;
    args.l2_linear = l2_linear;
    args.counts = counts ? counts->flat<int32_t>().data() : nullptr;
    return {args, d_penalty, priors};
  }

  float l2, l2_linear;
};

// A gradient and the update by it of its tables.
struct FmUpdateCall : FmGradientCall {
  explicit FmUpdateCall(OpKernelConstruction* ctx) : FmGradientCall(ctx), rule(ctx) {}

  // The variables that go with the tables, for FmInputs.
  std::vector<Tables::Input> Updated(OpKernelContext* ctx) const {
    int first = 0, last = 0;
    OrFail(ctx->op_kernel().InputRange("variables", &first, &last));
    std::vector<Tables::Input> updated;
    const int each = rule.num_variables();
    Require(each > 0 || first == last, "variables must be none, got ", last - first);
    for (int i = first; i < last; ++i) updated.push_back({i, rule.NameOf((i - first) % each)});
    return updated;
  }

  void Read(OpKernelContext* ctx, const FmInputs& in, UpdateArgs* updates) const {
    const size_t variables = in.tables.size() - in.num_tables;
    Require(variables == in.num_tables * rule.num_variables(), "variables must be ",
            in.num_tables * rule.num_variables(), ", got ", variables);
    OpInputList hyper;
    OrFail(ctx->input_list("hyper", &hyper));
    Require(hyper.size() == static_cast<int>(in.num_tables), "hyper must be ", in.num_tables, ", got ", hyper.size());
    const Tensor* counts = Optional(ctx, "counts_of_rare");
    for (size_t i = 0; i < in.num_tables; ++i) updates[i] = rule.Read(in.tables, i, FirstOf(in, i), hyper[i], counts);
  }

  // See UpdateRule::Own.
  template <typename OwnOne>
  void Own(const FmInputs& in, UpdateArgs* updates, GradientArgs* gradient, OwnOne own) const {
    for (size_t i = 0; i < in.num_tables; ++i) rule.Own(in.tables, i, FirstOf(in, i), &updates[i], own);
    gradient->table = updates[0].table;  // owning it may have moved it
    if (in.weights) gradient->weights = updates[1].table;
  }

  size_t FirstOf(const FmInputs& in, size_t table) const { return in.num_tables + table * rule.num_variables(); }

  const UpdateRule rule;
};

}  // namespace deepfm

#endif  // DEEPFM_TF_FM_COMMON_H_
