// The sliding-window allocator by itself: two plain allocators and a map beside random calls,
// memory that runs out in every call, planted faults.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.hpp"
#include "kvspec/contract.hpp"
#include "kvspec/page_allocator.hpp"
#include "kvspec/slot_allocator.hpp"
#include "kvspec/swa_allocator.hpp"

namespace kvspec {

// Breaks books and pairs behind the back of an allocator.
struct PlantedFault {
  static PageId& pair(SWATokenToKVPoolAllocator& subject, PageId page) {
    return subject.pairs_[static_cast<std::size_t>(page)];
  }
  static void lose_a_page(SWATokenToKVPoolAllocator& subject) {
    static_cast<PageBooks&>(subject.full_).free_.pop_front(1);
  }
  static void lose_a_window_page(SWATokenToKVPoolAllocator& subject) {
    static_cast<PageBooks&>(subject.window_).free_.pop_front(1);
  }
  static void list_the_sink(SWATokenToKVPoolAllocator& subject) {
    const PageId sink = 0;
    PageRing& free = static_cast<PageBooks&>(subject.window_).free_;
    free.pop_front(1);
    free.push_front({&sink, 1});
  }
};

namespace {

using Numbers = std::vector<std::int64_t>;
using Subject = SWATokenToKVPoolAllocator;

constexpr std::int64_t kFullCount = 12;   // pages
constexpr std::int64_t kWindowCount = 9;  // pages

std::unique_ptr<Subject> make(std::int64_t page_size, bool need_sort = false) {
  return std::make_unique<Subject>(kFullCount * page_size, kWindowCount * page_size, page_size,
                                   need_sort);
}

Numbers numbers(const std::optional<Slots>& slots) {
  const auto given = slots.value().span();
  return {given.begin(), given.end()};
}

// Whether a call is refused with a text that begins so.
bool refuses(const char* start, const std::function<void()>& call) {
  return test::throws<ContractError>(start, call);
}

// Every list of both pools has pages, a group is open, and a ticket is worth three pages.  Of the
// others that are held, 4 and 5 have a pair, and 2, 6 and 8 have none.
struct Busy {
  Busy(std::int64_t page_size, bool need_sort) : subject(make(page_size, need_sort)) {
    const auto slots = [&](Numbers pages) {
      for (std::int64_t& page : pages) page *= page_size;
      return pages;
    };
    subject->alloc(8 * page_size);
    subject->free(slots({7, 3}), slots({8, 6}));
    subject->free_group_begin();
    subject->free(slots({1}), slots({2}));
    ticket = subject->backup_state();
    subject->alloc(3 * page_size);
    view = subject->view();
    digest = subject->digest();
  }

  void require_unchanged() const {
    CHECK(subject->view() == view);
    CHECK(subject->digest() == digest);
    subject->check();
  }

