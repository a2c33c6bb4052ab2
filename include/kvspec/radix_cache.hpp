// Radix tree: which pages hold the KV of which tokens.  Spec: CACHE, RADIX, SWARADIX.
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
// With windows a resident page can be without its pair, a tombstone: it still joins what is before
// and after it, and a match ends in a window of live pages.  What a key's pages become then depends
// on the pairs that the caller's have, and the tree takes those of the reach (SWARADIX-3).
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
#include "kvspec/node_heap.hpp"
#include "kvspec/page_set.hpp"
#include "kvspec/radix_node.hpp"
#include "kvspec/slots.hpp"

namespace kvspec {

class RadixTree {
 public:
  // A window of that many tokens, or none for 0.  REQUIRES: page_size >= 1 (CACHE-17); policy and
  // granularity are known names, with windows "lru" and "page" (RADIX-14); a window is not negative
  // (SWARADIX-19).
  RadixTree(std::int32_t page_size, std::string_view eviction_policy,
            std::string_view eviction_granularity, std::int64_t sliding_window_size = 0);

  RadixTree(const RadixTree&) = delete;
  RadixTree& operator=(const RadixTree&) = delete;

  std::int32_t page_size() const noexcept { return page_size_; }

  // The longest resident prefix, with windows the longest that can be used, made most recent and
  // counted as a hit (RADIX-1, RADIX-3, SWARADIX-1, SWARADIX-2).  O(tokens compared), amortised,
  // and O(log leaves) if it ends in a leaf.
  RadixMatch match(std::string_view space, std::span<const Token> tokens);
  // The same without a handle, changing nothing (RADIX-3).
  RadixMatch peek(std::string_view space, std::span<const Token> tokens) const;

  // What an insert of these tokens with these slots would do, and all the memory it needs; it
  // changes nothing that can be seen; with windows add_pairs() must follow.  REQUIRES: one slot per
  // token; whole pages of slots are pages in order, none in the tree at another place, none twice
  // (CACHE-10).  O(tokens).
  InsertPlan plan_insert(std::string_view space, std::span<const Token> tokens,
                         std::span<const std::int64_t> slots);
  // The same with pages, one for each whole page of tokens.
  InsertPlan plan_pages(std::string_view space, std::span<const Token> tokens,
                        std::vector<PageId> pages);
  // The same for the row of a request, of which [0, protected_count) is locked by `receipt`, or
  // nothing by none; with `locks` for commit_row().  `tokens` are the committed ones, and no more
  // than the row has slots.  REQUIRES: CACHE-5, CACHE-10.  O(row).
  InsertPlan plan_row(std::string_view space, std::span<const Token> tokens,
                      std::span<const std::int64_t> row, std::int64_t protected_count,
                      const RadixReceipt* receipt, bool locks);
  // With windows: completes a plan by the window slots of the key's whole pages and of the tail's
  // slots, of which those above 0 are there; none given: all are (SWARADIX-3 to SWARADIX-6).
  // REQUIRES: as many as there are, added once, and nothing changed the tree since the plan was
  // made (CACHE-7); no page beyond the reach is in the tree (CACHE-5, CACHE-10).  O(pages of the
  // key).
  void add_pairs(InsertPlan& plan, std::span<const std::int64_t> pairs);
  // Carries the plan out (CACHE-9, RADIX-4).  REQUIRES: nothing else changed the tree since it was
  // made, and it is complete (CACHE-7).  Throws nothing else.  O(nodes on the path).
  RadixHandle commit_insert(InsertPlan plan, std::int64_t priority);
  // The same for a row, with a lock on what it reaches, of which the window is not asked for
  // (CACHE-2).  REQUIRES: besides, a plan of plan_row() that `locks`.  O(nodes on the path).
  RadixReceipt commit_row(InsertPlan plan);

  // Locks every page of the path, and a window at its end (CACHE-11, SWARADIX-9).  REQUIRES: live
  // handle (CACHE-13), of a path that a match would give all of (SWARADIX-11).  O(nodes on it), and
  // O(log nodes) for each of the window and for a leaf.
  RadixReceipt lock(const RadixHandle& handle);
  // Undoes that lock, or the oldest open one of the node; the tokens that became evictable
  // (CACHE-12).  REQUIRES: open (CACHE-13).  O(nodes on the path).
  std::int64_t unlock(const RadixReceipt& receipt);
  std::int64_t unlock(const RadixHandle& handle);
  // The tokens of the path that an open receipt of this tree covers, else nullopt.
  std::optional<std::int64_t> locked_token_count(const RadixReceipt& receipt) const;

