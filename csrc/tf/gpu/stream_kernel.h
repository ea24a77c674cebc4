// What the ops share that enqueue their work on a GPU's stream. No header of CUDA's is needed: TensorFlow's own say
// what the stream is, so that one library serves the wheels with and without CUDA.
#ifndef DEEPFM_TF_GPU_STREAM_KERNEL_H_
#define DEEPFM_TF_GPU_STREAM_KERNEL_H_

#include <cstring>
#include <memory>
#include <vector>

#include "../../cuda/fm_cuda.h"
#include "../update_common.h"
#include "tensorflow/core/framework/device.h"
#include "xla/stream_executor/device_memory.h"
#include "xla/stream_executor/stream.h"

namespace deepfm {

// Device memory for the time of a call: TensorFlow's allocator hands it out again in the order of the stream.
class TempMemory : public cuda::Memory {
 public:
  explicit TempMemory(OpKernelContext* ctx) : ctx_(ctx) {}

  void* Take(size_t bytes) override {
    const int64_t size = std::max<int64_t>(bytes, 1);
    Tensor tensor;
    OrFail(ctx_->allocate_temp(tensorflow::DT_INT8, TensorShape({size}), &tensor));
    tensors_.push_back(tensor);
    return MutableData(&tensor);
  }

  // A vector of `length` elements at an address in what was taken, which it keeps.
  Tensor At(const void* data, DataType dtype, int64_t length) const {
    const int64_t bytes = length * tensorflow::DataTypeSize(dtype);
    for (const Tensor& taken : tensors_) {
      const int64_t begin = static_cast<const char*>(data) - static_cast<const char*>(Data(taken));
      if (begin < 0 || begin + bytes > taken.NumElements()) continue;
      Tensor result;
      OrFail(result.BitcastFrom(taken.Slice(begin, begin + bytes), dtype, TensorShape({length})));
      return result;
    }
    throw Failure{absl::InternalError("the memory was not taken here")};
  }

 private:
  OpKernelContext* const ctx_;
  std::vector<Tensor> tensors_;
};

// One call of an op: its stream, memory, and what the kernels tell the host at its end.
class StreamCall {
 public:
  explicit StreamCall(OpKernelContext* ctx)
      : memory(ctx),
        ctx_(ctx),
        context_(ctx->op_device_context()),
        device_(static_cast<tensorflow::Device*>(ctx->device())) {
    tensorflow::AllocatorAttributes on_host;
    on_host.set_on_host(true);
    on_host.set_gpu_compatible(true);
    const TensorShape shape({static_cast<int64_t>(sizeof(Found))});
    OrFail(ctx->allocate_temp(tensorflow::DT_INT8, shape, &on_device_));
    OrFail(ctx->allocate_temp(tensorflow::DT_INT8, shape, &on_host_, on_host));
    cuda::NoErrors(report(), stream());
  }

  // Null, which is the default stream, on a device that is not CUDA's.
  cuda::Stream stream() const {
    return static_cast<cuda::Stream>(context_->stream()->platform_specific_handle().stream);
  }

  cuda::Report* report() { return &static_cast<Found*>(MutableData(&on_device_))->report; }

  // Groups the rows; their number is told at the end.
  cuda::Groups Group(const Tensor& indices, int64_t num_rows) {
    Require(indices.NumElements() < int64_t{1} << 31, "indices on a GPU must be fewer than 2^31, got ",
            indices.NumElements());
    const cuda::Groups groups = cuda::GroupRows(Data(indices), IndexTypeOf(indices), indices.NumElements(), num_rows,
                                                report(), &memory, stream());
    stream_executor::DeviceMemoryBase to(&static_cast<Found*>(MutableData(&on_device_))->num_groups, sizeof(int64_t));
    const stream_executor::DeviceMemoryBase from(const_cast<int64_t*>(groups.size), sizeof(int64_t));
    OrFail(context_->stream()->Memcpy(&to, from, sizeof(int64_t)));
    return groups;
  }

