// Ownership ledger: who has every page, since when, and what could not have been right.
// Spec: LEDGER.
//
//     |free| + |pending| + |reserved| + |request| + |tree| + |copy| == pages of a pool  (LEDGER-1)
//
// A page has a holder and, lying over it, the copies of it that are in flight; its owner is the
// newest of these, or else the holder.  What gives, takes or adopts a page tears it out of its
// copies.  A row is a page of the pool `rows`, free or reserved.  Every change of a page is a step
// in a ring, which names the step before it, so that a page's history is read without a search.
//
// An effect looks at its arguments and makes room first, and changes the books then, which cannot
// throw.  Not thread-safe: one scheduler thread owns a ledger.  After any exception, std::bad_alloc
// included, the ledger is as before.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

#include "kvspec/row_names.hpp"
#include "kvspec/slots.hpp"

namespace kvspec {

// Exact costs so far (LEDGER-15).
struct LedgerCounters {
  std::int64_t slots_seen = 0;      // that effects were given
  std::int64_t pages_moved = 0;     // steps that were entered, those of rows among them
  std::int64_t rows_looked_at = 0;  // that name a page given back or taken, for each
};

class OwnershipLedger {
 public:
  enum class OwnerKind : std::uint8_t { free, pending, reserved, request, tree, copy };
  static constexpr std::size_t kOwnerKinds = 6;
  enum class FaultKind : std::uint8_t {
    leak, double_free, alias, use_after_free, dangling_row, sentinel
  };

  struct Owner {
    OwnerKind kind;
    std::int64_t who = -1;  // the row of a request, the number of a copy
    bool operator==(const Owner&) const = default;
  };

  struct Step {
    std::int64_t action;
    Owner owner;
    bool operator==(const Step&) const = default;
  };

  struct Fault {
    FaultKind kind;
    std::size_t pool;  // pool_name() knows it
    std::int64_t page;
    std::int64_t row;
    std::int64_t action;
    Owner owner;  // before
    Owner other;  // after
    bool operator==(const Fault&) const = default;
  };

  using PageCounts = std::vector<std::pair<std::string, std::int64_t>>;

  // The first pool is where rows point.  REQUIRES (LEDGER-14): every size is in [1, 2^31), there is
  // a pool, and none is named rows.  O(pages + rows).
  OwnershipLedger(std::int64_t page_size, const PageCounts& page_counts, std::int64_t row_count,
                  std::int64_t step_count);
  OwnershipLedger(const OwnershipLedger&) = delete;
  OwnershipLedger& operator=(const OwnershipLedger&) = delete;

  // REQUIRES of both, and of every effect: LEDGER-14.
  void begin(std::int64_t action);
  // The faults of the action (LEDGER-6, LEDGER-7, LEDGER-12).  O(pages given back and rows that
  // name them).
  std::vector<Fault> end(bool by_hand = false);

  // Effects.  Slots may be any; a page that does not exist is a sentinel (LEDGER-10).
  void take(std::string_view pool, std::span<const std::int64_t> slots);  // LEDGER-2
  void give(std::string_view pool, std::span<const std::int64_t> slots);  // LEDGER-3
  void open_group(std::string_view pool);                                 // LEDGER-3
  void close_group(std::string_view pool);                                // LEDGER-8
  void clear(std::string_view pool);                                      // LEDGER-8; O(pages)
  void take_rows(std::span<const std::int64_t> rows);                     // LEDGER-11
  void give_rows(std::span<const std::int64_t> rows);                     // LEDGER-7, LEDGER-11
  void clear_rows();                                                      // LEDGER-8; O(rows)
  // LEDGER-4.  REQUIRES: 0 <= start, and no position is beyond 2^31.
  void write(std::int64_t row, std::int64_t start, std::span<const std::int64_t> slots);
  void adopt(std::int64_t row, std::int64_t stop);         // LEDGER-5
  void adopt_slots(std::span<const std::int64_t> slots);   // LEDGER-5
  std::int64_t copy_begin(std::string_view pool, std::span<const std::int64_t> slots);  // LEDGER-9
  void copy_end(std::int64_t copy);                                                     // LEDGER-9