  std::unique_ptr<Subject> subject;
  Subject::Ticket ticket;
  SWAAllocatorView view;
  std::uint64_t digest = 0;
};

using Action = std::function<void(Busy&)>;

// Runs `action` on busy books with every allocation failing in turn; then it must have succeeded.
std::int64_t survives(std::int64_t page_size, bool need_sort, Observer observer,
                      const Action& action) {
  return test::fail_each_allocation(
      [&] {
        Busy busy(page_size, need_sort);
        busy.subject->attach(observer);
        return busy;
      },
      action,
      [](const Busy& busy) {
        busy.require_unchanged();
        busy.subject->restore_state(busy.ticket);  // a call that failed ends no ticket
        busy.subject->check();
      });
}

void count_one(void* context, const Operation&) noexcept { ++*static_cast<int*>(context); }

// Every method, on busy books.
std::vector<Action> actions(std::int64_t unit) {
  const auto slots = [unit](Numbers pages) {
    for (std::int64_t& page : pages) page *= unit;
    return pages;
  };
  return {
      [=](Busy& busy) { CHECK(busy.subject->alloc(2 * unit)); },
      [=](Busy& busy) { CHECK(busy.subject->alloc_extend(Numbers{0}, Numbers{2 * unit},
                                                         Numbers{-1}, 2 * unit)); },
      [=](Busy& busy) { CHECK(busy.subject->alloc_decode(Numbers{1, unit + 1},
                                                         Numbers{-1, 5 * unit - 1})); },
      [=](Busy& busy) { busy.subject->free(slots({8, 4})); },
      [=](Busy& busy) { busy.subject->free(slots({6}), slots({5, 4})); },
      [=](Busy& busy) { busy.subject->free_swa(slots({5, 4})); },
      [=](Busy& busy) { busy.subject->move_swa(slots({2, 8}), slots({5, 4})); },
      [](Busy& busy) { busy.subject->free_group_end(); },
      [](Busy& busy) { busy.subject->restore_state(busy.ticket); },
      [](Busy& busy) { busy.subject->clear(); },
      [=](Busy& busy) { busy.subject->translate_loc_from_full_to_swa(slots({5, 2})); },
      [](Busy& busy) { busy.subject->full_to_swa_index_mapping(); },
      [](Busy& busy) { busy.subject->view(); },
      [](Busy& busy) { busy.subject->check(); },
  };
}

TEST(memory_that_runs_out_changes_nothing) {
  int seen = 0;
  for (const std::int64_t page_size : {1, 4}) {
    for (const bool need_sort : {false, true}) {
      for (const Observer observer : {Observer{}, Observer{count_one, &seen}}) {
        for (const Action& action : actions(page_size)) {
          survives(page_size, need_sort, observer, action);
        }
      }
    }
  }
  CHECK(seen > 0);
}

TEST(memory_that_runs_out_makes_no_allocator) {
  test::fail_each_allocation([] { return 0; }, [](int) { make(4, true); }, [](int) {});
}

TEST(only_results_are_allocated) {
  for (const std::int64_t unit : {1, 4}) {
    const Busy busy(unit, false);
    Subject& subject = *busy.subject;
    const Numbers leaving{4 * unit}, bare{2 * unit}, paired{5 * unit};
    const std::int64_t before = test::allocation_count;
    subject.move_swa(bare, paired);
    subject.free(leaving, bare);
    subject.free_group_end();
    const Subject::Ticket ticket = subject.backup_state();
    CHECK(test::allocation_count == before);
    CHECK(subject.alloc(2 * unit).has_value());
    CHECK(test::allocation_count == before + 1);
    subject.restore_state(ticket);
    subject.clear();
    CHECK(test::allocation_count == before + 1);
  }
}

TEST(refusals_change_nothing) {
  for (const std::int64_t unit : {1, 4}) {
    const Busy busy(unit, false);
    Subject& subject = *busy.subject;
    const auto at = [unit](std::int64_t page) { return Numbers{page * unit + unit - 1}; };
    const auto both = [unit](std::int64_t first, std::int64_t second) {
      return Numbers{first * unit, second * unit};
    };
    const char* const free = unit > 1 ? "SWA-9: free names page " : "SWA-9: free names slot ";
    for (const std::int64_t page : {-1, 0, 1, 13}) {
      CHECK(refuses(free, [&] { subject.free(both(4, page)); }));
      CHECK(refuses(free, [&] { subject.free(at(4), both(5, page)); }));
      CHECK(refuses("SWA-11: ", [&] { subject.free_swa(both(4, page)); }));
      CHECK(refuses("SWA-13: ", [&] { subject.move_swa(both(2, page), both(4, 5)); }));
      CHECK(refuses("SWA-13: ", [&] { subject.move_swa(both(2, 6), both(4, page)); }));
    }
    CHECK(refuses(free, [&] { subject.free(both(4, 5), at(4)); }));
    CHECK(refuses(free, [&] { subject.free(at(4), at(2)); }));
    CHECK(refuses("SWA-11: ", [&] { subject.free_swa(both(4, 2)); }));
    CHECK(refuses("SWA-13: ", [&] { subject.move_swa(both(2, 2), both(4, 5)); }));
    CHECK(refuses("SWA-13: ", [&] { subject.move_swa(both(2, 6), both(4, 4)); }));
    CHECK(refuses("SWA-13: ", [&] { subject.move_swa(at(2), at(2)); }));
    CHECK(refuses("SWA-13: ", [&] { subject.move_swa(at(4), at(5)); }));
    CHECK(refuses("SWA-13: ", [&] { subject.move_swa(both(2, 6), at(4)); }));
    CHECK(refuses("SWA-15: ", [&] { subject.free_group_begin(); }));
    CHECK(refuses("SWA-18: ", [&] { subject.restore_state({}); }));
    CHECK(refuses("SWA-21: ", [&] { subject.translate_loc_from_full_to_swa(at(13)); }));
    CHECK(refuses("SWA-21: ", [&] { subject.translate_loc_from_full_to_swa(Numbers{-2}); }));
    busy.require_unchanged();
    subject.free(at(4), at(5));  // what was marked is held again
  }
}

TEST(sizes_out_of_range_are_refused) {
  constexpr std::int64_t kBeyond = (std::int64_t{1} << 31) - 4;
  CHECK(refuses("SWA-21: page_size is 0", [] { Subject(4, 4, 0, false); }));
  CHECK(refuses("SWA-21: size is -1", [] { Subject(-1, 4, 4, false); }));
  CHECK(refuses("SWA-21: size_swa is 2147483644", [] { Subject(4, kBeyond, 4, false); }));
}

TEST(lengths_beyond_64_bits_do_not_add_up) {
  constexpr std::int64_t kLongest = std::numeric_limits<std::int64_t>::max();
  const auto subject = make(4);
  CHECK(!subject->alloc_extend(Numbers{0}, Numbers{kLongest}, Numbers{-1}, kLongest));
  const Numbers none{0, 0, 0}, all{kLongest, kLongest, kLongest}, fresh{-1, -1, -1};
  CHECK(refuses("SWA-7: ", [&] { subject->alloc_extend(none, all, fresh, kLongest - 2); }));
  const Numbers least{std::numeric_limits<std::int64_t>::min()};
  CHECK(refuses("SWA-7: ", [&] { subject->alloc_decode(least, least); }));
  CHECK(refuses("SWA-9: ", [&] { subject->free(least); }));
  CHECK(refuses("SWA-9: ", [&] { subject->free({}, least); }));
  CHECK(refuses("SWA-21: ", [&] { subject->translate_loc_from_full_to_swa(least); }));
}

TEST(a_remainder_of_the_size_has_no_pairs) {
  Subject subject(/*size=*/11, /*size_swa=*/9, /*page_size=*/4, /*need_sort=*/false);
  CHECK(subject.alloc(8).has_value());
  const WindowSlots there = subject.translate_loc_from_full_to_swa(Numbers{11, 12, 14, 3, -1});
  CHECK(std::ranges::equal(there.span(), std::vector<std::int32_t>{11, 0, 0, 0, -1}));
  CHECK(subject.full_to_swa_index_mapping().count() == 12);
}

TEST(check_finds_planted_faults) {
  const auto broken = [](const char* text, auto plant) {
    const auto subject = make(4);
    subject->alloc(12);
    subject->free_swa(Numbers{4});
    subject->check();
    plant(*subject);
    CHECK(refuses(text, [&] { subject->check(); }));
  };
  broken("SWA-1: page ", PlantedFault::lose_a_page);
  broken("SWA-1: window page ", PlantedFault::lose_a_window_page);
  broken("SWA-1: the sink ", PlantedFault::list_the_sink);
  const auto pairs = [&](const char* text, PageId page, PageId pair) {
    broken(text, [=](Subject& subject) { PlantedFault::pair(subject, page) = pair; });
  };
  pairs("SWA-2: page 9 is not held", 9, 1);
  pairs("SWA-2: page 0 is not held", 0, 1);
  pairs("SWA-2: page 1 has window page 1, which is not held", 1, 1);
  pairs("SWA-2: page 1 has window page 99, which is not held", 1, 99);
  pairs("SWA-2: page 1 has window page -1, which is not held", 1, -1);
  pairs("SWA-2: window page 2 is of page 2 and another", 1, 2);
  pairs("SWA-2: window page 2 is held, and no pair", 2, 0);
}

// An allocator of one pool for either pool, and the pairs in a map.
template <class Plain>
struct Model {
  explicit Model(bool need_sort) : full(plain(kFullCount, need_sort)),
                                   window(plain(kWindowCount, need_sort)) {}

