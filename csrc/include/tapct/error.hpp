// The errors of the native core; bindings.cpp turns each into one Python exception.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace tapct {

// A scan is damaged or contradicts itself; `field` names where. Never holds a path. `code` is a
// reason code of io/findings.py, empty where the field decides it.
class FormatError : public std::runtime_error {
 public:
  FormatError(std::string field, const std::string& reason, std::string code = "")
      : std::runtime_error(reason), field_(std::move(field)), code_(std::move(code)) {}
  const std::string& field() const noexcept { return field_; }
  const std::string& code() const noexcept { return code_; }

 private:
  std::string field_;
  std::string code_;
};

// An argument of the caller does not do.
class InputError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A file of the training store is damaged or does not match its index.
class StoreError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The system could not read a file of the training store; it may another time.
class StoreReadError : public StoreError {
 public:
  using StoreError::StoreError;
};

// The GPU part is absent or failed.
class DeviceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace tapct