  // Refuses an effect outside an action, and one on a pool that there is not (LEDGER-14).
  void guard(const char* effect) const;
  void guard(const char* effect, std::string_view pool) const;

  // What is known.  The pool `rows` counts as one here.
  Owner owner(std::string_view pool, std::int64_t page) const;  // free of what does not exist; O(1)
  std::array<std::int64_t, kOwnerKinds> counts(std::string_view pool) const;  // O(1)
  std::vector<Step> history(std::string_view pool, std::int64_t page) const;  // LEDGER-13; O(steps)
  // The page of each page-sized stretch of a row, that of its last position if it has several, 0 if
  // it has none; nothing of a row that is not live.  O(pages).
  std::vector<PageId> row_pages(std::int64_t row) const;
  std::size_t pool_count() const noexcept { return pools_.size(); }  // rows is the last
  const std::string& pool_name(std::size_t pool) const noexcept { return pools_[pool].name; }
  // Pages from 1 on; of rows, from 0 on.
  std::vector<Owner> owners(std::size_t pool) const;
  bool group_open(std::size_t pool) const noexcept { return pools_[pool].group; }
  std::vector<std::int64_t> live_rows() const;         // ascending; O(rows)
  std::vector<std::int64_t> copies_in_flight() const;  // the oldest first
  std::optional<std::int64_t> action() const noexcept { return action_; }
  LedgerCounters counters() const noexcept { return counters_; }

  // Throws ContractError if the books are broken (LEDGER-1).  O(pages + rows).
  void check() const;

 private:
  friend struct PlantedFault;  // tests/cpp: books are broken there to see check() find it

  // The row of a request, or one of these.
  using Holder = std::int32_t;
  static constexpr Holder kFree = -1;
  static constexpr Holder kPending = -2;
  static constexpr Holder kReserved = -3;
  static constexpr Holder kTree = -4;
  static constexpr Holder kAbandoned = -5;  // of a request that is gone

  struct Page {
    Holder holder = kFree;
    std::int32_t flight = -1;     // the newest copy over it, in flights_
    std::int64_t last_step = 0;   // its number; the first is 1
    std::uint64_t named_by = 0;   // the last effect that named it
  };

  struct Pool {
    std::string name;
    std::vector<Page> pages;         // place 0 is the sink, but of rows the row 0
    std::array<std::int64_t, kOwnerKinds> counts{};
    std::vector<PageId> pending;     // all that is, and some that no longer is
    bool group = false;

    Page& at(std::int64_t page) noexcept { return pages[static_cast<std::size_t>(page)]; }
    const Page& at(std::int64_t page) const noexcept {
      return pages[static_cast<std::size_t>(page)];
    }
  };

  // What else there is to a page of the first pool.
  struct Claim {
    PageId held_before = -1;     // in the list of what a request holds
    PageId held_after = -1;
    std::int32_t given = -1;     // in given_, if it was given back in the action
    std::int32_t orphan = -1;    // in orphans_, if its row was
    bool told = false;           // an end has told which rows name it since it was given back
  };

  struct Row {
    PageId held = -1;              // the first page that its request holds
    std::size_t held_count = 0;
    std::uint64_t left_in = 0;     // the number of the action that gave it back last
    std::uint64_t looked_by = 0;   // the last effect that looked at it,
    std::size_t dangling = 0;      // and what it found, in dangling_
  };

  struct Entered {
    std::int64_t action;
    std::int64_t who;
    std::int64_t before;  // number of the page's step before
    OwnerKind kind;
  };

  // A page's place in a copy, above an older one; or, by `below` alone, unused.
  struct Flight {
    std::int64_t copy;
    std::int32_t below;
  };

  struct Copy {
    std::size_t pool;
    std::vector<PageId> pages;
  };

