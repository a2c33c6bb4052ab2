#include "kvspec/swa_allocator.hpp"

#include <algorithm>
#include <string>

#include "kvspec/contract.hpp"
#include "kvspec/digest.hpp"

namespace kvspec {
namespace {

AllocatorKind swa_kind(const char* unit, const char* size_name, bool pages) {
  return {
      .room = "swa_allocator",
      .unit = unit,
      .size_name = size_name,
      .freed = pages ? "pages were freed" : "slots were freed",
      .books = "SWA-1",
      .sink = "SWA-1",
      .amount = "SWA-5",
      .given_back = "SWA-9",
      .group = "SWA-15",
      .ticket = "SWA-18",
      .argument = "SWA-21",
      .requests = "SWA-7",
      .pages = pages,
  };
}

AllocatorKind full_kind(std::int64_t page_size) {
  const bool pages = page_size > 1;
  return swa_kind(pages ? "page" : "slot", "size", pages);
}

AllocatorKind window_kind(std::int64_t page_size) {
  const bool pages = page_size > 1;
  return swa_kind(pages ? "window page" : "window slot", "size_swa", pages);
}

bool fits_always(PageId) noexcept { return true; }

}  // namespace

SWATokenToKVPoolAllocator::SWATokenToKVPoolAllocator(std::int64_t size, std::int64_t size_swa,
                                                     std::int64_t page_size, bool need_sort)
    : full_(full_kind(page_size), size, page_size, need_sort),
      window_(window_kind(page_size), size_swa, page_size, need_sort),
      pairs_(static_cast<std::size_t>(size / page_size) + 2) {}

std::optional<Slots> SWATokenToKVPoolAllocator::alloc(std::int64_t need_size) {
  full_.reporter().guard("alloc");
  const std::size_t page_count = full_.require_whole_pages(need_size);
  if (page_count > available_page_count()) return std::nullopt;
  Slots slots(static_cast<std::size_t>(need_size));

  take(page_count);
  full_.write_taken(page_count, slots.span());
  if (page_count > 0) full_.reporter().report("alloc", slots.span());
  return slots;
}

std::optional<Slots> SWATokenToKVPoolAllocator::alloc_extend(
    std::span<const std::int64_t> prefix_lens, std::span<const std::int64_t> seq_lens,
    std::span<const std::int64_t> last_loc, std::int64_t extend_num_tokens) {
  return extend("alloc_extend",
                {prefix_lens, seq_lens, last_loc, /*decode=*/false, pairs_.data()},
                extend_num_tokens);
}

std::optional<Slots> SWATokenToKVPoolAllocator::alloc_decode(
    std::span<const std::int64_t> seq_lens, std::span<const std::int64_t> last_loc) {
  return extend("alloc_decode", {{}, seq_lens, last_loc, /*decode=*/true, pairs_.data()},
                static_cast<std::int64_t>(seq_lens.size()));
}

std::optional<Slots> SWATokenToKVPoolAllocator::extend(const char* name,
                                                       const FullPool::Requests& requests,
                                                       std::int64_t extend_num_tokens) {
  full_.reporter().guard(name);
  const std::uint64_t needed = full_.require_continuable(requests, extend_num_tokens);
  if (needed > available_page_count()) return std::nullopt;
  const auto page_count = static_cast<std::size_t>(needed);
  Slots slots(static_cast<std::size_t>(extend_num_tokens));
  Slots moved = full_.room_for_report(page_count);

  take(page_count);
  full_.place(requests, page_count, slots.span());
  full_.report_taken(name, page_count, moved);
  return slots;
}

void SWATokenToKVPoolAllocator::free(std::span<const std::int64_t> slots,
                                     std::span<const std::int64_t> swa_slots) {
  full_.reporter().guard("free");
  const Naming naming{"free", kind().given_back, /*once=*/!kind().pages, no_window_page()};
  const std::span<PageId> leaving = full_.name_pages(naming, slots, 0, fits_always);
  if (!swa_slots.empty()) full_.set_state(leaving, State::set_aside);
  const std::span<PageId> staying = full_.name_pages(naming, swa_slots, leaving.size(), has_pair());
  const std::span<PageId> named(leaving.data(), leaving.size() + staying.size());
  full_.set_state(named, State::held);
  if (named.empty()) return;
  Slots moved = full_.room_for_report(named.size());

  give_back_pairs(named);
  full_.put_back(leaving);
  full_.end_epoch(leaving.empty() ? in_unit("window slots were freed", "window pages were freed")
                                  : kind().freed);
  full_.write_report(named, moved);
  full_.reporter().report("free", moved.span());
}

void SWATokenToKVPoolAllocator::free_swa(std::span<const std::int64_t> slots) {
  full_.reporter().guard("free_swa");
  const Naming naming{"free_swa", "SWA-11", /*once=*/!kind().pages, no_window_page()};
  const std::span<PageId> named = full_.name_pages(naming, slots, 0, has_pair());
  full_.set_state(named, State::held);
  if (named.empty()) return;
  Slots moved = full_.room_for_report(named.size());

  give_back_pairs(named);
  full_.end_epoch(in_unit("window slots were freed", "window pages were freed"));
  full_.write_report(named, moved);
  full_.reporter().report("free_swa", moved.span());
}

void SWATokenToKVPoolAllocator::move_swa(std::span<const std::int64_t> targets,
                                         std::span<const std::int64_t> sources) {
  full_.reporter().guard("move_swa");
  constexpr const char* kClause = "SWA-13";
  if (targets.size() != sources.size()) {
    refuse(kClause, "move_swa names " + std::to_string(targets.size()) + " targets and " +
                        std::to_string(sources.size()) + " sources");
  }
  Naming naming{"move_swa", kClause, /*once=*/true,
                in_unit("has a window slot", "has a window page")};
  const std::span<PageId> tgt = full_.name_pages(
      naming, targets, 0, [this](PageId page) { return pair(page) == 0; });
  full_.set_state(tgt, State::held);
  naming.unfit = no_window_page();
  const std::span<PageId> src = full_.name_pages(naming, sources, tgt.size(), has_pair());
  full_.set_state(src, State::held);
  if (tgt.empty()) return;
  Slots moved = full_.room_for_report(tgt.size());

  for (std::size_t i = 0; i < tgt.size(); ++i) pair(tgt[i]) = std::exchange(pair(src[i]), 0);
  full_.end_epoch(in_unit("window slots were moved", "window pages were moved"));
  full_.write_report(tgt, moved);
  full_.reporter().report("move_swa", moved.span());
}

void SWATokenToKVPoolAllocator::free_group_begin() {
  full_.reporter().guard("free_group_begin");
  full_.require_group(false);
  full_.open_group();
  window_.open_group();
  full_.end_epoch("a free group was opened");
  full_.reporter().report("free_group_begin");
}

void SWATokenToKVPoolAllocator::free_group_end() {
  full_.reporter().guard("free_group_end");
  full_.require_group(true);
  Slots moved = full_.room_for_report(full_.pending_page_count());
  Slots unreported;

  full_.close_group(moved);
  window_.close_group(unreported);
  full_.end_epoch("a free group was closed");
  full_.reporter().report("free_group_end", moved.span());
}

void SWATokenToKVPoolAllocator::restore_state(const Ticket& ticket) {
  full_.reporter().guard("restore_state");
  const std::size_t page_count = full_.require_valid(ticket);
  Slots moved = full_.room_for_report(page_count);
  if (full_.reporter().attached()) full_.write_taken(page_count, moved.span());

  // Nothing was given back or moved since, so that the window pages taken since are their pairs.
  for (std::size_t i = 0; i < page_count; ++i) pair(full_.taken(page_count, i)) = 0;
  full_.untake(page_count);
  window_.untake(page_count);
  full_.end_epoch("a state was restored");
  if (page_count > 0) full_.reporter().report("restore_state", moved.span());
}

void SWATokenToKVPoolAllocator::clear() {
  full_.reporter().guard("clear");
  const bool changed = !full_.is_clear() || !window_.is_clear();
  full_.start();
  window_.start();
  std::ranges::fill(pairs_, 0);
  full_.end_epoch("the allocator was cleared");
  if (changed) full_.reporter().report("clear");
}

WindowSlots SWATokenToKVPoolAllocator::translate_loc_from_full_to_swa(
    std::span<const std::int64_t> slots) const {
  const std::int64_t last = size() + page_size() - 1;
  const auto unit = static_cast<PageId>(page_size());
  WindowSlots window_slots(slots.size());
  PageId* next = window_slots.span().data();
  for (const std::int64_t slot : slots) {
    if (slot < -1 || slot > last) {
      refuse(kind().argument, "slot " + std::to_string(slot) + " is out of range -1 .. " +
                                  std::to_string(last));
    }
    const auto place = static_cast<PageId>(slot);  // 32 bits divide faster than 64
    const PageId page = place < 0 ? 0 : pair(place / unit);
    *next++ = page != 0 ? page * unit + place % unit : std::min(place, 0);
  }
  return window_slots;
}

Slots SWATokenToKVPoolAllocator::full_to_swa_index_mapping() const {
  const std::int64_t unit = page_size();
  Slots mapping((pairs_.size() - 1) * static_cast<std::size_t>(unit));
  std::int64_t* next = mapping.span().data();
  for (const PageId page : std::span(pairs_).first(pairs_.size() - 1)) {
    for (std::int64_t offset = 0; offset < unit; ++offset) {
      *next++ = page != 0 ? page * unit + offset : 0;
    }
  }
  return mapping;
}

SWAAllocatorView SWATokenToKVPoolAllocator::view() const {
  SWAAllocatorView view{full_.view(), window_.view(), {}};
  for (const PageId page : view.full.held) {
    if (pair(page) != 0) view.pairs.emplace_back(page, pair(page));
  }
  return view;
}

std::uint64_t SWATokenToKVPoolAllocator::digest() const noexcept {
  std::uint64_t digest = mix(mix(kDigestStart, full_.digest()), window_.digest());
  digest = mix(digest, pairs_.size() - static_cast<std::size_t>(std::ranges::count(pairs_, 0)));
  for (std::size_t page = 1; page < pairs_.size(); ++page) {
    if (pairs_[page] == 0) continue;
    digest = mix(mix(digest, page), static_cast<std::uint64_t>(pairs_[page]));
  }
  return digest;
}

void SWATokenToKVPoolAllocator::check() const {
  full_.check();
  window_.check();
  const auto name = [](const PageBooks& books, std::int64_t page) {
    return std::string(books.kind().unit) + " " + std::to_string(page);
  };
  const auto pool_pages = static_cast<PageId>(size_swa() / page_size());
  std::vector<bool> paired(static_cast<std::size_t>(pool_pages) + 1, false);
  for (PageId page = 0; page < static_cast<PageId>(pairs_.size()); ++page) {
    if (pair(page) == 0) continue;
    if (!full_.is_held(page)) {
      refuse("SWA-2", name(full_, page) + " is not held, but has " + name(window_, pair(page)));
    }
    if (!window_.is_held(pair(page))) {
      refuse("SWA-2",
             name(full_, page) + " has " + name(window_, pair(page)) + ", which is not held");
    }
    const auto place = static_cast<std::size_t>(pair(page));
    if (paired[place]) {
      refuse("SWA-2", name(window_, pair(page)) + " is of " + name(full_, page) + " and another");
    }
    paired[place] = true;
  }
  for (PageId page = 1; page <= pool_pages; ++page) {
    if (window_.is_held(page) && !paired[static_cast<std::size_t>(page)]) {
      refuse("SWA-2", name(window_, page) + " is held, and no pair");
    }
  }
}

AllocatorCounters SWATokenToKVPoolAllocator::counters() const noexcept {
  const AllocatorCounters full = full_.counters();
  const AllocatorCounters window = window_.counters();
  return {full.pages_moved + window.pages_moved, full.merges + window.merges,
          full.pages_merged + window.pages_merged};
}

std::size_t SWATokenToKVPoolAllocator::available_page_count() const noexcept {
  return std::min(full_.available_page_count(), window_.available_page_count());
}

// Hands out full pages, each with the next window page (SWA-22).  REQUIRES: so many are available.
void SWATokenToKVPoolAllocator::take(std::size_t page_count) noexcept {
  full_.take(page_count);
  window_.take(page_count);
  for (std::size_t i = 0; i < page_count; ++i) {
    pair(full_.taken(page_count, i)) = window_.taken(page_count, i);
  }
}

// Gives back the pairs of full pages, as far as they have one, in their order (SWA-22).
void SWATokenToKVPoolAllocator::give_back_pairs(std::span<const PageId> pages) noexcept {
  PageId* end = window_.scratch();
  for (const PageId page : pages) {
    if (pair(page) != 0) *end++ = std::exchange(pair(page), 0);
  }
  window_.put_back({window_.scratch(), end});
}

}  // namespace kvspec