  static constexpr std::int64_t kUnit = std::is_same_v<Plain, TokenToKVPoolAllocator> ? 1 : 4;

  static std::unique_ptr<Plain> plain(std::int64_t page_count, bool need_sort) {
    if constexpr (kUnit == 1) return std::make_unique<Plain>(page_count, need_sort);
    else return std::make_unique<Plain>(page_count * kUnit, kUnit, need_sort);
  }

  std::optional<Numbers> alloc(std::int64_t size) {
    if (size > std::min(full->available_size(), window->available_size())) return std::nullopt;
    const Numbers taken = numbers(full->alloc(size));
    const Numbers beside = numbers(window->alloc(size));
    for (std::size_t i = 0; i < taken.size(); ++i) {
      pairs[static_cast<PageId>(taken[i] / kUnit)] = static_cast<PageId>(beside[i] / kUnit);
    }
    return taken;
  }

  void free(const std::vector<PageId>& leaving, const std::vector<PageId>& staying) {
    Numbers slots, beside;
    for (const PageId page : leaving) slots.push_back(page * kUnit);
    for (const auto* pages : {&leaving, &staying}) {
      for (const PageId page : *pages) {
        if (pairs.contains(page)) beside.push_back(pairs.at(page) * kUnit);
        pairs.erase(page);
      }
    }
    full->free(slots);
    window->free(beside);
    if (!slots.empty() || !beside.empty()) ticket.reset();
  }

