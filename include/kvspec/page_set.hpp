// A set of pages as a bitmap in blocks, so that it costs memory only where pages are.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvspec/slots.hpp"

namespace kvspec {

class PageSet {
 public:
  bool contains(PageId page) const noexcept {
    const std::size_t word = static_cast<std::size_t>(page) / 64;
    const std::size_t index = word / kWords;
    if (index >= blocks_.size() || blocks_[index] == nullptr) return false;
    return ((*blocks_[index])[word % kWords] >> (static_cast<std::size_t>(page) % 64) & 1) != 0;
  }

  // Makes add() of these pages no-throw.  REQUIRES: pages are not negative.  O(pages).
  void reserve(std::span<const PageId> pages) {
    Words words(pages);
    while (words.next()) {
      const std::size_t index = words.word() / kWords;
      if (index < blocks_.size() && blocks_[index] != nullptr) continue;
      if (index >= blocks_.size()) blocks_.resize(std::max(index + 1, blocks_.size() * 2));
      blocks_[index] = std::make_unique<Block>();
    }
  }

  // Adds the pages, or finds the first that is already there and adds none.
  // REQUIRES: reserve(pages).  O(pages).
  std::optional<PageId> add(std::span<const PageId> pages) noexcept {
    Words words(pages);
    while (words.next()) {
      std::uint64_t& word = at(words.word());
      if (const std::uint64_t known = word & words.bits(); known != 0) {
        remove(pages.first(words.start()));
        const auto low = static_cast<std::size_t>(std::countr_zero(known));
        return static_cast<PageId>(words.word() * 64 + low);
      }
      word |= words.bits();
    }
    return std::nullopt;
  }

  // REQUIRES: the pages were added.  O(pages).
  void remove(std::span<const PageId> pages) noexcept {
    Words words(pages);
    while (words.next()) at(words.word()) &= ~words.bits();
  }

  void clear() noexcept { blocks_.clear(); }

  // The pages, ascending.  O(pages + blocks).
  std::vector<PageId> sorted() const {
    std::vector<PageId> pages;
    for (std::size_t index = 0; index < blocks_.size(); ++index) {
      if (blocks_[index] == nullptr) continue;
      for (std::size_t at = 0; at < kWords; ++at) {
        for (std::uint64_t left = (*blocks_[index])[at]; left != 0; left &= left - 1) {
          const std::size_t low = static_cast<std::size_t>(std::countr_zero(left));
          pages.push_back(static_cast<PageId>((index * kWords + at) * 64 + low));
        }
      }
    }
    return pages;
  }

 private:
  static constexpr std::size_t kWords = 512;
  using Block = std::array<std::uint64_t, kWords>;

  // Walks pages in steps of ascending neighbours in one word, so that a run costs a step a word.
  class Words {
   public:
    explicit Words(std::span<const PageId> pages) : pages_(pages) {}

    bool next() noexcept {
      start_ = stop_;
      if (start_ == pages_.size()) return false;
      const PageId first = pages_[start_];
      const std::size_t low = static_cast<std::size_t>(first) % 64;
      const std::size_t limit = std::min(pages_.size() - start_, 64 - low);
      std::size_t count = 1;
      while (count < limit && pages_[start_ + count] == first + static_cast<PageId>(count)) ++count;
      stop_ = start_ + count;
      word_ = static_cast<std::size_t>(first) / 64;
      bits_ = (~std::uint64_t{0} >> (64 - count)) << low;
      return true;
    }

    std::size_t start() const noexcept { return start_; }
    std::size_t word() const noexcept { return word_; }
    std::uint64_t bits() const noexcept { return bits_; }

   private:
    std::span<const PageId> pages_;
    std::size_t start_ = 0;  // the step is pages_[start_ : stop_)
    std::size_t stop_ = 0;
    std::size_t word_ = 0;
    std::uint64_t bits_ = 0;
  };

  std::uint64_t& at(std::size_t word) noexcept { return (*blocks_[word / kWords])[word % kWords]; }

  std::vector<std::unique_ptr<Block>> blocks_;  // kWords words each; null where no page ever was
};

// The pages of these slots, each once, in order of first appearance.  REQUIRES: slots are in
// [0, 2^31); otherwise `clause` is broken.  O(slots).
inline std::vector<PageId> distinct_pages(std::span<const std::int64_t> slots,
                                          std::int32_t page_size, std::string_view clause) {
  PageSet seen;
  std::vector<PageId> pages;
  for (const std::int64_t slot : slots) {
    if (slot < 0 || slot >> 31 != 0) {
      refuse(clause, "slot " + std::to_string(slot) + " is not in [0, 2^31)");
    }
    const PageId page = static_cast<PageId>(slot / page_size);
    if (!pages.empty() && pages.back() == page) continue;
    seen.reserve({&page, 1});
    if (!seen.add({&page, 1})) pages.push_back(page);
  }
  return pages;
}

}  // namespace kvspec
