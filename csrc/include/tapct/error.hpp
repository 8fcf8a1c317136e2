// The errors of the native core; bindings.cpp turns each into one Python exception.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace tapct {

// A scan is damaged or contradicts itself; `field` names where. Never holds a path.
class FormatError : public std::runtime_error {
 public:
  FormatError(std::string field, const std::string& reason)
      : std::runtime_error(reason), field_(std::move(field)) {}
  const std::string& field() const noexcept { return field_; }

 private:
  std::string field_;
};

// A file of the training store is damaged or does not match its index.
class StoreError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The GPU part is absent or failed.
class DeviceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace tapct
