// Slots and pages: page p is the slots [p * page_size, (p + 1) * page_size).  Spec: CACHE-10.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kvspec/contract.hpp"

namespace kvspec {

using PageId = std::int32_t;

// Integers of a result: memory that is not zeroed before it is written.
template <class Integer>
class Unzeroed {
 public:
  Unzeroed() = default;
  explicit Unzeroed(std::size_t count)
      : data_(std::make_unique_for_overwrite<Integer[]>(count)), count_(count) {}

  std::size_t count() const noexcept { return count_; }
  std::span<Integer> span() noexcept { return {data_.get(), count_}; }
  std::span<const Integer> span() const noexcept { return {data_.get(), count_}; }
  std::unique_ptr<Integer[]> release() noexcept {
    count_ = 0;
    return std::move(data_);
  }

 private:
  std::unique_ptr<Integer[]> data_;
  std::size_t count_ = 0;
};

using Slots = Unzeroed<std::int64_t>;
using WindowSlots = Unzeroed<std::int32_t>;  // of a window pool

// Writes the slots of `pages`, in order.  REQUIRES: room for page_size slots of each.  O(slots).
inline void write_slots(std::span<const PageId> pages, std::int32_t page_size,
                        std::span<std::int64_t> slots) noexcept {
  std::int64_t* next = slots.data();
  if (page_size == 1) {
    for (const PageId page : pages) *next++ = page;
    return;
  }
  for (const PageId page : pages) {
    const std::int64_t first = static_cast<std::int64_t>(page) * page_size;
    for (std::int32_t offset = 0; offset < page_size; ++offset) next[offset] = first + offset;
    next += page_size;
  }
}

// The slots of `pages`, in order.  O(slots).
inline Slots slots_of(std::span<const PageId> pages, std::int32_t page_size) {
  Slots slots(pages.size() * static_cast<std::size_t>(page_size));
  write_slots(pages, page_size, slots.span());
  return slots;
}

// The page whose first slots `given` are, in order; nothing if there is none below 2^31.
inline std::optional<PageId> page_of(std::span<const std::int64_t> given, std::int32_t page_size) {
  constexpr std::int64_t kLimit = std::int64_t{1} << 31;
  const std::int64_t first = given.front();
  if (first <= -kLimit || first >= kLimit) return std::nullopt;
  const PageId page = static_cast<PageId>(first) / page_size;  // 32 bits divide faster than 64
  std::int64_t astray = first ^ (static_cast<std::int64_t>(page) * page_size);
  for (std::size_t offset = 0; offset < given.size(); ++offset) {
    astray |= given[offset] ^ (first + static_cast<std::int64_t>(offset));
  }
  return astray == 0 ? std::optional(page) : std::nullopt;
}

// Whether all slots are in [0, 2^31), so that at page size 1 each is its page; if so, copies them.
inline bool copy_pages(std::span<const std::int64_t> slots, std::span<PageId> out) noexcept {
  std::int64_t astray = 0;
  for (std::size_t index = 0; index < slots.size(); ++index) {
    out[index] = static_cast<PageId>(slots[index]);
    astray |= slots[index] >> 31;
  }
  return astray == 0;
}

// The pages of the whole pages of `slots`; the tail is not looked at.  REQUIRES: each is the slots
// of one page in order, below 2^31 (CACHE-10).  O(slots).
inline std::vector<PageId> pages_of(std::span<const std::int64_t> slots, std::int32_t page_size) {
  const auto unit = static_cast<std::size_t>(page_size);
  std::vector<PageId> pages(slots.size() / unit);
  if (page_size == 1 && copy_pages(slots, pages)) return pages;
  for (std::size_t index = 0; index < pages.size(); ++index) {
    const std::span<const std::int64_t> given = slots.subspan(index * unit, unit);
    const std::optional<PageId> page = page_of(given, page_size);
    if (!page) {
      std::string text;
      for (const std::int64_t slot : given) text += ", " + std::to_string(slot);
      refuse("CACHE-10", "slots [" + text.substr(2) + "] are not one page in order");
    }
    pages[index] = *page;
  }
  return pages;
}

// The pages of a request's row, the last one possibly begun.  REQUIRES: every slot is in its place
// in a page (CACHE-5).  O(slots).
inline std::vector<PageId> pages_of_row(std::span<const std::int64_t> row, std::int32_t page_size) {
  const auto unit = static_cast<std::size_t>(page_size);
  std::vector<PageId> pages((row.size() + unit - 1) / unit);
  if (page_size == 1 && copy_pages(row, pages)) return pages;
  for (std::size_t index = 0; index < pages.size(); ++index) {
    const std::size_t start = index * unit;
    const std::size_t count = std::min(unit, row.size() - start);
    const std::optional<PageId> page = page_of(row.subspan(start, count), page_size);
    if (!page) {
      std::size_t end = 1;
      while (end < count && page_of(row.subspan(start, end), page_size)) ++end;
      refuse("CACHE-5", "slot " + std::to_string(row[start + end - 1]) + " at position " +
                            std::to_string(start + end - 1) + " is not in its place in a page");
    }
    pages[index] = *page;
  }
  return pages;
}

// Consecutive ascending slots, as many as there are in a row.
struct SlotRun {
  std::int64_t start;
  std::size_t count;
};

// Walks slots in runs: `while (runs.next()) use(runs.run());`.  O(slots) altogether.
class SlotRuns {
 public:
  explicit SlotRuns(std::span<const std::int64_t> slots) noexcept : left_(slots) {}

  bool next() noexcept {
    if (left_.empty()) return false;
    run_ = {left_.front(), 1};
    // No run goes on beyond the last of 64 bits.
    const std::uint64_t room = std::uint64_t{std::numeric_limits<std::int64_t>::max()} - first();
    const std::size_t most = std::min<std::uint64_t>(room, left_.size() - 1) + 1;
    if (most > 1 && in_place(1)) {
      run_.count = 2;
      while (most - run_.count >= kBlock && block_in_place()) run_.count += kBlock;
      while (run_.count < most && in_place(run_.count)) ++run_.count;
    }
    left_ = left_.subspan(run_.count);
    return true;
  }

  const SlotRun& run() const noexcept { return run_; }

 private:
  static constexpr std::size_t kBlock = 14;  // with the two before it a page of 16

  std::uint64_t first() const noexcept { return static_cast<std::uint64_t>(run_.start); }
  bool in_place(std::size_t index) const noexcept {
    return static_cast<std::uint64_t>(left_[index]) == first() + index;
  }
  // Without a branch in the loop, which the compiler makes vectors of.
  bool block_in_place() const noexcept {
    std::uint64_t astray = 0;
    for (std::size_t index = run_.count; index < run_.count + kBlock; ++index) {
      astray |= static_cast<std::uint64_t>(left_[index]) ^ (first() + index);
    }
    return astray == 0;
  }

  std::span<const std::int64_t> left_;  // begins with the run while next() looks for its end
  SlotRun run_{};
};

}  // namespace kvspec
