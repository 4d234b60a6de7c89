// A CUDA device whose memory is the host's, for a build of torch without CUDA. What the package says of it is in
// __init__.py.
//
// Every operation goes through one boxed fallback: it looks at the devices of all tensors, as CUDA's operations do, and
// has the CPU compute. Written by hand are memory and its account, views and copies; kernels.cpp has what only CUDA
// has.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/extension.h>
#include <torch/library.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

#include "host.h"

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::IntArrayRef;

constexpr DeviceIndex kDevices = 2;
thread_local DeviceIndex current = 0;

// ---- what is counted: bytes, operations, waits of the host

struct Account {
  std::atomic<int64_t> now{0}, peak{0};
  void add(int64_t bytes) {
    int64_t total = now += bytes;
    for (int64_t most = peak; total > most && !peak.compare_exchange_weak(most, total);) {
    }
  }
} accounts[kDevices];
std::atomic<int64_t> operations{0}, waits{0};
std::atomic<int> sync_debug_mode{0};  // as torch.cuda.set_sync_debug_mode: 0 nothing, 1 warn, 2 error

void count_wait(const std::string& what) {
  if (host_gpu::Inside::depth) return;
  ++waits;
  TORCH_CHECK(sync_debug_mode < 2, "called a synchronizing CUDA operation: ", what);
  if (sync_debug_mode == 1) TORCH_WARN("called a synchronizing CUDA operation: ", what);
}

// ---- memory

struct Block {
  void* data;
  int64_t size;
  DeviceIndex device;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  accounts[block->device].add(-block->size);
  c10::free_cpu(block->data);
  delete block;
}

const auto process = getpid();

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    TORCH_CHECK(getpid() == process,
                "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, ",
                "you must use the 'spawn' start method");
    Device device(DeviceType::CUDA, current);
    if (!bytes) return {nullptr, nullptr, &release, device};
    size_t size = (bytes + 511) / 512 * 512;  // as the caching allocator rounds
    auto* block = new Block{c10::alloc_cpu(size), static_cast<int64_t>(size), current};
    std::memset(block->data, 0xff, size);  // NaN: a read of what nothing wrote shows
    accounts[current].add(block->size);
    return {block->data, block, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
} memory;
REGISTER_ALLOCATOR(DeviceType::CUDA, &memory)

std::mutex pinned_lock;
std::map<const char*, size_t> pinned;  // host memory that counts as page-locked

void unpin(void* data) {
  std::lock_guard<std::mutex> hold(pinned_lock);
  pinned.erase(static_cast<char*>(data));
  c10::free_cpu(data);
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* data = static_cast<char*>(c10::alloc_cpu(std::max<size_t>(bytes, 1)));
    std::lock_guard<std::mutex> hold(pinned_lock);
    pinned[data] = std::max<size_t>(bytes, 1);
    return {data, data, &unpin, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
} pinned_memory;

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> hold(pinned_lock);
  auto after = pinned.upper_bound(static_cast<const char*>(data));
  return after != pinned.begin() && static_cast<const char*>(data) < std::prev(after)->first + std::prev(after)->second;
}

