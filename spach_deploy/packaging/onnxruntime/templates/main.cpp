// Runs this folder's golden images with the best execution provider that ONNX Runtime has here, and compares.
//
//     main [FOLDER [PROVIDER]]     PROVIDER, such as CPUExecutionProvider; without it, the first of model.txt that runs
//
// Exit codes: 0 the answers are PyTorch's, 1 they are not, 2 bad usage or a damaged folder, 3 no provider runs it.
// $SPACH_PROVIDER_LIBRARY is the library of a provider outside of ONNX Runtime, as NVIDIA's for RTX is (README.md).
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <sstream>
#include <unordered_map>

namespace {

using Path = std::filesystem::path;
using Words = std::vector<std::string>;
using Lines = std::map<std::string, std::vector<Words>>;  // of model.txt, by their first word

struct Failure : std::runtime_error {  // ends the program with this code
  Failure(int exit_code, const std::string& text) : std::runtime_error(text), code(exit_code) {}
  const int code;
};

struct Tensor {  // a line `input` or `output` of model.txt and its golden values, those of all images in a row
  std::string name, role, type;
  std::vector<std::int64_t> shape;  // of one image
  std::string bytes;
  std::size_t images = 0, values = 1;  // values of one image
};

double number(const void* data, const std::string& type, std::size_t i) {
  if (type == "int64") return static_cast<double>(static_cast<const std::int64_t*>(data)[i]);
  return type == "float16" ? static_cast<const Ort::Float16_t*>(data)[i].ToFloat() : static_cast<const float*>(data)[i];
}

std::string content(const Path& file) {
  std::ifstream stream(file, std::ios::binary);
  if (!stream) throw Failure(2, file.string() + " cannot be read. Write the folder again: spach-package onnxruntime");
  return {std::istreambuf_iterator<char>(stream), {}};
}

[[noreturn]] void damaged(const std::string& why) {
  throw Failure(2, "the folder is damaged: " + why + ". Write it again: spach-package onnxruntime");
}

std::size_t count_of(const std::string& word) {  // a whole number from 1 to 999,999,999
  if (word.empty() || word.size() > 9 || word.find_first_not_of("0123456789") != std::string::npos || std::stoul(word) == 0)
    damaged("model.txt has " + word + " where a number above 0 belongs");
  return std::stoul(word);
}

double bound_of(const std::string& word) {  // `inf` is no bound
  char* end = nullptr;
  const double bound = std::strtod(word.c_str(), &end);
  if (end == word.c_str() || *end != 0 || !(bound >= 0)) damaged("model.txt has the bound " + word);
  return bound;
}

Lines read_lines(const Path& folder) {
  Lines lines;
  std::istringstream text(content(folder / "model.txt"));
  for (std::string line; std::getline(text, line);) {
    std::istringstream stream(line);
    Words words(std::istream_iterator<std::string>(stream), {});
    if (!words.empty()) lines[words[0]].emplace_back(words.begin() + 1, words.end());
  }
  return lines;
}

Tensor read_tensor(const Path& folder, const Words& words) {  // NAME ROLE TYPE STORED-TYPE EXTENTS...
  static const std::map<std::string, std::size_t> sizes{{"uint8", 1}, {"float16", 2}, {"float32", 4}, {"int64", 8}};
  Tensor tensor{words.at(0), words.at(1), words.at(2), {}, content(folder / ("golden." + words.at(0) + ".bin"))};
  for (std::size_t i = 4; i < words.size(); ++i) tensor.shape.push_back(static_cast<std::int64_t>(count_of(words[i])));
  const std::size_t stored = tensor.bytes.size() / sizes.at(words.at(3));
  for (const std::int64_t extent : tensor.shape) {
    tensor.values *= static_cast<std::size_t>(extent);
    if (tensor.values > stored) damaged("golden." + tensor.name + ".bin is too short");  // nor does the product overflow
  }
  tensor.images = stored / tensor.values;
  if (tensor.images * tensor.values * sizes.at(words.at(3)) != tensor.bytes.size())
    damaged("golden." + tensor.name + ".bin does not hold whole images");
  return tensor;
}

Ort::Session session_of(Ort::Env& env, const Path& file, const std::string& provider) {
  const Words built_in = Ort::GetAvailableProviders();
  Ort::SessionOptions options;
  if (std::find(built_in.begin(), built_in.end(), provider) == built_in.end()) {
    const char* library = std::getenv("SPACH_PROVIDER_LIBRARY");
    if (library == nullptr) throw std::runtime_error("this ONNX Runtime does not have it");
#if ORT_API_VERSION >= 23
    env.RegisterExecutionProviderLibrary(provider.c_str(), Path(library).native());
    std::vector<Ort::ConstEpDevice> devices;
    for (const Ort::ConstEpDevice& device : env.GetEpDevices())
      if (provider == device.EpName() && devices.empty()) devices.push_back(device);
    options.AppendExecutionProvider_V2(env, devices, std::unordered_map<std::string, std::string>{});
#else
    throw std::runtime_error("a provider outside of ONNX Runtime needs headers of version 1.23");
#endif
  } else if (provider == "CUDAExecutionProvider") {
    OrtCUDAProviderOptionsV2* cuda = nullptr;
    const char *key = "use_tf32", *value = "0";  // the bounds of an FP32 model are for FP32 products
    Ort::ThrowOnError(Ort::GetApi().CreateCUDAProviderOptions(&cuda));
    Ort::ThrowOnError(Ort::GetApi().UpdateCUDAProviderOptions(cuda, &key, &value, 1));
    options.AppendExecutionProvider_CUDA_V2(*cuda);
  } else if (provider == "TensorrtExecutionProvider") {
    OrtTensorRTProviderOptionsV2* tensorrt = nullptr;
    Ort::ThrowOnError(Ort::GetApi().CreateTensorRTProviderOptions(&tensorrt));
    options.AppendExecutionProvider_TensorRT_V2(*tensorrt);
  } else if (provider != "CPUExecutionProvider") {
    options.AppendExecutionProvider(provider, {});
  }
  return {env, file.c_str(), options};
}

// The numbers of each output, in batches that a plan takes too; the last one is filled with the first images.
std::vector<std::vector<double>> answers(Ort::Session& session, std::size_t batch, const Tensor& input,
                                         const std::vector<Tensor>& outputs) {
  std::vector<std::vector<double>> found(outputs.size());
  std::vector<std::int64_t> shape = input.shape;
  shape.insert(shape.begin(), static_cast<std::int64_t>(batch));
  std::vector<const char*> names;
  for (const Tensor& output : outputs) names.push_back(output.name.c_str());
  const char* name = input.name.c_str();
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const auto type = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetElementType();
  const std::size_t bytes = input.bytes.size() / input.images;
  for (std::size_t start = 0; start < input.images; start += batch) {
    std::string pixels;
    for (std::size_t i = start; i < start + batch; ++i) pixels.append(input.bytes, i % input.images * bytes, bytes);
    const Ort::Value fed =
        Ort::Value::CreateTensor(memory, pixels.data(), pixels.size(), shape.data(), shape.size(), type);
    const std::vector<Ort::Value> given =
        session.Run(Ort::RunOptions{}, &name, &fed, 1, names.data(), names.size());
    for (std::size_t o = 0; o < outputs.size(); ++o) {
      if (given[o].GetTensorTypeAndShapeInfo().GetElementCount() != batch * outputs[o].values)
        throw std::runtime_error(outputs[o].name + " has another shape than in model.txt");
      for (std::size_t i = 0; i < std::min(batch, input.images - start) * outputs[o].values; ++i)
        found[o].push_back(number(given[o].GetTensorRawData(), outputs[o].type, i));
    }
  }
  return found;
}

void figure(const char* what, double found, double allowed) {
  std::printf("%s %.2e", what, found);
  if (std::isfinite(allowed)) std::printf(" (%.2e)", allowed);
}

// Whether an output is what PyTorch answers. `bound`: relative L2, largest error, what is a tie in `scores`.
bool agrees(const Tensor& output, const std::vector<double>& found, const std::vector<double>& expected,
            const std::vector<double>& bound, const std::vector<double>& scores) {
  const std::size_t n = output.values, classes = scores.size() / output.images;
  double error = 0, largest = 0, gap = 0, usual = 1e-300;
  for (const double value : expected) usual += value * value / static_cast<double>(output.images);
  for (std::size_t image = 0; image < output.images; ++image) {
    const double *ours = &found[image * n], *theirs = &expected[image * n], *score = scores.data() + image * classes;
    const auto differ = [&](std::ptrdiff_t one, std::ptrdiff_t other) {
      gap = std::max(gap, std::abs(score[one] - score[other]));
    };
    double difference = 0, size = 0;
    for (std::size_t i = 0; i < n; ++i) {
      if (!std::isfinite(ours[i])) return false;
      if (output.role == "top_indices") {
        if (!(ours[i] >= 0 && ours[i] < static_cast<double>(classes))) return false;
        differ(static_cast<std::ptrdiff_t>(ours[i]), static_cast<std::ptrdiff_t>(theirs[i]));
        continue;
      }
      difference += (ours[i] - theirs[i]) * (ours[i] - theirs[i]);
      size += theirs[i] * theirs[i];
      largest = std::max(largest, std::abs(ours[i] - theirs[i]));
    }
    if (output.role == "logits")
      differ(std::max_element(ours, ours + n) - ours, std::max_element(theirs, theirs + n) - theirs);
    // few numbers may be close to zero by chance, and are compared with what they usually are
    error = std::max(error, std::sqrt(difference / std::max({size, n < 8 ? usual : 0.0, 1e-300})));
  }
  std::printf("  %s:", output.name.c_str());
  if (output.role != "top_indices") {
    figure(" relative L2", error, bound[0]);
    figure(", largest error", largest, bound[1]);
  }
  if (output.role == "logits") std::printf(",");
  if (output.role == "logits" || output.role == "top_indices") figure(" between classes that differ", gap, bound[2]);
  std::printf("\n");
  return error <= bound[0] && largest <= bound[1] && gap <= bound[2];
}

int run(const Path& folder, const std::string& wanted) {
  Lines lines = read_lines(folder);
  const std::size_t batch = count_of(lines.at("batch").at(0).at(0));
  const Tensor input = read_tensor(folder, lines.at("input").at(0));
  std::vector<Tensor> outputs;
  std::vector<std::vector<double>> expected;
  std::vector<double> scores;  // PyTorch's, of all classes
  for (const Words& words : lines.at("output")) {
    outputs.push_back(read_tensor(folder, words));
    expected.emplace_back();
    for (std::size_t i = 0; i < outputs.back().images * outputs.back().values; ++i)
      expected.back().push_back(number(outputs.back().bytes.data(), words.at(3), i));
    if (outputs.back().images != input.images || input.images == 0)
      damaged("the golden files have different numbers of images");
    if (outputs.back().role == "logits") scores = expected.back();
  }
  std::map<std::string, std::vector<double>> bounds;  // by file and output
  for (const Words& words : lines.at("bound"))
    bounds[words.at(0) + " " + words.at(1)] = {bound_of(words.at(2)), bound_of(words.at(3)), bound_of(words.at(4))};
  for (const Words& words : lines.at("file")) {  // run.py compares the SHA-256 too
    std::error_code none;
    const std::uintmax_t size = std::filesystem::file_size(folder / words.at(0), none);
    if (none) damaged(words.at(0) + " is missing");
    if (std::to_string(size) != words.at(1)) damaged(words.at(0) + " has not the size that was written");
  }
  std::vector<Words> runs;  // FILE PROVIDER, the best first
  for (const Words& words : lines.at("run"))
    if (wanted.empty() || wanted == words.at(1)) runs.push_back(words);
  if (runs.empty()) runs.push_back({"model.onnx", wanted});
  Ort::Env env(ORT_LOGGING_LEVEL_FATAL);
  for (const Words& words : runs) {
    const std::string &file = words.at(0), &provider = words.at(1);
    Ort::Session session(nullptr);
    try {
      session = session_of(env, folder / file, provider);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s does not run %s here: %s\n", provider.c_str(), file.c_str(), error.what());
      continue;
    }
    std::printf("%s runs %s\n", provider.c_str(), file.c_str());
    const auto found = answers(session, batch, input, outputs);
    bool all_agree = true;
    for (std::size_t o = 0; o < outputs.size(); ++o)
      all_agree &= agrees(outputs[o], found[o], expected[o], bounds.at(file + " " + outputs[o].name), scores);
    std::printf("%zu images: %swhat PyTorch answers in FP32\n", input.images, all_agree ? "" : "not ");
    return all_agree ? 0 : 1;
  }
  throw Failure(3, "no execution provider here runs this model");
}

}  // namespace

int main(int count, char** words) {
  try {
    if (count > 3) throw Failure(2, "usage: main [FOLDER [PROVIDER]]");
    return run(count > 1 ? words[1] : ".", count > 2 ? words[2] : "");
  } catch (const Failure& failure) {
    std::fprintf(stderr, "Error: %s.\n", failure.what());
    return failure.code;
  } catch (const std::logic_error&) {
    std::fprintf(stderr, "Error: the folder is damaged. Write it again: spach-package onnxruntime\n");
    return 2;
  } catch (const std::exception& error) {  // ONNX Runtime's, while it ran
    std::fprintf(stderr, "Error: %s\n", error.what());
    return 1;
  }
}
