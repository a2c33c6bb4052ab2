// What only reads a radix tree: paths, the abstract state, its digest, and the check of the books.
#include <algorithm>
#include <tuple>

#include "kvspec/contract.hpp"
#include "kvspec/digest.hpp"
#include "kvspec/radix_cache.hpp"

namespace kvspec {
namespace {

// The distinct values, ascending: the rank of one is its position.
std::vector<std::uint64_t> distinct(std::vector<std::uint64_t> values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  return values;
}

std::uint64_t rank_of(std::uint64_t value, const std::vector<std::uint64_t>& ascending) {
  const auto found = std::lower_bound(ascending.begin(), ascending.end(), value);
  return static_cast<std::uint64_t>(found - ascending.begin());
}

std::uint64_t hash_space(const std::string& space) {
  std::uint64_t hash = mix(kDigestStart, space.size());
  for (const char byte : space) hash = mix(hash, static_cast<unsigned char>(byte));
  return hash;
}

[[noreturn]] void broken(std::string_view clause, std::uint32_t node, const std::string& what) {
  refuse(clause, "node " + std::to_string(node) + " " + what);
}

}  // namespace

// The nodes from below the root to `end`.
std::vector<RadixTree::NodeIndex> RadixTree::path_to(NodeIndex end) const {
  std::vector<NodeIndex> path;
  for (NodeIndex index = end; !is_root(nodes_[index]); index = nodes_[index].parent) {
    path.push_back(index);
  }
  std::reverse(path.begin(), path.end());
  return path;
}

RadixPath RadixTree::path_of(NodeIndex end) const {
  RadixPath path;
  for (const NodeIndex index : path_to(end)) {
    const std::span<const Token> tokens = tokens_of(nodes_[index]);
    path.tokens.insert(path.tokens.end(), tokens.begin(), tokens.end());
  }
  NodeIndex root = end;
  while (!is_root(nodes_[root])) root = nodes_[root].parent;
  path.space = *nodes_[root].space;
  return path;
}

std::optional<RadixPath> RadixTree::resolve(const RadixHandle& handle) const {
  if (!is_current(handle)) return std::nullopt;
  if (handle.node == kNone) return RadixPath{handle.space, {}};
  return path_of(handle.node);
}

Slots RadixTree::resident_slots() const {
  return slots_of(resident_.sorted(), page_size_);
}

std::vector<PageId> RadixTree::resident_pages(bool tombstones) const {
  std::vector<PageId> found;
  for (const NodeIndex index : resident_nodes()) {
    const std::span<const PageId> pages = pages_of_node(nodes_[index]);
    const std::size_t dead_count = nodes_[index].dead_count;
    const auto chosen = tombstones ? pages.first(dead_count) : pages.subspan(dead_count);
    found.insert(found.end(), chosen.begin(), chosen.end());
  }
  return found;
}

RadixCounters RadixTree::counters() const noexcept {
  const auto moves = static_cast<std::int64_t>(leaves_.move_count() + windows_.move_count());
  return {tokens_compared_, moves, leaves_evicted_};
}

std::vector<RadixTree::NodeIndex> RadixTree::resident_nodes() const {
  std::vector<NodeIndex> resident;
  for (NodeIndex index = 0; index < nodes_.size(); ++index) {
    if (is_live(nodes_[index]) && !is_root(nodes_[index])) resident.push_back(index);
  }
  return resident;
}

RadixRanks RadixTree::ranks() const {
  RadixRanks ranks;
  for (const NodeIndex index : resident_nodes()) {
    ranks.last.push_back(nodes_[index].last);
    ranks.born.push_back(nodes_[index].born);
  }
  return {distinct(std::move(ranks.last)), distinct(std::move(ranks.born))};
}

std::vector<RadixPage> RadixTree::pages() const {
  const RadixRanks ranks = this->ranks();
  std::vector<RadixPage> all;
  for (const NodeIndex index : resident_nodes()) {
    const Node& node = nodes_[index];
    const std::uint64_t last = rank_of(node.last, ranks.last);
    const std::uint64_t born = rank_of(node.born, ranks.born);
    RadixPath path = path_of(node.parent);
    const std::span<const PageId> pages = pages_of_node(node);
    for (std::size_t at = 0; at < pages.size(); ++at) {
      const auto unit = static_cast<std::size_t>(page_size_);
      const std::span<const Token> tokens = tokens_of(node).subspan(at * unit, unit);
      path.tokens.insert(path.tokens.end(), tokens.begin(), tokens.end());
      const bool cut = whole_nodes_ && at + 1 == pages.size();
      all.push_back({path, pages[at], node.lock_count, last, born, node.hits, node.priority, cut,
                     at < node.dead_count, node.swa_lock_count});
    }
  }
  std::sort(all.begin(), all.end(), [](const RadixPage& one, const RadixPage& other) {
    const RadixPath& left = one.path;
    const RadixPath& right = other.path;
    return std::tie(left.space, left.tokens) < std::tie(right.space, right.tokens);
  });
  return all;
}

std::vector<RadixTree::NodeIndex> RadixTree::locked_nodes() const {
  std::vector<std::pair<std::uint64_t, NodeIndex>> open;
  for (const RadixLock& receipt : receipts_) {
    if (receipt.id != 0) open.emplace_back(receipt.id, receipt.node);
  }
  std::sort(open.begin(), open.end());
  std::vector<NodeIndex> nodes;
  for (const auto& [id, node] : open) nodes.push_back(node);
  return nodes;
}

std::vector<RadixPath> RadixTree::open_receipts() const {
  std::vector<RadixPath> paths;
  for (const NodeIndex node : locked_nodes()) paths.push_back(path_of(node));
  return paths;
}

// The hash of the path to the end of each node; every node's is made once, after its parent's.
std::vector<std::uint64_t> RadixTree::end_hashes() const {
  std::vector<std::uint64_t> hashes(nodes_.size(), 0);
  std::vector<bool> known(nodes_.size(), false);
  std::vector<NodeIndex> waiting;
  for (NodeIndex end = 0; end < nodes_.size(); ++end) {
    if (!is_live(nodes_[end])) continue;
    for (NodeIndex index = end; !known[index]; index = nodes_[index].parent) {
      waiting.push_back(index);
      if (is_root(nodes_[index])) break;
    }
    for (; !waiting.empty(); waiting.pop_back()) {
      const NodeIndex index = waiting.back();
      const Node& node = nodes_[index];
      hashes[index] = is_root(node) ? hash_space(*node.space)
                                    : mix_all(hashes[node.parent], tokens_of(node));
      known[index] = true;
    }
  }
  return hashes;
}

std::uint64_t RadixTree::digest() const {
  const RadixRanks ranks = this->ranks();
  const std::vector<std::uint64_t> hashes = end_hashes();
  const auto unit = static_cast<std::size_t>(page_size_);
  std::uint64_t sum = 0;
  for (const NodeIndex index : resident_nodes()) {
    const Node& node = nodes_[index];
    const std::uint64_t last = rank_of(node.last, ranks.last);
    const std::uint64_t born = rank_of(node.born, ranks.born);
    std::uint64_t path = hashes[node.parent];
    for (std::uint32_t at = 0; at < node.page_count; ++at) {
      path = mix_all(path, tokens_of(node).subspan(at * unit, unit));
      std::uint64_t page = mix(mix(path, last), born);
      page = mix(page, static_cast<std::uint64_t>(node.hits));
      page = mix(page, static_cast<std::uint64_t>(node.priority));
      page = mix(page, node.lock_count);
      page = mix(page, whole_nodes_ && at + 1 == node.page_count ? 1 : 0);
      page = mix(page, at < node.dead_count ? 1 : 0);
      sum += mix(mix(page, node.swa_lock_count), path);  // so that no two pages' sums trade places
    }
  }
  std::uint64_t receipts = mix(kDigestStart, open_receipt_count_);
  for (const NodeIndex node : locked_nodes()) receipts = mix(receipts, hashes[node]);
  return sum + receipts;
}

// ---- check ----

void RadixTree::check() const {
  check_links();
  check_pages();
  check_locks();
  check_sizes();
  if (has_windows()) check_windows();
}

// Every node hangs below a root, and its parent finds it by its first page.
void RadixTree::check_links() const {
  std::vector<std::uint32_t> child_counts(nodes_.size(), 0);
  const std::vector<NodeIndex> resident = resident_nodes();
  for (const NodeIndex index : resident) {
    const Node& node = nodes_[index];
    if (node.parent >= nodes_.size() || !is_live(nodes_[node.parent])) {
      broken("RADIX-5", index, "continues a path that is not resident");
    }
    if (node.page_count == 0 || node.data == nullptr ||
        std::uint64_t{node.start} + node.page_count > node.capacity) {
      broken("RADIX-5", index, "holds pages that it does not have");
    }
    if (node.depth != path_page_count(node.parent)) {
      broken("RADIX-5", index, "is not where its path ends");
    }
    ++child_counts[node.parent];
  }
  for (const NodeIndex index : resident) {
    const Node& node = nodes_[index];
    NodeIndex up = index;
    for (std::size_t steps = 0; !is_root(nodes_[up]); up = nodes_[up].parent) {
      if (++steps > nodes_.size()) broken("RADIX-5", index, "is its own ancestor");
    }
    const std::uint32_t hash = hash_page(node.parent, tokens_of(node).data());
    if (node.hash != hash || find_child(node.parent, hash, tokens_of(node).data()) != index) {
      broken("RADIX-5", index, "is not found from the path it continues");
    }
  }
  for (NodeIndex index = 0; index < nodes_.size(); ++index) {
    if (is_live(nodes_[index]) && nodes_[index].child_count != child_counts[index]) {
      broken("RADIX-5", index, "does not have the children it counts");
    }
  }
  if (children_.count() != resident.size()) {
    refuse("RADIX-5", "a path is continued by nodes that are not resident");
  }
}

// No page is held twice, and the set of pages is what the nodes hold.
void RadixTree::check_pages() const {
  std::vector<PageId> held;
  for (const NodeIndex index : resident_nodes()) {
    const std::span<const PageId> pages = pages_of_node(nodes_[index]);
    held.insert(held.end(), pages.begin(), pages.end());
  }
  std::sort(held.begin(), held.end());
  const auto twice = std::adjacent_find(held.begin(), held.end());
  if (twice != held.end()) refuse("RADIX-5", "page " + std::to_string(*twice) + " is held twice");
  if (held != resident_.sorted()) refuse("RADIX-5", "the set of pages is not what the nodes hold");
}

void RadixTree::check_locks() const {
  std::vector<std::uint32_t> lock_counts(nodes_.size(), 0);
  const std::vector<NodeIndex> locked = locked_nodes();
  for (const NodeIndex end : locked) {
    if (end >= nodes_.size() || !is_live(nodes_[end])) {
      broken("RADIX-6", end, "is not resident, but a receipt is open");
    }
    for (const NodeIndex index : path_to(end)) ++lock_counts[index];
  }
  for (const NodeIndex index : resident_nodes()) {
    if (nodes_[index].lock_count != lock_counts[index]) {
      broken("RADIX-6", index,
             "has " + std::to_string(nodes_[index].lock_count) + " locks, but " +
                 std::to_string(lock_counts[index]) + " open receipts cover it");
    }
  }
  if (locked.size() != open_receipt_count_) refuse("RADIX-6", "open receipts are miscounted");
}

// The sizes are right, and the queue holds the evictable leaves in order.
void RadixTree::check_sizes() const {
  const std::string_view clause = has_windows() ? "SWARADIX-10" : "RADIX-7";
  std::int64_t evictable = 0;
  std::int64_t locked = 0;
  std::size_t leaf_count = 0;
  for (const NodeIndex index : resident_nodes()) {
    const Node& node = nodes_[index];
    (node.lock_count == 0 ? evictable : locked) += node.page_count;
    if (!is_evictable_leaf(node)) continue;
    ++leaf_count;
    if (!leaves_.contains(index)) broken(clause, index, "cannot be evicted");
  }
  for (const NodeHeap::Entry& entry : leaves_.entries()) {
    if (key_of(nodes_[entry.node]) != entry.key) broken(clause, entry.node, "is out of order");
  }
  if (leaves_.entries().size() != leaf_count || !leaves_.is_sound()) {
    refuse(clause, "the queue of evictable leaves is not sound");
  }
  if (evictable != evictable_pages_) {
    refuse(clause, "evictable_size() is " + std::to_string(evictable_token_count()) + ", not " +
                          std::to_string(evictable * page_size_));
  }
  if (locked != protected_pages_) {
    refuse(clause, "protected_size() is " + std::to_string(protected_token_count()) + ", not " +
                          std::to_string(locked * page_size_));
  }
}

void RadixTree::check_windows() const {
  for (const NodeIndex index : resident_nodes()) {
    const Node& node = nodes_[index];
    if (node.dead_count > node.page_count) broken("SWARADIX-10", index, "has lost what it had not");
    if (node.child_count == 0 && is_tombstone_run(node)) {
      broken("SWARADIX-7", index, "is a leaf that ends in a tombstone");
    }
  }
  check_window_locks();
  check_window_sizes();
}

void RadixTree::check_window_locks() const {
  std::vector<std::uint32_t> lock_counts(nodes_.size(), 0);
  for (const NodeIndex end : locked_nodes()) {
    std::int64_t left = std::min(window_pages_, path_page_count(end));
    for (NodeIndex index = end; left > 0; index = nodes_[index].parent) {
      ++lock_counts[index];
      left -= nodes_[index].page_count;
    }
    if (left < 0) broken("SWARADIX-9", end, "ends a window that begins inside a node");
  }
  for (const NodeIndex index : resident_nodes()) {
    if (nodes_[index].swa_lock_count != lock_counts[index]) {
      broken("SWARADIX-9", index,
             "has " + std::to_string(nodes_[index].swa_lock_count) + " window locks, but " +
                 std::to_string(lock_counts[index]) + " open receipts' windows cover it");
    }
  }
}

// The sizes are right, and the queue holds what has evictable pairs, by keys that are not ahead.
void RadixTree::check_window_sizes() const {
  std::int64_t evictable = 0;
  std::int64_t locked = 0;
  std::size_t queued = 0;
  for (const NodeIndex index : resident_nodes()) {
    const Node& node = nodes_[index];
    (node.swa_lock_count == 0 ? evictable : locked) += node.page_count - node.dead_count;
    if (!has_evictable_pairs(node)) continue;
    ++queued;
    if (!windows_.contains(index)) broken("SWARADIX-10", index, "has pairs that cannot be evicted");
  }
  for (const NodeHeap::Entry& entry : windows_.entries()) {
    if (window_key(nodes_[entry.node]) < entry.key) {
      broken("SWARADIX-10", entry.node, "is queued behind its place");
    }
  }
  if (windows_.entries().size() != queued || !windows_.is_sound()) {
    refuse("SWARADIX-10", "the queue of evictable pairs is not sound");
  }
  if (evictable != swa_evictable_pages_) {
    refuse("SWARADIX-10", "swa_evictable_size() is " + std::to_string(swa_evictable_token_count()) +
                              ", not " + std::to_string(evictable * page_size_));
  }
  if (locked != swa_protected_pages_) {
    refuse("SWARADIX-10", "swa_protected_size() is " + std::to_string(swa_protected_token_count()) +
                              ", not " + std::to_string(locked * page_size_));
  }
}

}  // namespace kvspec
