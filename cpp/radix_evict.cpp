// Eviction: the policies' keys, the queue of leaves, and taking it back.
#include <algorithm>

#include "kvspec/contract.hpp"
#include "kvspec/radix_cache.hpp"

namespace kvspec {

// All pages with the same `last`, or the same `born`, lie on one path, so that no two leaves have
// equal keys and the tie-break of RADIX-13 is never needed.
LeafKey RadixTree::key_of(const Node& node) const noexcept {
  constexpr std::uint64_t kSign = std::uint64_t{1} << 63;
  switch (policy_) {
    case EvictionPolicy::lru:
      return {node.last, 0};
    case EvictionPolicy::mru:
      return {~node.last, 0};
    case EvictionPolicy::fifo:
      return {node.born, 0};
    case EvictionPolicy::filo:
      return {~node.born, 0};
    case EvictionPolicy::lfu:
      return {static_cast<std::uint64_t>(node.hits), node.last};
    case EvictionPolicy::slru:
      return {node.hits >= 1 ? 1U : 0U, node.last};
    case EvictionPolicy::priority:
      return {static_cast<std::uint64_t>(node.priority) ^ kSign, node.last};
  }
  return {};
}

// Puts the queue right after a change of the node's key, locks or children.
void RadixTree::requeue(NodeIndex index) noexcept {
  const Node& node = nodes_[index];
  if (is_evictable_leaf(node)) {
    leaves_.set(index, key_of(node));
  } else if (leaves_.contains(index)) {
    leaves_.erase(index);
  }
}

// What the next round will touch: the next victim comes first, the one after it is below it.
void RadixTree::prefetch_victims() const noexcept {
  const std::vector<LeafHeap::Entry>& entries = leaves_.entries();
  if (entries.empty()) return;
  const Node& next = nodes_[entries[0].node];
  __builtin_prefetch(next.data.get());
  children_.prefetch(next.hash);
  for (std::size_t at = 1; at < std::min<std::size_t>(5, entries.size()); ++at) {
    __builtin_prefetch(&nodes_[entries[at].node], 1);
  }
}

// Takes the last `page_count` pages from a leaf.
void RadixTree::take(NodeIndex index, std::uint32_t page_count, std::vector<PageId>& evicted) {
  Node& node = nodes_[index];
  const std::span<const PageId> pages = pages_of_node(node).last(page_count);
  victims_.push_back({index, page_count, node.incarnation});
  resident_.remove(pages);
  evictable_pages_ -= page_count;
  ++leaves_evicted_;
  if (page_count < node.page_count) {
    node.page_count -= page_count;
    node.incarnation = ++incarnation_count_;
  } else {
    leaves_.erase(index);
    prefetch_victims();
    node.incarnation = 0;
    children_.erase(node.hash, index);
    --nodes_[node.parent].child_count;
    requeue(node.parent);
  }
  if (page_size_ == 1) {
    evicted.insert(evicted.end(), pages.rbegin(), pages.rend());
  } else {  // to be sorted, so better in the order in which they were taken
    evicted.insert(evicted.end(), pages.begin(), pages.end());
  }
}

std::vector<PageId> RadixTree::evict(std::int64_t token_count) {
  if (token_count < 0) refuse("RADIX-12", "evict(" + std::to_string(token_count) + ")");
  evict_commit();
  std::int64_t wanted = token_count / page_size_ + (token_count % page_size_ != 0 ? 1 : 0);
  std::vector<PageId> evicted;
  try {
    evicted.reserve(static_cast<std::size_t>(std::min(wanted, evictable_pages_)));
    while (wanted > 0 && !leaves_.entries().empty()) {
      const NodeIndex victim = leaves_.entries().front().node;
      const std::uint32_t held = nodes_[victim].page_count;
      const std::int64_t count = whole_nodes_ ? held : std::min<std::int64_t>(wanted, held);
      take(victim, static_cast<std::uint32_t>(count), evicted);
      wanted -= count;
    }
    if (page_size_ > 1 && !std::is_sorted(evicted.begin(), evicted.end())) {
      std::sort(evicted.begin(), evicted.end());
    }
    version_ += victims_.empty() ? 0 : 1;
    return evicted;
  } catch (...) {
    evict_undo();
    throw;
  }
}

void RadixTree::evict_commit() noexcept {
  constexpr std::size_t kAhead = 8;
  for (std::size_t at = 0; at < victims_.size(); ++at) {
    if (at + kAhead < victims_.size()) __builtin_prefetch(&nodes_[victims_[at + kAhead].node], 1);
    if (at + kAhead / 2 < victims_.size()) {
      __builtin_prefetch(nodes_[victims_[at + kAhead / 2].node].data.get(), 1);
    }
    Node& node = nodes_[victims_[at].node];
    if (is_live(node)) {
      shrink(node);
      continue;
    }
    const NodeIndex parent = node.parent;
    release_node(victims_[at].node);
    if (is_root(nodes_[parent])) release_root_if_unused(parent);
  }
  victims_.clear();
}

void RadixTree::evict_undo() noexcept {
  for (; !victims_.empty(); victims_.pop_back()) {
    const RadixVictim& victim = victims_.back();
    Node& node = nodes_[victim.node];
    if (is_live(node)) {
      node.page_count += victim.page_count;
    } else {
      children_.insert(node.hash, victim.node);
      ++nodes_[node.parent].child_count;
      requeue(node.parent);
    }
    node.incarnation = victim.incarnation;
    resident_.add(pages_of_node(node).last(victim.page_count));
    evictable_pages_ += victim.page_count;
    --leaves_evicted_;
    requeue(victim.node);
    ++version_;
  }
}

}  // namespace kvspec
