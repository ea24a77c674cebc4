// The kernels on a GPU's arrays of any library that speaks DLPack, on its current stream, without TensorFlow. The
// module asks CUDA for nothing: memory, copies and waiting are the library's, through an object of
// deepfm_ops/gpu_arrays.py. With DEEPFM_EMULATED it is _cuda_emulated, for tests, and takes arrays on the CPU.
#include <algorithm>

#include "../../cuda/fm_cuda.h"
#include "../calls.h"
#include "dlpack.h"

namespace deepfm {
namespace {

#ifdef DEEPFM_EMULATED
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

[[noreturn]] void Fail(const std::string& text) { throw py::value_error(text); }

std::string NameOf(const dlpack::Device& device) {
  if (device.type == dlpack::kCpu) return "the CPU";
  if (device.type == dlpack::kCuda || device.type == dlpack::kCudaManaged) return "cuda:" + std::to_string(device.id);
  return "a device of DLPack's type " + std::to_string(device.type);
}

bool IsOurs(const dlpack::Device& device) {
  if (kEmulated) return device.type == dlpack::kCpu;
  return device.type == dlpack::kCuda || device.type == dlpack::kCudaManaged;
}

std::string NameOf(const dlpack::DataType& dtype) {
  std::string name;
  switch (dtype.code) {
    case dlpack::kInt:
      name = "int";
      break;
    case dlpack::kUInt:
      name = "uint";
      break;
    case dlpack::kFloat:
      name = "float";
      break;
    case dlpack::kBFloat:
      name = "bfloat";
      break;
    case dlpack::kBool:
      return "bool";
    default:
      name = "type " + std::to_string(dtype.code) + " of DLPack, ";
  }
  name += std::to_string(dtype.bits);
  return dtype.lanes == 1 ? name : name + " by " + std::to_string(dtype.lanes);
}

dlpack::Device DeviceOf(const char* name, py::handle array) {
  if (!py::hasattr(array, "__dlpack_device__") || !py::hasattr(array, "__dlpack__"))
    throw py::type_error(std::string(name) + " must be an array that speaks DLPack, got " +
                         std::string(py::str(py::type::handle_of(array).attr("__name__"))));
  const py::tuple device = array.attr("__dlpack_device__")();
  return {py::int_(device[0]).cast<int32_t>(), device[1].cast<int32_t>()};
}

// An array's capsule. Its library sees to it that the array is ready on the stream, whose number is None on the CPU.
py::capsule Export(py::handle array, const py::object& stream) {
  using namespace pybind11::literals;
  const py::object function = array.attr("__dlpack__");
  try {
    return function("stream"_a = stream, "max_version"_a = py::make_tuple(1, 0));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
  }
  return function("stream"_a = stream);  // of a library from before the versions
}

// The tensor in a capsule, which stays its owner, and whether it may be written to.
std::pair<const dlpack::Tensor*, bool> TensorIn(const char* name, const py::capsule& capsule) {
  const std::string kind = capsule.name();
  if (kind == "dltensor") return {&static_cast<dlpack::Managed*>(capsule.get_pointer())->tensor, true};
  if (kind != "dltensor_versioned")
    throw py::type_error(std::string(name) + " gave a capsule that is not DLPack's: " + kind);
  const auto* managed = static_cast<dlpack::Versioned*>(capsule.get_pointer());
  if (managed->major != 1)
    Fail(std::string(name) + " speaks DLPack " + std::to_string(managed->major) + ", only 1 is known");
  return {&managed->tensor, !(managed->flags & dlpack::kReadOnly)};
}

// Device memory for a call, in buffers of the caller's library. It gives them to nobody else before the work that
// stands on the stream at that time is done.
class Buffers : public cuda::Memory {
 public:
  Buffers(const py::object& library, const py::object& stream) : library_(library), stream_(stream) {}

  void* Take(size_t bytes) override {
    constexpr uintptr_t kAlign = 256;
    const py::object owner = library_.attr("empty")(py::make_tuple(bytes + kAlign), "uint8");
    const py::capsule capsule = Export(owner, stream_);
    const dlpack::Tensor* tensor = TensorIn("memory", capsule).first;
    char* first = static_cast<char*>(tensor->data) + tensor->byte_offset;
    taken_.push_back({first, bytes + kAlign, owner});
    return first + (kAlign - reinterpret_cast<uintptr_t>(first) % kAlign) % kAlign;
  }

  // int64s of what was taken, as an array.
  py::object Part(const void* data, int64_t count) const {
    for (const auto& [first, bytes, owner] : taken_) {
      const char* at = static_cast<const char*>(data);
      if (at >= first && at < first + bytes)
        return library_.attr("part")(owner, at - first, count * static_cast<int64_t>(sizeof(int64_t)));
    }
    throw std::logic_error("this memory was not taken here");
  }

