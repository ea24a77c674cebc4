// The optimizers' update of a variable's rows. No arithmetic.
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "update_common.h"

namespace deepfm {
namespace {

class SparseUpdateOp : public Kernel {
 public:
  explicit SparseUpdateOp(OpKernelConstruction* ctx) : Kernel(ctx), rule_(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("T", &dtype_));
    OP_REQUIRES_OK(ctx, RequireAcc(ctx, dtype_));
  }

  void Run(OpKernelContext* ctx) override {
    const int num_vars = 1 + rule_.num_variables();
    std::vector<Tables::Input> inputs = {{0, "table"}};
    for (int i = 1; i < num_vars; ++i) inputs.push_back({i, rule_.NameOf(i - 1)});
    const Tables tables(ctx, dtype_, inputs, true);
    const Tensor &indices = ctx->input(num_vars), &gradient = ctx->input(num_vars + 1);
    UpdateArgs args =
        rule_.Read(tables, 0, 1, ctx->input(num_vars + 2), rule_.num_counts ? &ctx->input(num_vars + 3) : nullptr);
    Require(indices.dims() == 1, "indices must be rank 1 [n], got shape ", TextOf(SizesOf(indices)));
    Sizes want = SizesOf(tables[0]);
    want[0] = indices.NumElements();
    CheckShape("gradient", SizesOf(gradient), want);
    const Parallel pool = PoolOf(ctx);
    RowGroups groups;
    Group(indices, args.num_rows, pool, &groups);
    rule_.Own(ctx, tables, 0, 1, &args);
    args.gradient = Data(gradient);
    args.groups = &groups;
    SparseUpdate(args, pool);
  }

 private:
  const UpdateRule rule_;
  DataType dtype_;
};

REGISTER_OP("DeepfmOpsSparseUpdate")
    .Attr("T: {float, double, bfloat16, half}")
    .Attr("Tacc: {float, double}")
    .Attr("Tindices: {int32, int64}")
    .DEEPFM_UPDATE_ATTRS.Input("table: resource")
    .Input("slots: num_slots * resource")
    .Input("lags: num_lags * resource")
    .Input("indices: Tindices")
    .Input("gradient: T")
    .Input("hyper: Tacc")
    .Input("counts: num_counts_of_rare * int32")
    .SetShapeFn(tensorflow::shape_inference::NoOutputs);
REGISTER_KERNEL_BUILDER(Name("DeepfmOpsSparseUpdate").Device(tensorflow::DEVICE_CPU), SparseUpdateOp);

}  // namespace
}  // namespace deepfm
