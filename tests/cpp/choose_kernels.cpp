// Answers questions about choices, one per line on standard input: MODE M N K GROUP_SIZE [SM_COUNT NAME OF THE GPU].
// MODE+EPILOGUE asks for a kernel with an epilogue.
// Prints the kernel, its microseconds and the source; or "error" and the sentence. The argument is the choice file.
// As in a program for people, C has the locale of the environment, and C++ one with a decimal comma.
#include <clocale>
#include <cstdio>
#include <iostream>
#include <locale>
#include <sstream>
#include <string>

#include "sdk/chooser.h"

struct DecimalComma : std::numpunct<char> {
  char do_decimal_point() const override { return ','; }
};

int main(int, char** arguments) {
  std::setlocale(LC_ALL, "");
  std::locale::global(std::locale(std::locale::classic(), new DecimalComma));
  try {
    const w4a16::Chooser chooser = w4a16::Chooser::load(arguments[1]);
    for (std::string line; std::getline(std::cin, line);) {
      std::istringstream fields(line);
      std::string mode;
      int64_t m = 0, n = 0, k = 0, group_size = 0;
      w4a16::Gpu gpu{};
      fields >> mode >> m >> n >> k >> group_size >> gpu.sm_count;
      const size_t plus = mode.find('+');
      const std::string epilogue = plus == std::string::npos ? "none" : mode.substr(plus + 1);
      mode.resize(plus == std::string::npos ? mode.size() : plus);
      const bool has_gpu = static_cast<bool>(std::getline(fields >> std::ws, gpu.name));
      try {
        const w4a16::Choice choice = chooser.choose(mode, m, n, k, group_size, has_gpu ? &gpu : nullptr,
                                                    w4a16::overrides_of_environment(), epilogue);
        std::printf("%s %.17g %s\n", choice.kernel.c_str(), choice.microseconds, choice.source);
      } catch (const w4a16::ChoiceError& error) {
        std::printf("error %s\n", error.what());
      }
    }
  } catch (const w4a16::ChoiceError& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
