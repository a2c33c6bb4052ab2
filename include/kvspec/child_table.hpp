// Which node continues another one: an open-addressing table of (hash, node) with linear probing.
//
// The hash only says where to look; whether a node is the one sought is decided by its tokens, by
// the caller.  Nothing observable depends on the order of entries.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvspec {

// An index that names nothing.
inline constexpr std::uint32_t kNone = 0xffffffffU;

class ChildTable {
 public:
  std::size_t count() const noexcept { return count_; }

  // Makes insert() no-throw until there are `count` entries.  Amortised O(1) each.
  void reserve(std::size_t count) {
    if (count * 2 <= entries_.size()) return;
    std::vector<Entry> former(std::bit_ceil(count * 2 < 16 ? std::size_t{16} : count * 2));
    former.swap(entries_);
    count_ = 0;
    for (const Entry& entry : former) {
      if (entry.node != kNone) insert(entry.hash, entry.node);
    }
  }

  // The node of this hash for which `same(node)` holds, or kNone.  O(1) expected.
  template <class Same>
  std::uint32_t find(std::uint32_t hash, Same same) const noexcept {
    if (entries_.empty()) return kNone;
    for (std::size_t at = home(hash);; at = next(at)) {
      const Entry& entry = entries_[at];
      if (entry.node == kNone) return kNone;
      if (entry.hash == hash && same(entry.node)) return entry.node;
    }
  }

  // REQUIRES: reserve().
  void insert(std::uint32_t hash, std::uint32_t node) noexcept {
    std::size_t at = home(hash);
    while (entries_[at].node != kNone) at = next(at);
    entries_[at] = {hash, node};
    ++count_;
  }

  // REQUIRES: (hash, from) is in the table.
  void replace(std::uint32_t hash, std::uint32_t from, std::uint32_t to) noexcept {
    entries_[position(hash, from)].node = to;
  }

  // Closes the gap, so that no tombstone is left.  REQUIRES: (hash, node) is in the table.
  void erase(std::uint32_t hash, std::uint32_t node) noexcept {
    std::size_t gap = position(hash, node);
    for (std::size_t at = next(gap); entries_[at].node != kNone; at = next(at)) {
      // An entry may move into the gap unless its home lies cyclically in (gap, at].
      const std::size_t distance = (at - home(entries_[at].hash)) & mask();
      if (distance < ((at - gap) & mask())) continue;
      entries_[gap] = entries_[at];
      gap = at;
    }
    entries_[gap] = Entry{};
    --count_;
  }

  void prefetch(std::uint32_t hash) const noexcept {
    __builtin_prefetch(entries_.data() + home(hash), 1);
  }

  void clear() noexcept {
    entries_.clear();
    count_ = 0;
  }

 private:
  struct Entry {
    std::uint32_t hash = 0;
    std::uint32_t node = kNone;
  };

  std::size_t mask() const noexcept { return entries_.size() - 1; }
  std::size_t home(std::uint32_t hash) const noexcept { return hash & mask(); }
  std::size_t next(std::size_t at) const noexcept { return (at + 1) & mask(); }
  std::size_t position(std::uint32_t hash, std::uint32_t node) const noexcept {
    std::size_t at = home(hash);
    while (entries_[at].node != node) at = next(at);
    return at;
  }

  std::vector<Entry> entries_;  // a power of two, at most half of them taken
  std::size_t count_ = 0;
};

}  // namespace kvspec
