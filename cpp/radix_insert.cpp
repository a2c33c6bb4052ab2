// Insert: what would become of the caller's pages, and making them resident.  What their pairs
// change is in radix_window.cpp.
#include <algorithm>

#include "kvspec/contract.hpp"
#include "kvspec/radix_cache.hpp"
#include "radix_parts.hpp"

namespace kvspec {
InsertPlan RadixTree::plan_insert(std::string_view space, std::span<const Token> tokens,
                                  std::span<const std::int64_t> slots) {
  if (slots.size() != tokens.size()) {
    refuse("CACHE-10", std::to_string(slots.size()) + " slots were given for " +
                           std::to_string(tokens.size()) + " tokens");
  }
  InsertPlan plan = plan_pages(space, tokens, pages_of(slots, page_size_));
  const auto whole = static_cast<std::ptrdiff_t>(plan.reach) * page_size_;
  if (has_windows()) plan.tail_slots.assign(slots.begin() + whole, slots.end());
  return plan;
}

InsertPlan RadixTree::plan_pages(std::string_view space, std::span<const Token> tokens,
                                 std::vector<PageId> pages) {
  if (pages.size() != tokens.size() / static_cast<std::size_t>(page_size_)) {
    refuse("CACHE-10", std::to_string(pages.size()) + " pages were given for " +
                           std::to_string(tokens.size()) + " tokens");
  }
  evict_commit();
  const NodeIndex root = find_root(space);
  const RadixWalk at = root == kNone ? RadixWalk{kNone, 0, 0} : walk(root, tokens);
  InsertPlan plan = compare(at, std::move(pages), tokens.size());
  if (const auto conflict = find_conflict(plan)) refuse_conflict(*conflict);
  prepare(plan, at, space, tokens);
  return plan;
}

InsertPlan RadixTree::plan_row(std::string_view space, std::span<const Token> tokens,
                               std::span<const std::int64_t> row, std::int64_t protected_count,
                               const RadixReceipt* receipt, bool locks) {
  evict_commit();
  std::vector<PageId> pages = pages_of_row(row, page_size_);
  const NodeIndex root = find_root(space);
  const RadixWalk at = root == kNone ? RadixWalk{kNone, 0, 0} : walk(root, tokens);
  InsertPlan plan = compare(at, std::move(pages), tokens.size());
  plan.is_row = true;
  plan.locks = locks;
  require_lock(plan, at, protected_count, receipt);
  if (const auto conflict = find_conflict(plan)) {
    const std::string page = "page " + std::to_string(conflict->page);
    if (conflict->twice) refuse("CACHE-5", page + " is twice in the row");
    if (conflict->index < plan.reach) refuse_conflict(*conflict);
    refuse("CACHE-5", page + " beyond the reach is in the tree");
  }
  prepare(plan, at, space, tokens);
  return plan;
}

// What the tree holds along the key, and what becomes of the caller's pages.
InsertPlan RadixTree::compare(const RadixWalk& at, std::vector<PageId> pages,
                              std::size_t token_count) const {
  InsertPlan plan;
  plan.token_count = token_count;
  plan.reach = token_count / static_cast<std::size_t>(page_size_);
  plan.resident.resize(at.page_count);
  copy_pages(at, plan.resident);
  plan.pages = std::move(pages);
  sort_slots(plan);
  return plan;
}

// The four classes of the caller's slots (CACHE-8).
void RadixTree::sort_slots(InsertPlan& plan) const {
  plan.shared.clear();
  plan.duplicate.clear();
  plan.adopted.clear();
  plan.tail.clear();
  const auto position = [this](std::size_t page) {
    return static_cast<std::int64_t>(page) * page_size_;
  };
  const std::size_t held = plan.resident.size();
  for (std::size_t start = 0; start < held;) {
    const bool same = plan.pages[start] == plan.resident[start];
    std::size_t stop = start + 1;
    while (stop < held && (plan.pages[stop] == plan.resident[stop]) == same) ++stop;
    append(same ? plan.shared : plan.duplicate, position(start), position(stop));
    start = stop;
  }
  append(plan.adopted, position(held), position(plan.reach));
  append(plan.tail, position(plan.reach), static_cast<std::int64_t>(plan.token_count));
}

// The first page that the tree may not take, if there is one; makes room in the set of pages.
std::optional<RadixConflict> RadixTree::find_conflict(const InsertPlan& plan) {
  const std::span<const PageId> pages(plan.pages);
  const auto is_none = [](PageId page) { return page < 1; };
  if (std::count_if(pages.begin(), pages.end(), is_none) > 0) {
    const auto first = std::find_if(pages.begin(), pages.end(), is_none);
    return RadixConflict{*first, static_cast<std::size_t>(first - pages.begin()), false};
  }
  std::vector<std::span<const PageId>> fresh;  // runs of what is not the tree's already
  fresh.reserve(plan.duplicate.size() + 1);
  for (const Interval& interval : plan.duplicate) {
    const auto start = static_cast<std::size_t>(interval.start / page_size_);
    const auto stop = static_cast<std::size_t>(interval.stop / page_size_);
    fresh.push_back(pages.subspan(start, stop - start));
  }
  fresh.push_back(pages.subspan(plan.resident.size()));
  for (const std::span<const PageId> run : fresh) resident_.reserve(run);

  std::optional<PageId> taken;
  std::size_t added = 0;
  while (added < fresh.size() && !(taken = resident_.add(fresh[added]))) ++added;
  while (added-- > 0) resident_.remove(fresh[added]);
  if (!taken) return std::nullopt;
  bool seen = false;
  for (std::size_t index = 0;; ++index) {
    if (pages[index] != *taken) continue;
    const bool shared = index < plan.resident.size() && plan.resident[index] == *taken;
    if (seen || (!shared && resident_.contains(*taken))) return RadixConflict{*taken, index, seen};
    seen = true;
  }
}

void RadixTree::refuse_conflict(const RadixConflict& conflict) {
  const std::string page = "page " + std::to_string(conflict.page);
  if (conflict.page == 0) refuse("CACHE-10", page + " is the sink");
  if (conflict.page < 0) refuse("CACHE-10", page + " is negative");
  if (conflict.twice) refuse("CACHE-10", page + " occurs twice");
  refuse("CACHE-10", page + " is already in the tree at another place");
}

// row[0 : protected_count) is what the tree holds along the path of the receipt (CACHE-5).
void RadixTree::require_lock(const InsertPlan& plan, const RadixWalk& at,
                             std::int64_t protected_count, const RadixReceipt* receipt) const {
  const std::string count = std::to_string(protected_count);
  if (receipt == nullptr) {
    if (protected_count == 0) return;
    refuse("CACHE-5", count + " tokens are protected without a receipt");
  }
  const std::optional<std::int64_t> covered = locked_token_count(*receipt);
  if (!covered) refuse("CACHE-5", "the lock_receipt is not open");
  if (*covered != protected_count) {
    refuse("CACHE-5", "the lock covers " + std::to_string(*covered) + " tokens, but " + count +
                          " are protected");
  }
  const NodeIndex locked = receipts_[receipt->slot].node;
  NodeIndex index = at.node;
  if (index != kNone && at.offset < nodes_[index].page_count) index = nodes_[index].parent;
  while (index != kNone && index != locked) index = nodes_[index].parent;
  const auto page_count = protected_count / page_size_;
  if (index == kNone || !std::equal(plan.resident.begin(), plan.resident.begin() + page_count,
                                    plan.pages.begin())) {
    refuse("CACHE-5", "row[0 : " + count + ") is not what the lock's path holds");
  }
}

// Makes the parts of the plan for the whole key; with windows they are to be cut.
void RadixTree::prepare(InsertPlan& plan, const RadixWalk& at, std::string_view space,
                        std::span<const Token> tokens) {
  const auto unit = static_cast<std::size_t>(page_size_);
  plan.space = space;
  plan.version = version_;
  plan.node = at.node;
  if (const std::size_t count = plan.reach - at.page_count; count > 0) {
    RadixBuffer run = make_run(std::span<const PageId>(plan.pages).subspan(at.page_count, count),
                               tokens.subspan(at.page_count * unit, count * unit));
    plan.added.push_back({std::move(run), 0});
  }
  if (at.node == kNone && (plan.locks || !plan.added.empty())) plan.new_space = make_name(space);
  if (has_windows()) return;
  if (at.page_count > 0 && at.offset < nodes_[at.node].page_count) {
    plan.cuts.push_back({at.node, copy_run(nodes_[at.node], 0, at.offset), 0});
  }
  complete(plan);
}

// Takes the rest of the memory that carrying the plan out, and locking its handle, will need.
void RadixTree::complete(InsertPlan& plan) {
  reserve(1 + plan.cuts.size() + plan.added.size());  // a root, parts of nodes and leaves
  grow(receipts_, 1);
  plan.is_complete = true;
}

void RadixTree::require_unchanged(const InsertPlan& plan) const {
  if (plan.version == version_) return;
  refuse("CACHE-7", "the tree has changed since the insert was planned");
}

// The end of the plan's reach, or kNone where its namespace has no root.
RadixTree::NodeIndex RadixTree::carry_out(InsertPlan& plan, std::int64_t priority) {
  require_unchanged(plan);
  if (!plan.is_complete) refuse("CACHE-7", "the insert was planned without the caller's pairs");
  ++tick_;
  NodeIndex end = plan.node;
  if (!plan.new_space.empty()) end = make_root(std::move(plan.new_space));
  for (RadixCut& cut : plan.cuts) {
    const bool whole = cut.upper.data == nullptr;
    const NodeIndex part = whole ? cut.node : split(cut.node, std::move(cut.upper));
    if (has_windows()) set_dead_count(part, cut.dead_count);
    if (cut.node == plan.node) end = part;
  }
  for (RadixRun& run : plan.added) end = make_leaf(end, std::move(run));
  if (end != kNone && !is_root(nodes_[end])) touch(end, 0, priority);
  return end;
}

RadixHandle RadixTree::commit_insert(InsertPlan plan, std::int64_t priority) {
  const NodeIndex end = carry_out(plan, priority);
  if (end == kNone || is_root(nodes_[end])) return handle_of(kNone, std::move(plan.space));
  return handle_of(end, {});
}

RadixReceipt RadixTree::commit_row(InsertPlan plan) {
  if (!plan.locks) refuse("CACHE-7", "the insert was planned without a lock");
  const NodeIndex end = carry_out(plan, 0);
  if (is_root(nodes_[end])) return take_lock(handle_of(kNone, std::move(plan.space)), end);
  return take_lock(handle_of(end, {}), end);
}

}  // namespace kvspec
