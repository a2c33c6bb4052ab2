// Sliding-window allocator: slots of a full pool, each page with its pair in a window pool.
// Spec: SWA.
//
// Either pool has page books of its own (SWA-1), and beside them stand the pairs (SWA-2):
//
//     full page:    free or pending        held, with a pair        held, without
//     window page:  free or pending        held, of one full page
//
// What callers name are full slots; a window page is reached through its full page alone.
//
// Not thread-safe: one scheduler thread owns an allocator.  After any exception, std::bad_alloc
// included, both pools are as before: what can throw comes first.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "kvspec/observer.hpp"
#include "kvspec/page_allocator.hpp"
#include "kvspec/page_books.hpp"
#include "kvspec/slots.hpp"

namespace kvspec {

// The abstract state.
struct SWAAllocatorView {
  AllocatorView full, swa;
  std::vector<std::pair<PageId, PageId>> pairs;  // (full page, window page), ascending

  bool operator==(const SWAAllocatorView&) const = default;
};

class SWATokenToKVPoolAllocator {
 public:
  using Ticket = PageBooks::Ticket;

  // Owns the pages 1 .. size / page_size, and as many pairs as size_swa / page_size.  REQUIRES:
  // page_size >= 1, and 0 <= either size < 2^31 - page_size (SWA-21).  O(pages).
  SWATokenToKVPoolAllocator(std::int64_t size, std::int64_t size_swa, std::int64_t page_size,
                            bool need_sort);

  const AllocatorKind& kind() const noexcept { return full_.kind(); }
  std::int64_t size() const noexcept { return full_.size(); }
  std::int64_t size_full() const noexcept { return full_.size(); }
  std::int64_t size_swa() const noexcept { return window_.size(); }
  std::int64_t page_size() const noexcept { return full_.page_size(); }
  bool need_sort() const noexcept { return full_.need_sort(); }
  bool group_open() const noexcept { return full_.group_open(); }

  // Slots of each pool given back in the open group (SWA-25).  O(1).
  std::int64_t pending_size() const noexcept { return full_.pending_size(); }
  std::int64_t swa_pending_size() const noexcept { return window_.pending_size(); }

  // Slots that either pool can hand out now, and the smaller of them (SWA-19).  O(1).
  std::int64_t full_available_size() const noexcept { return full_.available_size(); }
  std::int64_t swa_available_size() const noexcept { return window_.available_size(); }
  std::int64_t available_size() const noexcept {
    return std::min(full_available_size(), swa_available_size());
  }

  // The slots of whole pages, each with a pair, or nullopt and no change (SWA-3, SWA-4).  REQUIRES:
  // need_size >= 0, and a multiple of page_size (SWA-5).  O(need_size) but for merges.
  std::optional<Slots> alloc(std::int64_t need_size);
  // As PagedTokenToKVPoolAllocator, with a pair for every page begun (SWA-4, SWA-6).  REQUIRES:
  // what SWA-7 lists.
  std::optional<Slots> alloc_extend(std::span<const std::int64_t> prefix_lens,
                                    std::span<const std::int64_t> seq_lens,
                                    std::span<const std::int64_t> last_loc,
                                    std::int64_t extend_num_tokens);
  std::optional<Slots> alloc_decode(std::span<const std::int64_t> seq_lens,
                                    std::span<const std::int64_t> last_loc);

  // Gives back pages with their pairs, and the pairs alone of those in `swa_slots` (SWA-8, SWA-22).
  // REQUIRES: what SWA-9 lists.  O(slots), and O(pages log pages) unless they ascend.
  void free(std::span<const std::int64_t> slots, std::span<const std::int64_t> swa_slots = {});
  // Gives back the pairs alone (SWA-10).  REQUIRES: what SWA-11 lists.  Costs as `free`.
  void free_swa(std::span<const std::int64_t> slots);
  // Makes the pair of each source page that of its target (SWA-12).  REQUIRES: what SWA-13 lists.
  // O(slots).
  void move_swa(std::span<const std::int64_t> targets, std::span<const std::int64_t> sources);

