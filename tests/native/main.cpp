#include <cstring>
#include <exception>

#include "check.hpp"

// tapct_tests [part of a test's name]: runs the matching tests; the exit status says whether all
// passed.
int main(int argc, char** argv) {
  int num_run = 0;
  for (const check::Test& test : check::tests()) {
    if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) {
      continue;
    }
    ++num_run;
    try {
      test.run();
    } catch (const std::exception& error) {
      check::report(test.name, 0, std::string("threw ") + error.what());
    }
  }
  std::printf("%d tests, %d failures\n", num_run, check::num_failures());
  return num_run > 0 && check::num_failures() == 0 ? 0 : 1;
}
