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

std::string as_text(const Bytes& bytes) {
  return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

Result<ModelFacts> load_facts(const std::string& folder) {
  Result<Bytes> content = read_file(join(folder, "model.txt"), kMostTextBytes);
  if (!content) return content.error();
  return parse_facts(as_text(*content));
}

// labels.txt, one label a line. A folder without one is fine.
Result<std::vector<std::string>> load_labels(const std::string& folder, const ModelFacts& facts) {
  std::vector<std::string> labels;
  Result<Bytes> content = read_file(join(folder, "labels.txt"), kMostTextBytes);
  if (!content) return labels;
  const std::string text = as_text(*content);
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    labels.push_back(text.substr(at, end - at));
    if (!labels.back().empty() && labels.back().back() == '\r') labels.back().pop_back();
    at = end + 1;
  }
  if (labels.size() == static_cast<std::size_t>(facts.classes())) return labels;
  return Error{ErrorCode::bad_file, "labels.txt has " + std::to_string(labels.size()) +
                                        " lines; the model has " + std::to_string(facts.classes()) +
                                        " classes."};
}

Result<Bytes> load_plan(const std::string& folder, const ModelFacts& facts) {
  Result<Bytes> plan = read_exported(join(folder, "engine.plan"), facts.plan);
  if (!plan) return plan.error();
  Status status = check_plan(plan->data(), plan->size(), facts, linked_library());
  if (!status) return status.error();
  return plan;
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
  engine.reset();
  runtime.reset();
}

Status Engine::Impl::read(const std::string& from) {
  folder = from;
  Result<ModelFacts> read_facts = load_facts(folder);
  if (!read_facts) return read_facts.error();
  facts = std::move(*read_facts);
  Result<std::vector<std::string>> read_labels = load_labels(folder, facts);
  if (!read_labels) return read_labels.error();
  labels = std::move(*read_labels);
  return Done{};
}

Status Engine::Impl::deserialize(const Bytes& plan) {
  const cuda::OnDevice on(device);
  if (Status status = on.status(); !status) return status;
  runtime.reset(nvinfer1::createInferRuntime(Logger::instance()));
  if (!runtime)
    return Error{ErrorCode::engine,
                 Logger::instance().take("TensorRT's runtime could not be created.")};
  engine.reset(runtime->deserializeCudaEngine(plan.data(), plan.size()));
  if (!engine)
    return explain(facts, device,
                   Logger::instance().take("TensorRT refused the plan and gave no reason."));
  return check_interface(*engine, facts);
}

Result<std::unique_ptr<nvinfer1::IExecutionContext>> Engine::Impl::context() {
  const std::lock_guard<std::mutex> lock(creating);
  std::unique_ptr<nvinfer1::IExecutionContext> made(engine->createExecutionContext());
  if (!made)
    return explain(facts, device, Logger::instance().take("TensorRT could not create a context."));
  return made;
}

Engine::Engine(std::shared_ptr<Impl> impl) noexcept : impl_(std::move(impl)) {}

Result<Engine> Engine::load(const std::string& folder, int device) noexcept {
  return guarded([&]() -> Result<Engine> {
    auto impl = std::make_shared<Impl>();
    if (Status status = impl->read(folder); !status) return status.error();
    Result<Bytes> plan = load_plan(folder, impl->facts);
    if (!plan) return plan.error();
    Result<int> count = cuda::device_count();
    if (!count) return count.error();
    if (device < 0 || device >= *count) {
      return Error{ErrorCode::bad_argument, "There is no CUDA device " + std::to_string(device) +
                                                "; there are " + std::to_string(*count) + "."};
    }
    impl->device = device;
    if (Status status = impl->deserialize(*plan); !status) return status.error();
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

const char* linked_flavour() noexcept {
  return SPACH_FLAVOUR;
}

std::string linked_version() {
  return dotted(linked_library().version);
}

}  // namespace spach
