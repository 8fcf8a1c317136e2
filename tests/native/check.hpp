// A test is a function registered by TEST; CHECK and CHECK_THROWS report and count, and go on.
#pragma once

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline int& num_failures() {
  static int count = 0;
  return count;
}

inline bool add(const char* name, void (*run)()) {
  tests().push_back({name, run});
  return true;
}

inline void report(const char* file, int line, const std::string& what) {
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
  ++num_failures();
}

}  // namespace check

#define TEST(name)                                           \
  static void name();                                        \
  static const bool name##_added = check::add(#name, &name); \
  static void name()

#define CHECK(condition)                                          \
  do {                                                            \
    if (!(condition)) {                                           \
      check::report(__FILE__, __LINE__, "not true: " #condition); \
    }                                                             \
  } while (false)

// The error must carry `text` in its field or message: the message is what a user acts on.
#define CHECK_THROWS(Kind, text, expression)                                           \
  do {                                                                                 \
    try {                                                                              \
      (void)(expression);                                                              \
      check::report(__FILE__, __LINE__, "did not throw: " #expression);                \
    } catch (const Kind& error) {                                                      \
      if (check::message_of(error).find(text) == std::string::npos) {                  \
        check::report(__FILE__, __LINE__, "wrong error: " + check::message_of(error)); \
      }                                                                                \
    }                                                                                  \
  } while (false)

namespace check {

template <typename Error>
std::string message_of(const Error& error) {
  if constexpr (requires { error.field(); }) {
    return error.field() + ": " + error.what();
  } else {
    return error.what();
  }
}

}  // namespace check