// ---- the device itself: one stream, on which everything is done at once

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device d) const override { return {DeviceType::CUDA, std::exchange(current, d.index())}; }
  Device getDevice() const override { return {DeviceType::CUDA, current}; }
  void setDevice(Device d) const override { current = d.index(); }
  void uncheckedSetDevice(Device d) const noexcept override { current = d.index(); }
  c10::Stream getStream(Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream getDefaultStream(Device d) const override { return getStream(d); }
  c10::Stream getStreamFromGlobalPool(Device d, bool) const override { return getStream(d); }
  c10::Stream getNewStream(Device d, int) const override { return getStream(d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void record(void**, const c10::Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// A generator of the device; `host` draws its numbers.
struct DeviceGenerator final : at::CPUGeneratorImpl {
  explicit DeviceGenerator(DeviceIndex index) : host(at::make_generator<at::CPUGeneratorImpl>()) {
    device_ = Device(DeviceType::CUDA, index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::CUDA);
  }
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    auto* shared = const_cast<c10::TensorImpl*>(&state);
    host.set_state(Tensor::wrap_tensor_impl(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(shared)));
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.get_state().getIntrusivePtr(); }
  at::Generator host;
};

const at::Generator& default_generator(DeviceIndex index) {
  static const std::vector<at::Generator> all = {at::make_generator<DeviceGenerator>(DeviceIndex(0)),
                                                 at::make_generator<DeviceGenerator>(DeviceIndex(1))};
  return all.at(index < 0 ? current : index);
}

}  // namespace

namespace at {

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  int getNumGPUs() const override { return kDevices; }
  void setCurrentDevice(DeviceIndex d) const override { current = d; }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex d) const override { return std::exchange(current, d); }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { return d < 0 ? current : std::exchange(current, d); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  Allocator* getCUDADeviceAllocator() const override { return &memory; }
  const Generator& getDefaultGenerator(DeviceIndex i) const override { return default_generator(i); }
  Generator getNewGenerator(DeviceIndex i) const override {
    return make_generator<DeviceGenerator>(i < 0 ? current : i);
  }
};
REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at

namespace {

// ---- operations

}  // namespace

thread_local int host_gpu::Inside::depth = 0;

void host_gpu::count_operation() {
  if (!Inside::depth) ++operations;
}

Tensor host_gpu::host(const Tensor& t) {
  if (!t.defined() || t.is_cpu()) return t;
  auto* held = new c10::Storage(t.storage());
  auto drop = [](void* p) { delete static_cast<c10::Storage*>(p); };
  c10::DataPtr data(held->mutable_data(), held, drop, Device(DeviceType::CPU));
  c10::Storage same(c10::Storage::use_byte_size_t(), held->nbytes(), std::move(data));
  return at::empty({0}, t.options().device(at::kCPU)).set_(same, t.storage_offset(), t.sizes(), t.strides());
}

namespace {

using host_gpu::count_operation;
using host_gpu::host;
using host_gpu::Inside;

// What waits for the device on CUDA because its result has a size that only the device knows, or goes to the host.
const std::set<std::string> kWaiting = {
    "aten::nonzero",    "aten::masked_select",      "aten::equal",    "aten::is_nonzero", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::histc"};
const std::set<std::string> kIndexOnHost = {"aten::index", "aten::_unsafe_index", "aten::index_put_",
                                            "aten::_index_put_impl_"};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  count_operation();
  const auto& name = op.schema().operator_name().name;
  const auto& arguments = op.schema().arguments();
  std::optional<Device> device;
  auto look = [&](const Tensor& t, const std::string& argument) {
    if (!t.defined() || (t.is_cpu() && t.dim() == 0)) return;  // a number may come from the host
    if (t.is_cpu() && kIndexOnHost.count(name)) return count_wait(name + " with an index on the host");
    TORCH_CHECK(t.is_cuda() && device.value_or(t.device()) == t.device(),
                "Expected all tensors to be on the same device, but argument ", argument, " of ", name, " ", t.sizes(),
                " is on ", t.device());
    device = t.device();
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& value = (*stack)[stack->size() - arguments.size() + i];
    if (value.isTensor()) look(value.toTensor(), arguments[i].name());
    if (value.isTensorList())
      for (const Tensor& t : value.toTensorVector()) look(t, arguments[i].name());
    if (value.isOptionalTensorList())
      for (const auto& t : value.toOptionalTensorVector()) look(t.value_or(Tensor()), arguments[i].name());
    auto type = arguments[i].type();
    if (auto optional = type->cast<c10::OptionalType>()) type = optional->getElementType();
    if (type->kind() == c10::TypeKind::GeneratorType) {
      auto generator = value.isNone() ? default_generator(-1) : value.toGenerator();
      TORCH_CHECK(generator.device().is_cuda(), "Expected a 'cuda' device type for generator but found ",
                  generator.device());
      value = static_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl())->host;
    }
  }
  if (kWaiting.count(name)) count_wait(name);
  Inside own;
  at::native::cpu_fallback(op, stack);
}

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

Tensor empty(IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::OptionalDeviceGuard guard(device && device->has_index() ? device : std::nullopt);
  return at::detail::empty_generic(size, &memory, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  c10::OptionalDeviceGuard guard(device && device->has_index() ? device : std::nullopt);
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys, c10::dtype_or_default(dtype));
}

const Tensor& resize_(const Tensor& self, IntArrayRef size, std::optional<at::MemoryFormat>) {
  if (self.sizes() == size) return self;
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  auto* storage = self.storage().unsafeGetStorageImpl();
  size_t bytes = static_cast<size_t>(self.storage_offset() + self.numel()) * self.element_size();
  if (storage->nbytes() >= bytes) return self;
  c10::DeviceGuard guard(self.device());
  auto fresh = memory.allocate(bytes);
  if (storage->nbytes()) std::memcpy(fresh.get(), storage->data(), storage->nbytes());
  storage->set_data_ptr_noswap(std::move(fresh));
  storage->set_nbytes(bytes);
  return self;
}

Tensor& copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  count_operation();
  if (self.is_cpu() != from.is_cpu()) {
    const void* on_host = (self.is_cpu() ? self : from).const_data_ptr();
    if (!non_blocking || (self.is_cpu() && !is_pinned(on_host)))
      count_wait(self.is_cpu() ? "copy to the host" : "copy to the device");
  }
  host(self).copy_(host(from));
  return self;
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool) {
  host(to).copy_(host(self));
  return to;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  host(resize_(to, self.sizes(), std::nullopt)).copy_(host(self));
  return to;
}

Tensor strided(const Tensor& self, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
  auto out = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(self.storage()),
                                                      self.key_set(), self.dtype());
  out.unsafeGetTensorImpl()->set_storage_offset(offset.value_or(self.storage_offset()));
  out.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return out;
}

