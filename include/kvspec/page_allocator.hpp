// Page allocator: hands out whole pages of KV slots, and extends requests into them.  Spec: PAGE.
//
// Page books whose pages have page_size slots: page p is [p * page_size, (p + 1) * page_size).  How
// far a held page is filled is its holder's business.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>

#include "kvspec/page_books.hpp"
#include "kvspec/slots.hpp"

namespace kvspec {

inline constexpr AllocatorKind kPageAllocator{
    .room = "page_allocator",
    .unit = "page",
    .size_name = "size",
    .freed = "pages were freed",
    .books = "PAGE-1",
    .sink = "PAGE-2",
    .amount = "PAGE-5",
    .given_back = "PAGE-10",
    .group = "PAGE-12",
    .ticket = "PAGE-15",
    .argument = "PAGE-17",
    .requests = "PAGE-8",
    .pages = true,
};

class PagedTokenToKVPoolAllocator : public PageBooks {
 public:
  // Owns the pages 1 .. size / page_size.  REQUIRES: page_size >= 1, 0 <= size < 2^31 - page_size
  // (PAGE-17).  O(pages).
  PagedTokenToKVPoolAllocator(std::int64_t size, std::int64_t page_size, bool need_sort);

  // The slots for positions [prefix, seq) of each request, one request after the other, or nullopt
  // and no change (PAGE-4, PAGE-6).  REQUIRES: what PAGE-8 lists.  O(extend_num_tokens + requests)
  // but for a merge.
  std::optional<Slots> alloc_extend(std::span<const std::int64_t> prefix_lens,
                                    std::span<const std::int64_t> seq_lens,
                                    std::span<const std::int64_t> last_loc,
                                    std::int64_t extend_num_tokens);

  // The slot for position seq - 1 of each request, or nullopt and no change (PAGE-4, PAGE-7).
  // REQUIRES: what PAGE-8 lists, for the prefix seq - 1.  O(requests) but for a merge.
  std::optional<Slots> alloc_decode(std::span<const std::int64_t> seq_lens,
                                    std::span<const std::int64_t> last_loc);

 protected:
  // A batch as both calls see it: a decode is an extension by one token.
  struct Requests {
    std::span<const std::int64_t> prefix_lens;  // empty for a decode
    std::span<const std::int64_t> seq_lens;
    std::span<const std::int64_t> last_loc;
    bool decode;
    const PageId* pairs = nullptr;  // by page, 0 for one without a pair; null if none needs one

    std::size_t count() const noexcept { return seq_lens.size(); }
    std::int64_t length(std::size_t request) const noexcept { return seq_lens[request]; }
    std::int64_t prefix(std::size_t request) const noexcept {
      if (!decode) return prefix_lens[request];
      return std::max(seq_lens[request], std::numeric_limits<std::int64_t>::min() + 1) - 1;
    }
    // Whether the request's first new token goes into the page of last_loc.
    bool continues(std::size_t request, std::int64_t page_size) const noexcept {
      return prefix(request) % page_size != 0 && prefix(request) < length(request);
    }
  };

  PagedTokenToKVPoolAllocator(const AllocatorKind& kind, std::int64_t size, std::int64_t page_size,
                              bool need_sort);

  // How many pages the new tokens begin, or a refusal (PAGE-8, SWA-7).  O(requests).
  std::uint64_t require_continuable(const Requests& requests, std::int64_t extend_num_tokens);
  // Writes the new tokens' slots, of the last `page_count` pages taken (PAGE-6).  O(slots).
  void place(const Requests& requests, std::size_t page_count,
             std::span<std::int64_t> slots) const noexcept;
  // Tells of `page_count` pages taken, if any, in room_for_report(page_count).
  void report_taken(const char* name, std::size_t page_count, Slots& moved) noexcept;

 private:
  std::optional<Slots> extend(const char* name, const Requests& requests,
                              std::int64_t extend_num_tokens);
  bool continuable(const Requests& requests, std::size_t request) const noexcept;
  [[noreturn]] void refuse_request(const Requests& requests, std::size_t request) const;
  std::int64_t pages_for(std::int64_t tokens) const noexcept;
};

}  // namespace kvspec
