// Nodes of a tree, smallest key first: a 4-ary heap that knows where each node is.  Spec:
// RADIX-13, RADIX-15, SWARADIX-14.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kvspec/child_table.hpp"

namespace kvspec {

// What an eviction orders by; no two nodes of one heap have equal keys (RADIX-13, SWARADIX-14).
struct NodeKey {
  std::uint64_t major = 0;
  std::uint64_t minor = 0;

  friend bool operator==(const NodeKey&, const NodeKey&) = default;
  friend bool operator<(const NodeKey& one, const NodeKey& other) noexcept {
    return one.major < other.major || (one.major == other.major && one.minor < other.minor);
  }
};

class NodeHeap {
 public:
  struct Entry {
    NodeKey key;
    std::uint32_t node;
  };

  // The entry with the smallest key first; the rest in heap order.
  const std::vector<Entry>& entries() const noexcept { return entries_; }
  // Entries moved by all operations so far.
  std::uint64_t move_count() const noexcept { return move_count_; }

  // Room for the nodes [0, count).  Amortised O(1) each.
  void reserve(std::size_t count) {
    if (count <= places_.size()) return;
    entries_.reserve(count);
    places_.resize(count, kNone);
  }

  bool contains(std::uint32_t node) const noexcept { return places_[node] != kNone; }

  // Adds a node or gives it another key.  REQUIRES: reserve().  O(log n).
  void set(std::uint32_t node, const NodeKey& key) noexcept {
    if (!contains(node)) {
      entries_.push_back({key, node});
      rise(entries_.size() - 1, {key, node});
    } else if (key < entries_[places_[node]].key) {
      rise(places_[node], {key, node});
    } else {
      sink(places_[node], {key, node});
    }
  }

  // REQUIRES: contains(node).  O(log n).
  void erase(std::uint32_t node) noexcept {
    const std::uint32_t hole = places_[node];
    const Entry last = entries_.back();
    entries_.pop_back();
    places_[node] = kNone;
    if (last.node == node) return;
    const bool smaller = hole > 0 && last.key < entries_[(hole - 1) / kArity].key;
    smaller ? rise(hole, last) : sink(hole, last);
  }

  void clear() noexcept {
    entries_.clear();
    std::fill(places_.begin(), places_.end(), kNone);
  }

  // Whether keys and places are in order.  O(n).
  bool is_sound() const noexcept {
    for (std::size_t at = 0; at < entries_.size(); ++at) {
      if (entries_[at].node >= places_.size() || places_[entries_[at].node] != at) return false;
      if (at > 0 && entries_[at].key < entries_[(at - 1) / kArity].key) return false;
    }
    return true;
  }

 private:
  static constexpr std::size_t kArity = 4;

  void put(std::size_t at, const Entry& entry) noexcept {
    entries_[at] = entry;
    places_[entry.node] = static_cast<std::uint32_t>(at);
    ++move_count_;
  }

  // Moves the hole at `at` up to where `entry` belongs, and fills it.
  void rise(std::size_t at, const Entry& entry) noexcept {
    while (at > 0) {
      const std::size_t parent = (at - 1) / kArity;
      if (!(entry.key < entries_[parent].key)) break;
      put(at, entries_[parent]);
      at = parent;
    }
    put(at, entry);
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
      put(at, entries_[least]);
      at = least;
    }
    put(at, entry);
  }

  std::vector<Entry> entries_;
  std::vector<std::uint32_t> places_;  // by node: where its entry is, or kNone
  std::uint64_t move_count_ = 0;
};

}  // namespace kvspec
