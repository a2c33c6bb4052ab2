// What the sources of the ownership ledger share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvspec/ownership_ledger.hpp"

namespace kvspec {

using LedgerKind = OwnershipLedger::OwnerKind;
using LedgerFail = OwnershipLedger::FaultKind;

// Positions and rows are below it.
inline constexpr std::int64_t kLedgerLimit = std::int64_t{1} << 31;
inline constexpr OwnershipLedger::Owner kNobody{LedgerKind::free};

constexpr std::size_t index(LedgerKind kind) noexcept { return static_cast<std::size_t>(kind); }

}  // namespace kvspec
