#include "kvspec/request_pool.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <tuple>

#include "kvspec/contract.hpp"

namespace kvspec {

namespace {

constexpr std::int64_t kLimit = std::int64_t{1} << 31;

std::size_t checked_row_count(std::int64_t size, std::int64_t pre_alloc_size) {
  if (size < 0 || size >= kLimit) {
    refuse("REQ-12", "size " + std::to_string(size) + " is not in [0, 2^31)");
  }
  if (pre_alloc_size < 0 || pre_alloc_size >= kLimit - size) {
    refuse("REQ-12", "pre_alloc_size " + std::to_string(pre_alloc_size) + " is not in [0, " +
                         std::to_string(kLimit - size) + ")");
  }
  return static_cast<std::size_t>(size + pre_alloc_size);
}

// Whether all are in [1, 2^31): neither v nor v - 1 has a bit from the 31st on.
bool all_slots(std::span<const std::int64_t> values) noexcept {
  std::uint64_t bits = 0;
  for (const std::int64_t value : values) {
    const auto word = static_cast<std::uint64_t>(value);
    bits |= word | (word - 1);
  }
  return bits >> 31 == 0;
}

// Grows in steps that double, so that appending costs O(1) amortised.
template <class Item>
void reserve_amortised(std::vector<Item>& items, std::size_t count) {
  if (count > items.capacity()) items.reserve(std::max(count, 2 * items.capacity()));
}

}  // namespace

RequestPool::RequestPool(std::int64_t size, std::int64_t pre_alloc_size,
                         std::int64_t max_context_len)
    : max_context_len_(max_context_len) {
  const std::size_t row_count = checked_row_count(size, pre_alloc_size);
  if (max_context_len < 1 || max_context_len >= kLimit) {
    refuse("REQ-12",
           "max_context_len " + std::to_string(max_context_len) + " is not in [1, 2^31)");
  }
  rows_.resize(row_count);
  free_.resize(row_count);
  make_all_free();
}

void RequestPool::make_all_free() noexcept {
  for (Row& row : rows_) {
    row.slots.clear();
    row.next_length = 0;
    row.state = State::free;
  }
  std::iota(free_.begin(), free_.end(), 0);
  free_head_ = 0;
  free_count_ = rows_.size();
  unsent_.clear();
}

bool RequestPool::is_live(std::int64_t row) const noexcept {
  return row >= 0 && row < row_count() && at(row).state == State::live;
}

std::optional<std::vector<std::int64_t>> RequestPool::alloc(std::int64_t need_size) {
  reporter_.guard("alloc");
  if (need_size < 0) {
    refuse("REQ-4", "alloc(" + std::to_string(need_size) + ") asks for a negative number of rows");
  }
  if (need_size > available_size()) return std::nullopt;
  std::vector<std::int64_t> taken(static_cast<std::size_t>(need_size));
  for (std::int64_t& row : taken) {
    row = free_[free_head_];
    at(row).state = State::live;
    free_head_ = free_head_ + 1 == free_.size() ? 0 : free_head_ + 1;
  }
  free_count_ -= taken.size();
  counters_.rows_moved += need_size;
  if (!taken.empty()) reporter_.report("alloc", taken);
  return taken;
}

void RequestPool::free(std::span<const std::int64_t> rows) {
  reporter_.guard("free");
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (!is_live(rows[i])) refuse_free(rows[i], rows.first(i));
    at(rows[i]).state = State::named;
  }
  for (const std::int64_t row : rows) push_free(row);
  counters_.rows_moved += static_cast<std::int64_t>(rows.size());
  if (!rows.empty()) reporter_.report("free", rows);
}

void RequestPool::refuse_free(std::int64_t row, std::span<const std::int64_t> named) {
  const bool twice = std::find(named.begin(), named.end(), row) != named.end();
  for (const std::int64_t earlier : named) at(earlier).state = State::live;
  refuse("REQ-4",
         "free names row " + std::to_string(row) + (twice ? " twice" : ", which is not live"));
}

