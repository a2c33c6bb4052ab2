// Insert: what would become of the caller's pages, and making them resident.
#include <algorithm>

#include "kvspec/contract.hpp"
#include "kvspec/radix_cache.hpp"
#include "radix_parts.hpp"

namespace kvspec {
namespace {

void append(std::vector<Interval>& intervals, std::int64_t start, std::int64_t stop) {
  if (start == stop) return;
  if (!intervals.empty() && intervals.back().stop == start) {
    intervals.back().stop = stop;
  } else {
    intervals.push_back({start, stop});
  }
}

}  // namespace

InsertPlan RadixTree::plan_insert(std::string_view space, std::span<const Token> tokens,
                                  std::span<const std::int64_t> slots) {
  if (slots.size() != tokens.size()) {
    refuse("CACHE-10", std::to_string(slots.size()) + " slots were given for " +
                           std::to_string(tokens.size()) + " tokens");
  }
  return plan_pages(space, tokens, pages_of(slots, page_size_));
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
                               const RadixReceipt* receipt) {
  evict_commit();
  std::vector<PageId> pages = pages_of_row(row, page_size_);
  const NodeIndex root = find_root(space);
  const RadixWalk at = root == kNone ? RadixWalk{kNone, 0, 0} : walk(root, tokens);
  InsertPlan plan = compare(at, std::move(pages), tokens.size());
  require_lock(plan, at, protected_count, receipt);
  if (const auto conflict = find_conflict(plan)) {
    const std::string page = "page " + std::to_string(conflict->page);
    if (conflict->twice) refuse("CACHE-5", page + " is twice in the row");
    if (conflict->index < plan.whole_count) refuse_conflict(*conflict);
    refuse("CACHE-5", page + " beyond the whole ones is in the tree");
  }
  prepare(plan, at, space, tokens);
  return plan;
}

// What the tree holds along the key, and what becomes of the caller's pages (CACHE-8).
InsertPlan RadixTree::compare(const RadixWalk& at, std::vector<PageId> pages,
                              std::size_t token_count) const {
  InsertPlan plan;
  plan.whole_count = token_count / static_cast<std::size_t>(page_size_);
  plan.resident.resize(at.page_count);
  copy_pages(at, plan.resident);
  for (std::size_t start = 0; start < at.page_count;) {
    const bool same = pages[start] == plan.resident[start];
    std::size_t stop = start + 1;
    while (stop < at.page_count && (pages[stop] == plan.resident[stop]) == same) ++stop;
    append(same ? plan.shared : plan.duplicate, static_cast<std::int64_t>(start) * page_size_,
           static_cast<std::int64_t>(stop) * page_size_);
    start = stop;
  }
  const std::int64_t whole = static_cast<std::int64_t>(plan.whole_count) * page_size_;
  append(plan.adopted, static_cast<std::int64_t>(at.page_count) * page_size_, whole);
  append(plan.tail, whole, static_cast<std::int64_t>(token_count));
  plan.pages = std::move(pages);
  return plan;
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

// Takes all the memory that carrying the plan out will need.
void RadixTree::prepare(InsertPlan& plan, const RadixWalk& at, std::string_view space,
                        std::span<const Token> tokens) {
  const auto unit = static_cast<std::size_t>(page_size_);
  plan.space = space;
  plan.node = at.node;
  if (at.page_count > 0 && at.offset < nodes_[at.node].page_count) {
    plan.upper = copy_front(nodes_[at.node], at.offset);
  }
  if (const std::size_t count = plan.whole_count - at.page_count; count > 0) {
    plan.added = make_run(std::span<const PageId>(plan.pages).subspan(at.page_count, count),
                          tokens.subspan(at.page_count * unit, count * unit));
    if (at.node == kNone) plan.new_space = make_name(space);
  }
  reserve(3);          // a root, an upper part and a leaf
  grow(receipts_, 1);  // so that what was inserted can be locked
  plan.version = version_;
}

RadixHandle RadixTree::commit_insert(InsertPlan plan, std::int64_t priority) {
  if (plan.version != version_) {
    refuse("CACHE-7", "the tree has changed since the insert was planned");
  }
  ++tick_;
  NodeIndex end = plan.node;
  if (!plan.new_space.empty()) end = make_root(std::move(plan.new_space));
  if (plan.upper.data != nullptr) end = split(end, std::move(plan.upper));
  if (plan.added.data != nullptr) end = make_leaf(end, std::move(plan.added));
  if (end == kNone || is_root(nodes_[end])) return handle_of(kNone, std::move(plan.space));
  touch(end, 0, priority);
  return handle_of(end, {});
}

}  // namespace kvspec
