// Page books: what every allocator of KV slots keeps about its pages.  Spec: SLOT, PAGE, SWA.
//
// Every page of 1 .. P is in exactly one place (PAGE-1, SLOT-1, SWA-1), and page 0, the sink, in
// none:
//
//     |free| + |release| + |pending| + |held| == P
//
//   free     in the free list, handed out from its head
//   release  under need_sort, given back and not yet merged into the free list
//   pending  given back inside an open free group
//   held     owned by a caller
//
// The public calls refuse, change and report.  The steps that they are made of are protected: an
// allocator of several pools makes its calls of the steps of all of them.
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
  const char* size_name;    // what the constructor calls the size
  const char* freed;        // why a ticket ended
  const char* books;        // clause of conservation
  const char* sink;         // clause of the sink
  const char* amount;       // clause of alloc's argument
  const char* given_back;   // clause of free's argument
  const char* group;        // clause of free groups
  const char* ticket;       // clause of tickets
  const char* argument;     // clause of types and of the constructor
  const char* requests;     // clause of the requests that are extended
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
  // Slots given back in the open group (SLOT-14, PAGE-21).  O(1).
  std::int64_t pending_size() const noexcept {
    return static_cast<std::int64_t>(pending_.size()) * page_size_;
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
  // How a call names pages, and what it says of one that it refuses.
  struct Naming {
    const char* call;
    const char* clause;
    bool once;          // one slot names a page; else any number of its slots do
    const char* unfit;  // said of a held page that does not fit
  };
  // The last two are held, and marked by the call at hand: by the list at hand, or by another.
  enum class State : std::uint8_t { sink, free, release, pending, held, named, set_aside };

  std::size_t pending_page_count() const noexcept { return pending_.size(); }
  std::size_t available_page_count() const noexcept { return free_.size() + release_.size(); }
  bool contains(std::int64_t page) const noexcept {
    return page >= 1 && page <= static_cast<std::int64_t>(page_count_);
  }
  // Whether a page is held; whether it is named.
  bool is_held(std::int64_t page) const noexcept;
  bool is_named(std::int64_t page) const noexcept;
  std::int64_t page_of(std::int64_t slot) const noexcept {
    return page_size_ == 1 ? slot : slot / page_size_ - (slot % page_size_ < 0 ? 1 : 0);
  }
  State& state(std::int64_t page) noexcept { return state_[static_cast<std::size_t>(page)]; }
  void set_state(std::span<const PageId> pages, State place) noexcept {
    for (const PageId page : pages) state_[static_cast<std::size_t>(page)] = place;
  }

  // What alloc's argument is in pages, or a refusal (PAGE-5, SLOT-4, SWA-5).
  std::size_t require_whole_pages(std::int64_t need_size) const;
  // Pages handed out since a ticket that is valid, or a refusal (PAGE-15, SLOT-10, SWA-18).
  std::size_t require_valid(const Ticket& ticket) const;
  // Refuses unless a free group is open, or none is (PAGE-12, SLOT-8, SWA-15).
  void require_group(bool open) const;

  // The pages that the slots name, in the order of their first slots, now marked named.  They lie
  // in the scratch memory, behind the `before` ones that lie there already.  Or a refusal, which
  // makes all of them held again: of one not held, or without fits(page).  O(slots).
  template <class Fits>
  std::span<PageId> name_pages(const Naming& naming, std::span<const std::int64_t> slots,
                               std::size_t before, Fits fits);

  // Hands out pages from the head (PAGE-16, SLOT-6).  REQUIRES: so many are available.
  void take(std::size_t page_count) noexcept;
  // The i-th page of the last `page_count` that were taken.
  PageId taken(std::size_t page_count, std::size_t i) const noexcept {
    return free_.popped(page_count - i);
  }
  // Puts the last pages taken back.  REQUIRES: nothing was given back since.
  void untake(std::size_t page_count) noexcept;
  // Puts held pages where what is given back waits; they are sorted if the kind asks (PAGE-16,
  // SLOT-6).
  void put_back(std::span<PageId> pages) noexcept;
  void open_group() noexcept { group_ = true; }
  // Puts back what waits, and writes its slots if there is room.
  void close_group(Slots& moved) noexcept;
  // Whether start() would change nothing.
  bool is_clear() const noexcept;
  // Makes everything free, in ascending order.
  void start() noexcept;
  // Ends every ticket; `reason` is told to who uses one.
  void end_epoch(const char* reason) noexcept;

  // Room for P pages during one call: those that it names, or those that it merges.
  PageId* scratch() noexcept { return scratch_.get(); }
  // All slots of the last `page_count` pages taken.  REQUIRES: there is room for them.
  void write_taken(std::size_t page_count, std::span<std::int64_t> slots) const noexcept;
  // Room for the slots of so many pages if an observer will want them, else none.
  Slots room_for_report(std::size_t page_count) const;
  // The slots of the pages, if there is room.
  void write_report(std::span<const PageId> pages, Slots& moved) const noexcept;
  Reporter& reporter() noexcept { return reporter_; }

 private:
  friend struct PlantedFault;  // tests/cpp: books are broken there to see check() find it

  // Refuses `page`, and makes those held again that are named.
  [[noreturn]] void refuse_page(const Naming& naming, std::int64_t page,
                                std::span<const PageId> named);
  void merge() noexcept;

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

template <class Fits>
std::span<PageId> PageBooks::name_pages(const Naming& naming, std::span<const std::int64_t> slots,
                                        std::size_t before, Fits fits) {
  PageId* const pages = scratch_.get();
  State* const states = state_.data();
  std::size_t count = before;
  for (std::size_t i = 0; i < slots.size();) {
    const std::int64_t page = page_of(slots[i]);
    const State place = contains(page) ? states[page] : State::sink;
    if (place == State::held && fits(static_cast<PageId>(page))) {
      states[page] = State::named;
      pages[count++] = static_cast<PageId>(page);
    } else if (place != State::named || naming.once) {
      refuse_page(naming, page, {pages, count});
    }
    ++i;
    if (!naming.once) {
      // Most slots follow one of their own page, which is known already.
      const std::int64_t end = (page + 1) * page_size_;
      while (i < slots.size() && slots[i] < end && slots[i] >= end - page_size_) ++i;
    }
  }
  return {pages + before, count - before};
}

}  // namespace kvspec
