// The ownership ledger by itself: memory that runs out, rows beside a model, planted faults.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "kvspec/contract.hpp"
#include "kvspec/ownership_ledger.hpp"
#include "kvspec/row_names.hpp"

namespace kvspec {

// Breaks the books behind the back of the ledger.
struct PlantedFault {
  static void miscount(OwnershipLedger& ledger) { ++ledger.pools_.front().counts[0]; }
  static void lose_what_a_request_holds(OwnershipLedger& ledger) { ledger.rows_[0].held = -1; }
  static void name_a_page_twice(OwnershipLedger& ledger) {
    ledger.names_.rows_[0].names.push_back(ledger.names_.rows_[0].names.front());
  }
  static void lose_a_name(OwnershipLedger& ledger) { ledger.names_.first_[1] = -1; }
  static void free_a_live_row(OwnershipLedger& ledger) {
    ledger.rows().pages[0].holder = OwnershipLedger::kFree;
    --ledger.rows().counts[static_cast<std::size_t>(OwnershipLedger::OwnerKind::reserved)];
    ++ledger.rows().counts[static_cast<std::size_t>(OwnershipLedger::OwnerKind::free)];
  }
};

namespace {

using Numbers = std::vector<std::int64_t>;
using Fail = OwnershipLedger::FaultKind;
using Kind = OwnershipLedger::OwnerKind;
using Owner = OwnershipLedger::Owner;

constexpr std::int64_t kPageSize = 2;
constexpr std::int64_t kPages = 12;
constexpr std::int64_t kRows = 3;

// The slots of these pages, in order.
Numbers slots(const Numbers& pages) {
  Numbers all;
  for (const std::int64_t page : pages) {
    for (std::int64_t place = 0; place < kPageSize; ++place) {
      all.push_back(page * kPageSize + place);
    }
  }
  return all;
}

// All that can be seen of a ledger.
struct Snapshot {
  std::vector<std::vector<Owner>> owners;
  std::vector<std::array<std::int64_t, OwnershipLedger::kOwnerKinds>> counts;
  std::vector<std::vector<OwnershipLedger::Step>> history;
  std::map<std::int64_t, std::vector<PageId>> rows;
  Numbers copies;
  std::vector<bool> groups;
  std::optional<std::int64_t> action;
  Numbers counters;

