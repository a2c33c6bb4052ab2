// Contracts: every refusal names the clause of spec/ that the caller broke.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace kvspec {

// A caller broke a clause; the text starts with its id, and nothing has changed.
class ContractError : public std::invalid_argument {
 public:
  explicit ContractError(const std::string& text) : std::invalid_argument(text) {}
};

[[noreturn]] inline void refuse(std::string_view clause, const std::string& what) {
  throw ContractError(std::string(clause) + ": " + what);
}

}  // namespace kvspec
