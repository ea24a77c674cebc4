// Which rows of a table that is split over machines a batch needs, by part. No arithmetic.
#include "../kernels/split.h"
#include "op_common.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace deepfm {
namespace {

class SplitRowsOp : public Kernel {
 public:
  explicit SplitRowsOp(OpKernelConstruction* ctx) : Kernel(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("parts", &parts_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("num_rows", &num_rows_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("Tlocal", &local_type_));
    const int64_t most = (num_rows_ + parts_ - 1) / parts_;
    OP_REQUIRES(ctx, local_type_ == tensorflow::DT_INT64 || most <= std::numeric_limits<int32_t>::max(),
                InvalidArgument("Tlocal must be int64 for parts of ", most, " rows"));
  }

  void Run(OpKernelContext* ctx) override {
    const Tensor& indices = ctx->input(0);
    const Parallel pool = PoolOf(ctx);
    RowGroups groups;
    Group(indices, num_rows_, pool, &groups);
    if (local_type_ == tensorflow::DT_INT32) {
      Split<int32_t>(ctx, groups, SizesOf(indices), pool);
    } else {
      Split<int64_t>(ctx, groups, SizesOf(indices), pool);
    }
  }

 private:
  template <typename I>
  void Split(OpKernelContext* ctx, const RowGroups& groups, const Sizes& sizes, const Parallel& pool) {
    const std::vector<int64_t> counts = CountOfParts(groups, parts_);
    std::vector<I*> local;
    for (int part = 0; part < parts_; ++part) local.push_back(static_cast<I*>(Allocate(ctx, 1 + part, {counts[part]})));
    SplitRows(groups, counts, local, static_cast<int64_t*>(Allocate(ctx, 0, sizes)), pool);
  }

  int64_t parts_, num_rows_;
  DataType local_type_;
};

REGISTER_OP("DeepfmOpsSplitRows")
    .Attr("Tindices: {int32, int64}")
    .Attr("Tlocal: {int32, int64}")
    .Attr("parts: int >= 1")
    .Attr("num_rows: int >= 0")
    .Input("indices: Tindices")
    .Output("positions: int64")
    .Output("local: parts * Tlocal")
    .SetShapeFn([](tensorflow::shape_inference::InferenceContext* c) {
      c->set_output(0, c->input(0));
      for (int part = 1; part < c->num_outputs(); ++part) c->set_output(part, c->Vector(c->UnknownDim()));
      return absl::OkStatus();
    });
REGISTER_KERNEL_BUILDER(Name("DeepfmOpsSplitRows").Device(tensorflow::DEVICE_CPU), SplitRowsOp);

}  // namespace
}  // namespace deepfm
