// The golden images of this folder, PyTorch's answers to them, and the comparison that main.cpp makes.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <sstream>
#include <stdexcept>
#include <tuple>

using Path = std::filesystem::path;
using Words = std::vector<std::string>;
using Numbers = std::vector<double>;

inline std::string content(const Path& file) {
  std::ifstream stream(file, std::ios::binary);
  if (!stream) throw std::invalid_argument(file.string() + " cannot be read");
  return {std::istreambuf_iterator<char>(stream), {}};
}

inline std::size_t count_of(const std::string& word) {  // a whole number above 0
  const bool is_count = word.find_first_not_of("0123456789") == std::string::npos && word.size() < 10;
  if (!is_count || std::stoul(word) == 0) throw std::invalid_argument("model.txt has " + word + " for a number");
  return std::stoul(word);
}

inline Numbers numbers(const void* data, ONNXTensorElementDataType type, std::size_t count) {
  Numbers found;
  for (std::size_t i = 0; i < count; ++i)
    if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64)
      found.push_back(static_cast<double>(static_cast<const std::int64_t*>(data)[i]));
    else if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16)
      found.push_back(static_cast<const Ort::Float16_t*>(data)[i].ToFloat());
    else
      found.push_back(static_cast<const float*>(data)[i]);
  return found;
}

struct Tensor {  // an input or output, and its golden values, those of all images in a row
  std::string name, role, bytes;
  std::vector<std::int64_t> shape;  // with the batch in front
  ONNXTensorElementDataType type;
  std::size_t size, values = 1;  // bytes of a value, values of an image

  Tensor(const Path& folder, std::size_t batch, const Words& words)  // NAME ROLE DTYPE STORED EXTENTS...
      : name(words.at(0)), role(words.at(1)), bytes(content(folder / ("golden." + name + ".bin"))) {
    static const std::map<std::string, std::pair<std::size_t, ONNXTensorElementDataType>> types{
        {"uint8", {1, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8}},
        {"float16", {2, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16}},
        {"float32", {4, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT}},
        {"int64", {8, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64}}};
    std::tie(size, type) = types.at(words.at(3));
    shape.push_back(static_cast<std::int64_t>(batch));
    for (std::size_t i = 4; i < words.size(); ++i) {
      values *= count_of(words[i]);
      shape.push_back(std::stoll(words[i]));
      if (values > bytes.size()) throw std::invalid_argument(name + " has too few values");
    }
  }
  std::size_t images() const { return bytes.size() / size / values; }
  Numbers golden() const { return numbers(bytes.data(), type, images() * values); }
};

struct Folder {  // what is in it; std::logic_error where it is damaged
  std::map<std::string, std::vector<Words>> lines;  // of model.txt, by their first word
  std::vector<Tensor> tensors;                      // the input, then the outputs

  explicit Folder(const Path& path) {
    std::istringstream text(content(path / "model.txt"));
    for (std::string line; std::getline(text, line);) {
      std::istringstream stream(line);
      Words words(std::istream_iterator<std::string>(stream), {});
      if (!words.empty()) lines[words[0]].emplace_back(words.begin() + 1, words.end());
    }
    for (const Words& words : lines.at("file"))  // run.py compares the SHA-256 too
      if (std::to_string(content(path / words.at(0)).size()) != words.at(1))
        throw std::invalid_argument(words.at(0) + " has not the size that was written");
    for (const char* kind : {"input", "output"})
      for (const Words& words : lines.at(kind))
        tensors.emplace_back(path, count_of(lines.at("batch").at(0).at(0)), words);
    for (const Tensor& tensor : tensors)
      if (tensor.images() != tensors[0].images() || tensor.images() == 0)
        throw std::invalid_argument(tensor.name + " has another number of images");
    for (const Words& run : lines.at("run"))
      for (const Words& output : lines.at("output")) bound(run.at(0), output[0]);
  }
  const Words& bound(const std::string& file, const std::string& output) const {
    for (const Words& words : lines.at("bound"))
      if (words.at(0) == file && words.at(1) == output) return words;
    throw std::invalid_argument("model.txt has no bound for " + output);
  }
};

