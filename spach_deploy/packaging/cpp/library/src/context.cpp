#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>

#include "cuda.h"
#include "engine_impl.h"
#include "guard.h"
#include "half.h"

namespace spach {
namespace {

template <typename T>
std::vector<float> as_floats(const std::vector<std::byte>& data, float (*convert)(T)) {
  std::vector<float> values(data.size() / sizeof(T));
  for (std::size_t i = 0; i < values.size(); ++i) {
    T value;
    std::memcpy(&value, data.data() + i * sizeof(T), sizeof(T));
    values[i] = convert(value);
  }
  return values;
}

}  // namespace

Result<std::vector<float>> Output::floats() const noexcept {
  return guarded([&]() -> Result<std::vector<float>> {
    switch (tensor.dtype) {
      case DType::float32: return as_floats<float>(data, [](float x) { return x; });
      case DType::float16:
        return as_floats<std::uint16_t>(data, [](std::uint16_t x) { return float_from_half(x); });
      case DType::uint8:
        return as_floats<std::uint8_t>(data, [](std::uint8_t x) { return static_cast<float>(x); });
      case DType::int64:
        return as_floats<std::int64_t>(data, [](std::int64_t x) { return static_cast<float>(x); });
    }
    return Error{ErrorCode::bad_argument, "An output of an unknown type."};
  });
}

namespace {

// Pinned host memory for the largest batch and its outputs, and whether they are in use.
struct Slot {
  cuda::PinnedMemory input;
  std::vector<cuda::PinnedMemory> outputs;
  cuda::Event done;  // when the outputs are here; only for batches that are submitted
  enum class State { free, submitted, waited } state = State::free;
  int batch = 0;
};

// Holds a context for one thread, or finds that another one has it.
class InUse {
 public:
  explicit InUse(std::atomic_flag& flag) noexcept : flag_(flag), mine_(!flag.test_and_set()) {}
  ~InUse() {
    if (mine_) flag_.clear();
  }
  InUse(const InUse&) = delete;
  InUse& operator=(const InUse&) = delete;

  Status status() const {
    if (mine_) return Done{};
    return Error{ErrorCode::busy, "Another thread uses this context; create one for each thread."};
  }

 private:
  std::atomic_flag& flag_;
  bool mine_;
};

}  // namespace

struct Context::Impl {
  std::shared_ptr<Engine::Impl> owner;
  ExecutionContext made;
  Preprocessor preprocessor;
  // What follows is made when host memory is first used. One stream runs everything in order, so
  // that one set of device memory is enough; its addresses stay the same, as CUDA graphs want it.
  cuda::Stream stream;
  cuda::DeviceMemory input;
  std::vector<cuda::DeviceMemory> outputs;
  Slot staging;  // of calls that wait
  std::array<std::unique_ptr<Slot>, kSlots> slots;
  std::atomic_flag in_use = ATOMIC_FLAG_INIT;

  Impl(std::shared_ptr<Engine::Impl> engine, ExecutionContext context)
      : owner(std::move(engine)), made(std::move(context)), preprocessor(owner->facts) {}

  ~Impl() {
    const cuda::OnDevice on(owner->device);
    if (stream) cudaStreamSynchronize(stream.get());
    slots = {};
    staging = Slot();
    outputs.clear();
    input.reset();
    stream.reset();
    made.context.reset();
    made.config.reset();
  }

  const ModelFacts& facts() const { return owner->facts; }
  std::byte* staged() const { return static_cast<std::byte*>(staging.input.get()); }

  Status check_batch(int batch) const;
  Result<Slot> make_slot() const;
  Status allocate();
  Result<Slot*> slot(std::size_t which);
  Status enqueue(const void* device_input, int batch, void* const* device_outputs, cudaStream_t on);
  Status run_staged(int batch);
  Status transfer(const Slot& slot, int batch);
  Outputs collect(int batch) const;
  void fill(std::size_t from, int batch);