void RequestPool::push_free(std::int64_t row) noexcept {
  at(row).slots.clear();
  at(row).next_length = 0;
  at(row).state = State::free;
  const std::size_t tail = free_head_ + free_count_;
  free_[tail < free_.size() ? tail : tail - free_.size()] = static_cast<std::int32_t>(row);
  ++free_count_;
}

void RequestPool::clear() {
  reporter_.guard("clear");
  std::vector<std::int64_t> rows;
  bool changed = false;
  if (reporter_.attached()) {
    rows.resize(rows_.size());
    std::iota(rows.begin(), rows.end(), 0);
    changed = free_rows() != rows;
  }
  make_all_free();
  if (changed) reporter_.report("clear", rows);
}

std::span<const RequestPool::Slot> RequestPool::row(std::int64_t row) const {
  if (!is_live(row)) refuse("REQ-1", "row " + std::to_string(row) + " is not live");
  return at(row).slots;
}

// -- writing --------------------------------------------------------------------------------------

void RequestPool::write_run(std::int64_t row, std::int64_t start, std::int64_t stop,
                            std::span<const std::int64_t> slots) {
  reporter_.guard("write");
  const auto first = static_cast<std::uint64_t>(start);
  require_count(slots.size(), stop > start ? static_cast<std::uint64_t>(stop) - first : 0);
  const auto count = static_cast<std::int64_t>(slots.size());
  const bool plain = is_live(row) && start >= 0 && start <= max_context_len_ &&
                     count <= max_context_len_ - start &&
                     static_cast<std::size_t>(start) <= at(row).slots.size() && all_slots(slots);
  if (!plain || reporter_.attached()) {
    std::vector<std::int64_t> positions(slots.size());
    std::iota(positions.begin(), positions.end(), start);
    write({&row, 1}, positions, slots);
    return;
  }
  std::vector<Slot>& books = at(row).slots;
  const std::size_t end = first + slots.size();
  reserve_amortised(books, end);
  if (table_ == nullptr) reserve_unsent(1);

  if (end > books.size()) books.resize(end);
  at(row).next_length = books.size();
  std::transform(slots.begin(), slots.end(), books.data() + first,
                 [](std::int64_t slot) { return static_cast<Slot>(slot); });
  if (table_ == nullptr) {
    add_unsent(row, first, end);
  } else if (!slots.empty()) {
    std::memcpy(table_row(row) + first, books.data() + first, slots.size() * sizeof(Slot));
  }
  counters_.positions_written += count;
}

void RequestPool::write(std::span<const std::int64_t> rows,
                        std::span<const std::int64_t> positions,
                        std::span<const std::int64_t> slots) {
  reporter_.guard("write");
  const Places places{rows, positions, slots};
  require_shape(places);
  // However this ends, next_length is again the length of the books.
  struct Settle {
    RequestPool& pool;
    std::span<const std::int64_t> rows;
    ~Settle() {
      for (const std::int64_t row : rows) pool.at(row).next_length = pool.at(row).slots.size();
    }
  };
  const Settle settle{*this, rows};
  measure(places);
  for (const std::int64_t row : rows) reserve_amortised(at(row).slots, at(row).next_length);
  if (table_ == nullptr) reserve_unsent(positions.size());
  if (!reporter_.attached()) return set(places);

  const std::vector<std::int64_t> named = once_each(rows);
  const std::vector<Slot> before = slots_at(places);
  set(places);
  for (std::size_t i = 0; i < before.size(); ++i) {
    if (at(places.row(i)).slots[places.position(i)] == before[i]) continue;
    return reporter_.report("write", named);
  }
}

void RequestPool::require_shape(const Places& places) const {
  const std::size_t count = places.positions.size();
  if (places.rows.size() != 1 && places.rows.size() != count) {
    refuse("REQ-7", std::to_string(places.rows.size()) + " rows were given for " +
                        std::to_string(count) + " positions");
  }
  require_count(places.slots.size(), count);
  for (const std::int64_t row : places.rows) {
    if (!is_live(row)) {
      refuse("REQ-7", "write names row " + std::to_string(row) + ", which is not live");
    }
  }
}

