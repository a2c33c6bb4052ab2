// Ownership ledger: its effects.  Each looks at its arguments and makes room, and then changes the
// books, which cannot throw.
#include <algorithm>
#include <string>
#include <utility>

#include "kvspec/contract.hpp"
#include "kvspec/grow.hpp"
#include "kvspec/ownership_ledger.hpp"
#include "ledger_parts.hpp"

namespace kvspec {

// -- allocators -----------------------------------------------------------------------------------

void OwnershipLedger::take(std::string_view name, std::span<const std::int64_t> slots) {
  Pool& pool = pool_of("take", name);
  name_pages(pool, slots);
  const std::int64_t looked_at = find_named(pool);
  grow(faults_, named_.size() + dangling_.size());

  counters_.slots_seen += static_cast<std::int64_t>(slots.size());
  counters_.rows_looked_at += looked_at;
  auto found = dangling_.begin();
  for (const std::int64_t page : named_) {
    if (!sound(pool, page)) continue;
    const Owner owner = owner_of(pool.at(page));
    if (owner != kNobody) fault(LedgerFail::alias, pool, page, owner, {LedgerKind::reserved});
    for (; found != dangling_.end() && found->page == page; ++found) {
      fault(LedgerFail::dangling_row, pool, page, owner, {LedgerKind::reserved}, found->row);
    }
    move(pool, static_cast<PageId>(page), kReserved);
  }
}

// The rows that name one of these pages though it is free, in dangling_, unless the end of an
// action has told of them, or will.  How many were looked at.
std::int64_t OwnershipLedger::find_named(const Pool& pool) {
  dangling_.clear();
  std::int64_t looked_at = 0;
  if (&pool != &first()) return looked_at;
  for (const std::int64_t number : named_) {
    if (!exists(pool, number) || owner_of(pool.at(number)) != kNobody) continue;
    const auto page = static_cast<PageId>(number);
    if (!claim(page).told && claim(page).given < 0) looked_at += add_dangling({page, kNobody});
  }
  return looked_at;
}

void OwnershipLedger::give(std::string_view name, std::span<const std::int64_t> slots) {
  Pool& pool = pool_of("give", name);
  name_pages(pool, slots);
  grow(faults_, named_.size());
  if (pool.group) grow(pool.pending, named_.size());
  if (&pool == &first()) grow(given_, named_.size());

  counters_.slots_seen += static_cast<std::int64_t>(slots.size());
  const Owner other{pool.group ? LedgerKind::pending : LedgerKind::free};
  for (const std::int64_t number : named_) {
    if (!sound(pool, number)) continue;
    const auto page = static_cast<PageId>(number);
    const Owner owner = owner_of(pool.at(page));
    const bool had_one = owner.kind != LedgerKind::free && owner.kind != LedgerKind::pending;
    if (!had_one) fault(LedgerFail::double_free, pool, page, owner, other);
    if (owner.kind == LedgerKind::copy) fault(LedgerFail::use_after_free, pool, page, owner, other);
    if (had_one && &pool == &first()) {
      claim(page).told = false;
      claim(page).given = static_cast<std::int32_t>(given_.size());
      given_.push_back({page, owner});
    }
    if (pool.group) pool.pending.push_back(page);
    move(pool, page, pool.group ? kPending : kFree);
  }
}

void OwnershipLedger::open_group(std::string_view name) {
  pool_of("open_group", name).group = true;
}

void OwnershipLedger::close_group(std::string_view name) {
  Pool& pool = pool_of("close_group", name);
  pool.group = false;
  for (const PageId page : pool.pending) {
    if (pool.at(page).holder == kPending) hold(pool, page, kFree);
  }
  pool.pending.clear();
}

void OwnershipLedger::clear(std::string_view name) {
  Pool& pool = pool_of("clear", name);
  pool.group = false;
  pool.pending.clear();
  for (std::size_t page = 1; page < pool.pages.size(); ++page) {
    if (owner_of(pool.pages[page]) == kNobody) continue;
    move(pool, static_cast<PageId>(page), kFree);
  }
}

// -- rows -----------------------------------------------------------------------------------------

void OwnershipLedger::take_rows(std::span<const std::int64_t> given) {
  guard("take_rows");
  grow(faults_, given.size());
  for (const std::int64_t row : given) {
    if (!sound(rows(), row, row)) continue;
    const Owner reserved{LedgerKind::reserved};
    if (live(row)) fault(LedgerFail::alias, rows(), row, reserved, reserved, row);
    names_.drop(static_cast<std::size_t>(row));
    move(rows(), static_cast<PageId>(row), kReserved);
  }
}

void OwnershipLedger::give_rows(std::span<const std::int64_t> given) {
  guard("give_rows");
  std::size_t held_count = 0;
  for (const std::int64_t row : given) {
    if (exists(rows(), row)) held_count += row_at(row).held_count;
  }
  grow(faults_, given.size());
  grow(orphans_, held_count);

  for (const std::int64_t row : given) {
    if (!sound(rows(), row, row)) continue;
    if (live(row)) {
      leave(row);
    } else {
      fault(LedgerFail::double_free, rows(), row, kNobody, kNobody, row);
    }
    move(rows(), static_cast<PageId>(row), kFree);
  }
}

// What the request of the row holds from here on are orphans.  REQUIRES: room for them.
void OwnershipLedger::leave(std::int64_t row) noexcept {
  names_.forget(static_cast<std::size_t>(row));
  row_at(row).left_in = action_number_;
  const auto known = static_cast<std::int32_t>(orphans_.size());
  const auto add = [&](PageId page, std::int64_t position) {
    if (claim(page).orphan >= known) return;
    claim(page).orphan = static_cast<std::int32_t>(orphans_.size());
    orphans_.push_back({page, row, position});
  };
  for (const RowNames::Piece& piece : names_.forgotten(static_cast<std::size_t>(row))) {
    if (first().at(piece.page).holder == row) add(piece.page, piece.start);
  }
  for (PageId page = row_at(row).held; page >= 0; page = claim(page).held_after) {
    add(page, kLedgerLimit);  // unless it was named
  }
}

void OwnershipLedger::clear_rows() {
  guard("clear_rows");
  std::size_t most = 0;
  for (const Row& row : rows_) most = std::max(most, row.held_count);
  named_.clear();
  grow(named_, most);

  for (const Row& row : rows_) {
    named_.clear();
    for (PageId page = row.held; page >= 0; page = claim(page).held_after) named_.push_back(page);
    std::ranges::sort(named_);
    for (const std::int64_t page : named_) hold(first(), static_cast<PageId>(page), kAbandoned);
  }
  for (std::size_t row = 0; row < rows_.size(); ++row) {
    if (!live(static_cast<std::int64_t>(row))) continue;
    names_.drop(row);
    move(rows(), static_cast<PageId>(row), kFree);
  }
}

void OwnershipLedger::write(std::int64_t row, std::int64_t start,
                            std::span<const std::int64_t> slots) {
  guard("write");
  const auto count = static_cast<std::int64_t>(slots.size());
  if (start < 0 || start > kLedgerLimit - count) {
    const auto stop = static_cast<std::uint64_t>(start) + slots.size();
    refuse("LEDGER-14", "positions [" + std::to_string(start) + ", " +
                            (start < 0 ? std::to_string(start + count) : std::to_string(stop)) +
                            ") are not in [0, 2^31)");
  }
  if (slots.empty()) return;
  const bool row_exists = exists(rows(), row);
  if (row_exists) {
    name_pieces(start, slots);
    names_.prepare(static_cast<std::size_t>(row), pieces_);
    grow(written_, named_.size());
  }
  grow(faults_, named_.size() + 1);

  counters_.slots_seen += count;
  if (!sound(rows(), row, row)) return;
  if (!live(row)) {
    fault(LedgerFail::dangling_row, rows(), row, kNobody, {LedgerKind::reserved}, row);
    move(rows(), static_cast<PageId>(row), kReserved);
  }
  for (const std::int64_t page : named_) {
    if (sound(first(), page, row)) write_page(static_cast<std::int32_t>(row), page);
  }
  names_.replace(static_cast<std::size_t>(row));
}

// Makes a page the request's of a row that names it, unless it is the tree's.
void OwnershipLedger::write_page(Holder request, std::int64_t number) noexcept {
  const auto page = static_cast<PageId>(number);
  const Holder holder = first().at(page).holder;
  if (holder != kTree && holder != request) {
    const Owner owner = owner_of(holder);
    const bool free = holder == kFree || holder == kPending;
    if (free) fault(LedgerFail::dangling_row, first(), page, owner, owner_of(request), request);
    if (!free && holder != kReserved) {
      fault(LedgerFail::alias, first(), page, owner, owner_of(request), request);
    }
    hold(first(), page, request);
  }
  if (claim(page).given < 0) return;
  Given& given = given_[static_cast<std::size_t>(claim(page).given)];
  if (written_since(given, request)) return;
  written_.push_back({request, given.written});
  given.written = static_cast<std::int32_t>(written_.size() - 1);
}

bool OwnershipLedger::written_since(const Given& given, std::int64_t row) const noexcept {
  for (std::int32_t at = given.written; at >= 0;) {
    const Written& written = written_[static_cast<std::size_t>(at)];
    if (written.row == row) return true;
    at = written.before;
  }
  return false;
}

// -- the tree -------------------------------------------------------------------------------------

void OwnershipLedger::adopt(std::int64_t row, std::int64_t stop) {
  guard("adopt");
  if (stop < 0 || stop > kLedgerLimit) {
    refuse("LEDGER-14", "stop " + std::to_string(stop) + " is not in [0, 2^31]");
  }
  start_naming();
  if (exists(rows(), row)) {
    const auto number = static_cast<std::size_t>(row);
    const bool left = !live(row) && row_at(row).left_in == action_number_;
    const std::int64_t whole = stop - stop % page_size_;
    for (const RowNames::Piece& piece : left ? names_.forgotten(number) : names_.names(number)) {
      if (piece.start >= whole) break;
      name(first(), piece.page);
    }
  }
  grow(faults_, named_.size() + 1);

  if (!sound(rows(), row, row)) return;
  for (const std::int64_t number : named_) {
    const auto page = static_cast<PageId>(number);
    const std::int32_t given = claim(page).given;
    const Holder holder = first().at(page).holder;
    if (given >= 0 && !written_since(given_[static_cast<std::size_t>(given)], row)) continue;
    if (holder != kTree) adopt_page(page, holder == row, row);
  }
}

void OwnershipLedger::adopt_slots(std::span<const std::int64_t> slots) {
  guard("adopt_slots");
  name_pages(first(), slots);
  grow(faults_, named_.size());

  counters_.slots_seen += static_cast<std::int64_t>(slots.size());
  for (const std::int64_t page : named_) {
    if (!sound(first(), page)) continue;
    adopt_page(static_cast<PageId>(page), first().at(page).holder != kTree, -1);
  }
}

void OwnershipLedger::adopt_page(PageId page, bool rightful, std::int64_t row) noexcept {
  const Owner owner = owner_of(first().at(page));
  const bool gone = owner.kind == LedgerKind::free || owner.kind == LedgerKind::pending;
  if (gone || owner.kind == LedgerKind::copy) {
    fault(LedgerFail::use_after_free, first(), page, owner, {LedgerKind::tree}, row);
  } else if (!rightful) {
    fault(LedgerFail::alias, first(), page, owner, {LedgerKind::tree}, row);
  }
  move(first(), page, kTree);
}

// -- copies ---------------------------------------------------------------------------------------

std::int64_t OwnershipLedger::copy_begin(std::string_view name,
                                         std::span<const std::int64_t> slots) {
  Pool& pool = pool_of("copy_begin", name);
  name_pages(pool, slots);
  grow(faults_, named_.size());
  if (unused_flights_ < named_.size()) grow(flights_, named_.size() - unused_flights_);
  while (unused_flights_ < named_.size()) {
    flights_.push_back({-1, unused_flight_});
    unused_flight_ = static_cast<std::int32_t>(flights_.size() - 1);
    ++unused_flights_;
  }
  Copy copy{static_cast<std::size_t>(&pool - pools_.data()), {}};
  copy.pages.reserve(named_.size());
  for (const std::int64_t page : named_) {
    if (exists(pool, page)) copy.pages.push_back(static_cast<PageId>(page));
  }
  copies_.emplace_hint(copies_.end(), copy_count_, std::move(copy));

  counters_.slots_seen += static_cast<std::int64_t>(slots.size());
  for (const std::int64_t page : named_) {
    if (!sound(pool, page)) continue;
    Page& books = pool.at(page);
    --pool.counts[index(owner_of(books).kind)];
    const std::int32_t at = unused_flight_;
    Flight& flight = flights_[static_cast<std::size_t>(at)];
    unused_flight_ = flight.below;
    --unused_flights_;
    flight = {copy_count_, books.flight};
    books.flight = at;
    enter(pool, static_cast<PageId>(page));
  }
  return copy_count_++;
}

void OwnershipLedger::copy_end(std::int64_t copy) {
  guard("copy_end");
  const auto found = copies_.find(copy);
  if (found == copies_.end()) {
    refuse("LEDGER-14", "copy " + std::to_string(copy) + " is not in flight");
  }
  const auto ended = copies_.extract(found);
  Pool& pool = pools_[ended.mapped().pool];
  for (const PageId page : ended.mapped().pages) {
    Page& books = pool.at(page);
    std::int32_t* link = &books.flight;
    while (*link >= 0 && flights_[static_cast<std::size_t>(*link)].copy != copy) {
      link = &flights_[static_cast<std::size_t>(*link)].below;
    }
    if (*link < 0) continue;  // it was torn out of the copy
    --pool.counts[index(owner_of(books).kind)];
    land(*link);
    enter(pool, page);
  }
}

}  // namespace kvspec