Tensor as(const Tensor& self, const Tensor& view) {
  return strided(self, view.sizes(), view.strides(), view.storage_offset());
}
Tensor reshape_alias(const Tensor& self, IntArrayRef size, IntArrayRef stride) {
  return strided(self, size, stride, std::nullopt);
}
Tensor view(const Tensor& self, IntArrayRef size) { return as(self, host(self).view(size)); }
Tensor unfold(const Tensor& self, int64_t dim, int64_t size, int64_t step) {
  return as(self, host(self).unfold(dim, size, step));
}

Tensor& set_parts(Tensor& self, at::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset);
  if (stride.empty())
    impl->set_sizes_contiguous(size);
  else
    impl->set_sizes_and_strides(size, stride);
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage storage) {
  int64_t numel = static_cast<int64_t>(storage.nbytes() / self.element_size());
  return set_parts(self, std::move(storage), 0, {numel}, {});
}

Tensor& set_tensor(Tensor& self, const Tensor& from) {
  return set_parts(self, from.storage(), from.storage_offset(), from.sizes(), from.strides());
}

at::Scalar item(const Tensor& self) {
  count_wait("item");
  return at::_local_scalar_dense(host(self));
}

void record_stream(Tensor&, c10::Stream) {}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("resize_", resize_);
  m.impl("copy_", copy_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("as_strided", strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", unfold);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", set_parts);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("_local_scalar_dense", item);
  m.impl("record_stream", record_stream);
  // one kernel on CUDA, several operations where torch knows no kernel
  for (const char* whole : {"native_layer_norm", "silu_backward"})
    m.impl(whole, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("device_count", [] { return static_cast<int>(kDevices); });
  m.def("current_device", [] { return static_cast<int>(current); });
  m.def("exchange_device",
        [](int d) { return static_cast<int>(d < 0 ? current : std::exchange(current, static_cast<DeviceIndex>(d))); });
  m.def("operations", [] { return operations.load(); });
  m.def("waits", [] { return waits.load(); });
  m.def("set_sync_debug_mode", [](int mode) { sync_debug_mode = mode; });
  m.def("allocated", [](int d) { return accounts[d].now.load(); });
  m.def("peak", [](int d) { return accounts[d].peak.load(); });
  m.def("reset_peak", [](int d) { accounts[d].peak = accounts[d].now.load(); });
  m.def("default_generator", [](int d) { return default_generator(static_cast<DeviceIndex>(d)); });
  m.def("host", &host);
}
