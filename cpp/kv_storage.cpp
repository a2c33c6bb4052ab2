#include "kvspec/kv_storage.hpp"

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <string>

#include "kvspec/contract.hpp"

namespace kvspec {

namespace {

using MaybeSlots = std::optional<SlotSpan>;

std::int64_t slot_at(const MaybeSlots& slots, std::size_t i) noexcept {
  return slots ? (*slots)[i] : static_cast<std::int64_t>(i);
}

// How many rows from i on follow one another, at most `limit`.
std::size_t run_length(const MaybeSlots& slots, std::size_t i, std::size_t limit) noexcept {
  if (!slots) return limit;
  std::size_t count = 1;
  while (count < limit && (*slots)[i + count] == (*slots)[i] + static_cast<std::int64_t>(count)) {
    ++count;
  }
  return count;
}

bool is_dense(const RowMemory& memory) noexcept {
  return memory.stride == static_cast<std::int64_t>(memory.row_bytes);
}

// Memory for `count` rows of such a tensor, and the tensor that it is.
class Scratch {
 public:
  Scratch(const RowMemory& like, std::size_t count)
      : bytes_(std::make_unique_for_overwrite<std::byte[]>(count * like.row_bytes)),
        rows_{bytes_.get(), static_cast<std::int64_t>(count),
              static_cast<std::int64_t>(like.row_bytes), like.row_bytes} {}

  const RowMemory& rows() const noexcept { return rows_; }

 private:
  std::unique_ptr<std::byte[]> bytes_;
  RowMemory rows_;
};

}  // namespace

bool RowMemory::meets(const RowMemory& other) const noexcept {
  if (row_count == 0 || other.row_count == 0) return false;
  const auto begin = [](const RowMemory& memory) {
    return memory.row(memory.stride < 0 ? memory.row_count - 1 : 0);
  };
  const auto end = [](const RowMemory& memory) {
    return memory.row(memory.stride < 0 ? 0 : memory.row_count - 1) + memory.row_bytes;
  };
  const std::less<const std::byte*> before;
  return before(begin(*this), end(other)) && before(begin(other), end(*this));
}

void copy_rows(const RowMemory& to, MaybeSlots to_slots, const RowMemory& from,
               MaybeSlots from_slots) noexcept {
  const std::size_t count = to_slots     ? to_slots->size()
                            : from_slots ? from_slots->size()
                                         : static_cast<std::size_t>(from.row_count);
  const bool dense = is_dense(to) && is_dense(from);
  for (std::size_t i = 0; i < count;) {
    const std::size_t rows =
        dense ? run_length(from_slots, i, run_length(to_slots, i, count - i)) : 1;
    std::memcpy(to.row(slot_at(to_slots, i)), from.row(slot_at(from_slots, i)),
                rows * to.row_bytes);
    i += rows;
  }
}

// -- slots that are named -------------------------------------------------------------------------

SlotCheck::SlotCheck(std::int64_t first, std::int64_t end, std::string_view whose)
    : first_(first), end_(end), whose_(whose), named_(static_cast<std::size_t>((end + 63) / 64)) {}

void SlotCheck::require_rows(std::string_view clause, SlotSpan slots) const {
  // Of a negative or too small slot the difference is beyond any count.
  const auto first = static_cast<std::uint64_t>(first_);
  const auto count = static_cast<std::uint64_t>(end_ - first_);
  bool astray = false;
  for (const std::int64_t slot : slots) {
    astray |= static_cast<std::uint64_t>(slot) - first >= count;
  }
  if (!astray) return;
  for (const std::int64_t slot : slots) {
    if (slot >= first_ && slot < end_) continue;
    refuse(clause, "slot " + std::to_string(slot) + std::string(whose_) + " is not in [" +
                       std::to_string(first_) + ", " + std::to_string(end_) + ")");
  }
}

void SlotCheck::require_once(std::string_view clause, SlotSpan slots, std::int64_t free_below) {
  require_rows(clause, slots);
  const std::int64_t* twice = nullptr;
  for (const std::int64_t& slot : slots) {
    std::uint64_t& named = word(slot);
    if (slot >= free_below && (named & bit(slot)) != 0 && twice == nullptr) twice = &slot;
    named |= bit(slot);
  }
  for (const std::int64_t slot : slots) word(slot) = 0;
  if (twice == nullptr) return;
  refuse(clause, "slot " + std::to_string(*twice) + std::string(whose_) + " is named twice");
}

// -- a device pool --------------------------------------------------------------------------------

KVStorage::KVStorage(std::int64_t row_count, std::int64_t sink_count, bool checked)
    : check_(0, row_count, ""), sink_count_(sink_count), checked_(checked) {}

void KVStorage::write(std::string_view clause, SlotSpan slots,
                      std::span<const std::size_t> tensors, std::span<const RowMemory> given) {
  for (const RowMemory& rows : given) {
    if (rows.row_count == static_cast<std::int64_t>(slots.size())) continue;
    refuse(clause, std::to_string(rows.row_count) + " rows were given for " +
                       std::to_string(slots.size()) + " slots");
  }
  if (checked_) {
    require_targets(clause, slots);
  } else {
    require_rows(clause, slots);
  }
  std::vector<RowMemory> sources(given.begin(), given.end());
  std::vector<Scratch> copies;  // of what lies in the tensors that are written
  for (RowMemory& source : sources) {
    const bool meets = std::ranges::any_of(
        tensors, [&](std::size_t tensor) { return tensors_[tensor].meets(source); });
    if (!meets) continue;
    copies.emplace_back(source, slots.size());
    copy_rows(copies.back().rows(), std::nullopt, source, std::nullopt);
    source = copies.back().rows();
  }
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    copy_rows(tensors_[tensors[i]], slots, sources[i], std::nullopt);
    count(slots);
  }
}

