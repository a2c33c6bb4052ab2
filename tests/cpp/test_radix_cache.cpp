// Tests of the tree core: against a page trie, with memory running out, and with broken books.
#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "kvspec/contract.hpp"
#include "kvspec/radix_cache.hpp"
#include "radix_model.hpp"

namespace kvspec {

// Breaks the books on purpose, one way at a time.
struct RadixTreeTestAccess {
  static RadixNode& node(RadixTree& tree, std::size_t index) { return tree.nodes_[index]; }
  static void forget_page(RadixTree& tree, PageId page) { tree.resident_.remove({&page, 1}); }
  static void forget_child(RadixTree& tree, std::uint32_t index) {
    tree.children_.erase(tree.nodes_[index].hash, index);
  }
  static void forget_leaves(RadixTree& tree) { tree.leaves_.clear(); }
  static void forget_receipt(RadixTree& tree, std::size_t slot) { tree.receipts_[slot].id = 0; }
  static std::int64_t& evictable_pages(RadixTree& tree) { return tree.evictable_pages_; }
  static std::int64_t& protected_pages(RadixTree& tree) { return tree.protected_pages_; }
  static std::size_t node_count(const RadixTree& tree) {
    return tree.nodes_.size() - tree.free_node_count_;
  }
};

namespace {

using Access = RadixTreeTestAccess;
using test::Key;
using test::Model;
using test::ModelPage;
using test::Pages;
using test::Tokens;

constexpr std::array kPolicies = {"lru", "lfu", "fifo", "mru", "filo", "slru", "priority"};

// ---- what can be seen of a tree ----

Pages pages_in(const Slots& slots, std::int32_t page_size) {
  return pages_of(slots.span(), page_size);
}

std::map<Key, ModelPage> trie_of(const RadixTree& tree) {
  std::map<Key, ModelPage> trie;
  for (const RadixPage& page : tree.pages()) {
    trie[{page.path.space, page.path.tokens}] = {page.page, static_cast<int>(page.locks), page.last,
                                                 page.born, page.hits, page.priority, page.cut, 0};
  }
  return trie;
}

// The model's trie with ranks for ticks and without incarnations.
std::map<Key, ModelPage> ranked(std::map<Key, ModelPage> trie) {
  std::map<std::uint64_t, std::uint64_t> last;
  std::map<std::uint64_t, std::uint64_t> born;
  for (const auto& [key, page] : trie) {
    last[page.last] = 0;
    born[page.born] = 0;
  }
  for (std::uint64_t rank = 0; auto& [tick, place] : last) place = rank++;
  for (std::uint64_t rank = 0; auto& [tick, place] : born) place = rank++;
  for (auto& [key, page] : trie) {
    page.last = last[page.last];
    page.born = born[page.born];
    page.incarnation = 0;
  }
  return trie;
}

struct Seen {
  std::map<Key, ModelPage> trie;
  std::vector<Key> receipts;
  std::uint64_t digest;
  std::int64_t evictable;
  std::int64_t locked;

  friend bool operator==(const Seen&, const Seen&) = default;
};

Seen see(const RadixTree& tree) {
  std::vector<Key> receipts;
  for (RadixPath& path : tree.open_receipts()) receipts.emplace_back(path.space, path.tokens);
  tree.check();
  return {trie_of(tree), receipts, tree.digest(), tree.evictable_token_count(),
          tree.protected_token_count()};
}

RadixHandle insert(RadixTree& tree, const Tokens& tokens, Pages pages, const char* space = "",
                   std::int64_t priority = 0) {
  return tree.commit_insert(tree.plan_pages(space, tokens, std::move(pages)), priority);
}

// ---- a random history ----

class History {
 public:
  History(std::uint32_t seed, const char* policy, bool whole_nodes, std::int32_t page_size)
      : random_(seed),
        page_size_(page_size),
        tree_(page_size, policy, whole_nodes ? "node" : "page"),
        model_(static_cast<std::size_t>(page_size), policy, whole_nodes) {}

