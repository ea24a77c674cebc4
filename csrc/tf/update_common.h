// What the ops that update rows share: attributes, and the variables of a rule.
#ifndef DEEPFM_TF_UPDATE_COMMON_H_
#define DEEPFM_TF_UPDATE_COMMON_H_

#include <algorithm>
#include <string>
#include <vector>

#include "../kernels/sparse_update.h"
#include "op_common.h"

namespace deepfm {

// Makes a variable's buffer its own, so that rows can be written in place: from now on whoever reads
// the whole variable gets a copy. What TensorFlow's own sparse updates do. copy(from, to) copies a tensor.
template <typename Copy>
void OwnBuffer(OpKernelContext* ctx, tensorflow::Var* var, tensorflow::AllocatorAttributes where, Copy copy) {
  if (var->copy_on_read_mode.load()) return;
  if (!var->tensor()->RefCountIsOne()) {
    Tensor own;
    OrFail(ctx->allocate_temp(var->tensor()->dtype(), var->tensor()->shape(), &own, where));
    copy(*var->tensor(), &own);
    *var->tensor() = own;
  }
  var->copy_on_read_mode.store(true);
}

// On the host.
inline void OwnBuffer(OpKernelContext* ctx, tensorflow::Var* var) {
  if (var->copy_on_read_mode.load()) return;
  tensorflow::AllocatorAttributes on_host;
  on_host.set_on_host(true);
  OwnBuffer(ctx, var, on_host, [](const Tensor& from, Tensor* to) {
    std::copy_n(from.tensor_data().data(), from.tensor_data().size(), static_cast<char*>(MutableData(to)));
  });
  PreferHugePages(MutableData(var->tensor()), var->tensor()->tensor_data().size());
}

// A rule, from the attributes that all ops of updates have.
struct UpdateRule {
  explicit UpdateRule(OpKernelConstruction* ctx) {
    static const char* const names[] = {"sgd", "adagrad", "row_wise_adagrad", "lazy_adam", "ftrl"};
    std::string name;
    DataType dtype;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("rule", &name));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("T", &dtype));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("num_slots", &num_slots));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("num_lags", &num_lags));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("num_counts_of_rare", &num_counts));
    rule = static_cast<Rule>(std::find(names, names + 5, name) - names);
    OP_REQUIRES(ctx, num_slots == ShapeOf(rule).slots,
                InvalidArgument(name, " has ", ShapeOf(rule).slots, " slots, got ", num_slots));
    OP_REQUIRES(ctx, num_lags <= 1 && num_counts <= 1,
                InvalidArgument("lags and counts must be one each, got ", num_lags, " and ", num_counts));
    OP_REQUIRES(ctx, num_lags == 0 || dtype == tensorflow::DT_FLOAT || dtype == tensorflow::DT_DOUBLE,
                InvalidArgument("a lag must be float or double, got ", tensorflow::DataTypeString(dtype)));
  }

  int num_variables() const { return num_slots + num_lags; }  // that a table brings along

  // The names of these, for errors.
  const char* NameOf(int i) const { return i < num_slots ? "a slot" : "a lag"; }

  // An update of tables[table] with the slots and lags at `first`; the groups and the gradient are left to the caller.
  UpdateArgs Read(const Tables& tables, size_t table, size_t first, const Tensor& hyper, const Tensor* counts) const {
    const Sizes shape = SizesOf(tables[table]);
    Require(!shape.empty(), "table must have rows, got a scalar");
    UpdateArgs args;
    args.rule = rule;
    args.table_type = TableTypeOf(tables[table].dtype());
    args.num_rows = shape[0];
    args.dim = 1;
    for (size_t i = 1; i < shape.size(); ++i) args.dim *= shape[i];
    for (int i = 0; i < num_variables(); ++i) {
      const bool by_row = i < num_slots && rule == Rule::kRowWiseAdagrad;
      const int64_t elements = by_row ? shape[0] : tables[table].NumElements();
      Require(tables[first + i].NumElements() == elements, NameOf(i), " must have ", elements, " elements, got shape ",
              TextOf(SizesOf(tables[first + i])));
    }
    CheckShape("hyper", SizesOf(hyper), {ShapeOf(rule).hyper + num_lags + 2 * num_counts});
    if (counts) CheckShape("counts", SizesOf(*counts), {shape[0]});
    args.hyper = Data(hyper);
    args.counts = counts ? counts->flat<int32_t>().data() : nullptr;
    return args;
  }

  // To be called when nothing can fail any more: from now on the variables are written to. own_buffer(variable) is one
  // of OwnBuffer.
  template <typename OwnOne>
  void Own(const Tables& tables, size_t table, size_t first, UpdateArgs* args, OwnOne own_buffer) const {
    auto own = [&](size_t i) {
      own_buffer(tables.variable(i));
      return MutableData(tables.variable(i)->tensor());
    };
    args->table = own(table);
    for (int i = 0; i < num_slots; ++i) args->slots[i] = own(first + i);
    if (num_lags) args->lag = own(first + num_slots);
  }

  Rule rule;
  int num_slots, num_lags, num_counts;
};

// The attributes of an update by a gradient that is given.
struct SparseUpdateCall {
  explicit SparseUpdateCall(OpKernelConstruction* ctx) : rule(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("T", &dtype));
    OP_REQUIRES_OK(ctx, RequireAcc(ctx, dtype));
  }

  std::vector<Tables::Input> TableInputs() const {
    std::vector<Tables::Input> inputs = {{0, "table"}};
    for (int i = 0; i < rule.num_variables(); ++i) inputs.push_back({1 + i, rule.NameOf(i)});
    return inputs;
  }

  const UpdateRule rule;
  DataType dtype;
};

struct SparseUpdateInputs {
  SparseUpdateInputs(const SparseUpdateCall& call, OpKernelContext* ctx)
      : tables(ctx, call.dtype, call.TableInputs(), true), indices(ctx->input(tables.size())) {
    const int next = tables.size() + 1;
    const Tensor& gradient = ctx->input(next);
    args = call.rule.Read(tables, 0, 1, ctx->input(next + 1), call.rule.num_counts ? &ctx->input(next + 2) : nullptr);
    Require(indices.dims() == 1, "indices must be rank 1 [n], got shape ", TextOf(SizesOf(indices)));
    Sizes want = SizesOf(tables[0]);
    want[0] = indices.NumElements();
    CheckShape("gradient", SizesOf(gradient), want);
    args.gradient = Data(gradient);
  }

  const Tables tables;
  const Tensor& indices;
  UpdateArgs args;
};

#define DEEPFM_UPDATE_ATTRS                                                 \
  Attr("rule: {'sgd', 'adagrad', 'row_wise_adagrad', 'lazy_adam', 'ftrl'}") \
      .Attr("num_slots: int >= 0")                                          \
      .Attr("num_lags: int >= 0")                                           \
      .Attr("num_counts_of_rare: int >= 0")

}  // namespace deepfm

#endif  // DEEPFM_TF_UPDATE_COMMON_H_
