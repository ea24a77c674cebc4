// The structures of DLPack 1.0 that a capsule of __dlpack__ points to. Their layout is the protocol.
#ifndef DEEPFM_PYTHON_GPU_DLPACK_H_
#define DEEPFM_PYTHON_GPU_DLPACK_H_

#include <cstdint>

namespace deepfm {
namespace dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaManaged = 13 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kBool = 6 };

struct Device {
  int32_t type, id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in items; null: C-contiguous
  uint64_t byte_offset;
};

// In a capsule "dltensor".
struct Managed {
  Tensor tensor;
  void* manager;
  void (*deleter)(Managed*);
};

// In a capsule "dltensor_versioned".
struct Versioned {
  uint32_t major, minor;
  void* manager;
  void (*deleter)(Versioned*);
  uint64_t flags;
  Tensor tensor;
};
constexpr uint64_t kReadOnly = 1;

}  // namespace dlpack
}  // namespace deepfm

#endif  // DEEPFM_PYTHON_GPU_DLPACK_H_
