// The queue of evictable leaves: a 4-ary heap, smallest key first.  Spec: RADIX-13, RADIX-15.
//
// An entry carries the key its node had when it was pushed, and a stamp.  The owner finds out at
// the top whether an entry still speaks for its node, so a change of a node costs nothing here.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvspec {

// What a policy orders by; keys of two leaves are never equal (RADIX-13).
struct LeafKey {
  std::uint64_t major = 0;
  std::uint64_t minor = 0;

  friend bool operator==(const LeafKey&, const LeafKey&) = default;
  friend bool operator<(const LeafKey& one, const LeafKey& other) noexcept {
    return one.major < other.major || (one.major == other.major && one.minor < other.minor);
  }
};

class LeafHeap {
 public:
  struct Entry {
    LeafKey key;
    std::uint32_t node;
    std::uint32_t stamp;
  };

  bool empty() const noexcept { return entries_.empty(); }
  std::size_t count() const noexcept { return entries_.size(); }
  const Entry& top() const noexcept { return entries_.front(); }
  const std::vector<Entry>& entries() const noexcept { return entries_; }
  // Entries moved by all operations so far.
  std::uint64_t move_count() const noexcept { return move_count_; }

  void reserve(std::size_t count) { entries_.reserve(count); }
  bool full() const noexcept { return entries_.size() == entries_.capacity(); }
  void clear() noexcept { entries_.clear(); }

  // REQUIRES: not full.  O(log n).
  void push(const Entry& entry) noexcept {
    entries_.push_back(entry);
    rise(entries_.size() - 1, entry);
  }

  // REQUIRES: not empty.  O(log n).
  void pop() noexcept {
    const Entry last = entries_.back();
    entries_.pop_back();
    if (!entries_.empty()) sink(0, last);
  }

  // Gives the top entry another key.  REQUIRES: not empty.  O(log n).
  void change_top(const LeafKey& key) noexcept {
    Entry entry = entries_.front();
    entry.key = key;
    sink(0, entry);
  }

  // Drops every entry for which `stale` holds.  O(n).
  template <class Stale>
  void drop(Stale stale) noexcept {
    std::erase_if(entries_, stale);
    for (std::size_t at = entries_.size() / kArity + 1; at-- > 0;) {
      if (at < entries_.size()) sink(at, Entry(entries_[at]));
    }
  }

 private:
  static constexpr std::size_t kArity = 4;

  // Moves the hole at `at` up to where `entry` belongs, and fills it.
  void rise(std::size_t at, const Entry& entry) noexcept {
    while (at > 0) {
      const std::size_t parent = (at - 1) / kArity;
      if (!(entry.key < entries_[parent].key)) break;
      entries_[at] = entries_[parent];
      at = parent;
      ++move_count_;
    }
    entries_[at] = entry;
    ++move_count_;
  }

  // Moves the hole at `at` down to where `entry` belongs, and fills it.
  void sink(std::size_t at, const Entry& entry) noexcept {
    const std::size_t count = entries_.size();
    for (std::size_t child = at * kArity + 1; child < count; child = at * kArity + 1) {
      std::size_t least = child;
      const std::size_t end = std::min(child + kArity, count);
      for (std::size_t other = child + 1; other < end; ++other) {
        if (entries_[other].key < entries_[least].key) least = other;
      }
      if (!(entries_[least].key < entry.key)) break;
      entries_[at] = entries_[least];
      at = least;
      ++move_count_;
    }
    entries_[at] = entry;
    ++move_count_;
  }

  std::vector<Entry> entries_;
  std::uint64_t move_count_ = 0;
};

}  // namespace kvspec
