// A device of type GPU made of host memory, for TensorFlow without CUDA: its C API for pluggable devices.
//
// Device memory is one file mapped twice. TensorFlow, and so every op, has addresses of the first map, which is closed
// to the host but while a kernel runs: a host read of device memory is a segmentation fault. Copies go by the second
// map. Fresh memory holds NaN. Work is done when it is enqueued.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "tensorflow/c/experimental/stream_executor/stream_executor.h"
#include "tensorflow/c/tf_status.h"

struct SP_Stream_st {};
struct SP_Event_st {};
struct SP_Timer_st {};

namespace {

constexpr size_t kBytes = size_t{1} << 28;

struct Memory {
  char *closed, *open;
  size_t used = 0;
  std::mutex mutex;

  Memory() {
    const int file = memfd_create("device", 0);
    if (file < 0 || ftruncate(file, kBytes)) abort();
    closed = static_cast<char*>(mmap(nullptr, kBytes, PROT_NONE, MAP_SHARED, file, 0));
    open = static_cast<char*>(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
    if (closed == MAP_FAILED || open == MAP_FAILED) abort();
  }

  void* Take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    bytes = (bytes + 255) / 256 * 256;
    if (bytes > kBytes - used) return nullptr;
    std::memset(open + used, 0xff, bytes);
    used += bytes;
    return closed + used - bytes;
  }
};

Memory& TheMemory() {
  static Memory& memory = *new Memory;
  return memory;
}

// Where the host may read and write what the device has at an address.
void* Host(const SP_DeviceMemoryBase* memory) {
  return TheMemory().open + (static_cast<char*>(memory->opaque) - TheMemory().closed);
}

void Ok(TF_Status* status) { TF_SetStatus(status, TF_OK, ""); }

void FillExecutor(SP_StreamExecutor* e) {
  e->struct_size = SP_STREAMEXECUTOR_STRUCT_SIZE;
  e->allocate = [](const SP_Device*, uint64_t size, int64_t, SP_DeviceMemoryBase* memory) {
    memory->struct_size = SP_DEVICE_MEMORY_BASE_STRUCT_SIZE;
    memory->opaque = TheMemory().Take(size);
    memory->size = size;
  };
  e->deallocate = [](const SP_Device*, SP_DeviceMemoryBase* memory) { memory->opaque = nullptr; };
  e->host_memory_allocate = [](const SP_Device*, uint64_t size) { return aligned_alloc(64, (size + 63) / 64 * 64); };
  e->host_memory_deallocate = [](const SP_Device*, void* memory) { free(memory); };
  e->get_allocator_stats = [](const SP_Device*, SP_AllocatorStats*) -> TF_Bool { return 0; };
  e->device_memory_usage = [](const SP_Device*, int64_t* free, int64_t* total) -> TF_Bool {
    *total = kBytes;
    *free = kBytes - TheMemory().used;
    return 1;
  };

  e->create_stream = [](const SP_Device*, SP_Stream* stream, TF_Status* status) {
    *stream = new SP_Stream_st;
    Ok(status);
  };
  e->destroy_stream = [](const SP_Device*, SP_Stream stream) { delete stream; };
  e->create_stream_dependency = [](const SP_Device*, SP_Stream, SP_Stream, TF_Status* status) { Ok(status); };
  e->get_stream_status = [](const SP_Device*, SP_Stream, TF_Status* status) { Ok(status); };
  e->create_event = [](const SP_Device*, SP_Event* event, TF_Status* status) {
    *event = new SP_Event_st;
    Ok(status);
  };
  e->destroy_event = [](const SP_Device*, SP_Event event) { delete event; };
  e->get_event_status = [](const SP_Device*, SP_Event) { return SE_EVENT_COMPLETE; };
  e->record_event = [](const SP_Device*, SP_Stream, SP_Event, TF_Status* status) { Ok(status); };
  e->wait_for_event = [](const SP_Device*, SP_Stream, SP_Event, TF_Status* status) { Ok(status); };
  e->create_timer = [](const SP_Device*, SP_Timer* timer, TF_Status* status) {
    *timer = new SP_Timer_st;
    Ok(status);
  };
  e->destroy_timer = [](const SP_Device*, SP_Timer timer) { delete timer; };
  e->start_timer = e->stop_timer = [](const SP_Device*, SP_Stream, SP_Timer, TF_Status* status) { Ok(status); };
  e->block_host_for_event = [](const SP_Device*, SP_Event, TF_Status* status) { Ok(status); };
  e->block_host_until_done = [](const SP_Device*, SP_Stream, TF_Status* status) { Ok(status); };
  e->synchronize_all_activity = [](const SP_Device*, TF_Status* status) { Ok(status); };
  e->host_callback = [](const SP_Device*, SP_Stream, SE_StatusCallbackFn, void*) -> TF_Bool { return 0; };

  using Device = SP_DeviceMemoryBase;
  e->memcpy_dtoh = [](const SP_Device*, SP_Stream, void* to, const Device* from, uint64_t size, TF_Status* status) {
    std::memcpy(to, Host(from), size);
    Ok(status);
  };
  e->memcpy_htod = [](const SP_Device*, SP_Stream, Device* to, const void* from, uint64_t size, TF_Status* status) {
    std::memcpy(Host(to), from, size);
    Ok(status);
  };
  e->memcpy_dtod = [](const SP_Device*, SP_Stream, Device* to, const Device* from, uint64_t size, TF_Status* status) {
    std::memcpy(Host(to), Host(from), size);
    Ok(status);
  };
  e->sync_memcpy_dtoh = [](const SP_Device*, void* to, const Device* from, uint64_t size, TF_Status* status) {
    std::memcpy(to, Host(from), size);
    Ok(status);
  };
  e->sync_memcpy_htod = [](const SP_Device*, Device* to, const void* from, uint64_t size, TF_Status* status) {
    std::memcpy(Host(to), from, size);
    Ok(status);
  };
  e->sync_memcpy_dtod = [](const SP_Device*, Device* to, const Device* from, uint64_t size, TF_Status* status) {
    std::memcpy(Host(to), Host(from), size);
    Ok(status);
  };
  e->mem_zero = [](const SP_Device*, SP_Stream, Device* to, uint64_t size, TF_Status* status) {
    std::memset(Host(to), 0, size);
    Ok(status);
  };
  e->memset = [](const SP_Device*, SP_Stream, Device* to, uint8_t byte, uint64_t size, TF_Status* status) {
    std::memset(Host(to), byte, size);
    Ok(status);
  };
  e->memset32 = [](const SP_Device*, SP_Stream, Device* to, uint32_t word, uint64_t size, TF_Status* status) {
    for (uint64_t i = 0; i < size / 4; ++i) static_cast<uint32_t*>(Host(to))[i] = word;
    Ok(status);
  };
}

void FillPlatform(SP_PlatformFns* f) {
  f->struct_size = SP_PLATFORM_FNS_STRUCT_SIZE;
  f->get_device_count = [](const SP_Platform*, int* count, TF_Status* status) {
    *count = 1;
    Ok(status);
  };
  f->create_device = [](const SP_Platform*, SE_CreateDeviceParams* params, TF_Status* status) {
    params->device->struct_size = SP_DEVICE_STRUCT_SIZE;
    params->device->ordinal = params->ordinal;
    params->device->hardware_name = "host memory";
    params->device->device_vendor = "none";
    params->device->pci_bus_id = "0000:00:00.0";
    Ok(status);
  };
  f->destroy_device = [](const SP_Platform*, SP_Device*) {};
  f->create_device_fns = [](const SP_Platform*, SE_CreateDeviceFnsParams* params, TF_Status* status) {
    params->device_fns->struct_size = SP_DEVICE_FNS_STRUCT_SIZE;
    Ok(status);
  };
  f->destroy_device_fns = [](const SP_Platform*, SP_DeviceFns*) {};
  f->create_stream_executor = [](const SP_Platform*, SE_CreateStreamExecutorParams* params, TF_Status* status) {
    FillExecutor(params->stream_executor);
    Ok(status);
  };
  f->destroy_stream_executor = [](const SP_Platform*, SP_StreamExecutor*) {};
  f->create_timer_fns = [](const SP_Platform*, SP_TimerFns* timer, TF_Status* status) {
    timer->struct_size = SP_TIMER_FNS_STRUCT_SIZE;
    timer->nanoseconds = [](SP_Timer) -> uint64_t { return 1; };
    Ok(status);
  };
  f->destroy_timer_fns = [](const SP_Platform*, SP_TimerFns*) {};
}

}  // namespace

extern "C" {

void SE_InitPlugin(SE_PlatformRegistrationParams* params, TF_Status* status) {
  params->struct_size = SE_PLATFORM_REGISTRATION_PARAMS_STRUCT_SIZE;
  params->major_version = SE_MAJOR;
  params->minor_version = SE_MINOR;
  params->patch_version = SE_PATCH;
  params->platform->struct_size = SP_PLATFORM_STRUCT_SIZE;
  params->platform->name = "EMULATED";
  params->platform->type = "GPU";
  params->platform->use_bfc_allocator = 1;
  params->platform->force_memory_growth = 1;
  params->destroy_platform = [](SP_Platform*) {};
  params->destroy_platform_fns = [](SP_PlatformFns*) {};
  FillPlatform(params->platform_fns);
  Ok(status);
}

// The emulated kernels open the memory while they run.
void open_device_memory(bool open) {
  if (mprotect(TheMemory().closed, kBytes, open ? PROT_READ | PROT_WRITE : PROT_NONE)) abort();
}
}
