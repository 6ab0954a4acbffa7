// Runs a package that carafe_plugin.export.to_aoti has written, in a process without Python, on the CPU:
//
//     run_package MODEL.pt2 INPUT.f32 1x3x512x512 OUTPUT [LIBRARY]
//
// INPUT.f32 holds the float32 values of the model's one input and nothing else. Each of its outputs goes into a file of
// that kind, OUTPUT0.f32 and so on, and its size to the terminal. Without `standalone=True` a package calls CARAFE++ in
// LIBRARY, which is carafe_plugin/_C.abi3.so of the installed package. To build the program:
//
//     TORCH=$(python -c "import torch; print(torch.__path__[0])")
//     g++ -std=c++17 -O2 docs/run_package.cpp -o run_package -I$TORCH/include -I$TORCH/include/torch/csrc/api/include
//         -L$TORCH/lib -Wl,-rpath,$TORCH/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 -ldl
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <fstream>
#include <iostream>
#include <sstream>

std::vector<int64_t> read_size(const std::string& text) {
  std::vector<int64_t> size;
  std::istringstream words(text);
  for (std::string word; std::getline(words, word, 'x');) size.push_back(std::stoll(word));
  return size;
}

torch::Tensor read(const std::string& path, const std::vector<int64_t>& size) {
  torch::Tensor values = torch::empty(size, torch::kFloat32);
  std::ifstream file(path, std::ios::binary);
  file.read(static_cast<char*>(values.mutable_data_ptr()), values.nbytes());
  if (file.gcount() != static_cast<std::streamsize>(values.nbytes()) || file.peek() != EOF)
    throw std::runtime_error(path + " must hold " + std::to_string(values.nbytes()) + " bytes");
  return values;
}

void write(const std::string& path, const torch::Tensor& tensor) {
  torch::Tensor values = tensor.to(torch::kCPU, torch::kFloat32).contiguous();
  std::ofstream file(path, std::ios::binary);
  if (!file.write(static_cast<const char*>(values.const_data_ptr()), values.nbytes()))
    throw std::runtime_error("cannot write " + path);
}

int main(int argc, char** argv) try {
  if (argc < 5) throw std::runtime_error("expected MODEL.pt2 INPUT.f32 SIZE OUTPUT [LIBRARY ...]");
  for (int i = 5; i < argc; ++i)  // lazily: the one function of Python's that the library names is never called here
    if (dlopen(argv[i], RTLD_LAZY | RTLD_GLOBAL) == nullptr) throw std::runtime_error(dlerror());
  c10::InferenceMode no_gradients;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  std::vector<torch::Tensor> outputs = model.run({read(argv[2], read_size(argv[3]))});
  for (size_t i = 0; i < outputs.size(); ++i) {
    write(argv[4] + std::to_string(i) + ".f32", outputs[i]);
    std::cout << "output " << i << ": " << outputs[i].sizes() << '\n';
  }
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << '\n';
  return 1;
}
