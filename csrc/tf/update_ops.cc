// The optimizers' update of a variable's rows. No arithmetic.
#include "../kernels/sparse_update.h"
#include "op_common.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace deepfm {
namespace {

using tensorflow::Var;
using tensorflow::core::RefCountPtr;

// Makes a variable's buffer its own, so that rows can be written in place: from now on whoever reads
// the whole variable gets a copy. What TensorFlow's own sparse updates do.
Status OwnBuffer(OpKernelContext* ctx, Var* var) {
  if (var->copy_on_read_mode.load()) return absl::OkStatus();
  if (!var->tensor()->RefCountIsOne()) {
    Tensor copy;
    tensorflow::AllocatorAttributes on_host;
    on_host.set_on_host(true);
    TF_RETURN_IF_ERROR(ctx->allocate_temp(var->tensor()->dtype(), var->tensor()->shape(), &copy, on_host));
    std::copy_n(var->tensor()->tensor_data().data(), copy.tensor_data().size(), static_cast<char*>(MutableData(&copy)));
    *var->tensor() = copy;
  }
  var->copy_on_read_mode.store(true);
  PreferHugePages(MutableData(var->tensor()), var->tensor()->tensor_data().size());
  return absl::OkStatus();
}

class SparseUpdateOp : public Kernel {
 public:
  explicit SparseUpdateOp(OpKernelConstruction* ctx) : Kernel(ctx) {
    static const char* const names[] = {"sgd", "adagrad", "row_wise_adagrad", "lazy_adam", "ftrl"};
    std::string rule;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("rule", &rule));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("T", &dtype_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("num_slots", &num_slots_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("num_lags", &num_lags_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("num_counts", &num_counts_));
    OP_REQUIRES_OK(ctx, RequireAcc(ctx, dtype_));
    rule_ = static_cast<Rule>(std::find(names, names + 5, rule) - names);
    OP_REQUIRES(ctx, num_slots_ == ShapeOf(rule_).slots,
                InvalidArgument(rule, " has ", ShapeOf(rule_).slots, " slots, got ", num_slots_));
    OP_REQUIRES(ctx, num_lags_ <= 1 && num_counts_ <= 1,
                InvalidArgument("lags and counts must be one each, got ", num_lags_, " and ", num_counts_));
    OP_REQUIRES(ctx, num_lags_ == 0 || dtype_ == tensorflow::DT_FLOAT || dtype_ == tensorflow::DT_DOUBLE,
                InvalidArgument("a lag must be float or double, got ", tensorflow::DataTypeString(dtype_)));
  }

  void Run(OpKernelContext* ctx) override {
    RefCountPtr<Var> vars[2 + kMostSlots];
    const int num_vars = 1 + num_slots_ + num_lags_;
    std::vector<tensorflow::mutex*> mutexes;
    for (int i = 0; i < num_vars; ++i) {
      OrFail(tensorflow::LookupResource(ctx, tensorflow::HandleFromInput(ctx, i), &vars[i]));
      mutexes.push_back(vars[i]->mu());
    }
    std::sort(mutexes.begin(), mutexes.end());  // everyone locks in this order
    Require(std::adjacent_find(mutexes.begin(), mutexes.end()) == mutexes.end(),
            "the table and its slots must be different variables");
    std::vector<std::unique_ptr<tensorflow::mutex_lock>> locks;
    for (tensorflow::mutex* mutex : mutexes) locks.push_back(std::make_unique<tensorflow::mutex_lock>(*mutex));

    const Tensor& indices = ctx->input(num_vars);
    const Tensor& gradient = ctx->input(num_vars + 1);
    const Tensor& hyper = ctx->input(num_vars + 2);
    for (int i = 0; i < num_vars; ++i) {
      const char* name = i == 0 ? "table" : i <= num_slots_ ? "a slot" : "a lag";
      if (!vars[i]->is_initialized) OrFail(FailedPrecondition(name, " is a variable that was not initialized"));
      Require(vars[i]->tensor()->dtype() == dtype_, name, " holds ",
              tensorflow::DataTypeString(vars[i]->tensor()->dtype()), ", the gradient is ",
              tensorflow::DataTypeString(dtype_));
    }
    const Sizes shape = SizesOf(*vars[0]->tensor());
    Require(!shape.empty(), "table must have rows, got a scalar");
    Require(indices.dims() == 1, "indices must be rank 1 [n], got shape ", TextOf(SizesOf(indices)));
    Sizes want = shape;
    want[0] = indices.NumElements();
    CheckShape("gradient", SizesOf(gradient), want);
    CheckShape("hyper", SizesOf(hyper), {ShapeOf(rule_).hyper + num_lags_ + 2 * num_counts_});
    UpdateArgs args;
    args.rule = rule_;
    args.table_type = TableTypeOf(dtype_);
    args.num_rows = shape[0];
    args.dim = 1;
    for (size_t i = 1; i < shape.size(); ++i) args.dim *= shape[i];
    for (int i = 1; i < num_vars; ++i) {
      const Tensor& slot = *vars[i]->tensor();
      const bool by_row = i <= num_slots_ && rule_ == Rule::kRowWiseAdagrad;
      const int64_t elements = by_row ? shape[0] : vars[0]->tensor()->NumElements();
      Require(slot.NumElements() == elements, "a slot must have ", elements, " elements, got shape ",
              TextOf(SizesOf(slot)));
    }
    if (num_counts_) {
      CheckShape("counts", SizesOf(ctx->input(num_vars + 3)), {shape[0]});
      args.counts = ctx->input(num_vars + 3).flat<int32_t>().data();
    }
    const Parallel pool = PoolOf(ctx);
    RowGroups groups;
    CheckIndices(groups.Build(Data(indices), IndexTypeOf(indices), indices.NumElements(), shape[0], pool),
                 Data(indices), IndexTypeOf(indices), SizesOf(indices), shape[0]);
    for (int i = 0; i < num_vars; ++i) OrFail(OwnBuffer(ctx, vars[i].get()));
    args.table = MutableData(vars[0]->tensor());
    for (int i = 1; i <= num_slots_; ++i) args.slots[i - 1] = MutableData(vars[i]->tensor());
    if (num_lags_) args.lag = MutableData(vars[num_vars - 1]->tensor());
    args.gradient = Data(gradient);
    args.hyper = Data(hyper);
    args.groups = &groups;
    SparseUpdate(args, pool);
  }

 private:
  Rule rule_;
  DataType dtype_;
  int num_slots_, num_lags_, num_counts_;
};

REGISTER_OP("DeepfmOpsSparseUpdate")
    .Attr("T: {float, double, bfloat16, half}")
    .Attr("Tacc: {float, double}")
    .Attr("Tindices: {int32, int64}")
    .Attr("rule: {'sgd', 'adagrad', 'row_wise_adagrad', 'lazy_adam', 'ftrl'}")
    .Attr("num_slots: int >= 0")
    .Attr("num_lags: int >= 0")
    .Attr("num_counts: int >= 0")
    .Input("table: resource")
    .Input("slots: num_slots * resource")
    .Input("lags: num_lags * resource")
    .Input("indices: Tindices")
    .Input("gradient: T")
    .Input("hyper: Tacc")
    .Input("counts: num_counts * int32")
    .SetShapeFn(tensorflow::shape_inference::NoOutputs);
REGISTER_KERNEL_BUILDER(Name("DeepfmOpsSparseUpdate").Device(tensorflow::DEVICE_CPU), SparseUpdateOp);

}  // namespace
}  // namespace deepfm
