// Ownership ledger: what it knows, and whether its books hold.
#include <algorithm>

#include "kvspec/contract.hpp"
#include "kvspec/ownership_ledger.hpp"
#include "ledger_parts.hpp"

namespace kvspec {

OwnershipLedger::Owner OwnershipLedger::owner(std::string_view name, std::int64_t page) const {
  const Pool& pool = pool_or_rows(name);
  return exists(pool, page) ? owner_of(pool.at(page)) : kNobody;
}

std::array<std::int64_t, OwnershipLedger::kOwnerKinds> OwnershipLedger::counts(
    std::string_view pool) const {
  return pool_or_rows(pool).counts;
}

std::vector<OwnershipLedger::Step> OwnershipLedger::history(std::string_view name,
                                                            std::int64_t page) const {
  const Pool& pool = pool_or_rows(name);
  std::vector<Step> steps;
  if (!exists(pool, page)) return steps;
  const std::int64_t lost = std::max<std::int64_t>(
      0, step_total_ - static_cast<std::int64_t>(step_count_));  // the newest that is
  for (std::int64_t at = pool.at(page).last_step; at > lost;) {
    const Entered& entered = steps_[static_cast<std::size_t>(at) % step_count_];
    steps.push_back({entered.action, {entered.kind, entered.who}});
    at = entered.before;
  }
  return steps;
}

std::vector<PageId> OwnershipLedger::row_pages(std::int64_t row) const {
  std::vector<PageId> pages;
  if (!live(row)) return pages;
  for (const RowNames::Piece& piece : names_.names(static_cast<std::size_t>(row))) {
    const auto from = static_cast<std::size_t>(piece.start / page_size_);
    const auto to = static_cast<std::size_t>((piece.stop - 1) / page_size_);
    pages.resize(to + 1);
    std::fill(pages.begin() + static_cast<std::ptrdiff_t>(from), pages.end(), piece.page);
  }
  return pages;
}

std::vector<OwnershipLedger::Owner> OwnershipLedger::owners(std::size_t pool) const {
  std::vector<Owner> all;
  all.reserve(pools_[pool].pages.size());
  for (const Page& page : pools_[pool].pages) all.push_back(owner_of(page));
  if (pool + 1 < pools_.size()) all.erase(all.begin());
  return all;
}

std::vector<std::int64_t> OwnershipLedger::live_rows() const {
  std::vector<std::int64_t> found;
  for (std::int64_t row = 0; row < static_cast<std::int64_t>(rows_.size()); ++row) {
    if (live(row)) found.push_back(row);
  }
  return found;
}

std::vector<std::int64_t> OwnershipLedger::copies_in_flight() const {
  std::vector<std::int64_t> numbers;
  for (const auto& [copy, pages] : copies_) numbers.push_back(copy);
  return numbers;
}

void OwnershipLedger::check() const {
  for (std::size_t pool = 0; pool < pools_.size(); ++pool) {
    std::array<std::int64_t, kOwnerKinds> found{};
    for (const Owner& owner : owners(pool)) ++found[index(owner.kind)];
    if (found == pools_[pool].counts) continue;
    refuse("LEDGER-1", "the counts of pool " + pools_[pool].name + " are not its owners'");
  }
  std::vector<std::size_t> held(rows_.size());
  for (const Page& page : pools_.front().pages) {
    if (page.holder >= 0) ++held[static_cast<std::size_t>(page.holder)];
  }
  for (std::size_t row = 0; row < rows_.size(); ++row) {
    const auto number = static_cast<std::int64_t>(row);
    std::size_t listed = 0;
    bool own = true;
    for (PageId page = rows_[row].held; page >= 0 && listed <= held[row]; ++listed) {
      own = own && pools_.front().at(page).holder == number;
      page = claims_[static_cast<std::size_t>(page)].held_after;
    }
    if (!own || listed != held[row] || listed != rows_[row].held_count) {
      refuse("LEDGER-1", "row " + std::to_string(row) + " does not have what its request holds");
    }
    if (!live(number) && !names_.names(row).empty()) {
      refuse("LEDGER-1", "row " + std::to_string(row) + " is free and live");
    }
  }
  names_.check();
}

}  // namespace kvspec
