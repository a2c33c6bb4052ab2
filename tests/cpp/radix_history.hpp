// A radix tree beside its model, and random histories of both.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <optional>
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
  static void forget_windows(RadixTree& tree) { tree.windows_.clear(); }
  static void forget_receipt(RadixTree& tree, std::size_t slot) { tree.receipts_[slot].id = 0; }
  static std::int64_t& evictable_pages(RadixTree& tree) { return tree.evictable_pages_; }
  static std::int64_t& protected_pages(RadixTree& tree) { return tree.protected_pages_; }
  static std::int64_t& swa_evictable_pages(RadixTree& tree) { return tree.swa_evictable_pages_; }
  static std::int64_t& swa_protected_pages(RadixTree& tree) { return tree.swa_protected_pages_; }
  static std::int64_t& window_pages(RadixTree& tree) { return tree.window_pages_; }
  static std::size_t node_count(const RadixTree& tree) {
    return tree.nodes_.size() - tree.free_node_count_;
  }
};

namespace test {

using Access = RadixTreeTestAccess;

// ---- what can be seen of a tree ----

inline Pages pages_in(const Slots& slots, std::int32_t page_size) {
  return pages_of(slots.span(), page_size);
}

inline std::map<Key, ModelPage> trie_of(const RadixTree& tree) {
  std::map<Key, ModelPage> trie;
  for (const RadixPage& page : tree.pages()) {
    const int locks = static_cast<int>(page.locks);
    const int swa_locks = static_cast<int>(page.swa_locks);
    trie[{page.path.space, page.path.tokens}] = {page.page, locks,         page.last,
                                                 page.born, page.hits,     page.priority,
                                                 page.cut,  page.tombstone, swa_locks, 0};
  }
  return trie;
}

// The model's trie with ranks for ticks and without incarnations.
inline std::map<Key, ModelPage> ranked(std::map<Key, ModelPage> trie) {
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
  std::int64_t swa_evictable;
  std::int64_t swa_locked;

  friend bool operator==(const Seen&, const Seen&) = default;
};

inline Seen see(const RadixTree& tree) {
  std::vector<Key> receipts;
  for (RadixPath& path : tree.open_receipts()) receipts.emplace_back(path.space, path.tokens);
  tree.check();
  return {trie_of(tree), receipts, tree.digest(), tree.evictable_token_count(),
          tree.protected_token_count(), tree.swa_evictable_token_count(),
          tree.swa_protected_token_count()};
}

inline RadixHandle insert(RadixTree& tree, const Tokens& tokens, Pages pages,
                          const char* space = "", std::int64_t priority = 0) {
  return tree.commit_insert(tree.plan_pages(space, tokens, std::move(pages)), priority);
}

// The same in a tree with windows: where `pairs` is above 0 the page has one; none: all have.
inline RadixHandle insert_pairs(RadixTree& tree, const Tokens& tokens, Pages pages,
                                const std::vector<std::int64_t>& pairs, const char* space = "") {
  InsertPlan plan = tree.plan_pages(space, tokens, std::move(pages));
  tree.add_pairs(plan, pairs);
  return tree.commit_insert(std::move(plan), 0);
}

// ---- a random history ----

class History {
 public:
  // With a window of so many pages; 0: without.
  History(std::uint32_t seed, const char* policy, bool whole_nodes, std::int32_t page_size,
          std::int32_t window = 0)
      : random_(seed),
        page_size_(page_size),
        window_(window),
        tree_(page_size, policy, whole_nodes ? "node" : "page",
              window == 0 ? 0 : (window - 1) * page_size + 1),
        model_(static_cast<std::size_t>(page_size), policy, whole_nodes,
               static_cast<std::size_t>(window)) {}

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
      while (open_.size() > 8) unlock();
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
          model_.usable_count(key) * static_cast<std::size_t>(page_size_));
  }

  void insert_random() {
    const Key key = draw_key();
    const std::size_t known = model_.resident_count(key);
    Pages pages;
    std::vector<bool> brought;
    for (std::size_t at = 0; (at + 1) * static_cast<std::size_t>(page_size_) <= key.second.size();
         ++at) {
      const bool same = at < known && draw(2) == 0;
      const ModelPage* held = at < known ? &model_.trie[model_.prefix(key, at + 1)] : nullptr;
      pages.push_back(same ? held->page : ++fresh_page_);
      brought.push_back(window_ == 0 || (same ? !held->tombstone : draw(4) != 0));
    }
    const ModelInsert expected = model_.plan(key, pages, brought);
    const bool locks = draw(window_ > 0 ? 2 : 6) == 0;
    InsertPlan plan = locks ? plan_row(key, pages) : tree_.plan_pages(key.first, key.second, pages);
    if (window_ > 0) {
      std::vector<std::int64_t> pairs;
      for (const bool has_pair : brought) pairs.push_back(has_pair ? 7 : 0);
      if (shares_beyond(expected)) {
        const char* clause = locks ? "CACHE-5" : "CACHE-10";
        CHECK(throws<ContractError>(clause, [&] { tree_.add_pairs(plan, pairs); }));
        return;
      }
      tree_.add_pairs(plan, pairs);
      compare_plan(plan, expected);
    }
    if (draw(4) == 0) return;  // an abandoned plan does nothing
    CHECK(plan.resident.size() == std::min(known, plan.reach));
    if (locks) {
      commit_row(std::move(plan), key, pages, brought);
    } else {
      const std::int64_t priority = static_cast<std::int64_t>(draw(4)) - 1;
      const RadixHandle handle = tree_.commit_insert(std::move(plan), priority);
      remember(handle, model_.prefix(key, model_.insert(key, pages, brought, priority)));
    }
  }

  // The same pages as a request's row, of which nothing is cached yet.
  InsertPlan plan_row(const Key& key, const Pages& pages) {
    const Key whole = model_.prefix(key, pages.size());
    const Slots row = slots_of(pages, page_size_);
    return tree_.plan_row(key.first, whole.second, row.span(), 0, nullptr, true);
  }

  // Whether a page that is not taken is the tree's already.
  static bool shares_beyond(const ModelInsert& expected) {
    for (std::size_t at = expected.reach; at < expected.shares.size(); ++at) {
      if (expected.shares[at]) return true;
    }
    return false;
  }

  void commit_row(InsertPlan plan, const Key& key, const Pages& pages,
                  const std::vector<bool>& brought) {
    std::optional<RadixReceipt> receipt;
    {
      const FailNthAllocation armed(1);  // the plan has taken all memory
      receipt = tree_.commit_row(std::move(plan));
    }
    const Key reached = model_.prefix(key, model_.insert(key, pages, brought, 0));
    remember(receipt->node, reached);
    opened(*receipt, reached);
  }

  void compare_plan(const InsertPlan& plan, const ModelInsert& expected) {
    CHECK(plan.reach == expected.reach);
    CHECK(plan.revived == expected.revived);
    const auto sorted = [this](const auto& ranges, Fate fate, auto& fates) {
      for (const auto& [start, stop] : ranges) {
        for (std::int64_t at = start; at < stop; at += page_size_) {
          const auto page = static_cast<std::size_t>(at / page_size_);
          if (page < fates.size()) fates[page] = fate;
        }
      }
    };
    std::vector<Fate> pages(expected.pages.size());
    std::vector<std::optional<Fate>> pairs(expected.pages.size());
    sorted(plan.shared, Fate::shared, pages);
    sorted(plan.adopted, Fate::adopted, pages);
    sorted(plan.duplicate, Fate::duplicate, pages);
    sorted(plan.tail, Fate::tail, pages);
    sorted(plan.swa.shared, Fate::shared, pairs);
    sorted(plan.swa.adopted, Fate::adopted, pairs);
    sorted(plan.swa.duplicate, Fate::duplicate, pairs);
    sorted(plan.swa.tail, Fate::tail, pairs);
    CHECK(pages == expected.pages);
    CHECK(pairs == expected.pairs);
  }

  void evict() {
    const std::int64_t count = draw(3) == 0 ? draw(100) : draw(6);
    const std::int64_t swa_count = window_ == 0 ? 0 : draw(3) == 0 ? draw(100) : draw(12);
    const std::int64_t given = window_ > 0 && draw(2) == 0 ? 0 : count;
    if (draw(2) == 0) {
      const Seen before = see(tree_);
      (void)tree_.evict(given, swa_count);
      tree_.evict_undo();
      CHECK(see(tree_) == before);
      compare();
    }
    CHECK(tree_.evict(given, swa_count) == model_.evict(given, swa_count));
    if (draw(2) == 0) tree_.evict_commit();
  }

  void lock() {
    if (known_.empty()) return;
    const Known& known = known_[draw(static_cast<std::uint32_t>(known_.size()))];
    if (!is_live(known)) {
      CHECK(throws<ContractError>("CACHE-13", [&] { (void)tree_.lock(known.handle); }));
    } else if (model_.usable_count(known.key) * static_cast<std::size_t>(page_size_) <
               known.key.second.size()) {
      CHECK(throws<ContractError>("SWARADIX-11", [&] { (void)tree_.lock(known.handle); }));
    } else {
      const std::int64_t before = tree_.evictable_token_count();
      opened(tree_.lock(known.handle), known.key);
      CHECK(open_.back().receipt.delta == tree_.evictable_token_count() - before);
    }
  }

  void opened(const RadixReceipt& receipt, const Key& key) {
    open_.push_back({receipt, key});
    model_.lock(key, 1);
    const auto length = static_cast<std::int64_t>(key.second.size());
    CHECK(tree_.locked_token_count(receipt) == length);
    CHECK(receipt.swa_uuid().has_value() == (window_ > 0 && length > window_ * page_size_));
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
    CHECK(throws<ContractError>("CACHE-13: the receipt has been consumed",
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
  std::int32_t window_;
  RadixTree tree_;
  Model model_;
  PageId fresh_page_ = 0;
  std::vector<Known> known_;
  std::vector<Open> open_;
};

}  // namespace test
}  // namespace kvspec
