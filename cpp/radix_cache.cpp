// Match, nodes, locks and handles.  Beside it: radix_insert.cpp, radix_evict.cpp, radix_window.cpp,
// and for what only reads, radix_view.cpp.
#include "kvspec/radix_cache.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <new>

#include "kvspec/contract.hpp"
#include "radix_parts.hpp"

namespace kvspec {
namespace {

constexpr std::array<std::string_view, 7> kPolicies = {"lru",  "lfu",  "fifo",    "mru",
                                                       "filo", "slru", "priority"};

// Less than any other.
constexpr std::int64_t kNoPriority = std::numeric_limits<std::int64_t>::min();

// How many tokens two runs have in common from their start.
std::size_t common_count(const Token* one, const Token* other, std::size_t count) noexcept {
  constexpr std::size_t kBlock = 1024;
  std::size_t equal = 0;
  std::size_t step = 0;
  for (; equal < count; equal += step) {
    step = std::min(kBlock, count - equal);
    if (std::memcmp(one + equal, other + equal, step * sizeof(Token)) != 0) break;
  }
  if (equal == count) return count;
  const Token* differing = std::mismatch(one + equal, one + equal + step, other + equal).first;
  return static_cast<std::size_t>(differing - one);
}

}  // namespace

RadixTree::RadixTree(std::int32_t page_size, std::string_view eviction_policy,
                     std::string_view eviction_granularity, std::int64_t sliding_window_size)
    : page_size_(page_size), self_(std::make_shared<const char>()) {
  if (page_size < 1) refuse("CACHE-17", "page_size is " + std::to_string(page_size));
  const auto known = std::find(kPolicies.begin(), kPolicies.end(), eviction_policy);
  if (known == kPolicies.end()) {
    refuse("RADIX-14", "eviction_policy is '" + std::string(eviction_policy) +
                           "', not one of lru, lfu, fifo, mru, filo, slru, priority");
  }
  if (eviction_granularity != "page" && eviction_granularity != "node") {
    refuse("RADIX-14", "eviction_granularity is '" + std::string(eviction_granularity) +
                           "', not one of page, node");
  }
  policy_ = static_cast<EvictionPolicy>(known - kPolicies.begin());
  whole_nodes_ = eviction_granularity == "node";
  if (sliding_window_size < 0) {
    refuse("SWARADIX-19", "sliding_window_size is " + std::to_string(sliding_window_size));
  }
  window_pages_ = page_count_of(sliding_window_size);
  if (has_windows() && (policy_ != EvictionPolicy::lru || whole_nodes_)) {
    refuse("RADIX-14", "a tree with windows evicts by lru and page");
  }
  reserve(1);
  make_root(make_name(""));
}

// ---- match ----

RadixMatch RadixTree::match(std::string_view space, std::span<const Token> tokens) {
  evict_commit();
  const RadixWalk at = find(space, tokens);
  if (at.page_count == 0) return {Slots(0), handle_of(kNone, std::string(space))};

  Slots slots = matched_slots(at);
  NodeIndex end = at.node;
  if (at.offset < nodes_[end].page_count) {
    reserve(1);
    end = split(end, copy_run(nodes_[end], 0, at.offset));
  }
  ++tick_;
  touch(end, 1, kNoPriority);
  return {std::move(slots), handle_of(end, {})};
}

RadixMatch RadixTree::peek(std::string_view space, std::span<const Token> tokens) const {
  return {matched_slots(find(space, tokens)), std::nullopt};
}

// What a match of these tokens covers.
RadixWalk RadixTree::find(std::string_view space, std::span<const Token> tokens) const {
  const NodeIndex root = find_root(space);
  const RadixWalk at = root == kNone ? RadixWalk{kNone, 0, 0} : walk(root, tokens);
  return has_windows() ? usable_end(at) : at;
}

Slots RadixTree::matched_slots(const RadixWalk& at) const {
  std::vector<PageId> pages(at.page_count);
  copy_pages(at, pages);
  return slots_of(pages, page_size_);
}

RadixWalk RadixTree::walk(NodeIndex root, std::span<const Token> tokens) const {
  const auto unit = static_cast<std::size_t>(page_size_);
  const std::size_t whole = tokens.size() / unit;
  RadixWalk at{root, 0, 0};
  while (at.page_count < whole) {
    const Token* key = tokens.data() + at.page_count * unit;
    const NodeIndex child = find_child(at.node, hash_page(at.node, key), key);
    tokens_compared_ += page_size_;
    if (child == kNone) break;
    const Node& node = nodes_[child];
    // The first page has just been compared.
    const std::size_t rest = std::min<std::size_t>(whole - at.page_count, node.page_count) - 1;
    const Token* held = tokens_of(node).data();
    const std::size_t common = common_count(held + unit, key + unit, rest * unit);
    tokens_compared_ += static_cast<std::int64_t>(std::min(common + 1, rest * unit));
    const std::size_t matched = 1 + common / unit;
    at = {child, static_cast<std::uint32_t>(matched), at.page_count + matched};
    if (matched < node.page_count) break;
  }
  return at;
}

std::uint32_t RadixTree::hash_page(NodeIndex parent, const Token* page) const noexcept {
  constexpr std::uint64_t kOdd = 0x9e3779b97f4a7c15U;
  std::uint64_t hash = (parent + std::uint64_t{1}) * kOdd;
  for (std::int32_t offset = 0; offset < page_size_; ++offset) {
    hash = (hash ^ static_cast<std::uint32_t>(page[offset])) * kOdd;
    hash ^= hash >> 32;
  }
  return static_cast<std::uint32_t>(hash);
}

RadixTree::NodeIndex RadixTree::find_child(NodeIndex parent, std::uint32_t hash,
                                           const Token* page) const {
  return children_.find(hash, [&](NodeIndex index) {
    const Node& node = nodes_[index];
    const auto bytes = static_cast<std::size_t>(page_size_) * sizeof(Token);
    return node.parent == parent && std::memcmp(tokens_of(node).data(), page, bytes) == 0;
  });
}

RadixTree::NodeIndex RadixTree::find_root(std::string_view space) const {
  if (space.empty()) return 0;
  const auto found = spaces_.find(space);
  return found == spaces_.end() ? kNone : found->second;
}

void RadixTree::copy_pages(const RadixWalk& at, std::span<PageId> out) const noexcept {
  std::size_t end = at.page_count;
  std::size_t count = at.offset;
  for (NodeIndex index = at.node; end > 0; index = nodes_[index].parent) {
    if (index != at.node) count = nodes_[index].page_count;
    const std::span<const PageId> pages = pages_of_node(nodes_[index]).first(count);
    end -= count;
    std::copy(pages.begin(), pages.end(), out.begin() + static_cast<std::ptrdiff_t>(end));
  }
}

void RadixTree::touch(NodeIndex end, std::int64_t added_hits,
                      std::int64_t least_priority) noexcept {
  for (NodeIndex index = end; !is_root(nodes_[index]); index = nodes_[index].parent) {
    Node& node = nodes_[index];
    node.last = tick_;
    node.hits += added_hits;
    node.priority = std::max(node.priority, least_priority);
  }
  requeue(end);
}

// ---- nodes ----

std::span<const Token> RadixTree::tokens_of(const Node& node) const noexcept {
  const auto unit = static_cast<std::size_t>(page_size_);
  return {node.data.get() + node.capacity + node.start * unit, node.page_count * unit};
}

std::span<const PageId> RadixTree::pages_of_node(const Node& node) const noexcept {
  return {node.data.get() + node.start, node.page_count};
}

void RadixTree::reserve(std::size_t node_count) {
  if (free_node_count_ < node_count) grow(nodes_, node_count - free_node_count_);
  children_.reserve(children_.count() + node_count);
  leaves_.reserve(nodes_.capacity());
  if (has_windows()) windows_.reserve(nodes_.capacity());
}

RadixTree::NodeIndex RadixTree::take_node(NodeIndex parent) noexcept {
  NodeIndex index = free_node_;
  if (index == kNone) {
    index = static_cast<NodeIndex>(nodes_.size());
    nodes_.emplace_back();
  } else {
    free_node_ = nodes_[index].parent;
    --free_node_count_;
  }
  nodes_[index].parent = parent;
  nodes_[index].incarnation = ++incarnation_count_;
  ++version_;
  return index;
}

RadixTree::NodeIndex RadixTree::make_leaf(NodeIndex parent, RadixRun run) noexcept {
  const NodeIndex index = take_node(parent);
  Node& node = nodes_[index];
  node.data = std::move(run.buffer.data);
  node.capacity = node.page_count = run.buffer.page_count;
  node.dead_count = run.dead_count;
  node.depth = nodes_[parent].depth + nodes_[parent].page_count;
  node.last = node.born = tick_;
  node.priority = kNoPriority;
  node.hash = hash_page(parent, tokens_of(node).data());
  children_.insert(node.hash, index);
  resident_.add(pages_of_node(node));
  ++nodes_[parent].child_count;
  requeue(parent);
  evictable_pages_ += node.page_count;
  if (has_windows()) {
    swa_evictable_pages_ += node.page_count - node.dead_count;
    requeue_window(index);
  }
  return index;
}

RadixTree::NodeIndex RadixTree::make_root(RadixSpaces::node_type name) noexcept {
  const NodeIndex index = take_node(kNone);
  name.mapped() = index;
  nodes_[index].space = &spaces_.insert(std::move(name)).position->first;
  return index;
}

void RadixTree::release_node(NodeIndex index) noexcept {
  nodes_[index] = Node{};
  nodes_[index].parent = free_node_;
  free_node_ = index;
  ++free_node_count_;
  ++version_;
}

void RadixTree::release_root_if_unused(NodeIndex index) noexcept {
  const Node& root = nodes_[index];
  if (index == 0 || root.child_count > 0 || root.first_receipt != kNone) return;
  spaces_.erase(spaces_.find(*root.space));
  release_node(index);
}

RadixBuffer RadixTree::copy_run(const Node& node, std::size_t first,
                                std::size_t page_count) const {
  const auto unit = static_cast<std::size_t>(page_size_);
  return make_run(pages_of_node(node).subspan(first, page_count),
                  tokens_of(node).subspan(first * unit, page_count * unit));
}

// The lower part keeps its index, so that handles and receipts stay with the path's end, and its
// memory; all metadata are those of both.
RadixTree::NodeIndex RadixTree::split(NodeIndex lower_index, RadixBuffer run) noexcept {
  const NodeIndex upper_index = take_node(nodes_[lower_index].parent);
  Node& upper = nodes_[upper_index];
  Node& lower = nodes_[lower_index];
  upper.data = std::move(run.data);
  upper.capacity = upper.page_count = run.page_count;
  upper.hash = lower.hash;
  upper.child_count = 1;
  upper.lock_count = lower.lock_count;
  upper.swa_lock_count = lower.swa_lock_count;
  upper.dead_count = std::min(lower.dead_count, run.page_count);
  upper.depth = lower.depth;
  upper.last = lower.last;
  upper.born = lower.born;
  upper.hits = lower.hits;
  upper.priority = lower.priority;
  children_.replace(upper.hash, lower_index, upper_index);
  lower.start += upper.page_count;
  lower.page_count -= upper.page_count;
  lower.dead_count -= upper.dead_count;
  lower.depth += upper.page_count;
  lower.parent = upper_index;
  lower.hash = hash_page(upper_index, tokens_of(lower).data());
  children_.insert(lower.hash, lower_index);
  shrink(lower);
  if (has_windows()) requeue_window(upper_index);
  return upper_index;
}

// Moves a node that uses less than half of its memory; without memory to move to, it stays.  What
// it costs was paid by the comparisons or evictions that made the rest useless.
void RadixTree::shrink(Node& node) const noexcept {
  if (node.page_count * std::uint64_t{2} >= node.capacity) return;
  const std::span<const PageId> pages = pages_of_node(node);
  const std::span<const Token> tokens = tokens_of(node);
  std::unique_ptr<std::int32_t[]> smaller(
      new (std::nothrow) std::int32_t[pages.size() + tokens.size()]);
  if (smaller == nullptr) return;
  std::copy(pages.begin(), pages.end(), smaller.get());
  std::copy(tokens.begin(), tokens.end(), smaller.get() + pages.size());
  node.data = std::move(smaller);
  node.start = 0;
  node.capacity = node.page_count;
}

// ---- handles and locks ----

RadixHandle RadixTree::handle_of(NodeIndex node, std::string space) const noexcept {
  return {self_, node, node == kNone ? epoch_ : nodes_[node].incarnation, std::move(space)};
}

bool RadixTree::is_current(const RadixHandle& handle) const noexcept {
  if (handle.tree != self_) return false;
  if (handle.node == kNone) return handle.incarnation == epoch_;
  return handle.node < nodes_.size() && nodes_[handle.node].incarnation == handle.incarnation;
}

RadixReceipt RadixTree::lock(const RadixHandle& handle) {
  evict_commit();
  if (!is_current(handle)) refuse("CACHE-13", "the handle is stale");
  NodeIndex node = handle.node == kNone ? find_root(handle.space) : handle.node;
  if (has_windows() && handle.node != kNone && !ends_in_window(node)) {
    refuse("SWARADIX-11", "the window of the handle's path is not live");
  }
  RadixHandle locked = handle;
  grow(receipts_, 1);
  if (node == kNone) {
    RadixSpaces::node_type name = make_name(handle.space);
    reserve(1);
    node = make_root(std::move(name));
  } else if (has_windows()) {
    cut_window(node);
  }
  return take_lock(std::move(locked), node);
}

RadixReceipt RadixTree::take_lock(RadixHandle&& handle, NodeIndex node) noexcept {
  const bool ends_below_root = has_windows() && path_page_count(node) > window_pages_;
  const std::uint32_t slot = open_receipt(node);
  return {std::move(handle), slot, ends_below_root, receipts_[slot].id, -add_lock(node)};
}

std::int64_t RadixTree::unlock(const RadixReceipt& receipt) {
  if (receipt.node.tree != self_) refuse("CACHE-13", "the receipt is of another cache");
  if (!is_open(receipt)) refuse("CACHE-13", "the receipt has been consumed");
  evict_commit();
  return close_receipt(receipt.slot);
}

std::int64_t RadixTree::unlock(const RadixHandle& handle) {
  if (!is_current(handle)) refuse("CACHE-13", "the handle is stale");
  const NodeIndex node = handle.node == kNone ? find_root(handle.space) : handle.node;
  if (node == kNone || nodes_[node].first_receipt == kNone) {
    refuse("CACHE-13", "the node has no open receipt");
  }
  evict_commit();
  return close_receipt(nodes_[node].first_receipt);
}

Slots RadixTree::path_slots(const RadixHandle& handle) const {
  if (!is_current(handle) || handle.node == kNone) return Slots(0);
  return matched_slots({handle.node, nodes_[handle.node].page_count,
                        static_cast<std::size_t>(path_page_count(handle.node))});
}

std::optional<std::int64_t> RadixTree::locked_token_count(const RadixReceipt& receipt) const {
  if (receipt.node.tree != self_ || !is_open(receipt)) return std::nullopt;
  return path_page_count(receipts_[receipt.slot].node) * page_size_;
}

bool RadixTree::is_open(const RadixReceipt& receipt) const noexcept {
  return receipt.slot < receipts_.size() && receipts_[receipt.slot].id == receipt.id;
}

std::uint32_t RadixTree::open_receipt(NodeIndex node) noexcept {
  std::uint32_t slot = free_receipt_;
  if (slot == kNone) {
    slot = static_cast<std::uint32_t>(receipts_.size());
    receipts_.push_back({});
  } else {
    free_receipt_ = receipts_[slot].next;
  }
  Node& owner = nodes_[node];
  receipts_[slot] = {++receipt_count_, node, kNone, owner.last_receipt};
  (owner.last_receipt == kNone ? owner.first_receipt : receipts_[owner.last_receipt].next) = slot;
  owner.last_receipt = slot;
  ++open_receipt_count_;
  return slot;
}

// Gives the receipt's lock back; the tokens that became evictable.
std::int64_t RadixTree::close_receipt(std::uint32_t slot) noexcept {
  RadixLock& receipt = receipts_[slot];
  const NodeIndex node = receipt.node;
  Node& owner = nodes_[node];
  const auto [id, locked, next, previous] = receipt;
  (previous == kNone ? owner.first_receipt : receipts_[previous].next) = next;
  (next == kNone ? owner.last_receipt : receipts_[next].previous) = previous;
  receipt = {0, kNone, free_receipt_, kNone};
  free_receipt_ = slot;
  --open_receipt_count_;
  if (is_root(owner)) {
    release_root_if_unused(node);
    return 0;
  }
  return remove_lock(node);
}

std::int64_t RadixTree::add_lock(NodeIndex end) noexcept {
  std::int64_t page_count = 0;
  for (NodeIndex index = end; !is_root(nodes_[index]); index = nodes_[index].parent) {
    if (nodes_[index].lock_count++ == 0) page_count += nodes_[index].page_count;
  }
  evictable_pages_ -= page_count;
  protected_pages_ += page_count;
  if (has_windows()) change_window_lock(end, 1);
  requeue(end);
  return page_count * page_size_;
}

std::int64_t RadixTree::remove_lock(NodeIndex end) noexcept {
  std::int64_t page_count = 0;
  for (NodeIndex index = end; !is_root(nodes_[index]); index = nodes_[index].parent) {
    if (--nodes_[index].lock_count == 0) page_count += nodes_[index].page_count;
  }
  evictable_pages_ += page_count;
  protected_pages_ -= page_count;
  if (has_windows()) change_window_lock(end, -1);
  requeue(end);
  return page_count * page_size_;
}

// ---- reset ----

void RadixTree::require_no_receipt() const {
  if (open_receipt_count_ == 0) return;
  refuse("CACHE-16", std::to_string(open_receipt_count_) + " receipts are open");
}

void RadixTree::reset() {
  require_no_receipt();
  victims_.clear();
  nodes_.clear();
  free_node_ = kNone;
  free_node_count_ = 0;
  children_.clear();
  leaves_.clear();
  windows_.clear();
  resident_.clear();
  receipts_.clear();
  free_receipt_ = kNone;
  evictable_pages_ = 0;
  protected_pages_ = 0;
  swa_evictable_pages_ = 0;
  swa_protected_pages_ = 0;
  ++epoch_;
  RadixSpaces::node_type empty = spaces_.extract(spaces_.find(""));
  spaces_.clear();
  make_root(std::move(empty));
}

}  // namespace kvspec
