// A record of every block that torch's allocators give out and take back: what longtrain.memory calls the allocator's own word.
//
// Allocators report to the thread's profiler state (c10/core/Allocator.h), which torch carries over to the threads of a backward pass. Ours
// is a torch profiler that is switched off but for memory, so that who asks whether a profiler runs is told no.
#include <ATen/ops/empty.h>
#include <torch/csrc/profiler/orchestration/observer.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

namespace longtrain {
namespace {

using torch::profiler::impl::ActiveProfilerType;
using torch::profiler::impl::ProfilerConfig;
using torch::profiler::impl::ProfilerState;
using torch::profiler::impl::ProfilerStateBase;

struct Event {
  int64_t nanoseconds, address, bytes, device;  // bytes: negative where given back; device: -1 for the CPU
};

// Events so far. Python reads it before and after every operation, through its address.
std::atomic<int64_t> counter{0};
static_assert(sizeof(counter) == sizeof(int64_t));

class Trace final : public ProfilerStateBase {
 public:
  Trace() : ProfilerStateBase(ProfilerConfig(ProfilerState::Disabled, false, /*profile_memory=*/true)) {}

  void reportMemoryUsage(void* address, int64_t bytes, size_t, size_t, c10::Device device) override {
    const std::chrono::nanoseconds now = std::chrono::steady_clock::now().time_since_epoch();
    const std::lock_guard<std::mutex> guard(mutex_);
    events_.push_back({now.count(), reinterpret_cast<int64_t>(address), bytes, device.is_cpu() ? -1 : device.index()});
    counter.store(static_cast<int64_t>(events_.size()), std::memory_order_relaxed);
  }

  ActiveProfilerType profilerType() override { return ActiveProfilerType::NONE; }

  at::Tensor events() {
    const std::lock_guard<std::mutex> guard(mutex_);
    at::Tensor out = at::empty({static_cast<int64_t>(events_.size()), 4}, at::kLong);
    if (!events_.empty()) std::memcpy(out.data_ptr(), events_.data(), events_.size() * sizeof(Event));
    return out;
  }

 private:
  std::mutex mutex_;
  std::vector<Event> events_;
};

// The address of the counter.
int64_t begin() {
  TORCH_CHECK(ProfilerStateBase::get(/*global=*/false) == nullptr, "a profiler runs in this thread already; end it first");
  counter.store(0);
  ProfilerStateBase::push(std::make_shared<Trace>());
  return reinterpret_cast<int64_t>(&counter);
}

at::Tensor end() {
  auto trace = std::dynamic_pointer_cast<Trace>(ProfilerStateBase::pop(/*global=*/false));
  TORCH_CHECK(trace != nullptr, "the profiler that runs in this thread is another one than began");
  return trace->events();
}

TORCH_LIBRARY_FRAGMENT(longtrain, m) {
  m.def("_memory_trace_begin() -> int", begin);
  m.def("_memory_trace_end() -> Tensor", end);
}

} // namespace
} // namespace longtrain
