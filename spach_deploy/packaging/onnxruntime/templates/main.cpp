// Runs this folder's golden images with the best execution provider that ONNX Runtime has here, and compares.
//
//     main [FOLDER [PROVIDER]]     PROVIDER, such as CPUExecutionProvider; without it, the first of model.txt that runs
//
// Exit codes: 0 the answers are PyTorch's, 1 they are not, 2 bad usage or a damaged folder, 3 no provider runs it.
// $SPACH_PROVIDER_LIBRARY is the library of a provider outside of ONNX Runtime, as NVIDIA's for RTX is (README.md).
#include "golden.h"

#include <cstdlib>
#include <unordered_map>

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

int main(int count, char** words) try {
  if (count > 3) throw std::invalid_argument("usage: main [FOLDER [PROVIDER]]");
  const Path path = count > 1 ? words[1] : ".";
  const Folder folder(path);
  std::vector<Words> runs;  // FILE PROVIDER, the best first
  for (const Words& run : folder.lines.at("run"))
    if (count < 3 || run.at(1) == words[2]) runs.push_back(run);
  if (runs.empty() && count == 3) runs.push_back({"model.onnx", words[2]});
  Ort::Env env(ORT_LOGGING_LEVEL_FATAL);
  for (const Words& run : runs) {
    Ort::Session session(nullptr);
    try {
      session = session_of(env, path / run[0], run.at(1));
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s does not run %s here: %s\n", run[1].c_str(), run[0].c_str(), error.what());
      continue;
    }
    std::printf("%s runs %s\n", run[1].c_str(), run[0].c_str());
    return compared(session, folder, run[0]) ? 0 : 1;
  }
  std::fprintf(stderr, "Error: no execution provider here runs this model.\n");
  return 3;
} catch (const std::logic_error& error) {
  std::fprintf(stderr, "Error: %s. Write the folder again: spach-package onnxruntime\n", error.what());
  return 2;
} catch (const std::exception& error) {  // ONNX Runtime's, while it ran
  std::fprintf(stderr, "Error: %s\n", error.what());
  return 1;
}