void RequestPool::require_count(std::uint64_t slot_count, std::uint64_t position_count) {
  if (slot_count == position_count) return;
  refuse("REQ-7", std::to_string(slot_count) + " values were given for " +
                      std::to_string(position_count) + " positions");
}

void RequestPool::measure(const Places& places) {
  for (std::size_t i = 0; i < places.positions.size(); ++i) {
    std::size_t& length = at(places.row(i)).next_length;
    if (!fits(places.positions[i], length, places.slots[i])) refuse_place(places, i);
    if (places.position(i) == length) ++length;
  }
}

void RequestPool::set(const Places& places) noexcept {
  for (std::size_t i = 0; i < places.positions.size(); ++i) {
    Row& row = at(places.row(i));
    const std::size_t position = places.position(i);
    const auto slot = static_cast<Slot>(places.slots[i]);
    if (row.slots.size() < row.next_length) row.slots.resize(row.next_length);
    row.slots[position] = slot;
    if (table_ == nullptr) {
      add_unsent(places.row(i), position, position + 1);
    } else {
      table_row(places.row(i))[position] = slot;
    }
  }
  counters_.positions_written += static_cast<std::int64_t>(places.positions.size());
}

// What the books have at each place; 0, which is no slot, beyond the end of a row.
std::vector<RequestPool::Slot> RequestPool::slots_at(const Places& places) const {
  std::vector<Slot> slots(places.positions.size());
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const std::vector<Slot>& books = at(places.row(i)).slots;
    if (places.position(i) < books.size()) slots[i] = books[places.position(i)];
  }
  return slots;
}

// Live rows in the order in which they are first named.
std::vector<std::int64_t> RequestPool::once_each(std::span<const std::int64_t> rows) {
  std::vector<std::int64_t> once;
  once.reserve(rows.size());
  for (const std::int64_t row : rows) {
    if (at(row).state == State::live) once.push_back(row);
    at(row).state = State::named;
  }
  for (const std::int64_t row : once) at(row).state = State::live;
  return once;
}

bool RequestPool::fits(std::int64_t position, std::size_t length,
                       std::int64_t slot) const noexcept {
  return position >= 0 && position < max_context_len_ &&
         static_cast<std::size_t>(position) <= length && slot >= 1 && slot < kLimit;
}

void RequestPool::refuse_place(const Places& places, std::size_t i) const {
  const std::int64_t row = places.row(i);
  const std::size_t length = at(row).next_length;
  const std::string position = "position " + std::to_string(places.positions[i]);
  if (places.positions[i] < 0 || places.positions[i] >= max_context_len_) {
    refuse("REQ-7", position + " is not in [0, " + std::to_string(max_context_len_) + ")");
  }
  if (places.position(i) > length) {
    refuse("REQ-7", position + " of row " + std::to_string(row) + " is beyond its end, " +
                        std::to_string(length));
  }
  refuse("REQ-7", "slot " + std::to_string(places.slots[i]) + " is not in [1, 2^31)");
}

// -- the table ------------------------------------------------------------------------------------

RequestPool::Slot* RequestPool::table_row(std::int64_t row) const noexcept {
  return table_ + row * max_context_len_;
}

void RequestPool::reserve_unsent(std::size_t more) {
  const std::size_t count = unsent_.size() + more;
  if (count <= unsent_.capacity()) return;
  merge_unsent();  // what is written again and again before a commit takes no more memory
  if (2 * (unsent_.size() + more) > unsent_.capacity()) reserve_amortised(unsent_, count);
}

void RequestPool::add_unsent(std::int64_t row, std::size_t start, std::size_t stop) noexcept {
  const Range range{static_cast<std::int32_t>(row), static_cast<std::int32_t>(start),
                    static_cast<std::int32_t>(stop)};
  if (start == stop) return;
  if (!unsent_.empty() && unsent_.back().row == range.row && unsent_.back().stop == range.start) {
    unsent_.back().stop = range.stop;
  } else {
    unsent_.push_back(range);
  }
}

