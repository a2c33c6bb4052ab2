// What a radix tree is made of and what it answers.  Spec: CACHE, RADIX, SWARADIX.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kvspec/child_table.hpp"
#include "kvspec/slots.hpp"

namespace kvspec {

using Token = std::int32_t;

// Positions [start, stop) of the caller's slots.
struct Interval {
  std::int64_t start;
  std::int64_t stop;

  friend bool operator==(const Interval&, const Interval&) = default;
};

// Names a path and the incarnation of its last page (CACHE-14).
struct RadixHandle {
  std::shared_ptr<const char> tree;
  std::uint32_t node;         // the path's end; that of an empty path names no node
  std::uint64_t incarnation;  // of the path's last page; of the whole tree for an empty path
  std::string space;          // of an empty path; otherwise the node knows

  friend bool operator==(const RadixHandle&, const RadixHandle&) = default;
};

// One lock; worth one unlock (CACHE-11, CACHE-12).
struct RadixReceipt {
  RadixHandle node;
  std::uint32_t slot;
  bool ends_below_root;  // the window lock does, where there are windows
  std::uint64_t id;
  std::int64_t delta;  // minus the tokens that it took from the evictable ones

  // Names the end of the window lock, if it has one.
  std::optional<std::uint64_t> swa_uuid() const {
    return ends_below_root ? std::optional(id) : std::nullopt;
  }
};

struct RadixMatch {
  Slots slots;
  std::optional<RadixHandle> node;
};

struct RadixPath {
  std::string space;
  std::vector<Token> tokens;
};

// One resident page, as the abstract state has it.
struct RadixPage {
  RadixPath path;
  PageId page;
  std::uint32_t locks;
  std::uint64_t last;  // rank among those of all pages, 0 the oldest
  std::uint64_t born;
  std::int64_t hits;
  std::int64_t priority;
  bool cut;
  bool tombstone;  // false without windows, as are swa_locks 0
  std::uint32_t swa_locks;
};

// What an eviction took (SWARADIX-12, SWARADIX-13).
struct RadixEviction {
  std::vector<PageId> pages;       // that left
  std::vector<PageId> tombstones;  // that it made and that stayed
  std::int64_t pair_count = 0;     // pages that have lost their pair, of either kind

  friend bool operator==(const RadixEviction&, const RadixEviction&) = default;
};

// Exact costs so far (RADIX-15).
struct RadixCounters {
  std::int64_t tokens_compared;
  std::int64_t heap_moves;
  std::int64_t leaves_evicted;
};

enum class EvictionPolicy : std::uint8_t { lru, lfu, fifo, mru, filo, slru, priority };

// ---- parts of the tree ----

// A run of pages and their tokens in one allocation: page_count page ids, then the tokens.
struct RadixBuffer {
  std::unique_ptr<std::int32_t[]> data;
  std::uint32_t page_count = 0;
};

// A run of pages of one path with the same metadata; or the root of a namespace, which has none.
// With windows the first pages of a run may be tombstones: as eviction takes those nearest to the
// root first, a node is always
//
//     [0 ........ dead_count) [dead_count ........ page_count)
//      tombstones              live
//
// What an eviction reads comes first: it fits one cache line.
struct alignas(64) RadixNode {
  std::unique_ptr<std::int32_t[]> data;  // as in RadixBuffer, for `capacity` pages
  std::uint32_t start = 0;               // first page of data that is the node's
  std::uint32_t page_count = 0;
  std::uint32_t capacity = 0;
  std::uint32_t parent = 0;        // for a free node the next free one
  std::uint32_t hash = 0;          // of the parent and the first page
  std::uint32_t child_count = 0;
  std::uint32_t lock_count = 0;
  std::uint32_t dead_count = 0;
  std::uint64_t last = 0;
  std::uint64_t incarnation = 0;   // 0: evicted or free; otherwise unique in the tree
  std::int64_t hits = 0;

  std::uint64_t born = 0;
  std::int64_t priority = 0;
  const std::string* space = nullptr;  // of a root: its name, kept in the tree's map
  std::uint32_t first_receipt = kNone;  // oldest open receipt of the node
  std::uint32_t last_receipt = kNone;
  std::uint32_t depth = 0;             // pages of the path before it
  std::uint32_t swa_lock_count = 0;    // window locks that cover it
};
static_assert(sizeof(RadixNode) == 128);

// Where a key leaves the tree: `offset` pages of `node` matched, and `page_count` in all.
struct RadixWalk {
  std::uint32_t node;  // kNone: the namespace has no root
  std::uint32_t offset;
  std::size_t page_count;
};

// A page that the tree may not take.
struct RadixConflict {
  PageId page;
  std::size_t index;
  bool twice;  // or the tree holds it at another place, or it is no page that can be held
};

// An open receipt's side of the tree, or a free place for one.
struct RadixLock {
  std::uint64_t id;  // 0 when closed; otherwise unique in the tree, ascending
  std::uint32_t node;
  std::uint32_t next;  // of the same node, or of the free ones
  std::uint32_t previous;
};

// What an eviction did to a node: trimmed its end, took all of it, or took the pairs of its first
// live pages.
enum class RadixLoss : std::uint8_t { end, all, pairs };

struct RadixVictim {
  std::uint32_t node;
  std::uint32_t page_count;
  std::uint64_t incarnation;  // before
  RadixLoss loss;
};

// A part of a node on an insert's path, from what is left of its start on.
struct RadixCut {
  std::uint32_t node;
  RadixBuffer upper;         // the part; without memory it is all that is left
  std::uint32_t dead_count;  // of the part, after the insert
};

// A run of pages that become resident.
struct RadixRun {
  RadixBuffer buffer;
  std::uint32_t dead_count;
};

// Of each page of a key 0 or 1.
using RadixFlags = std::vector<std::uint8_t>;

// What becomes of the caller's window slots, where it has one (SWARADIX-6).
struct RadixPairRanges {
  std::vector<Interval> shared;
  std::vector<Interval> adopted;
  std::vector<Interval> duplicate;
  std::vector<Interval> tail;
};

// The distinct ticks of resident pages, ascending.
struct RadixRanks {
  std::vector<std::uint64_t> last;
  std::vector<std::uint64_t> born;
};

// Roots by the name of their namespace.
using RadixSpaces = std::map<std::string, std::uint32_t, std::less<>>;

// What an insert will do.  Dropping it does nothing.  In a tree with windows it can be carried out
// once the pairs of the caller's pages have been added.
struct InsertPlan {
  std::vector<PageId> pages;     // the caller's; of a row, also those after the whole ones
  std::size_t reach = 0;         // pages of the key that will be resident
  std::vector<Interval> shared;
  std::vector<Interval> adopted;
  std::vector<Interval> duplicate;
  std::vector<Interval> tail;
  std::vector<PageId> resident;  // what the tree held along the key, page for page, in the reach
  RadixPairRanges swa;           // with windows
  std::vector<std::size_t> revived;  // positions, in pages, of tombstones that get a pair

  std::size_t token_count = 0;       // of the key
  std::vector<std::int64_t> tail_slots;  // the caller's after the whole pages; none of a row
  bool is_row = false;
  bool locks = false;                // the row is to be locked, for which there is memory
  std::string space;
  std::uint64_t version = 0;         // of the tree it was made for
  bool is_complete = false;          // with windows once the pairs have been added
  std::uint32_t node = 0;            // where the key, or its reach, leaves the tree
  std::vector<RadixCut> cuts;        // from the root on; those of `node` last
  std::vector<RadixRun> added;
  RadixSpaces::node_type new_space;  // the name of the namespace, if it has no root yet
};

}  // namespace kvspec
