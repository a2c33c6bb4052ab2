// Radix tree: which pages hold the KV of which tokens.  Spec: CACHE, RADIX.
//
// The abstract state is a trie of pages in each namespace; the tree packs a run of pages with the
// same metadata into one node.  Every resident page is in exactly one node (RADIX-5, RADIX-7):
//
//     |evictable| + |protected| == |resident|,    locks(node) >= locks(any child)
//
// A key's pages and what becomes of the caller's slots (CACHE-8):
//
//     [0 ....... resident before) [........... whole pages) [...... tokens)
//      shared or duplicate         adopted                   tail
//
// A page is the unit: `tokens` are cut to whole pages.  The tree calls nobody: evict() says which
// slots to free, and evict_undo() takes it back.  After an exception everything is as it was.
// A namespace is any byte string; the empty one always exists.
//
// Not thread-safe: one scheduler thread owns a tree.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kvspec/child_table.hpp"
#include "kvspec/leaf_heap.hpp"
#include "kvspec/page_set.hpp"
#include "kvspec/radix_node.hpp"
#include "kvspec/slots.hpp"

namespace kvspec {

class RadixTree {
 public:
  // REQUIRES: page_size >= 1 (CACHE-17); policy and granularity are known names (RADIX-14).
  RadixTree(std::int32_t page_size, std::string_view eviction_policy,
            std::string_view eviction_granularity);

  RadixTree(const RadixTree&) = delete;
  RadixTree& operator=(const RadixTree&) = delete;

  std::int32_t page_size() const noexcept { return page_size_; }

  // The longest resident prefix, made most recent and counted as a hit (RADIX-1, RADIX-3).
  // O(tokens compared), amortised, and O(log leaves) if it ends in a leaf.
  RadixMatch match(std::string_view space, std::span<const Token> tokens);
  // The same without a handle, changing nothing (RADIX-3).
  RadixMatch peek(std::string_view space, std::span<const Token> tokens) const;

  // What an insert of these tokens with these slots would do, and all the memory it needs; it
  // changes nothing that can be seen.  REQUIRES: one slot per token; whole pages of slots are
  // pages in order, none in the tree at another place, none twice (CACHE-10).  O(tokens).
  InsertPlan plan_insert(std::string_view space, std::span<const Token> tokens,
                         std::span<const std::int64_t> slots);
  // The same with pages, one for each whole page of tokens.
  InsertPlan plan_pages(std::string_view space, std::span<const Token> tokens,
                        std::vector<PageId> pages);
  // The same for the row of a request, of which [0, protected_count) is locked by `receipt`, or
  // nothing by none.  `tokens` are the committed ones, and no more than the row has slots.
  // REQUIRES: CACHE-5, CACHE-10.  O(row).
  InsertPlan plan_row(std::string_view space, std::span<const Token> tokens,
                      std::span<const std::int64_t> row, std::int64_t protected_count,
                      const RadixReceipt* receipt);
  // Carries the plan out (CACHE-9, RADIX-4).  REQUIRES: nothing else changed the tree since it was
  // made (CACHE-7).  Throws nothing else.  O(nodes on the path).
  RadixHandle commit_insert(InsertPlan plan, std::int64_t priority);

  // Locks every page of the path (CACHE-11).  REQUIRES: live handle (CACHE-13).  O(nodes on it),
  // and O(log leaves) for a leaf.
  RadixReceipt lock(const RadixHandle& handle);
  // Undoes that lock, or the oldest open one of the node; the tokens that became evictable
  // (CACHE-12).  REQUIRES: open (CACHE-13).  O(nodes on the path).
  std::int64_t unlock(const RadixReceipt& receipt);
  std::int64_t unlock(const RadixHandle& handle);
  // The tokens of the path that an open receipt of this tree covers, else nullopt.
  std::optional<std::int64_t> locked_token_count(const RadixReceipt& receipt) const;

  // Evicts at least token_count tokens or all that can be; their pages, at page size 1 in order of
  // eviction, else ascending (RADIX-8 to RADIX-11, RADIX-13).  REQUIRES: token_count >= 0
  // (RADIX-12).  O(log n) a leaf, and a sort of the pages unless they are slots.  The victims'
  // memory is kept until evict_commit() or the next change.
  std::vector<PageId> evict(std::int64_t token_count);
  void evict_commit() noexcept;
  // Takes the last evict() back.  REQUIRES: nothing changed the tree since.  O(victims).
  void evict_undo() noexcept;

  // The slots of a live handle's path; none if it is stale.  O(tokens of the path).
  Slots path_slots(const RadixHandle& handle) const;
  // All resident slots, ascending.  O(tokens).
  Slots resident_slots() const;
  // Forgets every page; every handle becomes stale (CACHE-15).  REQUIRES: no open receipt
  // (CACHE-16).
  void reset();
  void require_no_receipt() const;

  // The path a handle names, nullopt if it is stale (CACHE-14).  O(tokens of the path).
  std::optional<RadixPath> resolve(const RadixHandle& handle) const;

  std::int64_t evictable_token_count() const noexcept { return evictable_pages_ * page_size_; }
  std::int64_t protected_token_count() const noexcept { return protected_pages_ * page_size_; }

