// host.cpp as a program, for the tests on a processor that is emulated: calls come by the standard input, results go to
// the standard output.
#include <cstdio>
#include <vector>

#include "host.cpp"

namespace {

struct Request {
  int64_t op, path, normalizer, dtype, layout, geometry[10], bytes[4];  // bytes: of the result, first, second, third
};

}  // namespace

int main() {
  for (Request call; fread(&call, sizeof call, 1, stdin) == 1;) {
    std::vector<char> maps[4];
    for (int i = 0; i < 4; ++i) {
      maps[i].resize(call.bytes[i]);
      if (fread(maps[i].data(), 1, maps[i].size(), stdin) != maps[i].size()) return 1;
    }
    carafe_run(
        call.op, call.path, call.normalizer, call.dtype, call.geometry, call.layout, maps[0].data(), maps[1].data(),
        maps[2].data(), maps[3].data());
    fwrite(maps[0].data(), 1, maps[0].size(), stdout);
    fflush(stdout);
  }
}
