#include "kvspec/page_books.hpp"

#include <algorithm>
#include <string>

#include "kvspec/contract.hpp"
#include "kvspec/digest.hpp"

namespace kvspec {
namespace {

std::int64_t checked_page_size(const AllocatorKind& kind, std::int64_t page_size) {
  if (page_size < 1) refuse(kind.argument, "page_size is " + std::to_string(page_size));
  return page_size;
}

// P, once the size is known to keep every slot below 2^31 (PAGE-17, SLOT-11).
std::size_t checked_page_count(const AllocatorKind& kind, std::int64_t size,
                               std::int64_t page_size) {
  const std::int64_t largest = (std::int64_t{1} << 31) - 1 - page_size;
  if (size < 0 || size > largest) {
    refuse(kind.argument,
           std::string(kind.size_name) + " is " + std::to_string(size) + ", not in 0 .. " +
               std::to_string(largest));
  }
  return static_cast<std::size_t>(size / page_size);
}

}  // namespace

PageBooks::PageBooks(const AllocatorKind& kind, std::int64_t size, std::int64_t page_size,
                     bool need_sort)
    : kind_(kind),
      size_(size),
      page_size_(checked_page_size(kind, page_size)),
      page_count_(checked_page_count(kind, size, page_size)),
      need_sort_(need_sort),
      free_(page_count_),
      release_(need_sort ? page_count_ : 0),
      state_(page_count_ + 1),
      scratch_(std::make_unique_for_overwrite<PageId[]>(page_count_)),
      identity_(std::make_shared<const char>()),
      reporter_(kind.room) {
  pending_.reserve(page_count_);
  start();
}

std::optional<Slots> PageBooks::alloc(std::int64_t need_size) {
  reporter_.guard("alloc");
  const std::size_t page_count = require_whole_pages(need_size);
  if (page_count > available_page_count()) return std::nullopt;
  Slots slots(static_cast<std::size_t>(need_size));

  take(page_count);
  write_taken(page_count, slots.span());
  if (page_count > 0) reporter_.report("alloc", slots.span());
  return slots;
}

void PageBooks::free(std::span<const std::int64_t> slots) {
  reporter_.guard("free");
  const Naming naming{"free", kind_.given_back, /*once=*/!kind_.pages, /*unfit=*/""};
  const std::span<PageId> pages = name_pages(naming, slots, 0, [](PageId) { return true; });
  set_state(pages, State::held);
  if (pages.empty()) return;
  Slots moved = room_for_report(pages.size());

  put_back(pages);
  end_epoch(kind_.freed);
  write_report(pages, moved);
  reporter_.report("free", moved.span());
}

void PageBooks::free_group_begin() {
  reporter_.guard("free_group_begin");
  require_group(false);
  open_group();
  end_epoch("a free group was opened");
  reporter_.report("free_group_begin");
}

void PageBooks::free_group_end() {
  reporter_.guard("free_group_end");
  require_group(true);
  Slots moved = room_for_report(pending_.size());

  close_group(moved);
  end_epoch("a free group was closed");
  reporter_.report("free_group_end", moved.span());
}

PageBooks::Ticket PageBooks::backup_state() const noexcept {
  Ticket ticket;
  ticket.owner_ = identity_;
  ticket.epoch_ = epoch_;
  ticket.taken_count_ = taken_count_;
  return ticket;
}

void PageBooks::restore_state(const Ticket& ticket) {
  reporter_.guard("restore_state");
  const std::size_t page_count = require_valid(ticket);
  Slots moved = room_for_report(page_count);
  if (reporter_.attached()) write_taken(page_count, moved.span());

  untake(page_count);
  end_epoch("a state was restored");
  if (page_count > 0) reporter_.report("restore_state", moved.span());
}

void PageBooks::clear() {
  reporter_.guard("clear");
  const bool changed = !is_clear();
  start();
  end_epoch("the allocator was cleared");
  if (changed) reporter_.report("clear");
}

AllocatorView PageBooks::view() const {
  AllocatorView view{free_pages(), release_pages(), pending_, {}, group_};
  for (std::size_t page = 1; page <= page_count_; ++page) {
    if (state_[page] == State::held) view.held.push_back(static_cast<PageId>(page));
  }
  return view;
}

std::uint64_t PageBooks::digest() const noexcept {
  std::uint64_t digest = kDigestStart;
  for (const PageRing* ring : {&free_, &release_}) {
    digest = mix(digest, ring->size());
    for (const auto& pages : ring->pieces()) digest = mix_all(digest, pages);
  }
  digest = mix(digest, pending_.size());
  digest = mix_all(digest, std::span<const PageId>(pending_));
  return mix(digest, group_ ? 1 : 0);
}

void PageBooks::check() const {
  std::vector<bool> listed(page_count_ + 1, false);
  const auto visit = [&](PageId page, State expected) {
    if (page == 0) refuse(kind_.sink, "the sink is listed");
    const std::string name = std::string(kind_.unit) + " " + std::to_string(page);
    if (!contains(page)) refuse(kind_.books, name + " is listed and unknown");
    const auto place = static_cast<std::size_t>(page);
    if (listed[place]) refuse(kind_.books, name + " is listed twice");
    if (state_[place] != expected) refuse(kind_.books, name + " is not what its list says");
    listed[place] = true;
  };
  for (std::size_t i = 0; i < free_.size(); ++i) visit(free_[i], State::free);
  for (std::size_t i = 0; i < release_.size(); ++i) visit(release_[i], State::release);
  for (const PageId page : pending_) visit(page, State::pending);
  if (state_[0] != State::sink) refuse(kind_.sink, "the sink is not kept apart");
  for (std::size_t page = 1; page <= page_count_; ++page) {
    if (!listed[page] && state_[page] != State::held) {
      refuse(kind_.books, std::string(kind_.unit) + " " + std::to_string(page) + " is lost");
    }
  }
}

bool PageBooks::is_held(std::int64_t page) const noexcept {
  return contains(page) && state_[static_cast<std::size_t>(page)] >= State::held;
}

bool PageBooks::is_named(std::int64_t page) const noexcept {
  return contains(page) && state_[static_cast<std::size_t>(page)] == State::named;
}

std::size_t PageBooks::require_whole_pages(std::int64_t need_size) const {
  if (need_size < 0 || need_size % page_size_ != 0) {
    const std::string call = "alloc(" + std::to_string(need_size) + ")";
    refuse(kind_.amount, kind_.pages ? call + " but page_size is " + std::to_string(page_size_)
                                     : call + " is negative");
  }
  return static_cast<std::size_t>(need_size / page_size_);
}

std::size_t PageBooks::require_valid(const Ticket& ticket) const {
  if (ticket.owner_ != identity_) refuse(kind_.ticket, "this is no ticket of this allocator");
  if (ticket.epoch_ != epoch_) {
    refuse(kind_.ticket, std::string("the ticket is no longer valid: ") + ended_by_ + " since");
  }
  return taken_count_ - ticket.taken_count_;
}

void PageBooks::require_group(bool open) const {
  if (group_ && !open) refuse(kind_.group, "a free group is open already");
  if (!group_ && open) refuse(kind_.group, "no free group is open");
}

void PageBooks::take(std::size_t page_count) noexcept {
  if (page_count > free_.size()) merge();
  free_.pop_front(page_count);
  for (const auto& pages : free_.last_popped(page_count)) set_state(pages, State::held);
  taken_count_ += page_count;
  counters_.pages_moved += static_cast<std::int64_t>(page_count);
}

void PageBooks::untake(std::size_t page_count) noexcept {
  for (const auto& pages : free_.last_popped(page_count)) set_state(pages, State::free);
  free_.unpop(page_count);
  counters_.pages_moved += static_cast<std::int64_t>(page_count);
}

void PageBooks::put_back(std::span<PageId> pages) noexcept {
  if (kind_.pages && !std::ranges::is_sorted(pages)) std::ranges::sort(pages);
  counters_.pages_moved += static_cast<std::int64_t>(pages.size());
  if (group_) {
    set_state(pages, State::pending);
    pending_.insert(pending_.end(), pages.begin(), pages.end());
    return;
  }
  set_state(pages, need_sort_ ? State::release : State::free);
  PageRing& ring = need_sort_ ? release_ : free_;
  kind_.pages ? ring.push_front(pages) : ring.push_back(pages);
}

void PageBooks::close_group(Slots& moved) noexcept {
  group_ = false;
  put_back(pending_);
  write_report(pending_, moved);
  pending_.clear();
}

bool PageBooks::is_clear() const noexcept {
  if (group_ || free_.size() != page_count_) return false;
  for (std::size_t i = 0; i < page_count_; ++i) {
    if (free_[i] != static_cast<PageId>(i + 1)) return false;
  }
  return true;
}

void PageBooks::start() noexcept {
  group_ = false;
  free_.clear();
  release_.clear();
  pending_.clear();
  std::ranges::fill(state_, State::free);
  state_[0] = State::sink;
  for (PageId page = 1; contains(page); ++page) free_.push_back({&page, 1});
}

void PageBooks::end_epoch(const char* reason) noexcept {
  ++epoch_;
  ended_by_ = reason;
  taken_count_ = 0;
}

void PageBooks::write_taken(std::size_t page_count, std::span<std::int64_t> slots) const noexcept {
  const auto [first, second] = free_.last_popped(page_count);
  const std::size_t slot_count = first.size() * static_cast<std::size_t>(page_size_);
  write_slots(first, static_cast<std::int32_t>(page_size_), slots.first(slot_count));
  write_slots(second, static_cast<std::int32_t>(page_size_), slots.subspan(slot_count));
}

Slots PageBooks::room_for_report(std::size_t page_count) const {
  return reporter_.attached() ? Slots(page_count * static_cast<std::size_t>(page_size_)) : Slots();
}

void PageBooks::write_report(std::span<const PageId> pages, Slots& moved) const noexcept {
  if (moved.count() == 0) return;
  write_slots(pages, static_cast<std::int32_t>(page_size_), moved.span());
}

void PageBooks::refuse_page(const Naming& naming, std::int64_t page,
                            std::span<const PageId> named) {
  const State place = contains(page) ? state(page) : State::sink;
  set_state(named, State::held);
  const std::string what =
      std::string(naming.call) + " names " + kind_.unit + " " + std::to_string(page);
  if (page == 0) refuse(naming.clause, what + ", which is the sink");
  if (!contains(page)) {
    refuse(naming.clause, what + ", which is out of range 1 .. " + std::to_string(page_count_));
  }
  if (place == State::held) refuse(naming.clause, what + ", which " + naming.unfit);
  if (place > State::held) refuse(naming.clause, what + " twice");
  const bool pending = place == State::pending;
  refuse(naming.clause, what + (pending ? ", which is pending" : ", which is free"));
}

// Sorts free list and release list into the free list.
void PageBooks::merge() noexcept {
  PageId* end = scratch_.get();
  for (const PageRing* ring : {&free_, &release_}) {
    for (const auto& pages : ring->pieces()) end = std::ranges::copy(pages, end).out;
  }
  const std::span<PageId> merged(scratch_.get(), end);
  std::ranges::sort(merged);
  set_state(merged, State::free);
  free_.replace(merged);
  release_.clear();
  ++counters_.merges;
  counters_.pages_merged += static_cast<std::int64_t>(merged.size());
}

}  // namespace kvspec
