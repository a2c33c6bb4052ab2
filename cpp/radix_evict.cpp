// Eviction: the policies' keys, the queue of leaves, and taking it back.  Pairs go by the queue of
// windows, which is in radix_window.cpp.
#include <algorithm>

#include "kvspec/contract.hpp"
#include "kvspec/radix_cache.hpp"

namespace kvspec {

// All pages with the same `last`, or the same `born`, lie on one path, so that no two leaves have
// equal keys and the tie-break of RADIX-13 is never needed.
NodeKey RadixTree::key_of(const Node& node) const noexcept {
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
  const std::vector<NodeHeap::Entry>& entries = leaves_.entries();
  if (entries.empty()) return;
  const Node& next = nodes_[entries[0].node];
  __builtin_prefetch(next.data.get());
  children_.prefetch(next.hash);
  for (std::size_t at = 1; at < std::min<std::size_t>(5, entries.size()); ++at) {
    __builtin_prefetch(&nodes_[entries[at].node], 1);
  }
}

// Takes the last `page_count` pages from a leaf.
void RadixTree::take(NodeIndex index, std::uint32_t page_count, RadixEviction& done) {
  Node& node = nodes_[index];
  const std::span<const PageId> pages = pages_of_node(node).last(page_count);
  const RadixLoss loss = page_count < node.page_count ? RadixLoss::end : RadixLoss::all;
  victims_.push_back({index, page_count, node.incarnation, loss});
  resident_.remove(pages);
  evictable_pages_ -= page_count;
  ++leaves_evicted_;
  if (has_windows()) {
    const std::uint32_t live_count = std::min(page_count, node.page_count - node.dead_count);
    swa_evictable_pages_ -= live_count;
    done.pair_count += live_count;
  }
  if (loss == RadixLoss::end) {
    node.page_count -= page_count;
    node.incarnation = ++incarnation_count_;
  } else {
    leaves_.erase(index);
    prefetch_victims();
    node.incarnation = 0;
    if (has_windows()) requeue_window(index);
    children_.erase(node.hash, index);
    --nodes_[node.parent].child_count;
    requeue(node.parent);
  }
  if (page_size_ == 1) {
    done.pages.insert(done.pages.end(), pages.rbegin(), pages.rend());
  } else {  // to be sorted, so better in the order in which they were taken
    done.pages.insert(done.pages.end(), pages.begin(), pages.end());
  }
}

// Takes the last `page_count` live pages from a leaf, and with the last of them the tombstones that
// are then leaves: they are not locked, as no lock ends in one (SWARADIX-11).
void RadixTree::take_leaf(NodeIndex index, std::uint32_t page_count, RadixEviction& done) {
  const Node& leaf = nodes_[index];
  if (page_count < leaf.page_count - leaf.dead_count) return take(index, page_count, done);
  do {
    take(index, nodes_[index].page_count, done);
    index = nodes_[index].parent;
  } while (nodes_[index].child_count == 0 && is_tombstone_run(nodes_[index]));
}

// Makes tombstones of a node's first live pages.
void RadixTree::bury(NodeIndex index, std::uint32_t page_count, RadixEviction& done) {
  victims_.push_back({index, page_count, nodes_[index].incarnation, RadixLoss::pairs});
  set_dead_count(index, nodes_[index].dead_count + page_count);
  done.pair_count += page_count;
}

void RadixTree::evict_leaves(std::int64_t wanted, RadixEviction& done) {
  while (wanted > std::ssize(done.pages) && !leaves_.entries().empty()) {
    const NodeIndex victim = leaves_.entries().front().node;
    const std::uint32_t live_count = nodes_[victim].page_count - nodes_[victim].dead_count;
    const std::int64_t left = wanted - std::ssize(done.pages);
    const std::int64_t count = whole_nodes_ ? live_count : std::min<std::int64_t>(left, live_count);
    take_leaf(victim, static_cast<std::uint32_t>(count), done);
  }
}

void RadixTree::evict_pairs(std::int64_t wanted, RadixEviction& done) {
  while (wanted > done.pair_count) {
    const NodeIndex victim = next_window();
    if (victim == kNone) return;
    const Node& node = nodes_[victim];
    const std::uint32_t live_count = node.page_count - node.dead_count;
    const auto count = static_cast<std::uint32_t>(
        std::min<std::int64_t>(wanted - done.pair_count, live_count));
    const bool takes_leaf = node.child_count == 0 && count == live_count;
    takes_leaf ? take_leaf(victim, count, done) : bury(victim, count, done);
  }
}

// The pages that were made tombstones and have not left since, in that order.
void RadixTree::list_tombstones(RadixEviction& done) const {
  for (const RadixVictim& victim : victims_) {
    const Node& node = nodes_[victim.node];
    if (victim.loss != RadixLoss::pairs || !is_live(node)) continue;
    const std::size_t first = node.dead_count - victim.page_count;
    const std::span<const PageId> pages = pages_of_node(node).subspan(first, victim.page_count);
    done.tombstones.insert(done.tombstones.end(), pages.begin(), pages.end());
  }
}

std::int64_t RadixTree::page_count_of(std::int64_t token_count) const noexcept {
  return token_count / page_size_ + (token_count % page_size_ != 0 ? 1 : 0);
}

RadixEviction RadixTree::evict(std::int64_t token_count, std::int64_t swa_token_count) {
  if (token_count < 0 || swa_token_count < 0) {
    const std::string given = std::to_string(token_count);
    if (!has_windows()) refuse("RADIX-12", "evict(" + given + ")");
    refuse("SWARADIX-17", "evict(" + given + ", " + std::to_string(swa_token_count) + ")");
  }
  evict_commit();
  const std::int64_t wanted = page_count_of(token_count);
  RadixEviction done;
  try {
    done.pages.reserve(static_cast<std::size_t>(std::min(wanted, evictable_pages_)));
    evict_leaves(wanted, done);
    if (has_windows()) {
      evict_pairs(page_count_of(swa_token_count), done);
      list_tombstones(done);
    }
    for (std::vector<PageId>* pages : {&done.pages, &done.tombstones}) {
      if (page_size_ == 1 || std::is_sorted(pages->begin(), pages->end())) continue;
      std::sort(pages->begin(), pages->end());
    }
    version_ += victims_.empty() ? 0 : 1;
    return done;
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
    if (victims_[at].loss != RadixLoss::all) {
      if (is_live(node)) shrink(node);
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
    ++version_;
    if (victim.loss == RadixLoss::pairs) {
      set_dead_count(victim.node, node.dead_count - victim.page_count);
      continue;
    }
    if (victim.loss == RadixLoss::end) {
      node.page_count += victim.page_count;
    } else {
      children_.insert(node.hash, victim.node);
      ++nodes_[node.parent].child_count;
      requeue(node.parent);
    }
    node.incarnation = victim.incarnation;
    resident_.add(pages_of_node(node).last(victim.page_count));
    evictable_pages_ += victim.page_count;
    if (has_windows()) {
      swa_evictable_pages_ += std::min(victim.page_count, node.page_count - node.dead_count);
      requeue_window(victim.node);
    }
    --leaves_evicted_;
    requeue(victim.node);
  }
}

}  // namespace kvspec
