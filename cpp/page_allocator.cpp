#include "kvspec/page_allocator.hpp"

#include <algorithm>
#include <cstddef>
#include <limits>

#include "kvspec/contract.hpp"

namespace kvspec {
namespace {

// The sum of two counts, or the largest count there is.
std::uint64_t saturating_sum(std::uint64_t a, std::uint64_t b) noexcept {
  constexpr std::uint64_t kLargest = std::numeric_limits<std::uint64_t>::max();
  return a > kLargest - b ? kLargest : a + b;
}

}  // namespace

PagedTokenToKVPoolAllocator::PagedTokenToKVPoolAllocator(std::int64_t size, std::int64_t page_size,
                                                         bool need_sort)
    : PagedTokenToKVPoolAllocator(kPageAllocator, size, page_size, need_sort) {}

PagedTokenToKVPoolAllocator::PagedTokenToKVPoolAllocator(const AllocatorKind& kind,
                                                         std::int64_t size, std::int64_t page_size,
                                                         bool need_sort)
    : PageBooks(kind, size, page_size, need_sort) {}

std::optional<Slots> PagedTokenToKVPoolAllocator::alloc_extend(
    std::span<const std::int64_t> prefix_lens, std::span<const std::int64_t> seq_lens,
    std::span<const std::int64_t> last_loc, std::int64_t extend_num_tokens) {
  return extend("alloc_extend", {prefix_lens, seq_lens, last_loc, /*decode=*/false},
                extend_num_tokens);
}

std::optional<Slots> PagedTokenToKVPoolAllocator::alloc_decode(
    std::span<const std::int64_t> seq_lens, std::span<const std::int64_t> last_loc) {
  return extend("alloc_decode", {{}, seq_lens, last_loc, /*decode=*/true},
                static_cast<std::int64_t>(seq_lens.size()));
}

std::optional<Slots> PagedTokenToKVPoolAllocator::extend(const char* name, const Requests& requests,
                                                         std::int64_t extend_num_tokens) {
  reporter().guard(name);
  const std::uint64_t needed = require_continuable(requests, extend_num_tokens);
  if (needed > available_page_count()) return std::nullopt;
  const auto page_count = static_cast<std::size_t>(needed);
  Slots slots(static_cast<std::size_t>(extend_num_tokens));
  Slots moved = room_for_report(page_count);

  take(page_count);
  place(requests, page_count, slots.span());
  report_taken(name, page_count, moved);
  return slots;
}

void PagedTokenToKVPoolAllocator::report_taken(const char* name, std::size_t page_count,
                                               Slots& moved) noexcept {
  if (!reporter().attached() || page_count == 0) return;
  write_taken(page_count, moved.span());
  reporter().report(name, moved.span());
}

std::uint64_t PagedTokenToKVPoolAllocator::require_continuable(const Requests& requests,
                                                               std::int64_t extend_num_tokens) {
  const std::size_t prefixes = requests.decode ? requests.count() : requests.prefix_lens.size();
  if (prefixes != requests.count() || requests.last_loc.size() != requests.count()) {
    refuse(kind().requests, "the lists of requests have " + std::to_string(prefixes) + ", " +
                                std::to_string(requests.count()) + " and " +
                                std::to_string(requests.last_loc.size()) + " entries");
  }
  std::uint64_t tokens = 0;
  std::uint64_t pages = 0;
  std::size_t good = 0;
  for (; good < requests.count() && continuable(requests, good); ++good) {
    const std::int64_t prefix = requests.prefix(good);
    const std::int64_t length = requests.length(good);
    const std::int64_t new_pages = pages_for(length) - pages_for(prefix);
    tokens = saturating_sum(tokens, static_cast<std::uint64_t>(length - prefix));
    pages = saturating_sum(pages, static_cast<std::uint64_t>(new_pages));
    if (requests.continues(good, page_size())) {
      state(requests.last_loc[good] / page_size()) = State::named;
    }
  }
  for (std::size_t request = 0; request < good; ++request) {
    if (requests.continues(request, page_size())) {
      state(requests.last_loc[request] / page_size()) = State::held;
    }
  }
  if (good < requests.count()) refuse_request(requests, good);
  if (extend_num_tokens < 0 || tokens != static_cast<std::uint64_t>(extend_num_tokens)) {
    refuse(kind().requests, "extend_num_tokens is " + std::to_string(extend_num_tokens) +
                                ", but " + std::to_string(tokens) + " are new");
  }
  return pages;
}

// Whether a request is as PAGE-8 and SWA-7 ask, after those before it, whose pages are named.
bool PagedTokenToKVPoolAllocator::continuable(const Requests& requests,
                                              std::size_t request) const noexcept {
  const std::int64_t prefix = requests.prefix(request);
  const std::int64_t slot = requests.last_loc[request];
  if (prefix < 0 || prefix > requests.length(request)) return false;
  if (prefix == 0) return slot == -1;
  const std::int64_t page = slot / page_size();
  if (slot < 0 || !is_held(page)) return false;
  if (slot % page_size() != (prefix - 1) % page_size()) return false;
  if (!requests.continues(request, page_size())) return true;
  return (requests.pairs == nullptr || requests.pairs[page] != 0) && !is_named(page);
}

// Says what is wrong with a request that is not continuable.
void PagedTokenToKVPoolAllocator::refuse_request(const Requests& requests,
                                                 std::size_t request) const {
  const auto text = [](auto number) { return std::to_string(number); };
  const std::int64_t prefix = requests.prefix(request);
  const std::int64_t length = requests.length(request);
  const std::int64_t slot = requests.last_loc[request];
  const std::int64_t page = page_of(slot);
  const char* const clause = kind().requests;
  const std::string subject = "request " + text(request);
  if (prefix < 0 || prefix > length) {
    refuse(clause, subject + " goes from " + text(prefix) + " to " + text(length) + " tokens");
  }
  if (prefix == 0) refuse(clause, subject + " has no prefix, but last_loc " + text(slot));
  const std::string continued = subject + " continues slot " + text(slot) + ", ";
  if (!is_held(page)) refuse(clause, continued + "but page " + text(page) + " is not held");
  if (slot % page_size() != (prefix - 1) % page_size()) {
    refuse(clause, continued + "where token " + text(prefix - 1) + " cannot be");
  }
  if (requests.pairs != nullptr && requests.pairs[page] == 0) {
    refuse(clause, continued + "but page " + text(page) + " has no window page");
  }
  std::size_t other = 0;
  while (!requests.continues(other, page_size()) || page_of(requests.last_loc[other]) != page) {
    ++other;
  }
  refuse(clause, "requests " + text(other) + " and " + text(request) +
                     " continue the same page " + text(page));
}

// An aligned position is the first slot of the next page, another follows the one before.
void PagedTokenToKVPoolAllocator::place(const Requests& requests, std::size_t page_count,
                                        std::span<std::int64_t> slots) const noexcept {
  std::size_t pages_used = 0;
  std::size_t filled = 0;
  for (std::size_t request = 0; request < requests.count(); ++request) {
    std::int64_t position = requests.prefix(request);
    const std::int64_t length = requests.length(request);
    std::int64_t slot = requests.last_loc[request] + 1;
    while (position < length) {
      const std::int64_t offset = position % page_size();
      if (offset == 0) slot = page_size() * taken(page_count, pages_used++);
      const std::int64_t run = std::min(page_size() - offset, length - position);
      for (std::int64_t i = 0; i < run; ++i) slots[filled++] = slot + i;
      position += run;
    }
  }
}

std::int64_t PagedTokenToKVPoolAllocator::pages_for(std::int64_t tokens) const noexcept {
  return tokens / page_size() + (tokens % page_size() != 0 ? 1 : 0);
}

}  // namespace kvspec
