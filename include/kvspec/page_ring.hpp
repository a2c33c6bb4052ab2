// Page ring: a list of pages that changes at both ends without allocating.  Spec: SLOT, PAGE.
//
// What pop_front took stays readable behind the head, and unpop puts it back, until a push writes
// over it; a ring of capacity P that holds pages of 1 .. P, each once, never writes over the pages
// that are still held.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <span>
#include <vector>

#include "kvspec/slots.hpp"

namespace kvspec {

class PageRing {
 public:
  using Pieces = std::array<std::span<const PageId>, 2>;

  // O(capacity).
  explicit PageRing(std::size_t capacity)
      : pages_(std::bit_ceil(std::max<std::size_t>(capacity, 1))), mask_(pages_.size() - 1) {}

  std::size_t size() const noexcept { return size_; }
  PageId operator[](std::size_t i) const noexcept { return pages_[(head_ + i) & mask_]; }

  // REQUIRES: there is room for them.  O(pages).
  void push_back(std::span<const PageId> pages) noexcept {
    size_ += pages.size();
    assign(size_ - pages.size(), pages);
  }
  void push_front(std::span<const PageId> pages) noexcept {
    head_ -= pages.size();
    size_ += pages.size();
    assign(0, pages);
  }

  // Holds these pages instead; what was popped stays readable.  REQUIRES: room.  O(pages).
  void replace(std::span<const PageId> pages) noexcept {
    size_ = pages.size();
    assign(0, pages);
  }

  // REQUIRES: count <= size().  O(1).
  void pop_front(std::size_t count) noexcept {
    head_ += count;
    size_ -= count;
  }

  // The page popped `back` pages ago: popped(1) is the last one.
  PageId popped(std::size_t back) const noexcept { return pages_[(head_ - back) & mask_]; }
  // The last `count` pages popped, oldest first, in the two pieces in which they lie.
  Pieces last_popped(std::size_t count) const noexcept { return pieces(head_ - count, count); }
  // All pages, front first, in two pieces.
  Pieces pieces() const noexcept { return pieces(head_, size_); }

  // Undoes pop_front.  REQUIRES: nothing was pushed to the front since.  O(1).
  void unpop(std::size_t count) noexcept {
    head_ -= count;
    size_ += count;
  }

  void clear() noexcept { head_ = size_ = 0; }

  // A copy, front first.
  std::vector<PageId> copy() const {
    const auto [first, second] = pieces();
    std::vector<PageId> pages(first.begin(), first.end());
    pages.insert(pages.end(), second.begin(), second.end());
    return pages;
  }

 private:
  // Writes over the pages from place i on.
  void assign(std::size_t i, std::span<const PageId> pages) noexcept {
    const std::size_t start = (head_ + i) & mask_;
    const std::size_t before_wrap = std::min(pages.size(), pages_.size() - start);
    std::ranges::copy(pages.first(before_wrap), pages_.data() + start);
    std::ranges::copy(pages.subspan(before_wrap), pages_.data());
  }

  Pieces pieces(std::size_t from, std::size_t count) const noexcept {
    const std::size_t start = from & mask_;
    const std::size_t before_wrap = std::min(count, pages_.size() - start);
    return {std::span(pages_).subspan(start, before_wrap),
            std::span(pages_).first(count - before_wrap)};
  }

  std::vector<PageId> pages_;  // a power of two of places
  std::size_t mask_;
  std::size_t head_ = 0;  // place of the front, before masking
  std::size_t size_ = 0;
};

}  // namespace kvspec