void KVStorage::read(std::string_view clause, SlotSpan slots, std::size_t tensor,
                     const RowMemory& out) {
  require_rows(clause, slots);
  copy_rows(out, std::nullopt, tensors_[tensor], slots);
  count(slots);
}

void KVStorage::require_move(std::string_view clause, SlotSpan targets, SlotSpan sources) {
  if (targets.size() != sources.size()) {
    refuse(clause, std::to_string(sources.size()) + " sources were given for " +
                       std::to_string(targets.size()) + " targets");
  }
  require_rows(clause, sources);
  require_targets(clause, targets);
}

void KVStorage::move(std::string_view clause, SlotSpan targets, SlotSpan sources,
                     std::size_t tensor_count) {
  require_move(clause, targets, sources);
  if (targets.empty()) return;
  const auto tensors = std::span(tensors_).first(tensor_count);
  RowMemory widest;  // memory for rows of any of them, before the first is moved
  for (const RowMemory& tensor : tensors) {
    if (tensor.row_bytes > widest.row_bytes) widest = tensor;
  }
  const Scratch scratch(widest, sources.size());
  for (const RowMemory& tensor : tensors) {
    const RowMemory gathered{scratch.rows().data, scratch.rows().row_count,
                             static_cast<std::int64_t>(tensor.row_bytes), tensor.row_bytes};
    copy_rows(gathered, std::nullopt, tensor, sources);
    copy_rows(tensor, targets, gathered, std::nullopt);
    count(sources);
    count(targets);
  }
}

// -- the books of the host ------------------------------------------------------------------------

HostSlots::HostSlots(std::int64_t size, std::int64_t page_size, std::int64_t device_first,
                     std::int64_t device_end)
    : page_size_(page_size),
      held_(static_cast<std::size_t>(size / page_size)),
      free_(held_.size()),
      check_(0, size, " of the host"),
      device_check_(device_first, device_end, " of the device") {
  clear();
}

void HostSlots::clear() noexcept {
  std::ranges::fill(held_, std::uint8_t{0});
  free_.clear();
  for (std::size_t page = 0; page < held_.size(); ++page) {
    const auto id = static_cast<PageId>(page);
    free_.push_back({&id, 1});
  }
}

