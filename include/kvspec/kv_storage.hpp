// KV storage: rows of bytes that slots name, and which of the host's are handed out.  Spec: KV.
//
//     |free| + |held| == size, and no slot of the host is in both (KV-24)
//
// The memory is torch's, and outlives what is here.  A tensor is rows of any stride, so a layer of
// either layout of the host is one, and so is a part of a latent.  Whatever is refused is refused
// before a byte is copied.  Not thread-safe: one thread at a time uses an object.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "kvspec/page_ring.hpp"
#include "kvspec/slots.hpp"

namespace kvspec {

using SlotSpan = std::span<const std::int64_t>;

// A tensor: row i is row_bytes bytes from data + i * stride on.
struct RowMemory {
  std::byte* data = nullptr;
  std::int64_t row_count = 0;
  std::int64_t stride = 0;
  std::size_t row_bytes = 0;

  std::byte* row(std::int64_t i) const noexcept { return data + i * stride; }
  // Whether a byte between the first and the last of either is between those of the other.
  bool meets(const RowMemory& other) const noexcept;
};

// Row to_slots[i] becomes row from_slots[i]; without slots row i stands for itself.  REQUIRES: the
// slots are rows, as many on either side, rows are equally long and the memories do not meet.
// O(rows named).
void copy_rows(const RowMemory& to, std::optional<SlotSpan> to_slots, const RowMemory& from,
               std::optional<SlotSpan> from_slots) noexcept;

// Finds a slot that is out of range or named twice, with one bit for each slot.
class SlotCheck {
 public:
  // Of the rows [first, end) that slots may name; `whose` they are stands in what is refused.
  // REQUIRES: 0 <= first <= end.  O(end).
  SlotCheck(std::int64_t first, std::int64_t end, std::string_view whose);

  std::int64_t end() const noexcept { return end_; }
  // REQUIRES (`clause`): every slot is in [first, end).  O(slots named).
  void require_rows(std::string_view clause, SlotSpan slots) const;
  // REQUIRES (`clause`): as well, none is named twice, but below `free_below`.  O(slots named).
  void require_once(std::string_view clause, SlotSpan slots, std::int64_t free_below);

 private:
  static std::uint64_t bit(std::int64_t slot) noexcept { return std::uint64_t{1} << (slot & 63); }
  std::uint64_t& word(std::int64_t slot) noexcept {
    return named_[static_cast<std::size_t>(slot >> 6)];
  }

  std::int64_t first_;
  std::int64_t end_;
  std::string_view whose_;
  std::vector<std::uint64_t> named_;  // zeros between calls
};

// The tensors of a device pool, in the order in which they were added.
class KVStorage {
 public:
  // REQUIRES: 0 <= sink_count <= row_count.  O(row_count).
  KVStorage(std::int64_t row_count, std::int64_t sink_count, bool checked);
  KVStorage(const KVStorage&) = delete;
  KVStorage& operator=(const KVStorage&) = delete;

  // REQUIRES: it has row_count rows, and outlives the storage.
  void add(const RowMemory& tensor) { tensors_.push_back(tensor); }
  std::size_t tensor_count() const noexcept { return tensors_.size(); }
  std::int64_t row_count() const noexcept { return check_.end(); }
  const RowMemory& tensor(std::size_t index) const { return tensors_.at(index); }

  // Row i of given[t] becomes row slots[i] of tensor tensors[t], as it was before the call (KV-9).
  // REQUIRES (`clause`): every slot is a row and, in a checked storage, none beyond the sink is
  // named twice (KV-12, KV-13); as many rows as slots.  O(rows named).
  void write(std::string_view clause, SlotSpan slots, std::span<const std::size_t> tensors,
             std::span<const RowMemory> given);

  // Row slots[i] of this tensor becomes row i of `out`, which has so many (KV-16).  REQUIRES
  // (`clause`): every slot is a row.  O(rows named).
  void read(std::string_view clause, SlotSpan slots, std::size_t tensor, const RowMemory& out);

  // In the first `tensor_count` tensors row targets[i] becomes what row sources[i] was before
  // (KV-14).  REQUIRES (`clause`): require_move().  O(rows named), and a copy of them for one
  // tensor at a time.
  void move(std::string_view clause, SlotSpan targets, SlotSpan sources, std::size_t tensor_count);

  // REQUIRES (`clause`): as many sources as targets, all rows; no target beyond the sink is named
  // twice (KV-15).
  void require_move(std::string_view clause, SlotSpan targets, SlotSpan sources);
  // REQUIRES (`clause`): as of a write's slots, also in a storage that is not checked.
  void require_targets(std::string_view clause, SlotSpan slots) {
    check_.require_once(clause, slots, sink_count_);
  }
  void require_rows(std::string_view clause, SlotSpan slots) const {
    check_.require_rows(clause, slots);
  }

  // Exact cost so far: rows that were copied, of every tensor (KV-34).
  std::int64_t rows_copied() const noexcept { return rows_copied_; }

 private:
  void count(SlotSpan slots) noexcept { rows_copied_ += static_cast<std::int64_t>(slots.size()); }

  SlotCheck check_;
  std::int64_t sink_count_;
  bool checked_;
  std::vector<RowMemory> tensors_;
  std::int64_t rows_copied_ = 0;
};

// The books of a host pool: pages of slots, first in, first out.
class HostSlots {
 public:
  // Owns the slots 0 .. size - 1, all free, for copies of the slots [device_first, device_end) of a
  // device pool.  REQUIRES: page_size >= 1 divides size.  O(size + device_end).
  HostSlots(std::int64_t size, std::int64_t page_size, std::int64_t device_first,
            std::int64_t device_end);

  std::int64_t available_size() const noexcept {
    return static_cast<std::int64_t>(free_.size()) * page_size_;
  }
  // The slots of the pages that have been free longest, in memory of their own, now held; nullopt
  // if there are too few (KV-25, KV-26).  REQUIRES: need_size is 0 or a positive multiple of
  // page_size (KV-28).  O(need_size).
  std::optional<Slots> alloc(std::int64_t need_size);
  // Makes pages free, last in the order given; how many slots (KV-27).  REQUIRES: whole pages, each
  // in order, held and named once (KV-28).  O(slots named).
  std::int64_t free(SlotSpan slots);
  // Makes every slot free, in ascending order (KV-27).  O(size).
  void clear() noexcept;

  // REQUIRES (KV-31): as many slots on either side, those of the host held, those of the device in
  // their pool, each named once.  O(slots named).
  void require_transfer(SlotSpan host, SlotSpan device);
  // REQUIRES (KV-33): a page begins at this slot, and it is held.
  void require_page(std::int64_t slot) const;

  std::vector<std::int64_t> free_slots() const;  // the next to be handed out first; O(size)
  std::vector<std::int64_t> held_slots() const;  // ascending; O(size)

 private:
  bool is_page(std::int64_t page) const noexcept {
    return page >= 0 && page < static_cast<std::int64_t>(held_.size());
  }
  bool holds(std::int64_t slot) const noexcept {
    return slot >= 0 && is_page(slot / page_size_) &&
           held_[static_cast<std::size_t>(slot / page_size_)] != 0;
  }
  std::vector<PageId> named_pages(SlotSpan slots) const;

  std::int64_t page_size_;
  std::vector<std::uint8_t> held_;  // of each page; 2 while free() looks at it
  PageRing free_;
  SlotCheck check_;
  SlotCheck device_check_;
};

}  // namespace kvspec