  void run(int steps) {
    for (int step = 0; step < steps; ++step) {
      switch (draw(12)) {
        case 0: case 1: case 2: match(); break;
        case 3: case 4: case 5: case 6: insert_random(); break;
        case 7: case 8: evict(); break;
        case 9: lock(); break;
        case 10: unlock(); break;
        default: peek(); break;
      }
      compare();
    }
    while (!open_.empty()) unlock();
    tree_.reset();
    for (const Known& known : known_) CHECK(!tree_.resolve(known.handle));
    known_.clear();
    model_.trie.clear();
    compare();
    CHECK(Access::node_count(tree_) == 1);  // the empty namespace's root; no other is kept
  }

 private:
  struct Known {
    RadixHandle handle;
    Key key;
    int incarnation;
  };
  struct Open {
    RadixReceipt receipt;
    Key key;
  };

  std::uint32_t draw(std::uint32_t count) { return static_cast<std::uint32_t>(random_()) % count; }

  Key draw_key() {
    static const std::array<const char*, 3> kSpaces = {"", "a", "bb"};
    Key key{kSpaces[draw(8) < 6 ? 0 : draw(3)], {}};
    const std::size_t count = draw(9) * static_cast<std::size_t>(page_size_) + draw(2);
    for (std::size_t at = 0; at < count; ++at) {
      key.second.push_back(static_cast<Token>(draw(at % 3 == 0 ? 3 : 2)) - 1);
    }
    return key;
  }

  void remember(const RadixHandle& handle, const Key& key) {
    const int incarnation = key.second.empty() ? 0 : model_.trie[key].incarnation;
    known_.push_back({handle, key, incarnation});
    if (known_.size() > 40) known_.erase(known_.begin());
  }

  void match() {
    const Key key = draw_key();
    const std::size_t count = model_.match(key);
    const RadixMatch found = tree_.match(key.first, key.second);
    CHECK(found.slots.count() == count * static_cast<std::size_t>(page_size_));
    const Pages pages = pages_in(found.slots, page_size_);
    for (std::size_t at = 0; at < count; ++at) {
      CHECK(pages[at] == model_.trie[model_.prefix(key, at + 1)].page);
    }
    remember(*found.node, model_.prefix(key, count));
  }

  void peek() {
    const Key key = draw_key();
    const RadixMatch found = tree_.peek(key.first, key.second);
    CHECK(!found.node);
    CHECK(found.slots.count() ==
          model_.resident_count(key) * static_cast<std::size_t>(page_size_));
  }

  void insert_random() {
    const Key key = draw_key();
    const std::size_t known = model_.resident_count(key);
    Pages pages;
    for (std::size_t at = 0; (at + 1) * static_cast<std::size_t>(page_size_) <= key.second.size();
         ++at) {
      const bool same = at < known && draw(2) == 0;
      pages.push_back(same ? model_.trie[model_.prefix(key, at + 1)].page : ++fresh_page_);
    }
    const std::int64_t priority = static_cast<std::int64_t>(draw(4)) - 1;
    InsertPlan plan = tree_.plan_pages(key.first, key.second, pages);
    if (draw(4) == 0) return;  // an abandoned plan does nothing
    CHECK(plan.resident.size() == known);
    const RadixHandle handle = tree_.commit_insert(std::move(plan), priority);
    model_.insert(key, pages, priority);
    remember(handle, model_.prefix(key, pages.size()));
  }

  void evict() {
    const std::int64_t count = draw(3) == 0 ? draw(100) : draw(6);
    if (draw(3) == 0) {
      const Seen before = see(tree_);
      (void)tree_.evict(count);
      tree_.evict_undo();
      CHECK(see(tree_) == before);
      compare();
    }
    Pages evicted = model_.evict(count);
    if (page_size_ > 1) std::sort(evicted.begin(), evicted.end());
    CHECK(tree_.evict(count) == evicted);
    if (draw(2) == 0) tree_.evict_commit();
  }

