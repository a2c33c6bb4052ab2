// The radix cache as a map from paths to pages, to compare the tree with.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kvspec/radix_node.hpp"

namespace kvspec::test {

using Tokens = std::vector<Token>;
using Pages = std::vector<PageId>;
using Key = std::pair<std::string, Tokens>;

struct ModelPage {
  PageId page = 0;
  int locks = 0;
  std::uint64_t last = 0;
  std::uint64_t born = 0;
  std::int64_t hits = 0;
  std::int64_t priority = 0;
  bool cut = false;
  bool tombstone = false;
  int swa_locks = 0;
  int incarnation = 0;

  friend bool operator==(const ModelPage&, const ModelPage&) = default;
};

// What becomes of a page that is inserted, and of its pair.
enum class Fate { shared, adopted, duplicate, tail };

struct ModelInsert {
  std::size_t reach = 0;  // pages
  std::vector<Fate> pages;
  std::vector<bool> shares;                // whether the tree held this very page there
  std::vector<std::optional<Fate>> pairs;  // of those that were brought
  std::vector<std::size_t> revived;
};

class Model {
 public:
  // A window of so many pages; 0: none.
  Model(std::size_t page_size, std::string policy, bool whole_nodes, std::size_t window = 0)
      : page_size_(page_size),
        policy_(std::move(policy)),
        whole_nodes_(whole_nodes),
        window_(window) {}

  std::map<Key, ModelPage> trie;

  Key prefix(const Key& key, std::size_t page_count) const {
    const auto stop = static_cast<std::ptrdiff_t>(page_count * page_size_);
    return {key.first, Tokens(key.second.begin(), key.second.begin() + stop)};
  }

  std::size_t resident_count(const Key& key) const {
    std::size_t count = 0;
    while ((count + 1) * page_size_ <= key.second.size() && trie.contains(prefix(key, count + 1))) {
      ++count;
    }
    return count;
  }

  // How much of the key a match covers: what ends in a window of live pages, or has no tombstone.
  std::size_t usable_count(const Key& key) const {
    for (std::size_t count = resident_count(key); count > 0; --count) {
      std::size_t live = 0;
      while (live < count && !trie.at(prefix(key, count - live)).tombstone) ++live;
      if (live == count || (window_ > 0 && live >= window_)) return count;
    }
    return 0;
  }

  std::size_t match(const Key& key) {
    const std::size_t count = usable_count(key);
    ++tick_;
    for (std::size_t at = 1; at <= count; ++at) {
      ModelPage& page = trie[prefix(key, at)];
      page.last = tick_;
      ++page.hits;
      page.cut = page.cut || (whole_nodes_ && at == count);
    }
    return count;
  }

  // What an insert would do, where brought[at] says whether a page of the caller has a pair.
  ModelInsert plan(const Key& key, const Pages& pages, const std::vector<bool>& brought) const {
    const std::size_t known = resident_count(key);
    ModelInsert plan{0, std::vector(pages.size(), Fate::tail), {}, {}, {}};
    for (std::size_t at = 0; at < pages.size(); ++at) {
      const bool was_live = at < known && !trie.at(prefix(key, at + 1)).tombstone;
      const bool same = at < known && trie.at(prefix(key, at + 1)).page == pages[at];
      if (!was_live && brought[at] && at < known) plan.revived.push_back(at);
      if (was_live || brought[at]) plan.reach = at + 1;
      plan.shares.push_back(same);
      plan.pages[at] = same ? Fate::shared : at < known ? Fate::duplicate : Fate::adopted;
    }
    for (std::size_t at = 0; at < pages.size(); ++at) {
      if (at >= plan.reach) plan.pages[at] = Fate::tail;
      plan.pairs.push_back(brought[at] ? std::optional(plan.pages[at]) : std::nullopt);
    }
    for (const std::size_t at : plan.revived) plan.pairs[at] = Fate::adopted;
    return plan;
  }

  std::size_t insert(const Key& key, const Pages& pages, const std::vector<bool>& brought,
                     std::int64_t priority) {
    const ModelInsert plan = this->plan(key, pages, brought);
    const std::size_t known = std::min(resident_count(key), plan.reach);
    ++tick_;
    for (std::size_t at = 1; at <= plan.reach; ++at) {
      const bool fresh = at > known;
      ModelPage& page = trie[prefix(key, at)];
      if (fresh) {
        page = {};
        page.page = pages[at - 1];
        page.born = tick_;
        page.priority = priority;
        page.tombstone = !brought[at - 1];
        page.incarnation = ++incarnation_;
      }
      page.last = tick_;
      page.priority = std::max(page.priority, priority);
      page.cut = page.cut || (whole_nodes_ && (at == known || at == plan.reach));
    }
    for (const std::size_t at : plan.revived) trie[prefix(key, at + 1)].tombstone = false;
    return plan.reach;
  }