  // The field_splits, which are the kernel's, where the device reads them.
  void BringFieldSplits(FmShape* shape) {
    if (!shape->field_splits) return;
    const size_t bytes = (shape->num_fields + 1) * sizeof(int64_t);
    void* there = memory.Take(bytes);
    stream_executor::DeviceMemoryBase to(there, bytes);
    OrFail(context_->stream()->Memcpy(&to, shape->field_splits, bytes));
    shape->field_splits = static_cast<int64_t*>(there);
  }

  void SetToZero(Tensor* tensor) {
    stream_executor::DeviceMemoryBase to(MutableData(tensor), tensor->tensor_data().size());
    OrFail(context_->stream()->MemZero(&to, to.size()));
  }

  // OwnBuffer, in the order of the stream.
  void Own(tensorflow::Var* var) {
    OwnBuffer(ctx_, var, {}, [this](const Tensor& from, Tensor* to) {
      Status status;  // of enqueuing it
      context_->CopyTensorInSameDevice(&from, device_, to, [&status](const Status& copied) { status = copied; });
      OrFail(status);
    });
  }

  void* Allocate(int output, const Sizes& sizes) {
    TensorShape shape;
    OrFail(TensorShape::BuildTensorShape(sizes, &shape));
    Tensor* tensor = nullptr;
    OrFail(ctx_->allocate_output(output, shape, &tensor));
    return MutableData(tensor);
  }

  Tensor AllocateTemp(DataType dtype, const Sizes& sizes) {
    TensorShape shape;
    OrFail(TensorShape::BuildTensorShape(sizes, &shape));
    Tensor tensor;
    OrFail(ctx_->allocate_temp(dtype, shape, &tensor));
    return tensor;
  }

  // Calls `then` with the status of the copy once the host has what was found.
  void Fetch(std::function<void(const Status&)> then) {
    context_->CopyDeviceTensorToCPU(&on_device_, "", device_, &on_host_, std::move(then));
  }

  // Fails as the op on a CPU does.
  void Check() const {
    const cuda::Report& found = this->found().report;
    if (found.sample != cuda::Report::kNone) FailRowSplits(found.sample, found.begin, found.end, num_samples);
    if (found.pair != cuda::Report::kNone) FailIndex(found.pair, found.index, indices_sizes, num_rows);
  }
  int64_t num_groups() const { return found().num_groups; }

  TempMemory memory;
  // For the texts of errors.
  Sizes indices_sizes;
  int64_t num_rows = 0, num_samples = 0;
  std::function<void()> finish = [] {};  // sets outputs whose sizes the host has learned

 private:
  struct Found {
    cuda::Report report;
    int64_t num_groups;
  };
  Found found() const {
    Found found;
    std::memcpy(&found, Data(on_host_), sizeof found);
    return found;
  }

  OpKernelContext* const ctx_;
  tensorflow::DeviceContext* const context_;
  tensorflow::Device* const device_;
  Tensor on_device_, on_host_;
};

// An op that enqueues its work, all of it at once and under the locks of its variables, and is done when the host has
// learned what was found: the stream is never waited for. Whatever uses a variable later is later on the stream, so
// that neither the variable's lock nor its tensor is held until then; one more reference to that would make the next
// update copy the whole table.
class StreamKernel : public tensorflow::AsyncOpKernel {
 public:
  using AsyncOpKernel::AsyncOpKernel;

  void ComputeAsync(OpKernelContext* ctx, DoneCallback done) final {
    std::shared_ptr<StreamCall> call;
    const Status enqueued = StatusOf(ctx, [&] {
      call = std::make_shared<StreamCall>(ctx);
      Enqueue(ctx, call.get());
    });
    if (!enqueued.ok()) {
      ctx->SetStatus(enqueued);
      done();
      return;
    }
    call->Fetch([ctx, call, done](const Status& copied) {
      const Status status = !copied.ok() ? copied : StatusOf(ctx, [&] {
        call->Check();
        call->finish();
      });
      if (!status.ok()) ctx->SetStatus(status);
      done();
    });
  }

 protected:
  virtual void Enqueue(OpKernelContext* ctx, StreamCall* call) = 0;
};

}  // namespace deepfm

#endif  // DEEPFM_TF_GPU_STREAM_KERNEL_H_
