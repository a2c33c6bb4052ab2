// Both allocators by themselves: a model beside random calls, memory that runs out, planted faults.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <iterator>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.hpp"
#include "kvspec/contract.hpp"
#include "kvspec/page_allocator.hpp"
#include "kvspec/slot_allocator.hpp"

namespace kvspec {

// Breaks the books behind the back of an allocator.
struct PlantedFault {
  static void list_the_sink(PageBooks& books) {
    const PageId sink = 0;
    books.free_.pop_front(1);
    books.free_.push_front({&sink, 1});
  }
  static void list_a_page_twice(PageBooks& books) {
    const PageId page = books.free_[1];
    books.free_.pop_front(1);
    books.free_.push_front({&page, 1});
  }
  static void list_an_unknown_page(PageBooks& books) { books.pending_.push_back(99); }
  static void lose_a_page(PageBooks& books) { books.free_.pop_front(1); }
  static void list_a_held_page(PageBooks& books, PageId page) { books.free_.push_back({&page, 1}); }
};

namespace {

using Numbers = std::vector<std::int64_t>;

constexpr std::int64_t kPageSize = 4;
constexpr std::int64_t kPageCount = 12;

template <class Allocator>
std::unique_ptr<Allocator> make(bool need_sort) {
  if constexpr (std::is_same_v<Allocator, TokenToKVPoolAllocator>) {
    return std::make_unique<Allocator>(kPageCount, need_sort);
  } else {
    return std::make_unique<Allocator>(kPageCount * kPageSize, kPageSize, need_sort);
  }
}

Numbers numbers(const std::optional<Slots>& slots) {
  const auto given = slots.value().span();
  return {given.begin(), given.end()};
}

// Lists of every kind, a group that is open, a merge to come, and a ticket with pages to put back.
template <class Allocator>
struct Busy {
  explicit Busy(bool need_sort) : subject(make<Allocator>(need_sort)) {
    const std::int64_t unit = subject->page_size();
    subject->alloc(7 * unit);
    subject->free(Numbers{5 * unit, 3 * unit});
    subject->free_group_begin();
    subject->free(Numbers{1 * unit, 2 * unit});
    ticket = subject->backup_state();
    subject->alloc(4 * unit);
    view = subject->view();
    digest = subject->digest();
  }

  void require_unchanged() const {
    CHECK(subject->view() == view);
    CHECK(subject->digest() == digest);
    subject->check();
  }