 private:
  struct Buffer {
    const char* first;
    size_t bytes;
    py::object owner;
  };
  const py::object library_, stream_;
  std::vector<Buffer> taken_;
};

// What a Report says, as int64s; their order is that of its members.
void CheckReport(const std::vector<int64_t>& words, const Sizes& indices, int64_t num_rows, int64_t num_samples) {
  static_assert(sizeof(cuda::Report) == 5 * sizeof(int64_t) && sizeof(size_t) == sizeof(int64_t));
  if (words[2] != -1) FailRowSplits(words[2], words[3], words[4], num_samples);
  if (words[0] != -1) FailIndex(words[0], words[1], indices, num_rows);
}

class OnDevice : public Place {
 public:
  // `report` is a deepfm_ops.kernels.Report, which is read by its owner, or None.
  OnDevice(const py::object& library, const py::object& report)
      : library_(library),
        shared_(report),
        stream_(reinterpret_cast<cuda::Stream>(py::cast<uintptr_t>(library.attr("stream")))),
        // In DLPack 1 is the legacy default stream, and 0 is not allowed. On the CPU there is none.
        exported_to_(kEmulated ? py::object(py::none())
                               : py::int_(std::max<uintptr_t>(1, reinterpret_cast<uintptr_t>(stream_)))),
        device_{py::cast<int32_t>(library.attr("device")[py::int_(0)]),
                py::cast<int32_t>(library.attr("device")[py::int_(1)])},
        memory_(library, exported_to_) {
    if (!IsOurs(device_))
      Fail(std::string("table must be on ") + (kEmulated ? "the CPU" : "a CUDA device") + ", got " + NameOf(device_));
    if (shared_.is_none()) {
      words_ = Make({}, "int64", {5});
      cuda::NoErrors(Report(), stream_);
    } else {
      words_ = Read("report", shared_.attr("words"), {"int64"}, true);
    }
  }

  const py::object& words() const { return words_.owner; }

  Dtypes TableDtypes() const override { return {"float32", "bfloat16", "float16", "uint16"}; }
  bool OnHost() const override { return false; }

  Array Read(const char* name, py::handle array, const Dtypes& dtypes, bool written) override {
    const dlpack::Device device = DeviceOf(name, array);
    if (!IsOurs(device) || (!kEmulated && device.id != device_.id))
      Fail(std::string(name) + " must be on the device of table, " + NameOf(device_) + ", got " + NameOf(device));
    return Tensor(name, array, dtypes, written);
  }

  Array ReadNumbers(const char* name, py::handle numbers, const char* dtype) override {
    if (py::hasattr(numbers, "__dlpack__")) return Read(name, numbers, {dtype}, false);
    return Tensor(name, library_.attr("upload")(py::list(py::reinterpret_borrow<py::object>(numbers)), dtype), {dtype},
                  false);
  }

  const int64_t* Splits(const std::vector<int64_t>& splits) override {
    splits_ = Tensor("field_splits", library_.attr("upload")(py::cast(splits), "int64"), {"int64"}, false);
    return static_cast<const int64_t*>(splits_.data);
  }

  Array Make(const Array& like, const char* dtype, const Sizes& sizes) override {
    const std::string name = *dtype ? dtype : like.dtype;
    return Tensor("a result", library_.attr("empty")(py::tuple(py::cast(sizes)), name), {name.c_str()}, true);
  }

  void Forward(const ForwardArgs& args, const PairInputs& in) override {
    Cover(in);
    cuda::FmForward(args, Report(), &memory_, stream_);
  }

  void Group(const PairInputs& in) override {
    Cover(in);
    in_ = &in;
    groups_ =
        cuda::GroupRows(in.indices.data, in.index_type, in.num_pairs, in.table.sizes[0], Report(), &memory_, stream_);
  }

  Array UniqueRows() override {
    int64_t size = 0;
    if (groups_.num_pairs > 0) {
      size = py::cast<int64_t>(memory_.Part(groups_.size, 1).attr("item")());
      if (size == 0) Wait(*in_);
      if (size == 0) throw std::runtime_error("the report holds an error of an earlier call: make a fresh one");
    }
    if (size == 0) return Make({}, "int64", {0});
    return Tensor("a result", library_.attr("copy")(memory_.Part(groups_.rows, size)), {"int64"}, true);
  }

  void Gradient(GradientArgs args) override { cuda::FmGradient(args, {}, groups_, Report(), &memory_, stream_); }

