#include <algorithm>

#include "cuda.h"
#include "engine_impl.h"
#include "guard.h"
#include "plan.h"

#ifndef SPACH_FLAVOUR
#error "SPACH_FLAVOUR is \"tensorrt\" or \"tensorrt-rtx\"; the CMake file sets it."
#endif

namespace spach {
namespace {

constexpr std::uint64_t kMostTextBytes = std::uint64_t{1} << 22;

Library linked_library() {
  Library library;
  library.flavour = SPACH_FLAVOUR;
  const int version = getInferLibVersion();  // (major * 100 + minor) * 100 + patch
  library.version[0] = version / 10000;
  library.version[1] = version / 100 % 100;
  library.version[2] = version % 100;
  return library;
}

std::string_view as_text(const Bytes& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// The lines of labels.txt.
Result<std::vector<std::string>> parse_labels(std::string_view text, const ModelFacts& facts) {
  std::vector<std::string> labels;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    labels.emplace_back(text.substr(at, end - at));
    if (!labels.back().empty() && labels.back().back() == '\r') labels.back().pop_back();
    at = end + 1;
  }
  if (labels.size() == static_cast<std::size_t>(facts.classes())) return labels;
  return Error{ErrorCode::bad_file, "labels.txt has " + std::to_string(labels.size()) +
                                        " lines; the model has " + std::to_string(facts.classes()) +
                                        " classes."};
}

Status check_options(const EngineOptions& options) {
  if (options.threads >= 1) return Done{};
  return Error{ErrorCode::bad_argument,
               "Pictures are preprocessed on at least one thread, not on " +
                   std::to_string(options.threads) + "."};
}

std::string gpu_name(int capability) {
  return "sm" + std::to_string(capability);
}

// TensorRT failed. Was it because the plan is for other GPUs? That is only asked now: whether a
// plan loads is TensorRT's to decide.
Error explain(const ModelFacts& facts, int device, const std::string& reason) {
  const int here = cuda::compute_capability(device);
  const std::vector<int>& gpus = facts.gpus;
  if (here == 0 || gpus.empty() || std::find(gpus.begin(), gpus.end(), here) != gpus.end())
    return Error{ErrorCode::engine, reason};
  std::string built_for;
  for (const int gpu : gpus) built_for += (built_for.empty() ? "" : ", ") + gpu_name(gpu);
  return Error{ErrorCode::wrong_gpu, "The plan is for " + built_for + ", and this GPU is " +
                                         gpu_name(here) + ". " + reason};
}

bool is_dtype(nvinfer1::DataType theirs, DType ours) {
  switch (ours) {
    case DType::float32: return theirs == nvinfer1::DataType::kFLOAT;
    case DType::float16: return theirs == nvinfer1::DataType::kHALF;
    case DType::uint8: return theirs == nvinfer1::DataType::kUINT8;
    case DType::int64: return theirs == nvinfer1::DataType::kINT64;
  }
  return false;
}

// The plan's own word on a tensor against model.txt's: later code trusts the sizes.
Status check_tensor(const nvinfer1::ICudaEngine& engine, const TensorFacts& tensor,
                    nvinfer1::TensorIOMode mode) {
  const char* name = tensor.name.c_str();
  const Error other{ErrorCode::changed, "The plan has no tensor '" + tensor.name +
                                            "' of the kind, type and shape that model.txt says."};
  if (engine.getTensorIOMode(name) != mode) return other;
  if (!is_dtype(engine.getTensorDataType(name), tensor.dtype)) return other;
  const nvinfer1::Dims ours = dims_of(tensor, 1), theirs = engine.getTensorShape(name);
  if (ours.nbDims != theirs.nbDims) return other;
  if (!std::equal(ours.d + 1, ours.d + ours.nbDims, theirs.d + 1)) return other;
  return Done{};
}

Status check_batches(const nvinfer1::ICudaEngine& engine, const ModelFacts& facts) {
  const char* name = facts.input.name.c_str();
  using Selector = nvinfer1::OptProfileSelector;
  std::int64_t least = engine.getTensorShape(name).d[0], most = least;
  if (least < 0) {
    least = engine.getProfileShape(name, 0, Selector::kMIN).d[0];
    most = engine.getProfileShape(name, 0, Selector::kMAX).d[0];
  }
  if (least <= facts.batch.min && facts.batch.max <= most) return Done{};
  return Error{ErrorCode::changed, "The plan takes batches of " + std::to_string(least) + " to " +
                                       std::to_string(most) + ", and model.txt says otherwise."};
}

Status check_interface(const nvinfer1::ICudaEngine& engine, const ModelFacts& facts) {
  const int count = engine.getNbIOTensors();
  if (count != static_cast<int>(facts.outputs.size()) + 1) {
    return Error{ErrorCode::changed, "The plan has " + std::to_string(count) +
                                         " inputs and outputs, and model.txt says otherwise."};
  }
  Status status = check_tensor(engine, facts.input, nvinfer1::TensorIOMode::kINPUT);
  for (std::size_t i = 0; status && i < facts.outputs.size(); ++i)
    status = check_tensor(engine, facts.outputs[i].tensor, nvinfer1::TensorIOMode::kOUTPUT);
  return status ? check_batches(engine, facts) : status;
}

}  // namespace

nvinfer1::Dims dims_of(const TensorFacts& tensor, int batch) {
  nvinfer1::Dims dims{};
  dims.nbDims = static_cast<std::int32_t>(tensor.shape.size() + 1);
  dims.d[0] = batch;
  std::copy(tensor.shape.begin(), tensor.shape.end(), dims.d + 1);
  return dims;
}

Engine::Impl::~Impl() {
  const cuda::OnDevice on(device);
  jit.close();
  engine.reset();
  runtime.reset();
}

// A folder without labels.txt is fine, and so is an empty text.
Status Engine::Impl::read(std::string_view text, std::string_view label_lines) {
  Result<ModelFacts> parsed = parse_facts(text);
  if (!parsed) return parsed.error();
  facts = std::move(*parsed);
  if (label_lines.empty()) return Done{};
  Result<std::vector<std::string>> lines = parse_labels(label_lines, facts);
  if (!lines) return lines.error();
  labels = std::move(*lines);
  return Done{};
}

Status Engine::Impl::load(const std::byte* plan, std::size_t size, const EngineOptions& options) {
  const Library library = linked_library();
  if (Status status = check_plan(plan, size, facts, library); !status) return status;
  if (Status status = check_options(options); !status) return status;
  Result<int> count = cuda::device_count();
  if (!count) return count.error();
  if (options.device < 0 || options.device >= *count) {
    return Error{ErrorCode::bad_argument, "There is no CUDA device " +
                                              std::to_string(options.device) + "; there are " +
                                              std::to_string(*count) + "."};
  }
  device = options.device;
  threads = options.threads;
  const cuda::OnDevice on(device);
  if (Status status = on.status(); !status) return status;
  if (Status status = deserialize(plan, size); !status) return status;
  return jit.open(*engine, options,
                  {facts.plan.sha256, cuda::kind_of(device), dotted(library.version)});
}

Status Engine::Impl::deserialize(const std::byte* plan, std::size_t size) {
  runtime.reset(nvinfer1::createInferRuntime(Logger::instance()));
  if (!runtime)
    return Error{ErrorCode::engine,
                 Logger::instance().take("TensorRT's runtime could not be created.")};
  engine.reset(runtime->deserializeCudaEngine(plan, size));
  if (!engine)
    return explain(facts, device,
                   Logger::instance().take("TensorRT refused the plan and gave no reason."));
  return check_interface(*engine, facts);
}

Result<ExecutionContext> Engine::Impl::context() {
  Result<ExecutionContext> made = jit.create_context();
  if (made && !made->context)
    return explain(facts, device, Logger::instance().take("TensorRT could not create a context."));
  return made;
}

Engine::Engine(std::shared_ptr<Impl> impl) noexcept : impl_(std::move(impl)) {}

Result<Engine> Engine::load(const std::string& folder, int device) noexcept {
  return guarded([&]() -> Result<Engine> {
    EngineOptions options;
    options.device = device;
    return load(path_of(folder), options);
  });
}

Result<Engine> Engine::load(const std::filesystem::path& folder,
                            const EngineOptions& options) noexcept {
  return guarded([&]() -> Result<Engine> {
    auto impl = std::make_shared<Impl>();
    impl->folder = text_of(folder);
    const Result<Bytes> text = read_file(folder / "model.txt", kMostTextBytes);
    if (!text) return text.error();
    const Result<Bytes> lines = read_file(folder / "labels.txt", kMostTextBytes);
    const std::string_view labels = lines ? as_text(*lines) : std::string_view();
    if (Status status = impl->read(as_text(*text), labels); !status) return status.error();
    const Result<Bytes> plan = read_exported(folder / "engine.plan", impl->facts.plan);
    if (!plan) return plan.error();
    if (Status status = impl->load(plan->data(), plan->size(), options); !status)
      return status.error();
    return Engine(std::move(impl));
  });
}

Result<Engine> Engine::load(const ModelBytes& model, const EngineOptions& options) noexcept {
  return guarded([&]() -> Result<Engine> {
    if (model.plan == nullptr) return Error{ErrorCode::bad_argument, "The plan is a null pointer."};
    auto impl = std::make_shared<Impl>();
    impl->from_memory = true;
    if (Status status = impl->read(model.text, model.labels); !status) return status.error();
    const auto* plan = static_cast<const std::byte*>(model.plan);
    if (Status status = impl->load(plan, model.plan_bytes, options); !status) return status.error();
    return Engine(std::move(impl));
  });
}

const ModelFacts& Engine::facts() const noexcept {
  return impl_->facts;
}
const std::vector<std::string>& Engine::labels() const noexcept {
  return impl_->labels;
}
const std::string& Engine::folder() const noexcept {
  return impl_->folder;
}

bool Engine::is_from_memory() const noexcept {
  return impl_->from_memory;
}
const std::filesystem::path& Engine::runtime_cache_file() const noexcept {
  return impl_->jit.file();
}

Status Engine::save_runtime_cache() const noexcept {
  return guarded([&]() -> Status {
    const cuda::OnDevice on(impl_->device);
    if (Status status = on.status(); !status) return status;
    return impl_->jit.save();
  });
}

const char* linked_flavour() noexcept {
  return SPACH_FLAVOUR;
}

std::string linked_version() {
  return dotted(linked_library().version);
}

}  // namespace spach
