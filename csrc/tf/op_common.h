// What the ops share: the table, the pool, allocation, the messages.
#ifndef DEEPFM_TF_OP_COMMON_H_
#define DEEPFM_TF_OP_COMMON_H_

#include <algorithm>
#include <atomic>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "../kernels/fm.h"
#include "../kernels/scratch.h"
#include "absl/synchronization/notification.h"
#include "tensorflow/core/framework/allocation_description.pb.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/platform/threadpool.h"

namespace deepfm {

using absl::Status;
using tensorflow::DataType;
using tensorflow::OpInputList;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::errors::FailedPrecondition;
using tensorflow::errors::InvalidArgument;

// A table for the time of one Compute: a tensor, or a variable's tensor under a shared lock. The
// variable is never read as a value: in copy-on-read mode that would copy all of it.
class Table {
 public:
  // From the input of this number.
  Status Open(OpKernelContext* ctx, int input, const char* name, DataType dtype) {
    if (ctx->input_dtype(input) != tensorflow::DT_RESOURCE) {
      tensor_ = &ctx->input(input);
    } else {
      TF_RETURN_IF_ERROR(tensorflow::LookupResource(ctx, tensorflow::HandleFromInput(ctx, input), &var_));
      lock_ = std::make_unique<tensorflow::tf_shared_lock>(*var_->mu());
      if (!var_->is_initialized) return FailedPrecondition(name, " is a variable that was not initialized");
      tensor_ = var_->tensor();
    }
    if (tensor_->dtype() != dtype)
      return InvalidArgument(name, " holds ", tensorflow::DataTypeString(tensor_->dtype()), ", the op was made for ",
                             tensorflow::DataTypeString(dtype));
    if (tensor_->dims() != 2)
      return InvalidArgument(name, " must be rank 2 [V, K], got shape ", tensor_->shape().DebugString());
    return absl::OkStatus();
  }
  const Tensor& tensor() const { return *tensor_; }

 private:
  tensorflow::core::RefCountPtr<tensorflow::Var> var_;
  std::unique_ptr<tensorflow::tf_shared_lock> lock_;  // released before var_
  const Tensor* tensor_ = nullptr;
};

inline TableType TableTypeOf(DataType dtype) {
  switch (dtype) {
    case tensorflow::DT_DOUBLE:
      return TableType::kFloat64;
    case tensorflow::DT_BFLOAT16:
      return TableType::kBFloat16;
    case tensorflow::DT_HALF:
      return TableType::kFloat16;
    default:
      return TableType::kFloat32;
  }
}

inline IndexType IndexTypeOf(const Tensor& indices) {
  return indices.dtype() == tensorflow::DT_INT32 ? IndexType::kInt32 : IndexType::kInt64;
}

inline const void* Data(const Tensor& t) { return t.tensor_data().data(); }
inline void* MutableData(Tensor* t) { return const_cast<char*>(t->tensor_data().data()); }
inline const void* DataOrNull(const OpInputList& list) { return list.size() ? Data(list[0]) : nullptr; }

// One call's tasks, taken one by one by the caller and by helpers. A helper that comes too late finds
// none left and touches nothing of the caller's, so the caller never waits for threads to wake up.
struct Job {
  explicit Job(int64_t tasks, const std::function<void(int64_t)>* fn) : tasks(tasks), fn(fn) {}

  void Work() {
    for (int64_t i; (i = next.fetch_add(1)) < tasks;) {
      (*fn)(i);
      if (done.fetch_add(1) + 1 == tasks) all_done.Notify();
    }
  }