  std::unique_ptr<Allocator> subject;
  PageBooks::Ticket ticket;
  AllocatorView view;
  std::uint64_t digest = 0;
};

// Runs `action` on busy books with every allocation failing in turn; then it must have succeeded.
template <class Allocator>
std::int64_t survives(const std::function<void(Busy<Allocator>&)>& action, Observer observer = {}) {
  std::int64_t allocations = 0;
  for (const bool need_sort : {false, true}) {
    allocations = test::fail_each_allocation(
        [&] {
          Busy<Allocator> busy(need_sort);
          busy.subject->attach(observer);
          return busy;
        },
        action,
        [](const Busy<Allocator>& busy) {
          busy.require_unchanged();
          busy.subject->restore_state(busy.ticket);  // a call that failed ends no ticket
          busy.subject->check();
        });
  }
  return allocations;
}

template <class Allocator>
void survive_every_call(Observer observer) {
  using Subject = Busy<Allocator>;
  const std::int64_t unit = make<Allocator>(false)->page_size();
  survives<Allocator>([&](Subject& busy) { busy.subject->alloc(2 * unit); }, observer);
  survives<Allocator>([&](Subject& busy) { busy.subject->free(Numbers{4 * unit, 6 * unit}); },
                      observer);
  survives<Allocator>([](Subject& busy) { busy.subject->free_group_end(); }, observer);
  survives<Allocator>([](Subject& busy) { busy.subject->restore_state(busy.ticket); }, observer);
  survives<Allocator>([](Subject& busy) { busy.subject->clear(); }, observer);
  survives<Allocator>([](Subject& busy) { busy.subject->view(); }, observer);
  survives<Allocator>([](Subject& busy) { busy.subject->check(); }, observer);
}

void count_one(void* context, const Operation&) noexcept { ++*static_cast<int*>(context); }

TEST(memory_that_runs_out_changes_nothing) {
  int seen = 0;
  for (const Observer observer : {Observer{}, Observer{count_one, &seen}}) {
    survive_every_call<TokenToKVPoolAllocator>(observer);
    survive_every_call<PagedTokenToKVPoolAllocator>(observer);
    using Subject = Busy<PagedTokenToKVPoolAllocator>;
    survives<PagedTokenToKVPoolAllocator>(
        [](Subject& busy) {
          busy.subject->alloc_extend(Numbers{0, 2}, Numbers{5, 3}, Numbers{-1, 17}, 6);
        },
        observer);
    survives<PagedTokenToKVPoolAllocator>(
        [](Subject& busy) { busy.subject->alloc_decode(Numbers{1, 3}, Numbers{-1, 17}); },
        observer);
  }
  CHECK(seen > 0);
}

TEST(memory_that_runs_out_makes_no_allocator) {
  test::fail_each_allocation([] { return 0; },
                             [](int) { make<PagedTokenToKVPoolAllocator>(true); }, [](int) {});
}

TEST(only_results_are_allocated) {
  Busy<PagedTokenToKVPoolAllocator> busy(false);
  PagedTokenToKVPoolAllocator& subject = *busy.subject;
  const Numbers slots{4 * kPageSize, 6 * kPageSize};
  const std::int64_t before = test::allocation_count;
  subject.free(slots);
  subject.free_group_end();
  const PageBooks::Ticket ticket = subject.backup_state();
  CHECK(test::allocation_count == before);
  CHECK(subject.alloc(4 * kPageSize).has_value());
  CHECK(test::allocation_count == before + 1);
  subject.restore_state(ticket);
  subject.clear();
  CHECK(test::allocation_count == before + 1);
}

TEST(check_finds_planted_faults) {
  const auto broken = [](const char* clause, auto plant) {
    PagedTokenToKVPoolAllocator subject(kPageCount * kPageSize, kPageSize, false);
    subject.alloc(3 * kPageSize);
    subject.check();
    plant(subject);
    CHECK(test::throws<ContractError>(clause, [&] { subject.check(); }));
  };
  broken("PAGE-2: ", PlantedFault::list_the_sink);
  broken("PAGE-1: ", PlantedFault::list_a_page_twice);
  broken("PAGE-1: ", PlantedFault::list_an_unknown_page);
  broken("PAGE-1: ", PlantedFault::lose_a_page);
  broken("PAGE-1: ", [](PageBooks& books) { PlantedFault::list_a_held_page(books, 2); });
}

TEST(lengths_beyond_64_bits_do_not_add_up) {
  constexpr std::int64_t kLongest = std::numeric_limits<std::int64_t>::max();
  PagedTokenToKVPoolAllocator subject(kPageCount * kPageSize, kPageSize, false);
  CHECK(!subject.alloc_extend(Numbers{0}, Numbers{kLongest}, Numbers{-1}, kLongest));
  const Numbers none{0, 0, 0}, all{kLongest, kLongest, kLongest}, fresh{-1, -1, -1};
  CHECK(test::throws<ContractError>(
      "PAGE-8: ", [&] { subject.alloc_extend(none, all, fresh, kLongest - 2); }));
  const Numbers least{std::numeric_limits<std::int64_t>::min()};
  CHECK(test::throws<ContractError>("PAGE-8: ", [&] { subject.alloc_decode(least, {}); }));
  CHECK(test::throws<ContractError>("PAGE-8: ", [&] { subject.alloc_decode(least, least); }));
  CHECK(test::throws<ContractError>("PAGE-10: ", [&] { subject.free(least); }));
}

// The books in sets and deques, without a thought for cost.
struct Model {
  Model(bool pages_, bool need_sort_) : pages(pages_), need_sort(need_sort_) { clear(); }

  std::optional<std::vector<PageId>> take(std::size_t count) {
    if (count > free.size() + release.size()) return std::nullopt;
    if (count > free.size()) {
      free.insert(free.end(), release.begin(), release.end());
      release.clear();
      std::ranges::sort(free);
    }
    std::vector<PageId> taken(free.begin(), free.begin() + static_cast<std::ptrdiff_t>(count));
    free.erase(free.begin(), free.begin() + static_cast<std::ptrdiff_t>(count));
    held.insert(taken.begin(), taken.end());
    since.insert(since.end(), taken.begin(), taken.end());
    return taken;
  }