  void lock(const Key& key, int by) {
    const std::size_t count = key.second.size() / page_size_;
    for (std::size_t at = 1; at <= count; ++at) {
      trie[prefix(key, at)].locks += by;
      if (at + window_ > count) trie[prefix(key, at)].swa_locks += by;
    }
  }

  bool is_leaf(const Key& key) const {
    const auto next = std::next(trie.find(key));
    if (next == trie.end() || next->first.first != key.first) return true;
    const Tokens& longer = next->first.second;
    return longer.size() <= key.second.size() ||
           !std::equal(key.second.begin(), key.second.end(), longer.begin());
  }

  RadixEviction evict(std::int64_t token_count, std::int64_t swa_token_count) {
    RadixEviction done;
    const auto counts = [this](std::int64_t pages) {
      return pages * static_cast<std::int64_t>(page_size_);
    };
    while (counts(std::ssize(done.pages)) < token_count) {
      const auto victim = first([this](const Key& key, const ModelPage& page) {
        return page.locks == 0 && is_leaf(key);
      });
      if (!victim) break;
      take_leaf(*victim, done);
    }
    while (counts(done.pair_count) < swa_token_count) {
      const auto victim = first([](const Key&, const ModelPage& page) {
        return page.swa_locks == 0 && !page.tombstone;
      });
      if (!victim) break;
      if (is_leaf(*victim)) {
        take_leaf(*victim, done);
      } else {
        trie[*victim].tombstone = true;
        done.tombstones.push_back(trie[*victim].page);
        ++done.pair_count;
      }
    }
    std::erase_if(done.tombstones, [&](PageId page) {
      return std::find(done.pages.begin(), done.pages.end(), page) != done.pages.end();
    });
    if (page_size_ > 1) {
      std::sort(done.pages.begin(), done.pages.end());
      std::sort(done.tombstones.begin(), done.tombstones.end());
    }
    return done;
  }

 private:
  // The eligible page whose key is smallest, and of several on one path the one next to the root.
  template <class Eligible>
  std::optional<Key> first(Eligible eligible) const {
    const Key* found = nullptr;
    for (const auto& [key, page] : trie) {
      if (!eligible(key, page)) continue;
      const bool before = found == nullptr || order(page) < order(trie.at(*found)) ||
                          (order(page) == order(trie.at(*found)) &&
                           key.second.size() < found->second.size());
      if (before) found = &key;
    }
    return found == nullptr ? std::nullopt : std::optional(*found);
  }

  // A leaf and, at node granularity, its ancestors back to the last cut; with windows the
  // tombstones that are then leaves.
  void take_leaf(Key key, RadixEviction& done) {
    bool more = true;
    while (more) {
      const ModelPage page = trie[key];
      done.pages.push_back(page.page);
      done.pair_count += window_ > 0 && !page.tombstone ? 1 : 0;
      trie.erase(key);
      key = prefix(key, key.second.size() / page_size_ - 1);
      if (key.second.empty()) return;
      more = whole_nodes_ ? !trie[key].cut : trie[key].tombstone && is_leaf(key);
    }
  }

  std::pair<std::int64_t, std::uint64_t> order(const ModelPage& page) const {
    const auto last = static_cast<std::int64_t>(page.last);
    const auto born = static_cast<std::int64_t>(page.born);
    if (policy_ == "lru") return {last, 0};
    if (policy_ == "mru") return {-last, 0};
    if (policy_ == "fifo") return {born, 0};
    if (policy_ == "filo") return {-born, 0};
    if (policy_ == "lfu") return {page.hits, page.last};
    if (policy_ == "slru") return {page.hits >= 1 ? 1 : 0, page.last};
    return {page.priority, page.last};
  }

  std::size_t page_size_;
  std::string policy_;
  bool whole_nodes_;
  std::size_t window_;
  std::uint64_t tick_ = 0;
  int incarnation_ = 0;
};

}  // namespace kvspec::test