  // The abstract state, ordered by path.  O(pages * depth).
  std::vector<RadixPage> pages() const;
  std::vector<RadixPath> open_receipts() const;
  // RADIX-17.  O(tokens).
  std::uint64_t digest() const;
  // Throws ContractError naming RADIX-5, RADIX-6 or RADIX-7 if the books break it.  O(tokens).
  void check() const;
  RadixCounters counters() const noexcept;

 private:
  friend struct RadixTreeTestAccess;  // tests of check() break the books on purpose
  using Node = RadixNode;
  using NodeIndex = std::uint32_t;

  RadixWalk walk(NodeIndex root, std::span<const Token> tokens) const;
  NodeIndex find_child(NodeIndex parent, std::uint32_t hash, const Token* page) const;
  std::uint32_t hash_page(NodeIndex parent, const Token* page) const noexcept;
  NodeIndex find_root(std::string_view space) const;
  bool is_current(const RadixHandle& handle) const noexcept;
  bool is_open(const RadixReceipt& receipt) const noexcept;
  RadixHandle handle_of(NodeIndex node, std::string space) const noexcept;
  Slots matched_slots(const RadixWalk& at) const;
  void copy_pages(const RadixWalk& at, std::span<PageId> out) const noexcept;

  void reserve(std::size_t node_count);
  NodeIndex take_node(NodeIndex parent) noexcept;
  NodeIndex make_leaf(NodeIndex parent, RadixBuffer run) noexcept;
  NodeIndex make_root(RadixSpaces::node_type name) noexcept;
  void release_node(NodeIndex node) noexcept;
  void release_root_if_unused(NodeIndex root) noexcept;
  RadixBuffer copy_front(const Node& node, std::uint32_t page_count) const;
  NodeIndex split(NodeIndex node, RadixBuffer upper) noexcept;
  void shrink(Node& node) const noexcept;
  void touch(NodeIndex end, std::int64_t added_hits, std::int64_t least_priority) noexcept;
  InsertPlan compare(const RadixWalk& at, std::vector<PageId> pages, std::size_t token_count) const;
  std::optional<RadixConflict> find_conflict(const InsertPlan& plan);
  [[noreturn]] static void refuse_conflict(const RadixConflict& conflict);
  void require_lock(const InsertPlan& plan, const RadixWalk& at, std::int64_t protected_count,
                    const RadixReceipt* receipt) const;
  void prepare(InsertPlan& plan, const RadixWalk& at, std::string_view space,
               std::span<const Token> tokens);

  std::uint32_t open_receipt(NodeIndex node) noexcept;
  std::int64_t close_receipt(std::uint32_t slot) noexcept;
  std::int64_t add_lock(NodeIndex node) noexcept;
  std::int64_t remove_lock(NodeIndex node) noexcept;

  LeafKey key_of(const Node& node) const noexcept;
  void requeue(NodeIndex index) noexcept;
  void take(NodeIndex victim, std::uint32_t page_count, std::vector<PageId>& evicted);
  void prefetch_victims() const noexcept;

  bool is_live(const Node& node) const noexcept { return node.incarnation != 0; }
  bool is_root(const Node& node) const noexcept { return node.space != nullptr; }
  bool is_evictable_leaf(const Node& node) const noexcept {
    return node.child_count == 0 && node.lock_count == 0 && !is_root(node);
  }
  std::span<const Token> tokens_of(const Node& node) const noexcept;
  std::span<const PageId> pages_of_node(const Node& node) const noexcept;
  std::vector<NodeIndex> path_to(NodeIndex node) const;
  RadixPath path_of(NodeIndex node) const;
  std::vector<NodeIndex> resident_nodes() const;
  std::vector<NodeIndex> locked_nodes() const;  // one per open receipt, oldest first
  RadixRanks ranks() const;
  std::vector<std::uint64_t> end_hashes() const;
  void check_links() const;
  void check_pages() const;
  void check_locks() const;
  void check_sizes() const;

  std::int32_t page_size_;
  EvictionPolicy policy_ = EvictionPolicy::lru;
  bool whole_nodes_ = false;            // eviction granularity "node": a node's end is a cut
  std::shared_ptr<const char> self_;    // what a handle or receipt of this tree points to
  std::uint64_t epoch_ = 1;             // resets so far, plus one
  std::uint64_t version_ = 0;           // changes of structure so far
  std::uint64_t tick_ = 0;
  std::uint64_t incarnation_count_ = 0;
  std::vector<Node> nodes_;             // [0] is the root of the empty namespace
  NodeIndex free_node_ = kNone;         // of those linked through parent
  std::size_t free_node_count_ = 0;
  RadixSpaces spaces_;                  // roots by namespace; those in use, and the empty one
  ChildTable children_;                 // every resident node, by parent and first page
  LeafHeap leaves_;                     // every evictable leaf, and no other node
  PageSet resident_;
  std::vector<RadixLock> receipts_;
  std::uint32_t free_receipt_ = kNone;
  std::size_t open_receipt_count_ = 0;
  std::uint64_t receipt_count_ = 0;     // ever
  std::vector<RadixVictim> victims_;    // of the last evict(), until it is committed
  std::int64_t evictable_pages_ = 0;
  std::int64_t protected_pages_ = 0;
  std::int64_t leaves_evicted_ = 0;
  mutable std::int64_t tokens_compared_ = 0;  // reading counts as well
};

}  // namespace kvspec
