// Tests of the tree core: against a page trie, with memory running out, and with broken books.
#include <array>
#include <cstdint>
#include <memory>
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
using test::insert;
using test::Pages;
using test::see;
using test::Seen;
using test::Tokens;

constexpr std::array kPolicies = {"lru", "lfu", "fifo", "mru", "filo", "slru", "priority"};

TEST(random_histories_equal_those_of_a_page_trie) {
  std::uint32_t seed = 1;
  for (const char* policy : kPolicies) {
    for (const bool whole_nodes : {false, true}) {
      for (const std::int32_t page_size : {1, 3}) {
        History(seed++, policy, whole_nodes, page_size).run(1500);
      }
    }
  }
}

// ---- memory that runs out ----

using Tree = std::unique_ptr<RadixTree>;

// Two namespaces, a branch, a lock, and free nodes; page size 2.
Tree grown(const char* granularity = "page") {
  auto tree = std::make_unique<RadixTree>(2, "lru", granularity);
  insert(*tree, {1, 1, 2, 2, 3, 3}, {1, 2, 3});
  insert(*tree, {1, 1, 2, 2, 4, 4, 5, 5}, {1, 2, 4, 5});
  insert(*tree, {7, 7, 8, 8}, {6, 7}, "tenant with a name too long to be stored in place");
  (void)tree->lock(*tree->match("", Tokens{1, 1, 2, 2, 3, 3}).node);
  return tree;
}

// Fails every allocation of `action`; after each the tree is as `grown` made it.
template <class Action>
std::int64_t survives(Action action, const char* granularity = "page") {
  const Seen before = see(*grown(granularity));
  return test::fail_each_allocation([&] { return grown(granularity); },
                                    [&](Tree& tree) { action(*tree); },
                                    [&](Tree& tree) { CHECK(see(*tree) == before); });
}

const char* const kNewSpace = "another tenant with a name too long to be stored in place";

TEST(match_survives_every_failed_allocation) {
  const auto match = [](RadixTree& tree) { (void)tree.match("", Tokens{1, 1, 2, 2, 4, 4}); };
  CHECK(survives(match) >= 3);
  CHECK(survives([](RadixTree& tree) { (void)tree.match(kNewSpace, Tokens{1, 1}); }) >= 1);
}

TEST(insert_survives_every_failed_allocation) {
  const auto extend = [](RadixTree& tree) {
    insert(tree, {1, 1, 2, 2, 4, 4, 9, 9, 9, 9}, {1, 2, 4, 40000, 41});
  };
  CHECK(survives(extend) >= 5);
  CHECK(survives([](RadixTree& tree) { insert(tree, {5, 5}, {50}, kNewSpace); }) >= 5);
  const auto many = [](RadixTree& tree) {
    for (Token token = 100; token < 140; ++token) insert(tree, {token, token}, {token});
  };
  const std::int64_t count = test::fail_each_allocation(
      [] { return grown(); }, [&](Tree& tree) { many(*tree); }, [](Tree& tree) { tree->check(); });
  CHECK(count >= 80);
}

TEST(row_of_a_request_survives_every_failed_allocation) {
  const auto cache_row = [](RadixTree& tree) {
    const std::vector<std::int64_t> row = {2, 3, 4, 5, 82, 83, 84};
    const Tokens tokens = {1, 1, 2, 2, 4, 4};
    (void)tree.commit_insert(tree.plan_row("", tokens, row, 0, nullptr, false), 0);
  };
  CHECK(survives(cache_row) >= 5);
}

