// The ops' kernels for a GPU: those of the CPU, in the same order and with the same checks, on a stream. No arithmetic.
#include "../fm_common.h"
#include "stream_kernel.h"

namespace deepfm {
namespace {

// What a call needs to tell what is wrong with its inputs.
void Describe(const FmInputs& in, StreamCall* call) {
  call->indices_sizes = SizesOf(in.indices);
  call->num_rows = in.shape.num_rows;
  call->num_samples = in.shape.num_samples;
}

// The gradient's arguments where the device reads them.
GradientArgs OnDevice(const FmInputs& in, const GradientInputs& read, StreamCall* call, cuda::Scalars* scalars) {
  Describe(in, call);
  GradientArgs args = read.args;
  call->BringFieldSplits(&args.shape);
  scalars->penalty = read.d_penalty->flat<float>().data();
  if (read.priors) scalars->priors = read.priors->flat<float>().data();
  return args;
}

class FmInteractionGpuOp : public StreamKernel {
 public:
  explicit FmInteractionGpuOp(OpKernelConstruction* ctx) : StreamKernel(ctx), call_(ctx) {}

 protected:
  void Enqueue(OpKernelContext* ctx, StreamCall* call) override {
    const FmInputs in(call_, ctx);
    Describe(in, call);
    ForwardArgs args = call_.Read(in);
    call->BringFieldSplits(&args.shape);
    call_.Outputs(in, &args, [call](int output, const Sizes& sizes) { return call->Allocate(output, sizes); });
    call->Allocate(4, {});
    call->SetToZero(ctx->mutable_output(4));  // the penalty
    cuda::FmForward(args, call->report(), &call->memory, call->stream());
  }

 private:
  const FmForwardCall call_;
};

class FmInteractionGradGpuOp : public StreamKernel {
 public:
  explicit FmInteractionGradGpuOp(OpKernelConstruction* ctx) : StreamKernel(ctx), call_(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("need_values", &need_values_));
  }

 protected:
  // How many rows there are is not known yet: there is room for as many as pairs, of which the outputs are a part.
  void Enqueue(OpKernelContext* ctx, StreamCall* call) override {
    const FmInputs in(call_, ctx);
    cuda::Scalars scalars;
    GradientArgs args = OnDevice(in, call_.Read(ctx, in), call, &scalars);
    const cuda::Groups groups = call->Group(in.indices, in.shape.num_rows);
    Tensor rows = call->AllocateTemp(call_.dtype, {in.shape.num_pairs, in.shape.dim});
    args.rows = MutableData(&rows);
    void* d_values = call->Allocate(2, need_values_ ? SizesOf(in.indices) : Sizes{0});
    args.d_values = need_values_ ? d_values : nullptr;
    Tensor weight_rows;
    if (in.weights)
      weight_rows = call->AllocateTemp(call_.dtype, {in.shape.num_pairs, 1});
    else
      call->Allocate(3, {0});
    args.weight_rows = in.weights ? MutableData(&weight_rows) : nullptr;
    call->Allocate(4, {0});  // there are no field weights here
    cuda::FmGradient(args, scalars, groups, call->report(), &call->memory, call->stream());
    const Tensor unique = call->memory.At(groups.rows, tensorflow::DT_INT64, in.shape.num_pairs);
    const bool has_weights = in.weights;
    call->finish = [=] {
      const int64_t size = call->num_groups();
      ctx->set_output(0, unique.Slice(0, size));
      ctx->set_output(1, rows.Slice(0, size));
      if (has_weights) ctx->set_output(3, weight_rows.Slice(0, size));
    };
  }

 private:
  const FmGradientCall call_;
  bool need_values_;
};

class FmUpdateGpuOp : public StreamKernel {
 public:
  explicit FmUpdateGpuOp(OpKernelConstruction* ctx) : StreamKernel(ctx), call_(ctx) {}

 protected:
  void Enqueue(OpKernelContext* ctx, StreamCall* call) override {
    const FmInputs in(call_, ctx, call_.Updated(ctx), true);
    UpdateArgs updates[2];
    call_.Read(ctx, in, updates);
    cuda::Scalars scalars;
    GradientArgs gradient = OnDevice(in, call_.FmGradientCall::Read(ctx, in), call, &scalars);
    const cuda::Groups groups = call->Group(in.indices, in.shape.num_rows);
    call_.Own(in, updates, &gradient, [call](tensorflow::Var* var) { call->Own(var); });
    cuda::FmUpdate(gradient, scalars, updates[0], in.weights ? &updates[1] : nullptr, groups, call->report(),
                   &call->memory, call->stream());
  }

 private:
  const FmUpdateCall call_;
};

class SparseUpdateGpuOp : public StreamKernel {
 public:
  explicit SparseUpdateGpuOp(OpKernelConstruction* ctx) : StreamKernel(ctx), call_(ctx) {}

 protected:
  void Enqueue(OpKernelContext* ctx, StreamCall* call) override {
    SparseUpdateInputs in(call_, ctx);
    call->indices_sizes = SizesOf(in.indices);
    call->num_rows = in.args.num_rows;
    const cuda::Groups groups = call->Group(in.indices, in.args.num_rows);
    call_.rule.Own(in.tables, 0, 1, &in.args, [call](tensorflow::Var* var) { call->Own(var); });
    cuda::SparseUpdate(in.args, groups, call->report(), &call->memory, call->stream());
  }

 private:
  const SparseUpdateCall call_;
};

#define DEEPFM_REGISTER_ON_GPU(name, kernel)                                                                       \
  REGISTER_KERNEL_BUILDER(Name(name).Device(tensorflow::DEVICE_GPU).TypeConstraint<float>("T"), kernel);           \
  REGISTER_KERNEL_BUILDER(Name(name).Device(tensorflow::DEVICE_GPU).TypeConstraint<Eigen::bfloat16>("T"), kernel); \
  REGISTER_KERNEL_BUILDER(Name(name).Device(tensorflow::DEVICE_GPU).TypeConstraint<Eigen::half>("T"), kernel);

DEEPFM_REGISTER_ON_GPU("DeepfmOpsFmInteraction", FmInteractionGpuOp)
DEEPFM_REGISTER_ON_GPU("DeepfmOpsResourceFmInteraction", FmInteractionGpuOp)
DEEPFM_REGISTER_ON_GPU("DeepfmOpsFmInteractionGrad", FmInteractionGradGpuOp)
DEEPFM_REGISTER_ON_GPU("DeepfmOpsResourceFmInteractionGrad", FmInteractionGradGpuOp)
DEEPFM_REGISTER_ON_GPU("DeepfmOpsResourceFmUpdate", FmUpdateGpuOp)
DEEPFM_REGISTER_ON_GPU("DeepfmOpsSparseUpdate", SparseUpdateGpuOp)

}  // namespace
}  // namespace deepfm
