// The radix cache as a map from paths to pages, to compare the tree with.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <string>
#include <tuple>
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
  int incarnation = 0;

  friend bool operator==(const ModelPage&, const ModelPage&) = default;
};

class Model {
 public:
  Model(std::size_t page_size, std::string policy, bool whole_nodes)
      : page_size_(page_size), policy_(std::move(policy)), whole_nodes_(whole_nodes) {}

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

  std::size_t match(const Key& key) {
    const std::size_t count = resident_count(key);
    ++tick_;
    for (std::size_t at = 1; at <= count; ++at) {
      ModelPage& page = trie[prefix(key, at)];
      page.last = tick_;
      ++page.hits;
      page.cut = page.cut || (whole_nodes_ && at == count);
    }
    return count;
  }

  void insert(const Key& key, const Pages& pages, std::int64_t priority) {
    const std::size_t known = resident_count(key);
    ++tick_;
    for (std::size_t at = 1; at <= pages.size(); ++at) {
      const bool fresh = at > known;
      ModelPage& page = trie[prefix(key, at)];
      if (fresh) page = {pages[at - 1], 0, 0, tick_, 0, priority, false, ++incarnation_};
      page.last = tick_;
      page.priority = std::max(page.priority, priority);
      page.cut = page.cut || (whole_nodes_ && (at == known || at == pages.size()));
    }
  }

  void lock(const Key& key, int by) {
    for (std::size_t at = 1; at * page_size_ <= key.second.size(); ++at) {
      trie[prefix(key, at)].locks += by;
    }
  }

  bool is_leaf(const Key& key) const {
    const auto next = std::next(trie.find(key));
    if (next == trie.end() || next->first.first != key.first) return true;
    const Tokens& longer = next->first.second;
    return longer.size() <= key.second.size() ||
           !std::equal(key.second.begin(), key.second.end(), longer.begin());
  }

  Pages evict(std::int64_t token_count) {
    Pages evicted;
    while (static_cast<std::int64_t>(evicted.size() * page_size_) < token_count) {
      const Key* victim = nullptr;
      for (const auto& [key, page] : trie) {
        if (page.locks > 0 || !is_leaf(key)) continue;
        if (victim == nullptr || order(page) < order(trie[*victim])) victim = &key;
      }
      if (victim == nullptr) break;
      Key key = *victim;
      do {
        evicted.push_back(trie[key].page);
        trie.erase(key);
        key = prefix(key, key.second.size() / page_size_ - 1);
      } while (whole_nodes_ && !key.second.empty() && !trie[key].cut);
    }
    return evicted;
  }

 private:
  std::tuple<std::int64_t, std::uint64_t, std::uint64_t> order(const ModelPage& page) const {
    const auto last = static_cast<std::int64_t>(page.last);
    const auto born = static_cast<std::int64_t>(page.born);
    if (policy_ == "lru") return {last, 0, page.born};
    if (policy_ == "mru") return {-last, 0, page.born};
    if (policy_ == "fifo") return {born, 0, page.born};
    if (policy_ == "filo") return {-born, 0, page.born};
    if (policy_ == "lfu") return {page.hits, page.last, page.born};
    if (policy_ == "slru") return {page.hits >= 1 ? 1 : 0, page.last, page.born};
    return {page.priority, page.last, page.born};
  }

  std::size_t page_size_;
  std::string policy_;
  bool whole_nodes_;
  std::uint64_t tick_ = 0;
  int incarnation_ = 0;
};

}  // namespace kvspec::test