  // In between, what is given back waits (SWA-14).  REQUIRES: none open, and one open (SWA-15).
  // O(1); the end as `free` of all that waits.
  void free_group_begin();
  void free_group_end();

  // A ticket for the allocations from here on.  O(1).
  Ticket backup_state() const noexcept { return full_.backup_state(); }
  // Undoes them in both pools (SWA-17).  REQUIRES: a valid ticket (SWA-18).  O(pages).
  void restore_state(const Ticket& ticket);

  // Everything is free, ascending, and no group is open (SWA-16).  O(P).
  void clear();

  // The window slot of each full slot, 0 for none, -1 for -1 (SWA-20).  REQUIRES: each is in
  // -1 .. size + page_size - 1 (SWA-21).  O(slots).
  WindowSlots translate_loc_from_full_to_swa(std::span<const std::int64_t> slots) const;
  // The same of all slots of the pages 0 .. P, by slot.  O(size).
  Slots full_to_swa_index_mapping() const;

  // REQUIRES: not called from inside the observer (OBS-3).
  void attach(Observer observer) { full_.attach(observer); }

  SWAAllocatorView view() const;                                               // O(P)
  std::vector<PageId> free_pages() const { return full_.free_pages(); }        // O(P)
  std::vector<PageId> release_pages() const { return full_.release_pages(); }  // O(P)
  // Equal for two allocators exactly when their views are equal (SWA-24).  O(P).
  std::uint64_t digest() const noexcept;
  // Throws ContractError if books or pairs are broken (SWA-1, SWA-2, SWA-24).  O(P).
  void check() const;
  // Of both pools together.
  AllocatorCounters counters() const noexcept;

 private:
  friend struct PlantedFault;  // tests/cpp: books are broken there to see check() find it

  // The books of one pool, with the steps open to the allocator of both.
  template <class Books>
  struct Pool : Books {
    Pool(const AllocatorKind& kind, std::int64_t size, std::int64_t page_size, bool need_sort)
        : Books(kind, size, page_size, need_sort) {}
    using Books::available_page_count, Books::pending_page_count;
    using Books::is_held, Books::set_state;
    using Books::require_group, Books::require_valid, Books::require_whole_pages;
    using Books::name_pages, Books::scratch;
    using Books::close_group, Books::open_group, Books::put_back, Books::take, Books::taken;
    using Books::end_epoch, Books::is_clear, Books::start, Books::untake;
    using Books::reporter, Books::room_for_report, Books::write_report, Books::write_taken;
    using typename Books::Naming, typename Books::State;
  };
  struct FullPool : Pool<PagedTokenToKVPoolAllocator> {
    using Pool::Pool;
    using PagedTokenToKVPoolAllocator::place, PagedTokenToKVPoolAllocator::report_taken;
    using PagedTokenToKVPoolAllocator::require_continuable;
    using PagedTokenToKVPoolAllocator::Requests;
  };
  using Naming = FullPool::Naming;
  using State = FullPool::State;

  std::optional<Slots> extend(const char* name, const FullPool::Requests& requests,
                              std::int64_t extend_num_tokens);
  std::size_t available_page_count() const noexcept;
  void take(std::size_t page_count) noexcept;
  void give_back_pairs(std::span<const PageId> pages) noexcept;
  PageId pair(PageId page) const noexcept { return pairs_[static_cast<std::size_t>(page)]; }
  PageId& pair(PageId page) noexcept { return pairs_[static_cast<std::size_t>(page)]; }
  auto has_pair() const noexcept {
    return [this](PageId page) { return pair(page) != 0; };
  }
  const char* in_unit(const char* of_slots, const char* of_pages) const noexcept {
    return kind().pages ? of_pages : of_slots;
  }
  const char* no_window_page() const noexcept {
    return in_unit("has no window slot", "has no window page");
  }

  FullPool full_;           // its epochs, its observer and its errors are the allocator's
  Pool<PageBooks> window_;
  std::vector<PageId> pairs_;  // by full page, 0 for none; those of 0 and P + 1 stay 0
};

}  // namespace kvspec