  void restore() {
    full->restore_state(ticket->first);
    window->restore_state(ticket->second);
    const AllocatorView view = full->view();
    std::erase_if(pairs, [&](auto pair) { return std::ranges::count(view.held, pair.first) == 0; });
    ticket.reset();
  }

  // Held pages with a pair, or without.
  std::vector<PageId> held(bool paired) const {
    std::vector<PageId> pages = full->view().held;
    std::erase_if(pages, [&](PageId page) { return pairs.contains(page) != paired; });
    return pages;
  }

  SWAAllocatorView view() const {
    return {full->view(), window->view(), {pairs.begin(), pairs.end()}};
  }

  std::unique_ptr<Plain> full, window;
  std::map<PageId, PageId> pairs;
  std::optional<std::pair<PageBooks::Ticket, PageBooks::Ticket>> ticket;
};

// Random calls on subject and model; whether one is legal is for the model to say.
template <class Plain>
class Walk {
 public:
  Walk(bool need_sort, unsigned seed)
      : subject_(make(kUnit, need_sort)), model_(need_sort), random_(seed) {}

  void run(int step_count) {
    for (int i = 0; i < step_count; ++i) {
      step();
      CHECK(subject_->view() == model_.view());
      subject_->check();
      for (const auto& [full, window] : subject_->view().pairs) {
        const Numbers slot{full * kUnit + kUnit - 1};
        const WindowSlots there = subject_->translate_loc_from_full_to_swa(slot);
        CHECK(there.span()[0] == window * kUnit + kUnit - 1);
      }
    }
  }

 private:
  static constexpr std::int64_t kUnit = Model<Plain>::kUnit;

