// Tests of the tree core's windows: against a page trie, with memory running out, and with broken
// books.
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "check.hpp"
#include "kvspec/contract.hpp"
#include "kvspec/radix_cache.hpp"
#include "radix_history.hpp"

namespace kvspec {
namespace {

using test::Access;
using test::History;
using test::insert_pairs;
using test::Pages;
using test::see;
using test::Seen;
using test::Tokens;

TEST(random_histories_with_windows_equal_those_of_a_page_trie) {
  std::uint32_t seed = 100;
  for (const std::int32_t window : {1, 2, 3, 9}) {
    for (const std::int32_t page_size : {1, 3}) {
      for (int round = 0; round < 3; ++round) {
        History(seed++, "lru", false, page_size, window).run(1500);
      }
    }
  }
}

// ---- memory that runs out ----

using Tree = std::unique_ptr<RadixTree>;

const Tokens kLong = {1, 1, 2, 2, 3, 3, 4, 4, 5, 5};
const Tokens kFork = {1, 1, 2, 2, 9, 9};

// Pages of two tokens and windows of two pages.  Of the path 1 .. 5 the pages 3 and 4 are
// tombstones; 1, 2, 6 forks off it and is locked.
Tree grown() {
  auto tree = std::make_unique<RadixTree>(2, "lru", "page", 3);
  insert_pairs(*tree, kLong, {1, 2, 3, 4, 5}, {});
  const RadixHandle fork = insert_pairs(*tree, kFork, {1, 2, 6}, {});
  CHECK(tree->evict(0, 4).tombstones == (Pages{3, 4}));
  (void)tree->lock(fork);
  return tree;
}

// Fails every allocation of `action`; after each the tree is as `grown` made it.
template <class Action>
std::int64_t survives(Action action) {
  const Seen before = see(*grown());
  return test::fail_each_allocation(grown, [&](Tree& tree) { action(*tree); },
                                    [&](Tree& tree) { CHECK(see(*tree) == before); });
}

// The handle of the whole long path, which no match gives.
RadixHandle revive(RadixTree& tree) {
  return insert_pairs(tree, kLong, {1, 2, 33, 34, 35}, {7, 7, 7, 0, 7});
}

TEST(match_falls_back_and_survives_every_failed_allocation) {
  CHECK(grown()->match("", kLong).slots.count() == 4);
  CHECK(grown()->peek("", Tokens{1, 1, 2, 2, 3, 3, 4, 4}).slots.count() == 4);
  CHECK(survives([](RadixTree& tree) { (void)tree.match("", Tokens{1, 1, 9, 9}); }) >= 3);
}

TEST(revival_survives_every_failed_allocation) {
  CHECK(survives([](RadixTree& tree) { (void)revive(tree); }) >= 5);
  CHECK(survives([](RadixTree& tree) {
    const Tokens longer = {1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8};
    insert_pairs(tree, longer, {1, 2, 3, 34, 5, 36, 37, 38}, {7, 7, 0, 7, 7, 7, 0, 7});
  }) >= 8);
}

TEST(eviction_of_both_kinds_survives_every_failed_allocation) {
  CHECK(survives([](RadixTree& tree) { (void)tree.evict(0, 4); }) >= 2);
  CHECK(survives([](RadixTree& tree) { (void)tree.evict(2, 4); }) >= 2);
}

TEST(lock_survives_every_failed_allocation) {
  const auto grown_long = [] {
    auto tree = std::make_unique<RadixTree>(1, "lru", "page", 2);
    insert_pairs(*tree, {1, 2, 3, 4, 5}, {1, 2, 3, 4, 5}, {});
    return tree;
  };
  const Seen before = see(*grown_long());
  const std::int64_t count = test::fail_each_allocation(
      grown_long,
      [](Tree& tree) { (void)tree->lock(*tree->match("", Tokens{1, 2, 3, 4, 5}).node); },
      [&](Tree& tree) { CHECK(see(*tree).receipts == before.receipts); });
  CHECK(count >= 4);
}

TEST(row_is_locked_with_the_memory_of_its_plan) {
  const Tree tree = grown();
  const std::vector<std::int64_t> row = {2, 3, 4, 5, 66, 67, 68, 69, 70, 71, 72, 73};
  const Tokens tokens = {1, 1, 2, 2, 3, 3, 4, 4, 6, 6, 7, 7};
  InsertPlan plan = tree->plan_row("", tokens, row, 0, nullptr, true);
  tree->add_pairs(plan, std::vector<std::int64_t>{7, 7, 7, 7, 7, 7});
  CHECK(plan.revived == (std::vector<std::size_t>{2, 3}));
  {
    const test::FailNthAllocation armed(1);
    CHECK(tree->commit_row(std::move(plan)).swa_uuid().has_value());
  }
  CHECK(tree->swa_protected_token_count() == 8);  // the last two pages of the fork and of the row
  tree->check();
}

TEST(row_in_a_new_namespace_that_reaches_nothing_is_locked) {
  RadixTree tree(1, "lru", "page", 1);
  const std::vector<std::int64_t> row = {5};
  InsertPlan plan = tree.plan_row("tenant", Tokens{1}, row, 0, nullptr, true);
  tree.add_pairs(plan, std::vector<std::int64_t>{0});
  const RadixReceipt receipt = tree.commit_row(std::move(plan));
  CHECK(tree.locked_token_count(receipt) == 0);
  CHECK(tree.unlock(receipt) == 0);
  CHECK(Access::node_count(tree) == 1);
}

// ---- what is refused ----

TEST(constructor_refuses_a_window_that_it_cannot_have) {
  CHECK(test::throws<ContractError>("SWARADIX-19: sliding_window_size is -1",
                                    [] { RadixTree(1, "lru", "page", -1); }));
  CHECK(test::throws<ContractError>("RADIX-14", [] { RadixTree(1, "lfu", "page", 1); }));
  CHECK(test::throws<ContractError>("RADIX-14", [] { RadixTree(1, "lru", "node", 1); }));
}

TEST(plan_without_pairs_or_with_them_twice_is_refused) {
  const Tree tree = grown();
  const Seen before = see(*tree);
  const std::vector<std::int64_t> pairs = {7, 7, 7};
  InsertPlan plan = tree->plan_pages("", kFork, {1, 2, 6});
  CHECK(test::throws<ContractError>("SWA-20: 2 window slots were given for 3 slots", [&] {
    tree->add_pairs(plan, std::span(pairs).first(2));
  }));
  CHECK(test::throws<ContractError>("CACHE-7: the insert was planned without the caller's pairs",
                                    [&] { (void)tree->commit_insert(std::move(plan), 0); }));
  plan = tree->plan_pages("", kFork, {1, 2, 6});
  tree->add_pairs(plan, pairs);
  CHECK(test::throws<ContractError>("CACHE-7: the insert is planned already",
                                    [&] { tree->add_pairs(plan, pairs); }));
  CHECK(see(*tree) == before);
}

TEST(pairs_for_a_tree_that_has_changed_are_refused) {
  const Tree tree = grown();
  InsertPlan plan = tree->plan_pages("", kFork, {1, 2, 6});
  insert_pairs(*tree, {9, 9}, {9}, {});
  CHECK(test::throws<ContractError>("CACHE-7: the tree has changed",
                                    [&] { tree->add_pairs(plan, {}); }));
}

TEST(row_whose_page_beyond_the_reach_is_in_the_tree_is_refused) {
  const Tree tree = grown();
  const Seen before = see(*tree);
  const std::vector<std::int64_t> row = {2, 3, 4, 5, 6, 7};
  InsertPlan plan = tree->plan_row("", Tokens{1, 1, 2, 2, 3, 3}, row, 0, nullptr, true);
  CHECK(test::throws<ContractError>("CACHE-5: page 3 beyond the reach is in the tree", [&] {
    tree->add_pairs(plan, std::vector<std::int64_t>{7, 7, 0});
  }));
  CHECK(see(*tree) == before);
}

TEST(lock_of_a_path_whose_window_has_gone_is_refused) {
  RadixTree tree(1, "lru", "page", 1);
  insert_pairs(tree, {1, 2}, {1, 2}, {});
  const RadixHandle first = *tree.match("", Tokens{1}).node;
  (void)tree.match("", Tokens{1, 2});
  CHECK(tree.evict(0, 1).tombstones == Pages{1});
  const Seen before = see(tree);
  CHECK(test::throws<ContractError>("SWARADIX-11: the window of the handle's path is not live",
                                    [&] { (void)tree.lock(first); }));
  CHECK(see(tree) == before);
}

TEST(lock_asks_for_the_whole_window) {
  RadixTree tree(1, "lru", "page", 2);
  insert_pairs(tree, {1, 2, 3}, {1, 2, 3}, {});
  const RadixHandle second = *tree.match("", Tokens{1, 2}).node;
  (void)tree.match("", Tokens{1, 2, 3});
  CHECK(tree.evict(0, 1).tombstones == Pages{1});
  CHECK(test::throws<ContractError>("SWARADIX-11", [&] { (void)tree.lock(second); }));
  (void)tree.lock(*tree.match("", Tokens{1, 2, 3}).node);  // live to the end of its window
}

TEST(negative_eviction_is_refused) {
  const Tree tree = grown();
  for (const auto& [full, swa] : {std::pair(-1, 0), std::pair(0, -1)}) {
    CHECK(test::throws<ContractError>("SWARADIX-17", [&, full = full, swa = swa] {
      (void)tree->evict(full, swa);
    }));
  }
}

// ---- what an eviction takes ----

TEST(pages_buried_and_uncovered_in_one_call_leave_once) {
  RadixTree tree(1, "lru", "page", 1);
  insert_pairs(tree, {1, 2, 3, 4}, {1, 2, 3, 4}, {});
  (void)tree.match("", Tokens{1, 2});
  CHECK(tree.evict(0, 3) == (RadixEviction{{4, 3}, {1}, 3}));
  tree.evict_undo();
  CHECK(tree.evict(1, 4) == (RadixEviction{{4, 3, 2, 1}, {}, 4}));
  tree.evict_undo();
  CHECK(tree.evict(0, 1) == (RadixEviction{{}, {3}, 1}));
  tree.check();
}

TEST(window_lock_outlives_splits_tombstones_and_revivals) {
  RadixTree tree(1, "lru", "page", 3);
  const RadixHandle end = insert_pairs(tree, {1, 2, 3, 4, 5}, {1, 2, 3, 4, 5}, {});
  const RadixReceipt receipt = tree.lock(end);
  CHECK(tree.swa_protected_token_count() == 3);
  CHECK(tree.evict(9, 9) == (RadixEviction{{}, {1, 2}, 2}));
  (void)tree.match("", Tokens{1, 2, 3, 4});
  insert_pairs(tree, {1, 2, 3, 4, 6}, {11, 12, 3, 4, 16}, {});
  CHECK(tree.swa_protected_token_count() == 3);
  CHECK(tree.swa_evictable_token_count() == 3);
  CHECK(tree.unlock(receipt) == 5);
  CHECK(tree.swa_protected_token_count() == 0);
  tree.check();
}

// ---- broken books ----

TEST(check_names_the_clause_of_windows_that_is_broken) {
  const auto finds = [](const char* clause, auto corrupt) {
    const Tree tree = grown();
    tree->check();
    corrupt(*tree);
    CHECK(test::throws<ContractError>(clause, [&] { tree->check(); }));
  };
  // Node 1 holds 3, 4 and 5; node 2 is what is above it and node 3 the fork, whose window begins
  // in the middle of node 2, which was split for it.
  finds("RADIX-5", [](RadixTree& tree) { ++Access::node(tree, 1).depth; });
  finds("SWARADIX-7", [](RadixTree& tree) { Access::node(tree, 1).dead_count = 3; });
  finds("SWARADIX-9", [](RadixTree& tree) { ++Access::node(tree, 1).swa_lock_count; });
  finds("SWARADIX-9", [](RadixTree& tree) { --Access::node(tree, 3).swa_lock_count; });
  finds("SWARADIX-10", [](RadixTree& tree) { Access::node(tree, 1).dead_count = 4; });
  finds("SWARADIX-10", [](RadixTree& tree) { Access::node(tree, 1).dead_count = 1; });
  finds("SWARADIX-10", [](RadixTree& tree) { ++Access::swa_evictable_pages(tree); });
  finds("SWARADIX-10", [](RadixTree& tree) { --Access::swa_protected_pages(tree); });
  finds("SWARADIX-10", [](RadixTree& tree) { ++Access::evictable_pages(tree); });
  finds("SWARADIX-10", [](RadixTree& tree) { Access::forget_windows(tree); });
  finds("SWARADIX-10", [](RadixTree& tree) { Access::node(tree, 1).last = 0; });
}

TEST(check_finds_a_window_that_begins_inside_a_node) {
  RadixTree tree(1, "lru", "page", 2);
  (void)tree.lock(insert_pairs(tree, {1, 2}, {1, 2}, {}));
  Access::window_pages(tree) = 1;
  CHECK(test::throws<ContractError>("SWARADIX-9", [&] { tree.check(); }));
}

// ---- cost ----

// Paths of two pages, of which no two share one.
Tree wide(Token path_count) {
  auto tree = std::make_unique<RadixTree>(1, "lru", "page", 1);
  for (Token path = 0; path < path_count; ++path) {
    insert_pairs(*tree, {path * 7919 % 100003, -1}, {2 * path + 1, 2 * path + 2}, {});
  }
  return tree;
}

TEST(pairs_cost_a_logarithm_of_heap_entries_each) {
  for (const Token path_count : {1000, 16000}) {
    const Tree tree = wide(path_count);
    for (Token path = 0; path < path_count; path += 2) {
      (void)tree->match("", Tokens{path * 7919 % 100003});  // splits it, and renews the first page
    }
    const std::int64_t before = tree->counters().heap_moves;
    std::int64_t gone = 0;
    for (std::int64_t step = 1; gone < 2 * path_count; ++step) {
      gone += tree->evict(0, step % 7 + 1).pair_count;
    }
    const std::int64_t levels = path_count == 1000 ? 6 : 8;  // of a 4-ary heap, and one more
    CHECK(tree->counters().heap_moves - before <= 4 * levels * path_count);
    CHECK(tree->evictable_token_count() == 0);
  }
}

TEST(what_was_renewed_is_passed_over_once) {
  const Tree tree = wide(4096);
  for (Token path = 0; path < 4096; ++path) {
    (void)tree->match("", Tokens{path * 1597 % 4096 * 7919 % 100003, -1});
  }
  const std::int64_t before = tree->counters().heap_moves;
  CHECK(tree->evict(0, 1).tombstones == Pages{1});
  const std::int64_t passed = tree->counters().heap_moves;
  CHECK(passed - before <= 8 * 4096);
  CHECK(tree->evict(0, 2).pair_count == 2);
  CHECK(tree->counters().heap_moves - passed <= 3 * 8);
}

}  // namespace
}  // namespace kvspec