  void lock() {
    if (known_.empty()) return;
    const Known& known = known_[draw(static_cast<std::uint32_t>(known_.size()))];
    if (!is_live(known)) {
      CHECK(test::throws<ContractError>("CACHE-13", [&] { (void)tree_.lock(known.handle); }));
      return;
    }
    const std::int64_t before = tree_.evictable_token_count();
    open_.push_back({tree_.lock(known.handle), known.key});
    model_.lock(known.key, 1);
    CHECK(open_.back().receipt.delta == tree_.evictable_token_count() - before);
    const auto length = static_cast<std::int64_t>(known.key.second.size());
    CHECK(tree_.locked_token_count(open_.back().receipt) == length);
  }

  void unlock() {
    if (open_.empty()) return;
    const auto drawn = draw(static_cast<std::uint32_t>(open_.size()));
    auto place = open_.begin() + drawn;
    const std::int64_t before = tree_.evictable_token_count();
    std::int64_t freed = 0;
    if (draw(2) == 0) {
      freed = tree_.unlock(place->receipt);
    } else {  // by node: the oldest of that path
      place = std::find_if(open_.begin(), open_.end(),
                           [&](const Open& open) { return open.key == place->key; });
      freed = tree_.unlock(place->receipt.node);
    }
    CHECK(freed == tree_.evictable_token_count() - before);
    CHECK(test::throws<ContractError>("CACHE-13: the receipt has been consumed",
                                      [&] { (void)tree_.unlock(place->receipt); }));
    model_.lock(place->key, -1);
    open_.erase(place);
  }

  bool is_live(const Known& known) const {
    if (known.key.second.empty()) return true;
    const auto found = model_.trie.find(known.key);
    return found != model_.trie.end() && found->second.incarnation == known.incarnation;
  }

  void compare() {
    const Seen seen = see(tree_);
    CHECK(seen.trie == ranked(model_.trie));
    std::vector<Key> receipts;
    for (const Open& open : open_) receipts.push_back(open.key);
    CHECK(seen.receipts == receipts);
    for (const Known& known : known_) {
      const auto path = tree_.resolve(known.handle);
      CHECK(path.has_value() == is_live(known));
      CHECK(!path || Key(path->space, path->tokens) == known.key);
    }
  }

  std::mt19937 random_;
  std::int32_t page_size_;
  RadixTree tree_;
  Model model_;
  PageId fresh_page_ = 0;
  std::vector<Known> known_;
  std::vector<Open> open_;
};

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
    (void)tree.commit_insert(tree.plan_row("", Tokens{1, 1, 2, 2, 4, 4}, row, 0, nullptr), 0);
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
        text, [&] { (void)tree->plan_row("", tokens, row, protected_count, held); }));
    CHECK(see(*tree) == before);
  };
  refused("CACHE-5: slot 6 at position 3 is not in its place", {2, 3, 4, 6, 82, 83}, 4, &receipt);
  refused("CACHE-5: 4 tokens are protected without a receipt", {2, 3, 4, 5, 82, 83}, 4, nullptr);
  refused("CACHE-5: the lock covers 4 tokens, but 2 are", {2, 3, 4, 5, 82, 83}, 2, &receipt);
  refused("CACHE-5: row[0 : 4) is not what the lock", {2, 3, 90, 91, 82, 83}, 4, &receipt);
  refused("CACHE-5: page 41 is twice", {2, 3, 4, 5, 82, 83, 82, 83}, 4, &receipt);
  refused("CACHE-5: page 6 beyond the whole ones", {2, 3, 4, 5, 82, 83, 12, 13}, 4, &receipt);
  refused("CACHE-10: page 6 is already in the tree", {2, 3, 4, 5, 12, 13}, 4, &receipt);
  (void)tree->unlock(receipt);
  CHECK(test::throws<ContractError>("CACHE-5: the lock_receipt is not open", [&] {
    (void)tree->plan_row("", Tokens{1, 1}, std::vector<std::int64_t>{2, 3}, 2, &receipt);
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
  CHECK(tree.evict(1).size() == 1);
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
      CHECK(tree.evict(leaf_count).size() == static_cast<std::size_t>(leaf_count));
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
  CHECK(tree.evict(1) == Pages{1});
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