  std::size_t below(std::size_t n) { return static_cast<std::size_t>(random_()) % n; }

  std::vector<PageId> some(const std::vector<PageId>& of) {
    std::vector<PageId> pages;
    std::ranges::sample(of, std::back_inserter(pages), static_cast<std::ptrdiff_t>(below(4)),
                        random_);
    std::ranges::shuffle(pages, random_);
    return pages;
  }

  Numbers slots(const std::vector<PageId>& pages) {
    Numbers named;
    for (const PageId page : pages) {
      named.push_back(page * kUnit + static_cast<std::int64_t>(below(std::size_t{kUnit})));
    }
    return named;
  }

  void step() {
    switch (below(10)) {
      case 0: case 1: case 2: return alloc();
      case 3: case 4: return free();
      case 5: return free_swa();
      case 6: return move();
      case 7: return group();
      case 8: return backup();
      default: return restore_or_clear();
    }
  }

  void alloc() {
    const auto size = static_cast<std::int64_t>(below(5)) * kUnit;
    const auto expected = model_.alloc(size);
    const auto given = subject_->alloc(size);
    CHECK(given.has_value() == expected.has_value());
    if (given) CHECK(numbers(given) == *expected);
  }

  void free() {
    std::vector<PageId> leaving = some(model_.held(true));
    std::ranges::copy(some(model_.held(false)), std::back_inserter(leaving));
    std::vector<PageId> staying = some(model_.held(true));
    std::erase_if(staying, [&](PageId page) { return std::ranges::count(leaving, page) > 0; });
    subject_->free(slots(leaving), slots(staying));
    model_.free(leaving, staying);
  }

  void free_swa() {
    const std::vector<PageId> pages = some(model_.held(true));
    subject_->free_swa(slots(pages));
    model_.free({}, pages);
  }

  void move() {
    std::vector<PageId> targets = some(model_.held(false));
    std::vector<PageId> sources = some(model_.held(true));
    const std::size_t count = std::min(targets.size(), sources.size());
    targets.resize(count);
    sources.resize(count);
    subject_->move_swa(slots(targets), slots(sources));
    for (std::size_t i = 0; i < count; ++i) {
      model_.pairs[targets[i]] = model_.pairs.at(sources[i]);
      model_.pairs.erase(sources[i]);
    }
    if (count > 0) model_.ticket.reset();
  }

  void group() {
    if (subject_->group_open()) {
      subject_->free_group_end();
      model_.full->free_group_end();
      model_.window->free_group_end();
    } else {
      CHECK(refuses("SWA-15: ", [&] { subject_->free_group_end(); }));
      subject_->free_group_begin();
      model_.full->free_group_begin();
      model_.window->free_group_begin();
    }
    model_.ticket.reset();
  }

  void backup() {
    ticket_ = subject_->backup_state();
    model_.ticket.emplace(model_.full->backup_state(), model_.window->backup_state());
  }

  void restore_or_clear() {
    if (model_.ticket) {
      subject_->restore_state(ticket_);
      return model_.restore();
    }
    CHECK(refuses("SWA-18: ", [&] { subject_->restore_state(ticket_); }));
    if (below(20) > 0) return;
    subject_->clear();
    model_.full->clear();
    model_.window->clear();
    model_.pairs.clear();
  }

  std::unique_ptr<Subject> subject_;
  Model<Plain> model_;
  std::mt19937 random_;
  Subject::Ticket ticket_;
};

TEST(random_calls_agree_with_two_plain_allocators) {
  for (const bool need_sort : {false, true}) {
    for (unsigned seed = 1; seed <= 3; ++seed) {
      Walk<TokenToKVPoolAllocator>(need_sort, seed).run(10'000);
      Walk<PagedTokenToKVPoolAllocator>(need_sort, seed).run(10'000);
    }
  }
}

}  // namespace
}  // namespace kvspec