// Sorts the ranges, joins those that touch and drops what is no longer in the books.  A row that
// was freed and taken again has only positions written since, so all of them are unsent.
void RequestPool::merge_unsent() noexcept {
  std::sort(unsent_.begin(), unsent_.end(), [](const Range& a, const Range& b) {
    return std::tie(a.row, a.start) < std::tie(b.row, b.start);
  });
  auto merged = unsent_.begin();
  for (Range range : unsent_) {
    range.stop = std::min(range.stop, static_cast<std::int32_t>(at(range.row).slots.size()));
    if (range.start >= range.stop) continue;
    if (merged != unsent_.begin() && merged[-1].row == range.row &&
        merged[-1].stop >= range.start) {
      merged[-1].stop = std::max(merged[-1].stop, range.stop);
    } else {
      *merged++ = range;
    }
  }
  unsent_.erase(merged, unsent_.end());
}

std::size_t RequestPool::unsent_count() noexcept {
  merge_unsent();
  std::size_t count = 0;
  for (const Range& range : unsent_) count += static_cast<std::size_t>(range.stop - range.start);
  return count;
}

void RequestPool::pack(std::span<std::int64_t> positions, std::span<Slot> slots) const noexcept {
  std::size_t packed = 0;
  for (const Range& range : unsent_) {
    const std::int64_t first = range.row * max_context_len_;
    for (std::int32_t position = range.start; position < range.stop; ++position, ++packed) {
      positions[packed] = first + position;
      slots[packed] = at(range.row).slots[static_cast<std::size_t>(position)];
    }
  }
}

void RequestPool::sent() noexcept {
  counters_.positions_sent += static_cast<std::int64_t>(unsent_count());
  unsent_.clear();
}

// -- checking -------------------------------------------------------------------------------------

std::vector<std::int64_t> RequestPool::free_rows() const {
  std::vector<std::int64_t> rows(free_count_);
  for (std::size_t i = 0; i < free_count_; ++i) {
    const std::size_t place = free_head_ + i;
    rows[i] = free_[place < free_.size() ? place : place - free_.size()];
  }
  return rows;
}

std::vector<std::int64_t> RequestPool::live_rows() const {
  std::vector<std::int64_t> rows;
  for (std::int64_t row = 0; row < row_count(); ++row) {
    if (is_live(row)) rows.push_back(row);
  }
  return rows;
}

void RequestPool::check(const Slot* table) {
  check_rows();
  if (table != nullptr) check_table(table);
}

void RequestPool::check_rows() const {
  std::vector<std::int64_t> listed = free_rows();
  const std::size_t free_count = listed.size();
  const std::vector<std::int64_t> live = live_rows();
  listed.insert(listed.end(), live.begin(), live.end());
  std::sort(listed.begin(), listed.end());
  for (std::size_t i = 0; i < std::max(listed.size(), rows_.size()); ++i) {
    if (i < listed.size() && listed[i] == static_cast<std::int64_t>(i)) continue;
    refuse("REQ-1", std::to_string(free_count) + " free and " + std::to_string(live.size()) +
                        " live rows are not the rows 0 .. " + std::to_string(row_count() - 1) +
                        ", once each");
  }
}

void RequestPool::check_table(const Slot* table) {
  merge_unsent();
  auto range = unsent_.begin();
  for (std::int64_t row = 0; row < row_count(); ++row) {
    const std::vector<Slot>& books = at(row).slots;
    const Slot* copy = table + row * max_context_len_;
    for (std::size_t i = 0; i < books.size(); ++i) {
      const auto position = static_cast<std::int32_t>(i);
      while (range != unsent_.end() &&
             (range->row < row || (range->row == row && range->stop <= position))) {
        ++range;
      }
      const bool unsent =
          range != unsent_.end() && range->row == row && range->start <= position;
      if (unsent || books[i] == copy[i]) continue;
      refuse("REQ-8", "req_to_token[" + std::to_string(row) + ", " + std::to_string(i) + "] is " +
                          std::to_string(copy[i]) + ", the books have " +
                          std::to_string(books[i]));
    }
  }
}

}  // namespace kvspec
