#include "kvspec/ownership_ledger.hpp"

#include <algorithm>
#include <tuple>

#include "kvspec/contract.hpp"
#include "kvspec/grow.hpp"
#include "ledger_parts.hpp"

namespace kvspec {

namespace {

constexpr std::string_view kRowsName = "rows";
constexpr std::size_t kNowhere = static_cast<std::size_t>(-1);

std::size_t checked_size(const std::string& name, std::int64_t size) {
  if (size < 1 || size >= kLedgerLimit) {
    refuse("LEDGER-14", name + " " + std::to_string(size) + " is not in [1, 2^31)");
  }
  return static_cast<std::size_t>(size);
}

// The pages of the first pool, once all sizes are known to be right.
std::size_t checked_sizes(std::int64_t page_size, const OwnershipLedger::PageCounts& page_counts,
                          std::int64_t row_count, std::int64_t step_count) {
  checked_size("page_size", page_size);
  checked_size("row_count", row_count);
  checked_size("step_count", step_count);
  bool named_rows = false;
  for (const auto& [name, count] : page_counts) {
    checked_size(name, count);
    named_rows = named_rows || name == kRowsName;
  }
  if (page_counts.empty() || named_rows) {
    refuse("LEDGER-14", "page_counts must name a pool, and none of them rows");
  }
  return static_cast<std::size_t>(page_counts.front().second);
}

}  // namespace

OwnershipLedger::OwnershipLedger(std::int64_t page_size, const PageCounts& page_counts,
                                 std::int64_t row_count, std::int64_t step_count)
    : page_size_(page_size),
      claims_(checked_sizes(page_size, page_counts, row_count, step_count) + 1),
      rows_(static_cast<std::size_t>(row_count)),
      names_(claims_.size() - 1, rows_.size()),
      steps_(std::make_unique_for_overwrite<Entered[]>(static_cast<std::size_t>(step_count))),
      step_count_(static_cast<std::size_t>(step_count)) {
  pools_.resize(page_counts.size() + 1);
  for (std::size_t at = 0; at < page_counts.size(); ++at) {
    pools_[at].name = page_counts[at].first;
    pools_[at].pages.resize(static_cast<std::size_t>(page_counts[at].second) + 1);
    pools_[at].counts[index(LedgerKind::free)] = page_counts[at].second;
  }
  rows().name = kRowsName;
  rows().pages.resize(rows_.size());
  rows().counts[index(LedgerKind::free)] = row_count;
}

// -- actions --------------------------------------------------------------------------------------

void OwnershipLedger::begin(std::int64_t action) {
  if (action_) {
    refuse("LEDGER-14", "action " + std::to_string(action) + " begins inside action " +
                            std::to_string(*action_));
  }
  action_ = action;
  ++action_number_;
}

void OwnershipLedger::guard(const char* effect) const {
  if (!action_) refuse("LEDGER-14", std::string(effect) + " outside an action");
}

void OwnershipLedger::guard(const char* effect, std::string_view pool) const {
  guard(effect);
  for (const Pool& known : std::span(pools_).first(pools_.size() - 1)) {
    if (known.name == pool) return;
  }
  refuse("LEDGER-14", "there is no pool " + std::string(pool));
}

std::vector<OwnershipLedger::Fault> OwnershipLedger::end(bool by_hand) {
  guard("end");
  const std::int64_t looked_at = find_dangling();
  find_orphans();
  if (!by_hand) grow(faults_, dangling_.size() + leaks_.size());

  counters_.rows_looked_at += looked_at;
  for (const Dangling& found : dangling_) {
    if (by_hand) break;
    const Owner owner = owner_of(first().at(found.page));
    fault(LedgerFail::dangling_row, first(), found.page, found.owner, owner, found.row);
    claim(found.page).told = true;
  }
  for (const Orphan& leak : leaks_) {
    const Owner owner{LedgerKind::request, leak.row};
    hold(first(), leak.page, kAbandoned);
    if (by_hand) continue;
    fault(LedgerFail::leak, first(), leak.page, owner, owner_of(kAbandoned), leak.row);
  }
  for (const Given& given : given_) claim(given.page).given = -1;
  for (const Orphan& orphan : orphans_) claim(orphan.page).orphan = -1;
  given_.clear();
  written_.clear();
  orphans_.clear();
  action_.reset();
  std::vector<Fault> faults;
  if (!faults_.empty()) faults.swap(faults_);  // else their memory stays
  return faults;
}

// Adds the rows that name a page and were not written with it since, ascending, to dangling_.  How
// many were looked at.
std::int64_t OwnershipLedger::add_dangling(const Given& given) {
  ++effect_;
  std::int64_t looked_at = 0;
  const auto first_found = static_cast<std::ptrdiff_t>(dangling_.size());
  names_.visit(given.page, [&](std::size_t number, std::int64_t position) {
    Row& row = rows_[number];
    if (row.looked_by != effect_) {
      const auto id = static_cast<std::int64_t>(number);
      row.looked_by = effect_;
      ++looked_at;
      row.dangling = written_since(given, id) ? kNowhere : dangling_.size();
      if (row.dangling != kNowhere) dangling_.push_back({id, position, given.page, given.owner});
    } else if (row.dangling != kNowhere) {
      std::int64_t& earliest = dangling_[row.dangling].position;
      earliest = std::min(earliest, position);
    }
  });
  std::ranges::sort(dangling_.begin() + first_found, dangling_.end(), {}, &Dangling::row);
  return looked_at;
}

// The rows that name a page which was given back, in dangling_.  How many were looked at.
std::int64_t OwnershipLedger::find_dangling() {
  dangling_.clear();
  std::int64_t looked_at = 0;
  for (std::size_t at = 0; at < given_.size(); ++at) {
    const bool stands = claim(given_[at].page).given == static_cast<std::int32_t>(at);
    if (stands) looked_at += add_dangling(given_[at]);
  }
  std::ranges::sort(dangling_, {}, [](const Dangling& found) {
    return std::tuple(found.row, found.position, found.page);
  });
  return looked_at;
}

// The pages that are still the request's of a row given back, in leaks_.
void OwnershipLedger::find_orphans() {
  leaks_.clear();
  for (std::size_t at = 0; at < orphans_.size(); ++at) {
    const bool stands = claim(orphans_[at].page).orphan == static_cast<std::int32_t>(at);
    if (stands) leaks_.push_back(orphans_[at]);
  }
  std::ranges::sort(leaks_, {}, [](const Orphan& leak) {
    return std::tuple(leak.row, leak.position, leak.page);
  });
}

// -- looking at arguments -------------------------------------------------------------------------

OwnershipLedger::Pool& OwnershipLedger::pool_of(const char* effect, std::string_view pool) {
  guard(effect, pool);
  return *std::ranges::find(pools_, pool, &Pool::name);
}

const OwnershipLedger::Pool& OwnershipLedger::pool_or_rows(std::string_view pool) const {
  const auto found = std::ranges::find(pools_, pool, &Pool::name);
  if (found == pools_.end()) refuse("LEDGER-14", "there is no pool " + std::string(pool));
  return *found;
}

bool OwnershipLedger::exists(const Pool& pool, std::int64_t page) const noexcept {
  const std::int64_t from = &pool == &rows() ? 0 : 1;
  return page >= from && page < static_cast<std::int64_t>(pool.pages.size());
}

bool OwnershipLedger::live(std::int64_t row) const noexcept {
  return exists(rows(), row) && rows().at(row).holder == kReserved;
}

// Calls visit(offset, count, page) for slots [offset, offset + count), which are of one page and
// ascend in it.
template <class Visit>
void OwnershipLedger::each_page(std::span<const std::int64_t> slots, Visit visit) const {
  std::int64_t offset = 0;
  for (SlotRuns runs(slots); runs.next();) {
    auto left = static_cast<std::int64_t>(runs.run().count);
    std::int64_t page = runs.run().start;
    std::int64_t place = 0;  // in the page
    if (page_size_ > 1) {
      place = page % page_size_;
      page = page / page_size_ - (place < 0 ? 1 : 0);
      if (place < 0) place += page_size_;
    }
    for (; left > 0; place = 0, ++page) {
      const std::int64_t count = std::min(left, page_size_ - place);
      visit(offset, count, page);
      offset += count;
      left -= count;
    }
  }
}

// Notes a page, unless the effect has named it before.
void OwnershipLedger::name(Pool& pool, std::int64_t page) {
  if (!exists(pool, page)) {
    if (strange_.insert(page).second) named_.push_back(page);
  } else if (std::uint64_t& named_by = pool.at(page).named_by; named_by != effect_) {
    named_.push_back(page);
    named_by = effect_;
  }
}

void OwnershipLedger::start_naming() {
  ++effect_;
  named_.clear();
  if (!strange_.empty()) strange_.clear();
}

void OwnershipLedger::name_pages(Pool& pool, std::span<const std::int64_t> slots) {
  start_naming();
  each_page(slots, [&](std::int64_t, std::int64_t, std::int64_t page) { name(pool, page); });
}

// Notes the pages of slots that are written from a position on, and those that exist as pieces.
void OwnershipLedger::name_pieces(std::int64_t start, std::span<const std::int64_t> slots) {
  start_naming();
  pieces_.clear();
  each_page(slots, [&](std::int64_t offset, std::int64_t count, std::int64_t page) {
    name(first(), page);
    if (!exists(first(), page)) return;
    const auto from = static_cast<std::uint32_t>(start + offset);
    const auto to = static_cast<std::uint32_t>(start + offset + count);
    const auto id = static_cast<PageId>(page);
    if (!pieces_.empty() && pieces_.back().stop == from && pieces_.back().page == id) {
      pieces_.back().stop = to;
    } else {
      pieces_.push_back({from, to, id});
    }
  });
}

// -- who has a page -------------------------------------------------------------------------------

OwnershipLedger::Owner OwnershipLedger::owner_of(Holder holder) noexcept {
  switch (holder) {
    case kFree: return {LedgerKind::free};
    case kPending: return {LedgerKind::pending};
    case kReserved: return {LedgerKind::reserved};
    case kTree: return {LedgerKind::tree};
    case kAbandoned: return {LedgerKind::request};
    default: return {LedgerKind::request, holder};
  }
}

OwnershipLedger::Owner OwnershipLedger::owner_of(const Page& page) const noexcept {
  if (page.flight < 0) return owner_of(page.holder);
  return {LedgerKind::copy, flights_[static_cast<std::size_t>(page.flight)].copy};
}

// Whether a page exists; it is a fault to name one that does not (LEDGER-10).
bool OwnershipLedger::sound(const Pool& pool, std::int64_t page, std::int64_t row) noexcept {
  if (exists(pool, page)) return true;
  fault(LedgerFail::sentinel, pool, page, kNobody, kNobody, row);
  return false;
}

// REQUIRES: there is room for it.
void OwnershipLedger::fault(FaultKind kind, const Pool& pool, std::int64_t page, Owner owner,
                            Owner other, std::int64_t row) noexcept {
  const auto number = static_cast<std::size_t>(&pool - pools_.data());
  faults_.push_back({kind, number, page, row, *action_, owner, other});
}

void OwnershipLedger::move(Pool& pool, PageId page, Holder holder) noexcept {
  Page& books = pool.at(page);
  --pool.counts[index(owner_of(books).kind)];
  while (books.flight >= 0) land(books.flight);
  change_holder(pool, page, holder);
  enter(pool, page);
}

void OwnershipLedger::hold(Pool& pool, PageId page, Holder holder) noexcept {
  --pool.counts[index(owner_of(pool.at(page)).kind)];
  change_holder(pool, page, holder);
  enter(pool, page);
}

// Counts the page again, and enters what became of it.
void OwnershipLedger::enter(Pool& pool, PageId page) noexcept {
  Page& books = pool.at(page);
  const Owner owner = owner_of(books);
  ++pool.counts[index(owner.kind)];
  step_place_ = step_place_ + 1 == step_count_ ? 0 : step_place_ + 1;
  steps_[step_place_] = {*action_, owner.who, books.last_step, owner.kind};
  books.last_step = ++step_total_;
  ++counters_.pages_moved;
}

// Takes one copy from above a page; `link` is what led to it.
void OwnershipLedger::land(std::int32_t& link) noexcept {
  const std::int32_t at = link;
  Flight& flight = flights_[static_cast<std::size_t>(at)];
  link = flight.below;
  flight.below = unused_flight_;
  unused_flight_ = at;
  ++unused_flights_;
}

// Keeps the lists of what each request holds.
void OwnershipLedger::change_holder(Pool& pool, PageId page, Holder holder) noexcept {
  const Holder before = std::exchange(pool.at(page).holder, holder);
  if (&pool != &first() || before == holder) return;
  Claim& own = claim(page);
  if (before >= 0) {
    Row& row = row_at(before);
    (own.held_before >= 0 ? claim(own.held_before).held_after : row.held) = own.held_after;
    if (own.held_after >= 0) claim(own.held_after).held_before = own.held_before;
    --row.held_count;
    own.orphan = -1;
  }
  if (holder >= 0) {
    Row& row = row_at(holder);
    own.held_before = -1;
    own.held_after = row.held;
    if (row.held >= 0) claim(row.held).held_before = page;
    row.held = page;
    ++row.held_count;
  }
}

}  // namespace kvspec