std::optional<Slots> HostSlots::alloc(std::int64_t need_size) {
  if (need_size < 0 || need_size % page_size_ != 0) {
    refuse("KV-28", "alloc(" + std::to_string(need_size) + ") is not whole pages of " +
                        std::to_string(page_size_));
  }
  if (need_size > available_size()) return std::nullopt;
  Slots slots(static_cast<std::size_t>(need_size));
  std::span<std::int64_t> left = slots.span();
  while (!left.empty()) {
    const PageId page = free_[0];
    write_slots({&page, 1}, static_cast<std::int32_t>(page_size_), left);
    left = left.subspan(static_cast<std::size_t>(page_size_));
    held_[static_cast<std::size_t>(page)] = 1;
    free_.pop_front(1);
  }
  return slots;
}

std::vector<PageId> HostSlots::named_pages(SlotSpan slots) const {
  const auto unit = static_cast<std::size_t>(page_size_);
  std::vector<PageId> pages;
  pages.reserve(slots.size() / unit + 1);
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const std::int64_t slot = slots[i];
    if (slot < 0 || slot >= check_.end()) {
      refuse("KV-28", "slot " + std::to_string(slot) + " is not in [0, " +
                          std::to_string(check_.end()) + ")");
    }
    const std::int64_t expected =
        i % unit == 0 ? slot / page_size_ * page_size_ : slots[i - 1] + 1;
    if (slot != expected) {
      refuse("KV-28", "free names slot " + std::to_string(slot) + " where slot " +
                          std::to_string(expected) + " makes whole pages in order");
    }
    if (i % unit == 0) pages.push_back(static_cast<PageId>(slot / page_size_));
  }
  if (slots.size() % unit != 0) {
    refuse("KV-28", "free names " + std::to_string(slots.size()) +
                        " slots, which are not whole pages of " + std::to_string(page_size_));
  }
  return pages;
}

std::int64_t HostSlots::free(SlotSpan slots) {
  const std::vector<PageId> pages = named_pages(slots);
  const auto held = [&](PageId page) -> std::uint8_t& {
    return held_[static_cast<std::size_t>(page)];
  };
  for (std::size_t i = 0; i < pages.size(); ++i) {
    if (held(pages[i]) == 1) {
      held(pages[i]) = 2;
      continue;
    }
    const bool twice = held(pages[i]) == 2;
    for (const PageId page : std::span(pages).first(i)) held(page) = 1;
    const std::int64_t slot = pages[i] * page_size_;
    if (twice) refuse("KV-28", "slot " + std::to_string(slot) + " is named twice");
    refuse("KV-28", "free names slot " + std::to_string(slot) + ", which is free");
  }
  for (const PageId page : pages) held(page) = 0;
  free_.push_back(pages);
  return static_cast<std::int64_t>(slots.size());
}

void HostSlots::require_transfer(SlotSpan host, SlotSpan device) {
  if (host.size() != device.size()) {
    refuse("KV-31", std::to_string(host.size()) + " slots of the host were given for " +
                        std::to_string(device.size()) + " of the device");
  }
  check_.require_once("KV-31", host, 0);
  for (const std::int64_t slot : host) {
    if (!holds(slot)) refuse("KV-31", "slot " + std::to_string(slot) + " of the host is free");
  }
  device_check_.require_once("KV-31", device, 0);
}

void HostSlots::require_page(std::int64_t slot) const {
  if (slot < 0 || slot >= check_.end() || slot % page_size_ != 0) {
    refuse("KV-33", "no page of " + std::to_string(page_size_) + " slots of " +
                        std::to_string(check_.end()) + " begins at " +
                        std::to_string(slot));
  }
  if (!holds(slot)) {
    refuse("KV-33", "the page that begins at slot " + std::to_string(slot) + " is free");
  }
}

std::vector<std::int64_t> HostSlots::free_slots() const {
  const Slots slots = slots_of(free_.copy(), static_cast<std::int32_t>(page_size_));
  return {slots.span().begin(), slots.span().end()};
}

std::vector<std::int64_t> HostSlots::held_slots() const {
  std::vector<std::int64_t> slots;
  for (std::int64_t slot = 0; slot < check_.end(); ++slot) {
    if (holds(slot)) slots.push_back(slot);
  }
  return slots;
}

}  // namespace kvspec