  const int64_t tasks;
  const std::function<void(int64_t)>* const fn;  // valid while a task is left
  std::atomic<int64_t> next{0}, done{0};
  absl::Notification all_done;
};

inline Parallel PoolOf(OpKernelContext* ctx) {
  const auto* workers = ctx->device()->tensorflow_cpu_worker_threads();
  Parallel parallel;
  parallel.threads = workers->num_threads;
  parallel.run = [workers](int64_t tasks, const std::function<void(int64_t)>& fn) {
    if (tasks == 1) return fn(0);
    auto job = std::make_shared<Job>(tasks, &fn);
    for (int64_t i = 1; i < std::min<int64_t>(tasks, workers->num_threads); ++i)
      workers->workers->Schedule([job] { job->Work(); });
    job->Work();
    job->all_done.WaitForNotification();
  };
  return parallel;
}

// Sizes of a shape whose product may be more than an int64 holds.
typedef std::vector<int64_t> Sizes;

inline Status CheckShape(const char* name, const Tensor& t, const Sizes& sizes) {
  TensorShape want;
  TF_RETURN_IF_ERROR(TensorShape::BuildTensorShape(sizes, &want));
  if (t.shape() == want) return absl::OkStatus();
  return InvalidArgument(name, " must have shape ", want.DebugString(), ", got ", t.shape().DebugString());
}

// A tensor's memory out of the kernels' scratch.
class ScratchBuffer : public tensorflow::TensorBuffer {
 public:
  explicit ScratchBuffer(int64_t bytes) : TensorBuffer(TakeScratch(bytes)), bytes_(bytes) {}
  ~ScratchBuffer() override { GiveBackScratch(data()); }
  size_t size() const override { return bytes_; }
  TensorBuffer* root_buffer() override { return this; }
  void FillAllocationDescription(tensorflow::AllocationDescription* description) const override {
    description->set_allocated_bytes(bytes_);
  }

 private:
  const int64_t bytes_;
};

// Allocates an output; a large one out of scratch, whose pages are not faulted in afresh each step.
inline Status Allocate(OpKernelContext* ctx, int output, const Sizes& sizes, Tensor** tensor) {
  constexpr int64_t kLarge = 1 << 20;
  TensorShape shape;
  TF_RETURN_IF_ERROR(TensorShape::BuildTensorShape(sizes, &shape));
  const DataType dtype = ctx->expected_output_dtype(output);
  const int64_t elements = shape.num_elements(), size = tensorflow::DataTypeSize(dtype);
  if (elements < kLarge / size || elements > std::numeric_limits<int64_t>::max() / size)
    return ctx->allocate_output(output, shape, tensor);
  ctx->set_output(
      output, Tensor(dtype, shape, tensorflow::core::RefCountPtr<ScratchBuffer>(new ScratchBuffer(elements * size))));
  *tensor = ctx->mutable_output(output);
  return absl::OkStatus();
}

// Checks that the op sums in the dtype that goes with the table's.
inline Status RequireAcc(OpKernelConstruction* ctx, DataType dtype) {
  DataType acc;
  TF_RETURN_IF_ERROR(ctx->GetAttr("Tacc", &acc));
  const DataType want = dtype == tensorflow::DT_DOUBLE ? tensorflow::DT_DOUBLE : tensorflow::DT_FLOAT;
  if (acc == want) return absl::OkStatus();
  return InvalidArgument("Tacc must be ", tensorflow::DataTypeString(want), " for a table of ",
                         tensorflow::DataTypeString(dtype), ", got ", tensorflow::DataTypeString(acc));
}

// An op whose working memory may be more than there is.
class Kernel : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* ctx) final {
    try {
      Run(ctx);
    } catch (const std::bad_alloc&) {
      ctx->SetStatus(
          tensorflow::errors::ResourceExhausted("no memory for the results of ", ctx->num_inputs(), " inputs"));
    }
  }

 protected:
  virtual void Run(OpKernelContext* ctx) = 0;
};

inline Status IndexError(const Tensor& indices, int64_t p, int64_t num_rows) {
  const int64_t index =
      indices.dtype() == tensorflow::DT_INT32 ? indices.flat<int32_t>()(p) : indices.flat<int64_t>()(p);
  std::string where = std::to_string(p);
  if (indices.dims() == 2)
    where = std::to_string(p / indices.dim_size(1)) + "," + std::to_string(p % indices.dim_size(1));
  return InvalidArgument("indices[", where, "] = ", index, " is not in [0, ", num_rows, ")");
}

}  // namespace deepfm

#endif  // DEEPFM_TF_OP_COMMON_H_