  // A page that had an owner when it was given back, and the rows that were written with it since.
  struct Given {
    PageId page;
    Owner owner;
    std::int32_t written = -1;  // in written_
  };
  struct Written {
    std::int64_t row;
    std::int32_t before;
  };

  struct Orphan {
    PageId page;
    std::int64_t row;
    std::int64_t position;  // the first that named it; 2^31 if none did
  };
  struct Dangling {
    std::int64_t row;
    std::int64_t position;
    PageId page;
    Owner owner;
  };

  Pool& first() noexcept { return pools_.front(); }
  Pool& rows() noexcept { return pools_.back(); }
  const Pool& rows() const noexcept { return pools_.back(); }
  Claim& claim(PageId page) noexcept { return claims_[static_cast<std::size_t>(page)]; }
  Row& row_at(std::int64_t row) noexcept { return rows_[static_cast<std::size_t>(row)]; }
  bool exists(const Pool& pool, std::int64_t page) const noexcept;
  bool live(std::int64_t row) const noexcept;
  static Owner owner_of(Holder holder) noexcept;
  Owner owner_of(const Page& page) const noexcept;
  bool written_since(const Given& given, std::int64_t row) const noexcept;

  // Looking at arguments and making room, which may throw.
  Pool& pool_of(const char* effect, std::string_view pool);
  const Pool& pool_or_rows(std::string_view pool) const;
  template <class Visit>
  void each_page(std::span<const std::int64_t> slots, Visit visit) const;
  void start_naming();
  void name(Pool& pool, std::int64_t page);
  void name_pages(Pool& pool, std::span<const std::int64_t> slots);
  void name_pieces(std::int64_t start, std::span<const std::int64_t> slots);
  std::int64_t add_dangling(const Given& given);
  std::int64_t find_dangling();
  std::int64_t find_named(const Pool& pool);
  void find_orphans();

  // Changing the books.
  bool sound(const Pool& pool, std::int64_t page, std::int64_t row = -1) noexcept;
  void fault(FaultKind kind, const Pool& pool, std::int64_t page, Owner owner, Owner other,
             std::int64_t row = -1) noexcept;
  void move(Pool& pool, PageId page, Holder holder) noexcept;  // and out of its copies
  void hold(Pool& pool, PageId page, Holder holder) noexcept;  // below its copies
  void change_holder(Pool& pool, PageId page, Holder holder) noexcept;
  void enter(Pool& pool, PageId page) noexcept;
  void land(std::int32_t& link) noexcept;
  void leave(std::int64_t row) noexcept;
  void write_page(Holder request, std::int64_t page) noexcept;
  void adopt_page(PageId page, bool rightful, std::int64_t row) noexcept;

  std::int64_t page_size_;
  std::vector<Pool> pools_;
  std::vector<Claim> claims_;  // of the first pool
  std::vector<Row> rows_;
  RowNames names_;
  std::vector<Flight> flights_;
  std::int32_t unused_flight_ = -1;
  std::size_t unused_flights_ = 0;
  std::map<std::int64_t, Copy> copies_;
  std::int64_t copy_count_ = 0;

  std::unique_ptr<Entered[]> steps_;  // step n at n % step_count_
  std::size_t step_count_;
  std::size_t step_place_ = 0;
  std::int64_t step_total_ = 0;

  std::optional<std::int64_t> action_;
  std::uint64_t action_number_ = 0;
  std::vector<Fault> faults_;
  std::vector<Given> given_;
  std::vector<Written> written_;
  std::vector<Orphan> orphans_;
  LedgerCounters counters_;

  // Of the effect at hand.
  std::uint64_t effect_ = 0;
  std::vector<std::int64_t> named_;  // pages, each once, in order; some may not exist
  std::unordered_set<std::int64_t> strange_;  // those that do not
  std::vector<RowNames::Piece> pieces_;
  std::vector<Dangling> dangling_;
  std::vector<Orphan> leaks_;
};

}  // namespace kvspec
