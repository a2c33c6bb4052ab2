// Page books: what every allocator of KV slots keeps about its pages.  Spec: SLOT, PAGE.
//
// Every page of 1 .. P is in exactly one place (PAGE-1, SLOT-1), and page 0, the sink, in none:
//
//     |free| + |release| + |pending| + |held| == P
//
//   free     in the free list, handed out from its head
//   release  under need_sort, given back and not yet merged into the free list
//   pending  given back inside an open free group
//   held     owned by a caller
//
// Not thread-safe: one scheduler thread owns an allocator.  After any exception, std::bad_alloc
// included, the books are as before: what can throw comes first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "kvspec/observer.hpp"
#include "kvspec/page_ring.hpp"
#include "kvspec/slots.hpp"

namespace kvspec {

// What tells one allocator from another: names in messages, clauses, and the order of its lists.
struct AllocatorKind {
  const char* room;
  const char* unit;         // "page" or "slot"
  const char* freed;        // why a ticket ended
  const char* books;        // clause of conservation
  const char* sink;         // clause of the sink
  const char* amount;       // clause of alloc's argument
  const char* given_back;   // clause of free's argument
  const char* group;        // clause of free groups
  const char* ticket;       // clause of tickets
  const char* argument;     // clause of types and of the constructor
  bool pages;  // several slots name one page, and what is given back goes, ascending, before the
               // list (PAGE-9, PAGE-16); else a slot is named once and goes last (SLOT-5, SLOT-6)
};

// The abstract state.
struct AllocatorView {
  std::vector<PageId> free, release, pending, held;  // lists in order; held ascending
  bool group;

  bool operator==(const AllocatorView&) const = default;
};

// Exact costs so far: pages that entered or left a list one by one, and merges.
struct AllocatorCounters {
  std::int64_t pages_moved = 0;
  std::int64_t merges = 0;
  std::int64_t pages_merged = 0;
};

class PageBooks {
 public:
  // Worth one restore_state while no epoch has ended since (PAGE-15, SLOT-10).
  class Ticket {
    friend class PageBooks;
    std::shared_ptr<const char> owner_;
    std::uint64_t epoch_ = 0;
    std::size_t taken_count_ = 0;  // pages handed out in that epoch before the ticket
  };

  // REQUIRES: page_size >= 1 and 0 <= size < 2^31 - page_size (PAGE-17, SLOT-11).  O(P).
  PageBooks(const AllocatorKind& kind, std::int64_t size, std::int64_t page_size, bool need_sort);
  PageBooks(const PageBooks&) = delete;
  PageBooks& operator=(const PageBooks&) = delete;

  const AllocatorKind& kind() const noexcept { return kind_; }
  std::int64_t size() const noexcept { return size_; }
  std::int64_t page_size() const noexcept { return page_size_; }
  bool need_sort() const noexcept { return need_sort_; }
  bool group_open() const noexcept { return group_; }

  // Slots that alloc() can hand out now.  O(1).
  std::int64_t available_size() const noexcept {
    return static_cast<std::int64_t>(available_page_count()) * page_size_;
  }

  // The slots of whole pages, or nullopt and no change (PAGE-3, PAGE-4; SLOT-2, SLOT-3).  REQUIRES:
  // need_size >= 0, and a multiple of page_size (PAGE-5, SLOT-4).  O(need_size) but for a merge.
  std::optional<Slots> alloc(std::int64_t need_size);

  // Gives back (PAGE-9, SLOT-6).  REQUIRES: all named are held (PAGE-10), slots once (SLOT-5).
  // O(slots), and O(pages log pages) unless they ascend.
  void free(std::span<const std::int64_t> slots);

  // In between, what is given back waits (PAGE-11, SLOT-7).  REQUIRES: none open, and one open
  // (PAGE-12, SLOT-8).  O(1); the end as `free` of all that waits.
  void free_group_begin();
  void free_group_end();

  // A ticket for the allocations from here on.  O(1).
  Ticket backup_state() const noexcept;
  // Undoes them (PAGE-14, SLOT-9).  REQUIRES: a valid ticket (PAGE-15, SLOT-10).  O(pages).
  void restore_state(const Ticket& ticket);

  // Everything is free, ascending, and no group is open (PAGE-13, SLOT-9).  O(P).
  void clear();

  // REQUIRES: not called from inside the observer (OBS-3).
  void attach(Observer observer) { reporter_.attach(observer); }

  AllocatorView view() const;             // O(P)
  std::vector<PageId> free_pages() const { return free_.copy(); }        // O(P)
  std::vector<PageId> release_pages() const { return release_.copy(); }  // O(P)
  // Equal for two allocators exactly when their views are equal (PAGE-20, SLOT-13).  O(P).
  std::uint64_t digest() const noexcept;
  // Throws ContractError if the books are broken (PAGE-1, PAGE-2, PAGE-19; SLOT-1, SLOT-13).  O(P).
  void check() const;
  AllocatorCounters counters() const noexcept { return counters_; }

 protected:
  enum class State : std::uint8_t { sink, free, release, pending, held, named };

  std::size_t available_page_count() const noexcept { return free_.size() + release_.size(); }
  // Whether a page is held; whether it is, and marked by the call at hand.
  bool is_held(std::int64_t page) const noexcept;
  bool is_named(std::int64_t page) const noexcept;
  std::int64_t page_of(std::int64_t slot) const noexcept;
  State& state(std::int64_t page) noexcept { return state_[static_cast<std::size_t>(page)]; }

  // Hands out pages from the head (PAGE-16, SLOT-6).  REQUIRES: so many are available.
  void take(std::size_t page_count) noexcept;
  // The i-th page of the last `page_count` that were taken.
  PageId taken(std::size_t page_count, std::size_t i) const noexcept {
    return free_.popped(page_count - i);
  }
  // All slots of the last `page_count` pages taken.  REQUIRES: there is room for them.
  void write_taken(std::size_t page_count, std::span<std::int64_t> slots) const noexcept;
  // Room for the slots of so many pages if an observer will want them, else none.
  Slots room_for_report(std::size_t page_count) const;
  Reporter& reporter() noexcept { return reporter_; }

 private:
  friend struct PlantedFault;  // tests/cpp: books are broken there to see check() find it

  bool contains(std::int64_t page) const noexcept;
  std::span<PageId> name_pages(std::span<const std::int64_t> slots);
  void set_state(std::span<const PageId> pages, State place) noexcept;
  [[noreturn]] void refuse_free(std::int64_t page, bool twice) const;
  void put_back(std::span<const PageId> pages) noexcept;
  void write_report(std::span<const PageId> pages, Slots& moved) const noexcept;
  void merge() noexcept;
  void end_epoch(const char* reason) noexcept;

  AllocatorKind kind_;
  std::int64_t size_;       // as given; the remainder beyond P pages is not used
  std::int64_t page_size_;  // slots
  std::size_t page_count_;  // P
  bool need_sort_;
  bool group_ = false;

  PageRing free_;              // front is handed out next; behind it, the pages of this epoch
  PageRing release_;           // empty unless need_sort_
  std::vector<PageId> pending_;  // empty unless group_; capacity P
  std::vector<State> state_;   // by page; state_[0] is the sink

  std::unique_ptr<PageId[]> scratch_;  // room for P pages during one call

  std::shared_ptr<const char> identity_;  // tells tickets of this allocator from others
  std::uint64_t epoch_ = 0;
  const char* ended_by_ = "";    // why the last epoch ended
  std::size_t taken_count_ = 0;  // pages handed out in this epoch, all readable behind free_
  AllocatorCounters counters_;
  Reporter reporter_;
};

}  // namespace kvspec