  explicit Snapshot(const OwnershipLedger& ledger)
      : copies(ledger.copies_in_flight()), action(ledger.action()) {
    for (std::size_t pool = 0; pool < ledger.pool_count(); ++pool) {
      owners.push_back(ledger.owners(pool));
      counts.push_back(ledger.counts(ledger.pool_name(pool)));
      groups.push_back(ledger.group_open(pool));
      for (std::int64_t page = 0; page <= kPages; ++page) {
        history.push_back(ledger.history(ledger.pool_name(pool), page));
      }
    }
    for (const std::int64_t row : ledger.live_rows()) rows[row] = ledger.row_pages(row);
    const LedgerCounters costs = ledger.counters();
    counters = {costs.slots_seen, costs.pages_moved, costs.rows_looked_at};
  }
  bool operator==(const Snapshot&) const = default;
};

// Rows 0 and 1 live and naming pages 1 .. 4 and 5, 6, of which 5 is the tree's; page 7 reserved, 8
// in a copy, 9 pending; an action begun.
std::unique_ptr<OwnershipLedger> used() {
  auto ledger = std::make_unique<OwnershipLedger>(
      kPageSize, OwnershipLedger::PageCounts{{"full", kPages}, {"swa", 4}}, kRows, 64);
  ledger->begin(1);
  ledger->take_rows(Numbers{0, 1});
  ledger->take("full", slots({1, 2, 3, 4, 5, 6, 7, 8, 9}));
  ledger->write(0, 0, slots({1, 2, 3, 4}));
  ledger->write(1, 0, slots({5, 6}));
  ledger->adopt(1, kPageSize);
  ledger->copy_begin("full", slots({8}));
  ledger->open_group("full");
  ledger->give("full", slots({9}));
  CHECK(ledger->end().empty());
  ledger->begin(2);
  return ledger;
}

// Fails each allocation of the action in turn, and finds the ledger unchanged and able to do it.
template <class Action>
void check_strong_guarantee(Action action) {
  const auto undisturbed = used();
  const Snapshot before(*undisturbed);
  action(*undisturbed);
  const auto faults = undisturbed->end();
  const Snapshot after(*undisturbed);
  test::fail_each_allocation(
      used, [&](auto& ledger) { action(*ledger); },
      [&](auto& ledger) {
        CHECK(Snapshot(*ledger) == before);
        ledger->check();
        action(*ledger);
        CHECK(ledger->end() == faults);
        CHECK(Snapshot(*ledger) == after);
        ledger->check();
      });
}

TEST(no_memory_for_take) {
  check_strong_guarantee([](OwnershipLedger& ledger) {
    ledger.take("full", slots({0, 10, 1, 99}));
  });
}

TEST(no_memory_for_give) {
  check_strong_guarantee([](OwnershipLedger& ledger) {
    ledger.give("full", slots({0, 1, 7, 8, 9, 10}));
  });
}

TEST(no_memory_for_rows) {
  check_strong_guarantee([](OwnershipLedger& ledger) { ledger.take_rows(Numbers{0, 2, 9}); });
  check_strong_guarantee([](OwnershipLedger& ledger) { ledger.give_rows(Numbers{0, 2, 1}); });
  check_strong_guarantee([](OwnershipLedger& ledger) { ledger.clear_rows(); });
}

TEST(no_memory_for_write) {
  check_strong_guarantee([](OwnershipLedger& ledger) {
    ledger.write(0, 1, slots({7, 0, 10, 5, 1, 2, 11}));
  });
  check_strong_guarantee([](OwnershipLedger& ledger) { ledger.write(9, 0, slots({7})); });
}

TEST(no_memory_for_adopt) {
  check_strong_guarantee([](OwnershipLedger& ledger) { ledger.adopt(0, 2 * kPageSize); });
  check_strong_guarantee([](OwnershipLedger& ledger) { ledger.adopt_slots(slots({5, 7, 8, 77})); });
}

TEST(no_memory_for_copies) {
  check_strong_guarantee([](OwnershipLedger& ledger) {
    ledger.copy_begin("swa", slots({1, 2, 9}));
  });
  check_strong_guarantee([](OwnershipLedger& ledger) { ledger.copy_end(0); });
}

TEST(no_memory_for_the_end) {
  const auto before_end = [] {
    auto ledger = used();
    ledger->give("full", slots({1, 2, 5}));
    ledger->give_rows(Numbers{1});
    return ledger;
  };
  const auto undisturbed = before_end();
  const Snapshot before(*undisturbed);
  const auto faults = undisturbed->end();
  CHECK(faults.size() == 3);  // row 0 names pages 1 and 2, row 1 left page 6
  const std::int64_t allocations = test::fail_each_allocation(
      before_end, [](auto& ledger) { ledger->end(); },
      [&](auto& ledger) {
        CHECK(Snapshot(*ledger) == before);
        CHECK(ledger->end() == faults);
        ledger->check();
      });
  CHECK(allocations > 0);
}

TEST(a_steady_state_allocates_nothing) {
  const auto ledger = used();
  ledger->end();
  const Numbers taken = slots({10, 11, 12});
  const Numbers row{2};
  std::int64_t before = 0;
  for (std::int64_t turn = 0; turn < 300; ++turn) {
    if (turn == 200) before = test::allocation_count;
    ledger->begin(turn);
    ledger->take("full", taken);
    ledger->take_rows(row);
    ledger->write(2, 0, taken);
    CHECK(ledger->end().empty());
    ledger->begin(turn);
    ledger->adopt(2, kPageSize);
    ledger->give_rows(row);
    ledger->give("full", taken);
    ledger->close_group("full");
    CHECK(ledger->end().empty());
  }
  CHECK(test::allocation_count == before);
}

TEST(slots_at_the_ends_of_64_bits_are_sentinels) {
  const auto ledger = used();
  constexpr std::int64_t low = std::numeric_limits<std::int64_t>::min();
  constexpr std::int64_t high = std::numeric_limits<std::int64_t>::max();
  ledger->take("full", Numbers{low, low + 1, -1, 0, high - 1, high, low});
  const auto faults = ledger->end();
  Numbers pages;
  for (const auto& fault : faults) {
    CHECK(fault.kind == Fail::sentinel);
    pages.push_back(fault.page);
  }
  CHECK(pages == (Numbers{low / 2, -1, 0, high / 2}));
  ledger->begin(3);
  CHECK(test::throws<ContractError>("LEDGER-14: positions [9223372036854775807, ", [&] {
    ledger->write(0, high, slots({1}));
  }));
  CHECK(test::throws<ContractError>("LEDGER-14: positions [2147483647, 2147483649)", [&] {
    ledger->write(0, (std::int64_t{1} << 31) - 1, slots({1}));
  }));
  CHECK(test::throws<ContractError>("LEDGER-14: positions [-1, 1)", [&] {
    ledger->write(0, -1, slots({1}));
  }));
}

TEST(a_row_at_the_last_position_takes_no_memory_for_the_others) {
  const auto ledger = used();
  ledger->write(1, (std::int64_t{1} << 31) - kPageSize, slots({7}));
  CHECK(ledger->end().empty());
  CHECK(ledger->owner("full", 7) == (Owner{Kind::request, 1}));
  ledger->check();
}

TEST(runs_are_as_long_as_they_can_be) {
  constexpr std::int64_t low = std::numeric_limits<std::int64_t>::min();
  constexpr std::int64_t high = std::numeric_limits<std::int64_t>::max();
  std::mt19937_64 random(7);
  for (int round = 0; round < 500; ++round) {
    Numbers given;
    std::vector<std::pair<std::int64_t, std::size_t>> expected;
    for (std::uint64_t runs = random() % 5; runs > 0; --runs) {
      constexpr std::int64_t starts[] = {low, -40, 0, 5, 1000, high - 20};
      const std::int64_t start = starts[random() % 6];
      const auto count = static_cast<std::size_t>(1 + random() % 60);
      for (std::size_t i = 0; i < count; ++i) {
        const auto step = static_cast<std::int64_t>(i);
        const std::int64_t slot = start > high - step ? low : start + step;
        const bool goes_on = !given.empty() && given.back() < high && given.back() + 1 == slot;
        if (goes_on) ++expected.back().second;
        if (!goes_on) expected.emplace_back(slot, 1);
        given.push_back(slot);
      }
    }
    std::size_t at = 0;
    for (SlotRuns runs(given); runs.next(); ++at) {
      CHECK(at < expected.size() && runs.run().start == expected[at].first);
      CHECK(runs.run().count == expected[at].second);
    }
    CHECK(at == expected.size());
  }
}

// Rows as a map from position to page, and RowNames beside it.
class RowHistory {
 public:
  void step() {
    const std::size_t row = draw(kRowCount);
    if (draw(20) == 0) {
      names_.forget(row);
      model_[row].clear();
    }
    write(row);
    names_.check();
    CHECK(positions(row) == model_[row]);
    for (PageId page = 1; page <= kPageCount; ++page) CHECK(naming(page) == expected(page));
  }

