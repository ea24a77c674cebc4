// What the ops share: the tables, the pool, allocation, failing.
#ifndef DEEPFM_TF_OP_COMMON_H_
#define DEEPFM_TF_OP_COMMON_H_

#include <algorithm>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../kernels/checks.h"
#include "../kernels/fm.h"
#include "../kernels/scratch.h"
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

// What stops a Compute that is not good; see StatusOf. The kernels' own checks throw standard exceptions.
struct Failure {
  Status status;
};
inline void OrFail(const Status& status) {
  if (!status.ok()) throw Failure{status};
}
template <typename... Parts>
void Require(bool good, const Parts&... parts) {
  if (!good) throw Failure{InvalidArgument(parts...)};
}

// What an op that may fail at any depth, or find no memory, ends with.
template <typename Run>
Status StatusOf(OpKernelContext* ctx, Run run) {
  try {
    run();
    return absl::OkStatus();
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::logic_error& error) {  // invalid_argument and out_of_range
    return InvalidArgument(error.what());
  } catch (const std::runtime_error& error) {  // CUDA's
    return absl::InternalError(error.what());
  } catch (const std::bad_alloc&) {
    return tensorflow::errors::ResourceExhausted("no memory for the results of ", ctx->num_inputs(), " inputs");
  }
}

class Kernel : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* ctx) final {
    const Status status = StatusOf(ctx, [&] { Run(ctx); });
    if (!status.ok()) ctx->SetStatus(status);
  }

 protected:
  virtual void Run(OpKernelContext* ctx) = 0;
};

// Whether tensors are on a device, where the host must not read them.
inline bool IsOnDevice(OpKernelConstruction* ctx) { return ctx->device_type().type_string() != tensorflow::DEVICE_CPU; }

inline Sizes SizesOf(const Tensor& t) {
  const auto sizes = t.shape().dim_sizes();
  return Sizes(sizes.begin(), sizes.end());
}

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
inline const void* DataOrNull(const Tensor* t) { return t ? Data(*t) : nullptr; }

inline Parallel PoolOf(OpKernelContext* ctx) {
  const auto* workers = ctx->device()->tensorflow_cpu_worker_threads();
  Parallel parallel;
  parallel.threads = workers->num_threads;
  parallel.schedule = [workers](std::function<void()> call) { workers->workers->Schedule(std::move(call)); };
  return parallel;
}

// Groups indices, each of which must be in [0, num_rows).
inline void Group(const Tensor& indices, int64_t num_rows, const Parallel& pool, RowGroups* groups) {
  const int64_t bad = groups->Build(Data(indices), IndexTypeOf(indices), indices.NumElements(), num_rows, pool);
  CheckIndices(bad, Data(indices), IndexTypeOf(indices), SizesOf(indices), num_rows);
}

// The only tensor of an input list, or null if there is none.
inline const Tensor* Optional(OpKernelContext* ctx, const char* name) {
  OpInputList list;
  OrFail(ctx->input_list(name, &list));
  Require(list.size() <= 1, name, " must be one tensor, got ", list.size());
  return list.size() ? &list[0] : nullptr;
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

// Allocates an output and gives its data; a large one out of scratch, whose pages are not faulted in afresh each step.
inline void* Allocate(OpKernelContext* ctx, int output, const Sizes& sizes) {
  constexpr int64_t kLarge = 1 << 20;
  TensorShape shape;
  OrFail(TensorShape::BuildTensorShape(sizes, &shape));  // their product may be more than an int64 holds
  const DataType dtype = ctx->expected_output_dtype(output);
  const int64_t elements = shape.num_elements(), size = tensorflow::DataTypeSize(dtype);
  Tensor* tensor = nullptr;
  if (elements < kLarge / size || elements > std::numeric_limits<int64_t>::max() / size) {
    OrFail(ctx->allocate_output(output, shape, &tensor));
  } else {
    ctx->set_output(
        output, Tensor(dtype, shape, tensorflow::core::RefCountPtr<ScratchBuffer>(new ScratchBuffer(elements * size))));
    tensor = ctx->mutable_output(output);
  }
  return MutableData(tensor);
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

// The tables of an op and what goes with them, for the time of one Compute: tensors, or variables' tensors under locks,
// shared ones or, to write, exclusive ones. A variable is never read as a value: in copy-on-read mode that would copy
// all of it.
class Tables {
 public:
  struct Input {
    int number;
    const char* name;
  };

  // Each variable is locked once, and all in the order in which everyone locks: a writer may stand in line between two.
  Tables(OpKernelContext* ctx, DataType dtype, const std::vector<Input>& inputs, bool exclusive = false) {
    std::vector<tensorflow::mutex*> mutexes;
    for (const Input& input : inputs) {
      vars_.emplace_back();
      if (ctx->input_dtype(input.number) != tensorflow::DT_RESOURCE) continue;
      OrFail(tensorflow::LookupResource(ctx, tensorflow::HandleFromInput(ctx, input.number), &vars_.back()));
      mutexes.push_back(vars_.back()->mu());
    }
    std::sort(mutexes.begin(), mutexes.end());
    const auto last = std::unique(mutexes.begin(), mutexes.end());
    Require(!exclusive || last == mutexes.end(), "the tables and their slots must be different variables");
    mutexes.erase(last, mutexes.end());
    for (tensorflow::mutex* mutex : mutexes) {
      if (exclusive) {
        exclusive_.push_back(std::make_unique<tensorflow::mutex_lock>(*mutex));
      } else {
        shared_.push_back(std::make_unique<tensorflow::tf_shared_lock>(*mutex));
      }
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
      const char* name = inputs[i].name;
      if (vars_[i] && !vars_[i]->is_initialized)
        OrFail(FailedPrecondition(name, " is a variable that was not initialized"));
      tensors_.push_back(vars_[i] ? vars_[i]->tensor() : &ctx->input(inputs[i].number));
      Require(tensors_[i]->dtype() == dtype, name, " holds ", tensorflow::DataTypeString(tensors_[i]->dtype()),
              ", the op was made for ", tensorflow::DataTypeString(dtype));
    }
  }

  size_t size() const { return tensors_.size(); }
  const Tensor& operator[](size_t i) const { return *tensors_[i]; }
  tensorflow::Var* variable(size_t i) const { return vars_[i].get(); }  // null: it is a tensor

 private:
  std::vector<tensorflow::core::RefCountPtr<tensorflow::Var>> vars_;
  std::vector<std::unique_ptr<tensorflow::tf_shared_lock>> shared_;  // locks are released before vars_
  std::vector<std::unique_ptr<tensorflow::mutex_lock>> exclusive_;
  std::vector<const Tensor*> tensors_;
};

}  // namespace deepfm

#endif  // DEEPFM_TF_OP_COMMON_H_
