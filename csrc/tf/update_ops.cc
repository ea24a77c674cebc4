// The optimizers' update of a variable's rows. No arithmetic.
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "update_common.h"

namespace deepfm {
namespace {

class SparseUpdateOp : public Kernel {
 public:
  explicit SparseUpdateOp(OpKernelConstruction* ctx) : Kernel(ctx), call_(ctx) {}

  void Run(OpKernelContext* ctx) override {
    SparseUpdateInputs in(call_, ctx);
    const Parallel pool = PoolOf(ctx);
    RowGroups groups;
    Group(in.indices, in.args.num_rows, pool, &groups);
    call_.rule.Own(in.tables, 0, 1, &in.args, [ctx](tensorflow::Var* var) { OwnBuffer(ctx, var); });
    in.args.groups = &groups;
    SparseUpdate(in.args, pool);
  }

 private:
  const SparseUpdateCall call_;
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