  void give_back(std::vector<PageId> given) {
    if (given.empty()) return;
    if (pages) std::ranges::sort(given);
    for (const PageId page : given) held.erase(page);
    put(given);
    ticket = false;
  }

  void put(const std::vector<PageId>& given) {
    std::deque<PageId>& list = group ? pending : need_sort ? release : free;
    list.insert(pages && !group ? list.begin() : list.end(), given.begin(), given.end());
  }

  void end_group() {
    group = ticket = false;
    std::vector<PageId> given(pending.begin(), pending.end());
    pending.clear();
    if (pages) std::ranges::sort(given);
    put(given);
  }

  void backup() {
    ticket = true;
    since.clear();
  }

  void restore() {
    free.insert(free.begin(), since.begin(), since.end());
    for (const PageId page : since) held.erase(page);
    ticket = false;
  }

  void clear() {
    for (std::deque<PageId>* list : {&free, &release, &pending, &since}) list->clear();
    held.clear();
    group = ticket = false;
    for (PageId page = 1; page <= kPageCount; ++page) free.push_back(page);
  }

  AllocatorView view() const {
    return {{free.begin(), free.end()},
            {release.begin(), release.end()},
            {pending.begin(), pending.end()},
            {held.begin(), held.end()},
            group};
  }

  bool pages, need_sort;
  std::deque<PageId> free, release, pending, since;
  std::set<PageId> held;
  bool group = false, ticket = false;
};

// One random call on both; whether it was legal is for the model to say.
template <class Allocator>
void step(Allocator& subject, Model& model, PageBooks::Ticket& ticket, std::mt19937& random) {
  const std::int64_t unit = subject.page_size();
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random()) % n; };
  const auto refuses = [](auto call) { return test::throws<ContractError>("", call); };
  switch (below(10)) {
    case 0: case 1: case 2: {
      const std::size_t count = below(5);
      const auto slots = subject.alloc(static_cast<std::int64_t>(count) * unit);
      const auto pages = model.take(count);
      CHECK(slots.has_value() == pages.has_value());
      for (std::size_t i = 0; pages && i < count; ++i) {
        CHECK(numbers(slots)[i * static_cast<std::size_t>(unit)] == (*pages)[i] * unit);
      }
      return;
    }
    case 3: case 4: case 5: {
      std::vector<PageId> pages;
      std::ranges::sample(model.held, std::back_inserter(pages),
                          static_cast<std::ptrdiff_t>(below(5)), random);
      std::ranges::shuffle(pages, random);
      Numbers slots;
      for (const PageId page : pages) slots.push_back(page * unit);
      subject.free(slots);
      return model.give_back(pages);
    }
    case 6: {
      const auto page = static_cast<PageId>(below(kPageCount + 2));
      const Numbers slots{model.held.empty() ? 0 : *model.held.begin() * unit, page * unit};
      if (!model.held.contains(page)) CHECK(refuses([&] { subject.free(slots); }));
      return;
    }
    case 7:
      if (model.group) {
        CHECK(refuses([&] { subject.free_group_begin(); }));
        subject.free_group_end();
        return model.end_group();
      }
      CHECK(refuses([&] { subject.free_group_end(); }));
      subject.free_group_begin();
      model.group = true;
      model.ticket = false;
      return;
    case 8:
      ticket = subject.backup_state();
      return model.backup();
    default:
      if (!model.ticket) CHECK(refuses([&] { subject.restore_state(ticket); }));
      if (model.ticket) subject.restore_state(ticket);
      if (model.ticket) model.restore();
      if (below(20) > 0) return;
      subject.clear();
      model.clear();
  }
}

template <class Allocator>
void walk(bool need_sort, unsigned seed) {
  std::mt19937 random(seed);
  const auto subject = make<Allocator>(need_sort);
  Model model(std::is_same_v<Allocator, PagedTokenToKVPoolAllocator>, need_sort);
  PageBooks::Ticket ticket;
  for (int i = 0; i < 20'000; ++i) {
    step(*subject, model, ticket, random);
    CHECK(subject->view() == model.view());
    subject->check();
  }
}

TEST(random_calls_agree_with_the_model) {
  for (const bool need_sort : {false, true}) {
    for (unsigned seed = 1; seed <= 3; ++seed) {
      walk<TokenToKVPoolAllocator>(need_sort, seed);
      walk<PagedTokenToKVPoolAllocator>(need_sort, seed);
    }
  }
}

}  // namespace
}  // namespace kvspec