TEST(row_that_is_not_as_its_lock_says_is_refused) {
  const Tree tree = grown();
  const RadixReceipt receipt = tree->lock(*tree->match("", Tokens{1, 1, 2, 2}).node);
  const Seen before = see(*tree);
  const auto refused = [&](const char* text, const std::vector<std::int64_t>& row,
                           std::int64_t protected_count, const RadixReceipt* held) {
    const Tokens tokens = {1, 1, 2, 2, 9, 9};
    CHECK(test::throws<ContractError>(
        text, [&] { (void)tree->plan_row("", tokens, row, protected_count, held, false); }));
    CHECK(see(*tree) == before);
  };
  refused("CACHE-5: slot 6 at position 3 is not in its place", {2, 3, 4, 6, 82, 83}, 4, &receipt);
  refused("CACHE-5: 4 tokens are protected without a receipt", {2, 3, 4, 5, 82, 83}, 4, nullptr);
  refused("CACHE-5: the lock covers 4 tokens, but 2 are", {2, 3, 4, 5, 82, 83}, 2, &receipt);
  refused("CACHE-5: row[0 : 4) is not what the lock", {2, 3, 90, 91, 82, 83}, 4, &receipt);
  refused("CACHE-5: page 41 is twice", {2, 3, 4, 5, 82, 83, 82, 83}, 4, &receipt);
  refused("CACHE-5: page 6 beyond the reach", {2, 3, 4, 5, 82, 83, 12, 13}, 4, &receipt);
  refused("CACHE-10: page 6 is already in the tree", {2, 3, 4, 5, 12, 13}, 4, &receipt);
  (void)tree->unlock(receipt);
  CHECK(test::throws<ContractError>("CACHE-5: the lock_receipt is not open", [&] {
    (void)tree->plan_row("", Tokens{1, 1}, std::vector<std::int64_t>{2, 3}, 2, &receipt, false);
  }));
}

TEST(evict_survives_every_failed_allocation) {
  for (const char* granularity : {"page", "node"}) {
    CHECK(survives([](RadixTree& tree) { (void)tree.evict(7); }, granularity) >= 3);
  }
}

TEST(lock_unlock_and_reset_survive_every_failed_allocation) {
  const auto lock = [](RadixTree& tree) {
    const RadixHandle handle = *tree.match(kNewSpace, Tokens{}).node;
    (void)tree.lock(handle);
  };
  CHECK(survives(lock) >= 3);
  const auto unlock = [](RadixTree& tree) {
    (void)tree.unlock(*tree.match("", Tokens{1, 1, 2, 2, 3, 3}).node);
    tree.reset();
  };
  const std::int64_t count = test::fail_each_allocation(
      [] { return grown(); }, [&](Tree& tree) { unlock(*tree); },
      [](Tree& tree) { tree->check(); });
  CHECK(count >= 1);
}

// ---- what is refused ----

TEST(constructor_refuses_unknown_options) {
  CHECK(test::throws<ContractError>("CACHE-17: page_size is 0",
                                    [] { RadixTree(0, "lru", "page"); }));
  CHECK(test::throws<ContractError>("RADIX-14: eviction_policy is 'clock'",
                                    [] { RadixTree(1, "clock", "page"); }));
  CHECK(test::throws<ContractError>("RADIX-14: eviction_granularity is 'token'",
                                    [] { RadixTree(1, "lru", "token"); }));
}

TEST(refused_insert_changes_nothing) {
  const Tree tree = grown();
  const Seen before = see(*tree);
  const auto refused = [&](const char* text, const Tokens& tokens, const Pages& pages) {
    CHECK(test::throws<ContractError>(text, [&] { insert(*tree, tokens, pages); }));
    CHECK(see(*tree) == before);
  };
  refused("CACHE-10: page 3 is already in the tree at another place", {9, 9, 9, 9}, {8, 3});
  refused("CACHE-10: page 1 is already in the tree at another place", {9, 9, 1, 1}, {1, 1});
  refused("CACHE-10: page 1 occurs twice", {1, 1, 2, 2}, {1, 1});
  refused("CACHE-10: page 9 occurs twice", {9, 9, 8, 8}, {9, 9});
  refused("CACHE-10: page 0 is the sink", {9, 9}, {0});
  refused("CACHE-10: page -1 is negative", {9, 9}, {-1});
  refused("CACHE-10: 1 pages were given for 4 tokens", {9, 9, 9, 9}, {8});
}