  template <typename Stage>
  Result<std::vector<float>> values(const OutputFacts* output, std::size_t count, Stage stage);
};

Status Context::Impl::check_batch(int batch) const {
  const BatchFacts& limits = facts().batch;
  if (limits.min <= batch && batch <= limits.max) return Done{};
  return Error{ErrorCode::bad_argument,
               "A batch of " + std::to_string(batch) + " is outside the plan's profile, " +
                   std::to_string(limits.min) + " to " + std::to_string(limits.max) + "."};
}

Result<Slot> Context::Impl::make_slot() const {
  const auto most = static_cast<std::size_t>(facts().batch.max);
  Slot slot;
  Result<cuda::PinnedMemory> made_input = cuda::pinned_memory(most * facts().input.bytes());
  if (!made_input) return made_input.error();
  slot.input = std::move(*made_input);
  for (const OutputFacts& output : facts().outputs) {
    Result<cuda::PinnedMemory> memory = cuda::pinned_memory(most * output.tensor.bytes());
    if (!memory) return memory.error();
    slot.outputs.push_back(std::move(*memory));
  }
  return slot;
}

Status Context::Impl::allocate() {
  if (stream) return Done{};
  const auto most = static_cast<std::size_t>(facts().batch.max);
  Result<cuda::DeviceMemory> made_input = cuda::device_memory(most * facts().input.bytes());
  if (!made_input) return made_input.error();
  input = std::move(*made_input);
  outputs.clear();
  for (const OutputFacts& output : facts().outputs) {
    Result<cuda::DeviceMemory> memory = cuda::device_memory(most * output.tensor.bytes());
    if (!memory) return memory.error();
    outputs.push_back(std::move(*memory));
  }
  Result<Slot> slot = make_slot();
  if (!slot) return slot.error();
  staging = std::move(*slot);
  Result<cuda::Stream> created = cuda::make_stream();
  if (!created) return created.error();
  stream = std::move(*created);
  return Done{};
}

Result<Slot*> Context::Impl::slot(std::size_t which) {
  if (which >= kSlots)
    return Error{ErrorCode::bad_argument, "There is no slot " + std::to_string(which) +
                                              "; they are 0 to " + std::to_string(kSlots - 1) +
                                              "."};
  if (Status status = allocate(); !status) return status.error();
  if (!slots[which]) {
    Result<Slot> slot = make_slot();
    if (!slot) return slot.error();
    Result<cuda::Event> event = cuda::make_event();
    if (!event) return event.error();
    slot->done = std::move(*event);
    slots[which] = std::make_unique<Slot>(std::move(*slot));
  }
  return slots[which].get();
}

Status Context::Impl::enqueue(const void* device_input, int batch, void* const* device_outputs,
                              cudaStream_t on) {
  const char* name = facts().input.name.c_str();
  nvinfer1::IExecutionContext& context = *made.context;
  bool accepted = context.setInputShape(name, dims_of(facts().input, batch)) &&
                  context.setTensorAddress(name, const_cast<void*>(device_input));
  for (std::size_t i = 0; accepted && i < facts().outputs.size(); ++i)
    accepted = context.setTensorAddress(facts().outputs[i].tensor.name.c_str(), device_outputs[i]);
  if (accepted && context.enqueueV3(on)) return Done{};
  return Error{ErrorCode::engine, Logger::instance().take("TensorRT could not run the plan.")};
}

// Runs what lies in `staging.input`; the answers lie in `staging.outputs` afterwards.
Status Context::Impl::run_staged(int batch) {
  Status status = guarded([&] { return transfer(staging, batch); });
  // Whatever failed, nothing may be in flight when the buffers are used again.
  Status waited = cuda::checked(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
  return status ? waited : status;
}

// Puts a slot's batch on the stream: its input there, the engine, its outputs back.
Status Context::Impl::transfer(const Slot& slot, int batch) {
  const auto images = static_cast<std::size_t>(batch);
  const std::size_t input_bytes = images * facts().input.bytes();
  Status status = cuda::checked(cudaMemcpyAsync(input.get(), slot.input.get(), input_bytes,
                                                cudaMemcpyHostToDevice, stream.get()),
                                "cudaMemcpyAsync");
  if (!status) return status;
  std::vector<void*> addresses;
  for (const cuda::DeviceMemory& memory : outputs) addresses.push_back(memory.get());
  status = enqueue(input.get(), batch, addresses.data(), stream.get());
  for (std::size_t i = 0; status && i < outputs.size(); ++i) {
    const std::size_t bytes = images * facts().outputs[i].tensor.bytes();
    status = cuda::checked(cudaMemcpyAsync(slot.outputs[i].get(), outputs[i].get(), bytes,
                                           cudaMemcpyDeviceToHost, stream.get()),
                           "cudaMemcpyAsync");
  }
  return status;
}

Outputs Context::Impl::collect(int batch) const {
  Outputs results;
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const TensorFacts& tensor = facts().outputs[i].tensor;
    const auto* from = static_cast<const std::byte*>(staging.outputs[i].get());
    const std::size_t bytes = static_cast<std::size_t>(batch) * tensor.bytes();
    results.push_back(Output{tensor, std::vector<std::byte>(from, from + bytes)});
  }
  return results;
}

// Copies of image `from - 1` of the staged batch, up to `batch`: the profile asks for so many.
void Context::Impl::fill(std::size_t from, int batch) {
  const std::size_t bytes = facts().input.bytes();
  for (std::size_t i = from; i < static_cast<std::size_t>(batch); ++i)
    std::memcpy(staged() + i * bytes, staged() + (from - 1) * bytes, bytes);
}

// One output of `count` images, of which `stage(start, images, destination)` writes some's inputs.
template <typename Stage>
Result<std::vector<float>> Context::Impl::values(const OutputFacts* output, std::size_t count,
                                                 Stage stage) {
  if (output == nullptr) return Error{ErrorCode::bad_argument, "The model has no such output."};
  if (Status status = allocate(); !status) return status.error();
  const BatchFacts& limits = facts().batch;
  const auto which = static_cast<std::size_t>(output - facts().outputs.data());
  std::vector<float> all;
  for (std::size_t start = 0; start < count;) {
    const std::size_t here = std::min(count - start, static_cast<std::size_t>(limits.max));
    if (Status status = stage(start, here, staged()); !status) return status.error();
    const int batch = std::max(static_cast<int>(here), limits.min);
    fill(here, batch);
    if (Status status = run_staged(batch); !status) return status.error();
    const Outputs results = collect(static_cast<int>(here));
    Result<std::vector<float>> values = results[which].floats();
    if (!values) return values.error();
    all.insert(all.end(), values->begin(), values->end());
    start += here;
  }
  return all;
}

Context::Context(std::unique_ptr<Impl> impl) noexcept : impl_(std::move(impl)) {}
Context::Context(Context&&) noexcept = default;
Context& Context::operator=(Context&&) noexcept = default;
Context::~Context() = default;

namespace {

// What every call of a context begins with: it is free, and its device is this thread's.
template <typename Impl, typename Body>
auto with_context(Impl* impl, Body body) noexcept -> decltype(body(*impl)) {
  return guarded([&]() -> decltype(body(*impl)) {
    if (impl == nullptr) return Error{ErrorCode::bad_argument, "The context was moved from."};
    const InUse in_use(impl->in_use);
    if (Status status = in_use.status(); !status) return status.error();
    const cuda::OnDevice on(impl->owner->device);
    if (Status status = on.status(); !status) return status.error();
    return body(*impl);
  });
}

Error in_flight(std::size_t slot) {
  return Error{ErrorCode::bad_argument, "The batch in slot " + std::to_string(slot) +
                                            " is still in flight: wait for it first."};
}

// One output of `count` inputs in host memory.
template <typename Impl>
Result<std::vector<float>> values_of(Impl& impl, const OutputFacts* output, const void* input,
                                     std::size_t count) {
  if (input == nullptr) return Error{ErrorCode::bad_argument, "The input is a null pointer."};
  const std::size_t bytes = impl.facts().input.bytes();
  const auto* from = static_cast<const std::byte*>(input);
  return impl.values(output, count,
                     [&](std::size_t start, std::size_t images, std::byte* destination) -> Status {
                       std::memcpy(destination, from + start * bytes, images * bytes);
                       return Done{};
                     });
}

// One output of `count` pictures.
template <typename Impl>
Result<std::vector<float>> values_of(Impl& impl, const OutputFacts* output, const Image* images,
                                     std::size_t count) {
  if (images == nullptr) return Error{ErrorCode::bad_argument, "The images are a null pointer."};
  return impl.values(
      output, count, [&](std::size_t start, std::size_t some, std::byte* destination) {
        return impl.preprocessor.write(images + start, some, destination, impl.owner->threads);
      });
}

}  // namespace

Result<Outputs> Context::run(const void* input, std::size_t input_bytes, int batch) noexcept {
  return with_context(impl_.get(), [&](Impl& impl) -> Result<Outputs> {
    if (Status status = impl.check_batch(batch); !status) return status.error();
    const std::size_t wanted = static_cast<std::size_t>(batch) * impl.facts().input.bytes();
    if (input == nullptr || input_bytes != wanted) {
      return Error{ErrorCode::bad_argument, "A batch of " + std::to_string(batch) + " has " +
                                                std::to_string(wanted) + " bytes, not " +
                                                std::to_string(input_bytes) + "."};
    }
    if (Status status = impl.allocate(); !status) return status.error();
    std::memcpy(impl.staged(), input, wanted);
    if (Status status = impl.run_staged(batch); !status) return status.error();
    return impl.collect(batch);
  });
}

Status Context::enqueue(const void* device_input, int batch, void* const* device_outputs,
                        std::size_t output_count, CUstream_st* stream) noexcept {
  return with_context(impl_.get(), [&](Impl& impl) -> Status {
    if (Status status = impl.check_batch(batch); !status) return status.error();
    const std::size_t wanted = impl.facts().outputs.size();
    if (device_input == nullptr || device_outputs == nullptr || output_count != wanted) {
      return Error{ErrorCode::bad_argument,
                   "The plan has one input and " + std::to_string(wanted) + " outputs."};
    }
    return impl.enqueue(device_input, batch, device_outputs, stream);
  });
}

Result<void*> Context::input(std::size_t slot) noexcept {
  return with_context(impl_.get(), [&](Impl& impl) -> Result<void*> {
    Result<Slot*> named = impl.slot(slot);
    if (!named) return named.error();
    if ((*named)->state == Slot::State::submitted) return in_flight(slot);
    return (*named)->input.get();
  });
}

Status Context::submit(std::size_t slot, int batch) noexcept {
  return with_context(impl_.get(), [&](Impl& impl) -> Status {
    if (Status status = impl.check_batch(batch); !status) return status;
    Result<Slot*> named = impl.slot(slot);
    if (!named) return named.error();
    Slot& mine = **named;
    if (mine.state == Slot::State::submitted) return in_flight(slot);
    mine.state = Slot::State::free;
    Status status = guarded([&] { return impl.transfer(mine, batch); });
    if (status)
      status =
          cuda::checked(cudaEventRecord(mine.done.get(), impl.stream.get()), "cudaEventRecord");
    if (!status) {
      cudaStreamSynchronize(impl.stream.get());  // nothing may read the slot any more
      return status;
    }
    mine.state = Slot::State::submitted;
    mine.batch = batch;
    return Done{};
  });
}

Result<std::vector<OutputView>> Context::wait(std::size_t slot) noexcept {
  return with_context(impl_.get(), [&](Impl& impl) -> Result<std::vector<OutputView>> {
    Result<Slot*> named = impl.slot(slot);
    if (!named) return named.error();
    Slot& mine = **named;
    if (mine.state == Slot::State::free)
      return Error{ErrorCode::bad_argument,
                   "Nothing was submitted in slot " + std::to_string(slot) + "."};
    if (mine.state == Slot::State::submitted) {
      Status done = cuda::checked(cudaEventSynchronize(mine.done.get()), "cudaEventSynchronize");
      mine.state = done ? Slot::State::waited : Slot::State::free;
      if (!done) return done.error();
    }
    std::vector<OutputView> views;
    for (std::size_t i = 0; i < mine.outputs.size(); ++i) {
      const TensorFacts& tensor = impl.facts().outputs[i].tensor;
      views.push_back(
          {tensor, mine.outputs[i].get(), static_cast<std::size_t>(mine.batch) * tensor.bytes()});
    }
    return views;
  });
}

Status Context::preprocess(const Image* images, std::size_t count, void* destination) noexcept {
  return guarded([&]() -> Status {
    if (impl_ == nullptr) return Error{ErrorCode::bad_argument, "The context was moved from."};
    return impl_->preprocessor.write(images, count, destination, impl_->owner->threads);
  });
}

Status Context::warm_up(const std::vector<int>& batches) noexcept {
  return with_context(impl_.get(), [&](Impl& impl) -> Status {
    const BatchFacts& profile = impl.facts().batch;
    std::vector<int> sizes = batches;
    if (sizes.empty()) sizes = {profile.min, profile.opt, profile.max};
    for (const int batch : sizes)
      if (Status status = impl.check_batch(batch); !status) return status;
    if (Status status = impl.allocate(); !status) return status;
    std::memset(impl.staged(), 0,
                static_cast<std::size_t>(profile.max) * impl.facts().input.bytes());
    for (const int batch : sizes)
      for (int run = 0; run < 2; ++run)  // the first compiles, the second captures
        if (Status status = impl.run_staged(batch); !status) return status;
    impl.owner->jit.save_if_any();
    return Done{};
  });
}

Result<std::vector<float>> Context::logits(const void* input, std::size_t count) noexcept {
  return with_context(impl_.get(), [&](Impl& impl) -> Result<std::vector<float>> {
    return values_of(impl, impl.facts().find(Role::logits), input, count);
  });
}

Result<std::vector<float>> Context::output(const std::string& name, const void* input,
                                           std::size_t count) noexcept {
  return with_context(impl_.get(), [&](Impl& impl) -> Result<std::vector<float>> {
    return values_of(impl, impl.facts().find(name), input, count);
  });
}

Result<std::vector<float>> Context::output(const std::string& name, const Image* images,
                                           std::size_t count) noexcept {
  return with_context(impl_.get(), [&](Impl& impl) -> Result<std::vector<float>> {
    return values_of(impl, impl.facts().find(name), images, count);
  });
}

Result<std::vector<std::vector<Prediction>>> Context::classify(const Image* images,
                                                               std::size_t count,
                                                               std::size_t k) noexcept {
  using Ranked = std::vector<std::vector<Prediction>>;
  return with_context(impl_.get(), [&](Impl& impl) -> Result<Ranked> {
    const OutputFacts* scores = impl.facts().find(Role::logits);
    if (scores == nullptr)
      return Error{ErrorCode::bad_argument, "The model has no logits to rank; ask for an output."};
    Result<std::vector<float>> logits = values_of(impl, scores, images, count);
    if (!logits) return logits.error();
    const auto classes = static_cast<std::size_t>(impl.facts().classes());
    Ranked ranked;
    for (std::size_t i = 0; i < count; ++i) {
      auto best = top_k(logits->data() + i * classes, classes, k, impl.owner->labels);
      if (!best) return best.error();
      ranked.push_back(std::move(*best));
    }
    return ranked;
  });
}

Result<Context> Engine::create_context() const noexcept {
  return guarded([&]() -> Result<Context> {
    const cuda::OnDevice on(impl_->device);
    if (Status status = on.status(); !status) return status.error();
    Result<ExecutionContext> made = impl_->context();
    if (!made) return made.error();
    return Context(std::make_unique<Context::Impl>(impl_, std::move(*made)));
  });
}

}  // namespace spach