  // Evicts at least token_count tokens or all that can be, and with windows then pairs until those
  // of swa_token_count tokens have gone; pages are at page size 1 in order of eviction, else
  // ascending (RADIX-8 to RADIX-11, RADIX-13, SWARADIX-12 to SWARADIX-16).  REQUIRES: neither is
  // negative (RADIX-12, SWARADIX-17).  O(log n) a leaf or run of tombstones, amortised with windows
  // (SWARADIX-20), and a sort of the pages unless they are slots.  The victims' memory is kept
  // until evict_commit() or the next change.
  RadixEviction evict(std::int64_t token_count, std::int64_t swa_token_count = 0);
  void evict_commit() noexcept;
  // Takes the last evict() back.  REQUIRES: nothing changed the tree since.  O(victims).
  void evict_undo() noexcept;

  // The slots of a live handle's path; none if it is stale.  O(tokens of the path).
  Slots path_slots(const RadixHandle& handle) const;
  // All resident slots, ascending.  O(tokens).
  Slots resident_slots() const;
  // All live pages, or all tombstones.  O(pages).
  std::vector<PageId> resident_pages(bool tombstones) const;
  // Forgets every page; every handle becomes stale (CACHE-15).  REQUIRES: no open receipt
  // (CACHE-16).
  void reset();
  void require_no_receipt() const;

  // The path a handle names, nullopt if it is stale (CACHE-14).  O(tokens of the path).
  std::optional<RadixPath> resolve(const RadixHandle& handle) const;

  std::int64_t evictable_token_count() const noexcept { return evictable_pages_ * page_size_; }
  std::int64_t protected_token_count() const noexcept { return protected_pages_ * page_size_; }
  // Of live pages, without and with a window lock; 0 without windows (SWARADIX-10).
  std::int64_t swa_evictable_token_count() const noexcept {
    return swa_evictable_pages_ * page_size_;
  }
  std::int64_t swa_protected_token_count() const noexcept {
    return swa_protected_pages_ * page_size_;
  }

  // The abstract state, ordered by path.  O(pages * depth).
  std::vector<RadixPage> pages() const;
  std::vector<RadixPath> open_receipts() const;
  // RADIX-17.  O(tokens).
  std::uint64_t digest() const;
  // Throws ContractError naming RADIX-5, RADIX-6 or RADIX-7 if the books break it, with windows
  // instead of the last SWARADIX-7, SWARADIX-9 or SWARADIX-10.  O(tokens).
  void check() const;
  RadixCounters counters() const noexcept;

 private:
  friend struct RadixTreeTestAccess;  // tests of check() break the books on purpose
  using Node = RadixNode;
  using NodeIndex = std::uint32_t;

  RadixWalk find(std::string_view space, std::span<const Token> tokens) const;
  RadixWalk walk(NodeIndex root, std::span<const Token> tokens) const;
  RadixWalk usable_end(RadixWalk at) const noexcept;
  bool ends_in_window(NodeIndex end) const noexcept;
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
  NodeIndex make_leaf(NodeIndex parent, RadixRun run) noexcept;
  NodeIndex make_root(RadixSpaces::node_type name) noexcept;
  void release_node(NodeIndex node) noexcept;
  void release_root_if_unused(NodeIndex root) noexcept;
  RadixBuffer copy_run(const Node& node, std::size_t first, std::size_t page_count) const;
  NodeIndex split(NodeIndex node, RadixBuffer upper) noexcept;
  void shrink(Node& node) const noexcept;
  void touch(NodeIndex end, std::int64_t added_hits, std::int64_t least_priority) noexcept;
  InsertPlan compare(const RadixWalk& at, std::vector<PageId> pages, std::size_t token_count) const;
  void sort_slots(InsertPlan& plan) const;
  std::optional<RadixConflict> find_conflict(const InsertPlan& plan);
  [[noreturn]] static void refuse_conflict(const RadixConflict& conflict);
  void require_lock(const InsertPlan& plan, const RadixWalk& at, std::int64_t protected_count,
                    const RadixReceipt* receipt) const;
  void prepare(InsertPlan& plan, const RadixWalk& at, std::string_view space,
               std::span<const Token> tokens);
  void complete(InsertPlan& plan);
  void require_unchanged(const InsertPlan& plan) const;
  NodeIndex carry_out(InsertPlan& plan, std::int64_t priority);

