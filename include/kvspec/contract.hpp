// Contracts: every refusal names the clause of spec/ that it is about.
#pragma once

#include <new>
#include <stdexcept>
#include <string>
#include <string_view>

namespace kvspec {

// A caller broke a clause; the text starts with its id, and nothing has changed.
class ContractError : public std::invalid_argument {
 public:
  explicit ContractError(const std::string& text) : std::invalid_argument(text) {}
};

// The machine has not the memory that was asked for; the text starts with the id of a clause, and
// nothing is mapped, locked, named or touched.
class HostMemoryError : public std::bad_alloc {
 public:
  HostMemoryError(std::string_view clause, const std::string& what)
      : text_(std::string(clause) + ": " + what) {}
  const char* what() const noexcept override { return text_.what(); }

 private:
  std::runtime_error text_;  // copies without throwing
};

// A process at the other end is gone; the text starts with the id of a clause and says which.
class PeerDiedError : public std::runtime_error {
 public:
  PeerDiedError(std::string_view clause, const std::string& what)
      : std::runtime_error(std::string(clause) + ": " + what) {}
};

[[noreturn]] inline void refuse(std::string_view clause, const std::string& what) {
  throw ContractError(std::string(clause) + ": " + what);
}

}  // namespace kvspec