  void Update(UpdateArgs args) override { cuda::SparseUpdate(args, groups_, Report(), &memory_, stream_); }

  void GradientAndUpdate(GradientArgs gradient, UpdateArgs table, const UpdateArgs* weights) override {
    cuda::FmUpdate(gradient, {}, table, weights, groups_, Report(), &memory_, stream_);
  }

  void Finish(const PairInputs& in) override {
    if (shared_.is_none()) Wait(in);
  }

 private:
  cuda::Report* Report() const { return static_cast<cuda::Report*>(words_.data); }

  void Wait(const PairInputs& in) const {
    CheckReport(py::cast<std::vector<int64_t>>(words_.owner.attr("tolist")()), in.indices.sizes, in.table.sizes[0],
                in.num_samples);
  }

  // Remembers in a report that others read what its numbers are about.
  void Cover(const PairInputs& in) const {
    if (in.num_pairs > INT32_MAX) Fail("indices must be fewer than 2^31, got " + std::to_string(in.num_pairs));
    if (shared_.is_none()) return;
    const py::tuple about = py::make_tuple(in.indices.sizes, in.table.sizes[0], in.num_samples);
    const py::object before = shared_.attr("about");
    if (before.is_none()) shared_.attr("about") = about;
    if (!before.is_none() && !before.equal(about))
      Fail("report must be of calls with the same indices, rows and samples, " + std::string(py::str(before)) +
           ", got " + std::string(py::str(about)));
  }

  Array Tensor(const char* name, py::handle array, const Dtypes& dtypes, bool written) const;

  const py::object library_, shared_;
  const cuda::Stream stream_;
  const py::object exported_to_;
  const dlpack::Device device_;
  Buffers memory_;
  Array words_, splits_;
  cuda::Groups groups_;
  const PairInputs* in_ = nullptr;
};

Array OnDevice::Tensor(const char* name, py::handle array, const Dtypes& dtypes, bool written) const {
  const py::capsule capsule = Export(array, exported_to_);
  const auto [tensor, writable] = TensorIn(name, capsule);
  const std::string dtype = NameOf(tensor->dtype);
  if (!IsOneOf(dtype, dtypes)) FailDtype(name, dtype, dtypes);
  const Sizes sizes(tensor->shape, tensor->shape + tensor->ndim);
  const int64_t item = tensor->dtype.bits / 8;
  int64_t size = 1;
  bool dense = true;
  for (int i = tensor->ndim - 1; i >= 0; --i) {
    if (tensor->strides && sizes[i] > 1 && tensor->strides[i] != size) dense = false;
    size *= sizes[i];
  }
  if (!dense && size > 0) {
    Sizes strides(tensor->strides, tensor->strides + tensor->ndim);
    for (int64_t& stride : strides) stride *= item;
    Fail(std::string(name) + " must be C-contiguous, got strides " + TextOf(strides));
  }
  char* data = static_cast<char*>(tensor->data) + tensor->byte_offset;
  if (reinterpret_cast<uintptr_t>(data) % item)
    Fail(std::string(name) + " must be aligned to its items of " + std::to_string(item) + " bytes");
  if (written && !writable) Fail(std::string(name) + " must be an array to write to");
  return {py::reinterpret_borrow<py::object>(array), data, sizes, dtype};
}

// A call on a GPU's arrays, which says first of which library they are and who reads the report.
template <typename Result, typename... Args>
auto OnGpu(Result (*call)(Place&, Args...)) {
  return [call](const py::object& library, const py::object& report, Args... args, std::optional<int> threads) {
    if (threads && *threads < 1) Fail("threads must be at least 1, got " + std::to_string(*threads));
    OnDevice place(library, report);
    return call(place, args...);
  };
}

}  // namespace
}  // namespace deepfm

#ifdef DEEPFM_EMULATED
PYBIND11_MODULE(_cuda_emulated, m) {
#else
PYBIND11_MODULE(_cuda, m) {
#endif
  using namespace pybind11::literals;
  m.doc() = "What deepfm_ops.kernels calls for arrays on a GPU; the contract is csrc/cuda/fm_cuda.h.";
  const char* const docs[4] = {"", "", "", ""};
  deepfm::DefineCalls(m, [](auto call) { return deepfm::OnGpu(call); }, docs, "library"_a, "report"_a);
  m.def(
      "new_report", [](const pybind11::object& library) { return deepfm::OnDevice(library, pybind11::none()).words(); },
      "library"_a);
  m.def("check_report", &deepfm::CheckReport, "words"_a, "indices"_a, "num_rows"_a, "num_samples"_a);
  m.attr("emulated") = deepfm::kEmulated;
}