  bool has_windows() const noexcept { return window_pages_ > 0; }
  RadixFlags live_after(InsertPlan& plan, std::span<const NodeIndex> path,
                        const RadixFlags& brought) const;
  void clip(InsertPlan& plan, const RadixFlags& live) const;
  void sort_pairs(InsertPlan& plan, RadixFlags brought) const;
  void cut_path(InsertPlan& plan, std::span<const NodeIndex> path, const RadixFlags& live,
                std::size_t boundary) const;
  void cut_added(InsertPlan& plan, const RadixFlags& live, std::size_t boundary) const;
  void cut_window(NodeIndex end);
  void change_window_lock(NodeIndex end, int change) noexcept;
  void set_dead_count(NodeIndex index, std::uint32_t dead_count) noexcept;
  std::int64_t& swa_pages_like(const Node& node) noexcept;
  NodeKey window_key(const Node& node) const noexcept;
  void requeue_window(NodeIndex index) noexcept;
  NodeIndex next_window() noexcept;

  RadixReceipt take_lock(RadixHandle&& handle, NodeIndex node) noexcept;
  std::uint32_t open_receipt(NodeIndex node) noexcept;
  std::int64_t close_receipt(std::uint32_t slot) noexcept;
  std::int64_t add_lock(NodeIndex node) noexcept;
  std::int64_t remove_lock(NodeIndex node) noexcept;

  NodeKey key_of(const Node& node) const noexcept;
  void requeue(NodeIndex index) noexcept;
  std::int64_t page_count_of(std::int64_t token_count) const noexcept;
  void evict_leaves(std::int64_t wanted, RadixEviction& done);
  void evict_pairs(std::int64_t wanted, RadixEviction& done);
  void take_leaf(NodeIndex victim, std::uint32_t page_count, RadixEviction& done);
  void take(NodeIndex victim, std::uint32_t page_count, RadixEviction& done);
  void bury(NodeIndex victim, std::uint32_t page_count, RadixEviction& done);
  void list_tombstones(RadixEviction& done) const;
  void prefetch_victims() const noexcept;

  bool is_live(const Node& node) const noexcept { return node.incarnation != 0; }
  bool is_root(const Node& node) const noexcept { return node.space != nullptr; }
  bool is_evictable_leaf(const Node& node) const noexcept {
    return node.child_count == 0 && node.lock_count == 0 && !is_root(node);
  }
  bool is_tombstone_run(const Node& node) const noexcept {
    return node.page_count > 0 && node.dead_count == node.page_count;
  }
  bool has_evictable_pairs(const Node& node) const noexcept {
    return node.dead_count < node.page_count && node.swa_lock_count == 0;
  }
  std::span<const Token> tokens_of(const Node& node) const noexcept;
  std::span<const PageId> pages_of_node(const Node& node) const noexcept;
  std::int64_t path_page_count(NodeIndex end) const noexcept {
    return std::int64_t{nodes_[end].depth} + nodes_[end].page_count;
  }
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
  void check_windows() const;
  void check_window_locks() const;
  void check_window_sizes() const;

  std::int32_t page_size_;
  EvictionPolicy policy_ = EvictionPolicy::lru;
  bool whole_nodes_ = false;            // eviction granularity "node": a node's end is a cut
  std::int64_t window_pages_ = 0;       // of one window; 0: there are none
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
  NodeHeap leaves_;                     // every evictable leaf, and no other node
  NodeHeap windows_;                    // every node with evictable pairs; keys may lag behind
  PageSet resident_;
  std::vector<RadixLock> receipts_;
  std::uint32_t free_receipt_ = kNone;
  std::size_t open_receipt_count_ = 0;
  std::uint64_t receipt_count_ = 0;     // ever
  std::vector<RadixVictim> victims_;    // of the last evict(), until it is committed
  std::int64_t evictable_pages_ = 0;
  std::int64_t protected_pages_ = 0;
  std::int64_t swa_evictable_pages_ = 0;  // live ones; 0 without windows
  std::int64_t swa_protected_pages_ = 0;
  std::int64_t leaves_evicted_ = 0;
  mutable std::int64_t tokens_compared_ = 0;  // reading counts as well
};

}  // namespace kvspec
