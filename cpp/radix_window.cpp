// Sliding windows: the end of a match, what pairs make of an insert, window locks, and the queue of
// pairs to evict.
//
// A window lock covers the last pages of a path, as many as a window has, and begins where a node
// begins: a lock splits the node otherwise, and nodes never merge.  A path that is locked is not
// trimmed either, so an unlock finds the very same pages.
#include <algorithm>
#include <cstring>

#include "kvspec/contract.hpp"
#include "kvspec/radix_cache.hpp"
#include "radix_parts.hpp"

namespace kvspec {
namespace {

// Pages [start, stop) of a path, the first dead_count of them tombstones and the others live.
struct Part {
  std::size_t start;
  std::size_t stop;
  std::uint32_t dead_count;
};

// The end of the run of equal flags that begins at `start`.
std::size_t run_end(const RadixFlags& flags, std::size_t start, std::size_t stop) noexcept {
  const std::uint8_t* first = flags.data() + start;
  const void* other = std::memchr(first, 1 - *first, stop - start);
  if (other == nullptr) return stop;
  return start + static_cast<std::size_t>(static_cast<const std::uint8_t*>(other) - first);
}

// Cuts [start, stop) into as few parts as can be, one of which begins at `boundary` if that lies
// inside.
std::vector<Part> parts_of(const RadixFlags& live, std::size_t start, std::size_t stop,
                           std::size_t boundary) {
  std::vector<Part> parts;
  while (start < stop) {
    const std::size_t limit = start < boundary && boundary < stop ? boundary : stop;
    const std::size_t first_live = live[start] != 0 ? start : run_end(live, start, limit);
    const std::size_t end = first_live < limit ? run_end(live, first_live, limit) : limit;
    parts.push_back({start, end, static_cast<std::uint32_t>(first_live - start)});
    start = end;
  }
  return parts;
}

// Adds those of [first, last) whose flag is set, by position: each is `unit` tokens.
void add_set(std::vector<Interval>& found, const RadixFlags& flags, std::size_t first,
             std::size_t last, std::int64_t position, std::int32_t unit) {
  for (std::size_t at = first; at < last;) {
    const std::size_t end = run_end(flags, at, last);
    const auto start = position + static_cast<std::int64_t>(at - first) * unit;
    if (flags[at] != 0) append(found, start, start + static_cast<std::int64_t>(end - at) * unit);
    at = end;
  }
}

}  // namespace

// ---- match ----

// The last page on the way back that ends a window of live pages, or a run of them from the root
// (SWARADIX-1).  O(nodes).
RadixWalk RadixTree::usable_end(RadixWalk at) const noexcept {
  constexpr RadixWalk kNowhere{kNone, 0, 0};
  RadixWalk end = kNowhere;
  std::int64_t live_count = 0;  // pages from `at` to `end`
  while (at.page_count > 0) {
    const Node& node = nodes_[at.node];
    const std::uint32_t dead_count = std::min(node.dead_count, at.offset);
    if (live_count == 0) end = at;
    live_count += at.offset - dead_count;
    if (live_count >= window_pages_) return end;
    if (dead_count > 0) live_count = 0;
    at.page_count -= at.offset;
    at.node = node.parent;
    at.offset = nodes_[at.node].page_count;
  }
  return live_count > 0 ? end : kNowhere;
}

// Whether a match of the path would give all of it (SWARADIX-11).  O(nodes).
bool RadixTree::ends_in_window(NodeIndex end) const noexcept {
  const auto page_count = static_cast<std::size_t>(path_page_count(end));
  return usable_end({end, nodes_[end].page_count, page_count}).page_count == page_count;
}

// ---- insert ----

void RadixTree::add_pairs(InsertPlan& plan, std::span<const std::int64_t> pairs) {
  require_unchanged(plan);
  if (plan.is_complete) refuse("CACHE-7", "the insert is planned already");
  const std::size_t count = plan.reach + plan.tail_slots.size();
  if (!pairs.empty() && pairs.size() != count) {
    refuse("SWA-20", std::to_string(pairs.size()) + " window slots were given for " +
                         std::to_string(count) + " slots");
  }
  RadixFlags brought(count, 1);
  std::transform(pairs.begin(), pairs.end(), brought.begin(),
                 [](std::int64_t pair) { return static_cast<std::uint8_t>(pair > 0); });
  std::vector<NodeIndex> path;
  if (plan.node != kNone) path = path_to(plan.node);
  const RadixFlags live = live_after(plan, path, brought);
  clip(plan, live);
  sort_pairs(plan, std::move(brought));
  const auto window = static_cast<std::size_t>(window_pages_);
  const std::size_t boundary = plan.locks && plan.reach > window ? plan.reach - window : 0;
  cut_path(plan, path, live, boundary);
  cut_added(plan, live, boundary);
  complete(plan);
}

// Which of the key's pages will be live, and which tombstones that revives (SWARADIX-5).
RadixFlags RadixTree::live_after(InsertPlan& plan, std::span<const NodeIndex> path,
                                 const RadixFlags& brought) const {
  RadixFlags live = brought;
  const std::size_t held = plan.resident.size();
  for (const NodeIndex index : path) {
    const Node& node = nodes_[index];
    const std::size_t stop = std::min(held, std::size_t{node.depth} + node.page_count);
    const std::size_t first_live = std::min(stop, std::size_t{node.depth} + node.dead_count);
    for (std::size_t at = node.depth; at < first_live; ++at) {
      if (brought[at] != 0) plan.revived.push_back(at);
    }
    std::fill_n(live.begin() + static_cast<std::ptrdiff_t>(first_live), stop - first_live, 1);
  }
  return live;
}

// Ends the plan at the reach (SWARADIX-3).
void RadixTree::clip(InsertPlan& plan, const RadixFlags& live) const {
  const std::size_t whole = plan.reach;
  while (plan.reach > 0 && live[plan.reach - 1] == 0) --plan.reach;
  if (plan.reach == whole) return;
  for (std::size_t at = plan.reach; at < plan.resident.size(); ++at) {
    if (plan.pages[at] != plan.resident[at]) continue;
    refuse(plan.is_row ? "CACHE-5" : "CACHE-10",
           "page " + std::to_string(plan.pages[at]) + " beyond the reach is in the tree");
  }
  plan.resident.resize(std::min(plan.resident.size(), plan.reach));
  sort_slots(plan);
  if (plan.node != kNone) {
    while (nodes_[plan.node].depth >= plan.reach && !is_root(nodes_[plan.node])) {
      plan.node = nodes_[plan.node].parent;
    }
  }
  if (plan.reach == 0 && !plan.locks) plan.new_space = {};
}

// The classes of the caller's window slots (SWARADIX-6): those of the full slots, except that the
// tree has the ones that revive.
void RadixTree::sort_pairs(InsertPlan& plan, RadixFlags brought) const {
  for (const std::size_t at : plan.revived) {
    const std::int64_t start = static_cast<std::int64_t>(at) * page_size_;
    append(plan.swa.adopted, start, start + page_size_);
    brought[at] = 0;
  }
  const auto sort = [&](const std::vector<Interval>& all, std::vector<Interval>& found) {
    for (const auto& [start, stop] : all) {
      add_set(found, brought, static_cast<std::size_t>(start / page_size_),
              static_cast<std::size_t>(stop / page_size_), start, page_size_);
    }
  };
  sort(plan.shared, plan.swa.shared);
  sort(plan.adopted, plan.swa.adopted);
  sort(plan.duplicate, plan.swa.duplicate);
  const std::size_t whole = plan.token_count / static_cast<std::size_t>(page_size_);
  const auto position = [this](std::size_t page) {
    return static_cast<std::int64_t>(page) * page_size_;
  };
  add_set(plan.swa.tail, brought, plan.reach, whole, position(plan.reach), page_size_);
  add_set(plan.swa.tail, brought, whole, brought.size(), position(whole), 1);
}

// The parts that the nodes of the path will be in; those that stay as they are need no cut.
void RadixTree::cut_path(InsertPlan& plan, std::span<const NodeIndex> path, const RadixFlags& live,
                         std::size_t boundary) const {
  for (const NodeIndex index : path) {
    const Node& node = nodes_[index];
    const std::size_t start = node.depth;
    const std::size_t stop = start + node.page_count;
    const std::size_t end = std::min(stop, plan.resident.size());
    if (start >= end) return;
    const std::vector<Part> parts = parts_of(live, start, end, boundary);
    if (parts.front().stop == stop && parts.front().dead_count == node.dead_count) continue;
    for (const Part& part : parts) {
      RadixBuffer upper;
      if (part.stop < stop) upper = copy_run(node, part.start - start, part.stop - part.start);
      plan.cuts.push_back({index, std::move(upper), part.dead_count});
    }
  }
}

// The runs that the new pages will be in.
void RadixTree::cut_added(InsertPlan& plan, const RadixFlags& live, std::size_t boundary) const {
  if (plan.added.empty()) return;
  RadixRun whole = std::move(plan.added.front());
  plan.added.clear();
  const std::size_t held = plan.resident.size();
  const std::vector<Part> parts = parts_of(live, held, plan.reach, boundary);
  if (parts.size() == 1 && plan.reach - held == whole.buffer.page_count) {
    whole.dead_count = parts.front().dead_count;
    plan.added.push_back(std::move(whole));
    return;
  }
  const auto unit = static_cast<std::size_t>(page_size_);
  const std::int32_t* data = whole.buffer.data.get();
  const std::span<const PageId> pages(data, whole.buffer.page_count);
  const std::span<const Token> tokens(data + pages.size(), pages.size() * unit);
  for (const Part& part : parts) {
    const std::size_t first = part.start - held;
    const std::size_t count = part.stop - part.start;
    plan.added.push_back({make_run(pages.subspan(first, count),
                                   tokens.subspan(first * unit, count * unit)),
                          part.dead_count});
  }
}

// ---- locks ----

// Splits the node in whose middle the path's window begins, if it does.
void RadixTree::cut_window(NodeIndex end) {
  const std::int64_t start = path_page_count(end) - window_pages_;
  NodeIndex index = end;
  while (nodes_[index].depth > start && !is_root(nodes_[index])) index = nodes_[index].parent;
  const std::int64_t offset = start - nodes_[index].depth;
  if (offset <= 0) return;
  reserve(1);
  split(index, copy_run(nodes_[index], 0, static_cast<std::size_t>(offset)));
}

// Adds a window lock to the end of a path, or takes it away (SWARADIX-9).
void RadixTree::change_window_lock(NodeIndex end, int change) noexcept {
  std::int64_t left = window_pages_;
  for (NodeIndex index = end; left > 0 && !is_root(nodes_[index]); index = nodes_[index].parent) {
    Node& node = nodes_[index];
    const std::uint32_t live_count = node.page_count - node.dead_count;
    left -= node.page_count;
    swa_pages_like(node) -= live_count;
    node.swa_lock_count += static_cast<std::uint32_t>(change);
    swa_pages_like(node) += live_count;
    requeue_window(index);
  }
}

// ---- the queue of windows ----

std::int64_t& RadixTree::swa_pages_like(const Node& node) noexcept {
  return node.swa_lock_count == 0 ? swa_evictable_pages_ : swa_protected_pages_;
}

void RadixTree::set_dead_count(NodeIndex index, std::uint32_t dead_count) noexcept {
  Node& node = nodes_[index];
  swa_pages_like(node) += std::int64_t{node.dead_count} - dead_count;
  node.dead_count = dead_count;
  requeue_window(index);
}

// Walked longest ago first, and of what was walked at once, which lies on one path, the one nearest
// to the root (SWARADIX-14).
NodeKey RadixTree::window_key(const Node& node) const noexcept {
  return {node.last, node.depth};
}

// Puts the queue right after a change of the node's tombstones or window locks.  A key that only
// grows, by a walk or a split, stays as it is queued.
void RadixTree::requeue_window(NodeIndex index) noexcept {
  const Node& node = nodes_[index];
  const bool queued = windows_.contains(index);
  if (queued == (is_live(node) && has_evictable_pairs(node))) return;
  queued ? windows_.erase(index) : windows_.set(index, window_key(node));
}

// The node whose pair goes next, or kNone.  Keys are brought up to date as they come to the front:
// what that costs was put off by the walk that changed the key.
RadixTree::NodeIndex RadixTree::next_window() noexcept {
  while (!windows_.entries().empty()) {
    const auto [queued, index] = windows_.entries().front();
    const NodeKey key = window_key(nodes_[index]);
    if (key == queued) return index;
    windows_.set(index, key);
  }
  return kNone;
}

}  // namespace kvspec