// Whether an output is within `bound`: relative L2, largest error, and how far `scores` may be apart of classes that
// are chosen in place of PyTorch's.
inline bool agrees(const Tensor& output, const Numbers& found, const Numbers& scores, const Words& bound) {
  const Numbers wanted = output.golden();
  const std::size_t n = output.values, classes = scores.size() / output.images();
  double usual = 1e-300, figures[3] = {0, 0, 0};
  const auto raise = [&](int i, double figure) {  // to NaN too, which stays
    if (!(figure <= figures[i]) && !std::isnan(figures[i])) figures[i] = figure;
  };
  for (const double value : wanted) usual += value * value / static_cast<double>(output.images());
  for (std::size_t image = 0; image < output.images(); ++image) {
    const double *ours = &found[image * n], *theirs = &wanted[image * n], *score = scores.data() + image * classes;
    const auto choose = [&](double one, double other) {
      const bool are_classes = std::min(one, other) >= 0 && std::max(one, other) < static_cast<double>(classes);
      raise(2, are_classes ? std::abs(score[std::size_t(one)] - score[std::size_t(other)]) : INFINITY);
    };
    double difference = 0, size = 1e-300;
    for (std::size_t i = 0; i < n; ++i) {
      difference += (ours[i] - theirs[i]) * (ours[i] - theirs[i]);
      size += theirs[i] * theirs[i];
      raise(1, std::abs(ours[i] - theirs[i]));
      if (output.role == "top_indices") choose(ours[i], theirs[i]);
    }
    if (output.role == "logits")
      choose(double(std::max_element(ours, ours + n) - ours), double(std::max_element(theirs, theirs + n) - theirs));
    raise(0, std::sqrt(difference / (n < 8 ? std::max(size, usual) : size)));  // few may be zero by chance
  }
  const char* const words[] = {"relative L2", "largest error", "between classes that differ"};
  bool is_within = true;
  for (std::size_t i = 0; i < 3; ++i) {
    const double most = std::stod(bound.at(i + 2));
    is_within &= figures[i] <= most;
    if (std::isfinite(most)) std::printf("    %s %.2e, allowed %.2e\n", words[i], figures[i], most);
  }
  return is_within;
}

// Runs the golden images, in batches that a plan takes too, and compares. The last batch is filled with the first images.
inline bool compared(Ort::Session& session, const Folder& folder, const std::string& file) {
  const Tensor& input = folder.tensors[0];
  const std::size_t batch = static_cast<std::size_t>(input.shape[0]), bytes = input.size * input.values;
  std::vector<const char*> names;
  for (std::size_t i = 1; i < folder.tensors.size(); ++i) names.push_back(folder.tensors[i].name.c_str());
  std::vector<Numbers> found(names.size());
  const char* name = input.name.c_str();
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  for (std::size_t start = 0; start < input.images(); start += batch) {
    std::string pixels;
    for (std::size_t i = start; i < start + batch; ++i) pixels.append(input.bytes, i % input.images() * bytes, bytes);
    const Ort::Value fed = Ort::Value::CreateTensor(memory, pixels.data(), pixels.size(), input.shape.data(),
                                                    input.shape.size(), input.type);
    const auto given = session.Run(Ort::RunOptions{}, &name, &fed, 1, names.data(), names.size());
    for (std::size_t o = 0; o < given.size(); ++o) {
      const auto info = given[o].GetTensorTypeAndShapeInfo();
      const Numbers all = numbers(given[o].GetTensorRawData(), info.GetElementType(), info.GetElementCount());
      if (info.GetShape() != folder.tensors[o + 1].shape)
        throw std::runtime_error(std::string(names[o]) + " has another shape than in model.txt");
      found[o].insert(found[o].end(), all.begin(), all.end());
    }
  }
  Numbers scores;  // PyTorch's, of all classes
  for (const Tensor& tensor : folder.tensors)
    if (tensor.role == "logits") scores = tensor.golden();
  bool all_agree = true;
  for (std::size_t o = 0; o < names.size(); ++o) {
    std::printf("  %s\n", names[o]);
    all_agree &= agrees(folder.tensors[o + 1], found[o], scores, folder.bound(file, names[o]));
  }
  std::printf("%zu images: %swhat PyTorch answers in FP32\n", input.images(), all_agree ? "" : "not ");
  return all_agree;
}