TEST(slots_that_are_not_pages_are_refused) {
  const auto refused = [](const char* text, const std::vector<std::int64_t>& slots) {
    CHECK(test::throws<ContractError>(
        text, [&] { (void)pages_of(std::span<const std::int64_t>(slots), 2); }));
  };
  refused("CACHE-10: slots [7, 6] are not one page in order", {4, 5, 7, 6});
  refused("CACHE-10: slots [5, 6] are not one page in order", {5, 6});
  refused("CACHE-10: slots [4294967296, 4294967297] are not", {4294967296, 4294967297});
}

TEST(plan_of_a_tree_that_has_changed_is_refused) {
  const Tree tree = grown();
  InsertPlan plan = tree->plan_pages("", Tokens{1, 1, 2, 2, 4, 4}, {1, 2, 4});
  insert(*tree, {9, 9}, {9});
  const Seen before = see(*tree);
  CHECK(test::throws<ContractError>("CACHE-7",
                                    [&] { (void)tree->commit_insert(std::move(plan), 0); }));
  CHECK(see(*tree) == before);
}

TEST(handles_and_receipts_of_another_tree_are_refused) {
  const Tree tree = grown();
  const Tree other = grown();
  const RadixHandle handle = *other->match("", Tokens{1, 1}).node;
  const RadixReceipt receipt = other->lock(handle);
  CHECK(!tree->resolve(handle));
  CHECK(!tree->locked_token_count(receipt));
  CHECK(test::throws<ContractError>("CACHE-13", [&] { (void)tree->lock(handle); }));
  CHECK(test::throws<ContractError>("CACHE-13", [&] { (void)tree->unlock(handle); }));
  CHECK(test::throws<ContractError>("CACHE-13: the receipt is of another cache",
                                    [&] { (void)tree->unlock(receipt); }));
}

TEST(reset_is_refused_while_a_receipt_is_open) {
  const Tree tree = grown();
  const Seen before = see(*tree);
  CHECK(test::throws<ContractError>("CACHE-16: 1 receipts are open", [&] { tree->reset(); }));
  CHECK(see(*tree) == before);
}

TEST(trimmed_page_leaves_its_handle_stale_for_ever) {
  RadixTree tree(1, "lru", "page");
  const RadixHandle handle = insert(tree, {1, 2, 3}, {1, 2, 3});
  CHECK(tree.evict(1).pages.size() == 1);
  insert(tree, {1, 2, 3}, {1, 2, 4});
  CHECK(!tree.resolve(handle));
}

// ---- broken books ----

TEST(check_names_the_clause_that_is_broken) {
  const auto finds = [](const char* clause, auto corrupt) {
    const Tree tree = grown();
    tree->check();
    corrupt(*tree);
    CHECK(test::throws<ContractError>(clause, [&] { tree->check(); }));
  };
  // Node 1 is the locked branch, node 2 the run above both branches.
  finds("RADIX-5", [](RadixTree& tree) { Access::node(tree, 1).parent = 77; });
  finds("RADIX-5", [](RadixTree& tree) { Access::node(tree, 1).parent = 1; });
  finds("RADIX-5", [](RadixTree& tree) { Access::node(tree, 1).page_count = 0; });
  finds("RADIX-5", [](RadixTree& tree) { Access::node(tree, 1).page_count += 1000; });
  finds("RADIX-5", [](RadixTree& tree) { ++Access::node(tree, 1).child_count; });
  finds("RADIX-5", [](RadixTree& tree) { ++Access::node(tree, 1).hash; });
  finds("RADIX-5", [](RadixTree& tree) { Access::forget_child(tree, 1); });
  finds("RADIX-5", [](RadixTree& tree) { Access::node(tree, 1).incarnation = 0; });
  finds("RADIX-5", [](RadixTree& tree) { Access::node(tree, 1).data[0] = 1; });
  finds("RADIX-5", [](RadixTree& tree) { Access::forget_page(tree, 3); });
  finds("RADIX-6", [](RadixTree& tree) { ++Access::node(tree, 1).lock_count; });
  finds("RADIX-6", [](RadixTree& tree) { Access::forget_receipt(tree, 0); });
  finds("RADIX-7", [](RadixTree& tree) { ++Access::evictable_pages(tree); });
  finds("RADIX-7", [](RadixTree& tree) { --Access::protected_pages(tree); });
  finds("RADIX-7", [](RadixTree& tree) { Access::forget_leaves(tree); });
  finds("RADIX-7", [](RadixTree& tree) { ++Access::node(tree, 3).last; });
}