 private:
  static constexpr PageId kPageCount = 5;
  static constexpr std::uint32_t kRowCount = 3;
  static constexpr std::uint32_t kWidth = 24;

  std::uint32_t draw(std::uint32_t count) { return static_cast<std::uint32_t>(random_() % count); }

  void write(std::size_t row) {
    std::vector<RowNames::Piece> pieces;
    for (std::uint32_t from = draw(kWidth); from < kWidth && draw(3) > 0;) {
      const std::uint32_t to = from + 1 + draw(5);
      const auto page = static_cast<PageId>(1 + draw(kPageCount));
      pieces.push_back({from, to, page});
      for (std::uint32_t position = from; position < to; ++position) model_[row][position] = page;
      from = to + draw(6) / 3;
    }
    names_.prepare(row, pieces);
    names_.replace(row);
  }

  // What the row names, in pieces that neither overlap nor could be one.
  std::map<std::uint32_t, PageId> positions(std::size_t row) const {
    std::map<std::uint32_t, PageId> found;
    const RowNames::Piece* before = nullptr;
    for (const RowNames::Piece& piece : names_.names(row)) {
      CHECK(before == nullptr || before->stop < piece.start ||
            (before->stop == piece.start && before->page != piece.page));
      for (std::uint32_t at = piece.start; at < piece.stop; ++at) found[at] = piece.page;
      before = &piece;
    }
    return found;
  }

  std::set<std::size_t> naming(PageId page) const {
    std::set<std::size_t> rows;
    names_.visit(page, [&](std::size_t row, std::uint32_t start) {
      CHECK(model_[row].at(start) == page);
      rows.insert(row);
    });
    return rows;
  }

  std::set<std::size_t> expected(PageId page) const {
    std::set<std::size_t> rows;
    for (std::size_t row = 0; row < kRowCount; ++row) {
      for (const auto& [position, named] : model_[row]) {
        if (named == page) rows.insert(row);
      }
    }
    return rows;
  }

  std::mt19937 random_{11};
  RowNames names_{kPageCount, kRowCount};
  std::vector<std::map<std::uint32_t, PageId>> model_ =
      std::vector<std::map<std::uint32_t, PageId>>(kRowCount);
};

TEST(rows_name_what_a_model_names) {
  RowHistory history;
  for (int step = 0; step < 3'000; ++step) history.step();
}

TEST(check_names_planted_faults) {
  const auto plant = [](auto fault) {
    const auto ledger = used();
    ledger->check();
    fault(*ledger);
    return test::throws<ContractError>("LEDGER-1: ", [&] { ledger->check(); });
  };
  CHECK(plant(PlantedFault::miscount));
  CHECK(plant(PlantedFault::lose_what_a_request_holds));
  CHECK(plant(PlantedFault::name_a_page_twice));
  CHECK(plant(PlantedFault::lose_a_name));
  CHECK(plant(PlantedFault::free_a_live_row));
}

}  // namespace
}  // namespace kvspec