// ---- cost ----

TEST(evict_moves_a_logarithm_of_heap_entries) {
  for (const char* policy : kPolicies) {
    for (const Token leaf_count : {1000, 16000}) {
      RadixTree tree(1, policy, "page");
      for (Token leaf = 0; leaf < leaf_count; ++leaf) {
        insert(tree, {leaf * 7919 % 100003}, {leaf + 1});
      }
      const std::int64_t before = tree.counters().heap_moves;
      CHECK(tree.evict(leaf_count).pages.size() == static_cast<std::size_t>(leaf_count));
      const std::int64_t levels = leaf_count == 1000 ? 6 : 8;  // of a 4-ary heap, and one more
      CHECK(tree.counters().heap_moves - before <= levels * leaf_count);
      CHECK(tree.counters().leaves_evicted == leaf_count);
    }
  }
}

TEST(evict_of_one_leaf_is_cheap_after_every_leaf_was_touched) {
  RadixTree tree(1, "lru", "page");
  for (Token leaf = 0; leaf < 4096; ++leaf) insert(tree, {leaf}, {leaf + 1});
  for (Token leaf = 0; leaf < 4096; ++leaf) {
    (void)tree.match("", Tokens{leaf * 1597 % 4096});
  }
  const std::int64_t before = tree.counters().heap_moves;
  CHECK(tree.evict(1).pages == Pages{1});
  CHECK(tree.counters().heap_moves - before <= 7);  // the levels of the heap
}

TEST(match_compares_each_token_once) {
  RadixTree tree(4, "lru", "page");
  Tokens key(4096);
  Pages pages(1024);
  for (std::size_t at = 0; at < key.size(); ++at) key[at] = static_cast<Token>(at);
  for (std::size_t at = 0; at < pages.size(); ++at) pages[at] = static_cast<PageId>(at + 1);
  insert(tree, key, pages);
  const std::int64_t before = tree.counters().tokens_compared;
  (void)tree.match("", key);
  CHECK(tree.counters().tokens_compared - before == 4096);
  (void)tree.match("", std::span<const Token>(key).first(2047));  // now in two nodes
  const std::int64_t split = tree.counters().tokens_compared;
  (void)tree.match("", key);
  CHECK(tree.counters().tokens_compared - split == 4096);
}

TEST(memory_of_a_node_stays_within_twice_its_pages) {
  RadixTree tree(1, "lru", "page");
  Tokens key(1000);
  Pages pages(1000);
  for (std::size_t at = 0; at < key.size(); ++at) pages[at] = static_cast<PageId>(at + 1);
  insert(tree, key, pages);
  for (std::size_t stop = 999; stop > 0; --stop) {
    (void)tree.match("", std::span<const Token>(key).first(stop));
  }
  for (std::size_t index = 1; index < Access::node_count(tree); ++index) {
    CHECK(Access::node(tree, index).capacity <= 2 * Access::node(tree, index).page_count);
  }
  tree.check();
}

}  // namespace
}  // namespace kvspec
