// The request pool by itself: a model beside random calls, memory that runs out, planted faults.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "check.hpp"
#include "kvspec/contract.hpp"
#include "kvspec/request_pool.hpp"

namespace kvspec {

// Breaks the books behind the back of the pool.
struct PlantedFault {
  static void free_a_live_row(RequestPool& pool, std::int64_t row) { pool.push_free(row); }
  static void lose_a_free_row(RequestPool& pool) { --pool.free_count_; }
  static void list_a_row_twice(RequestPool& pool) { pool.free_[1] = pool.free_[0]; }
  static std::size_t unsent_capacity(const RequestPool& pool) { return pool.unsent_.capacity(); }
};

namespace {

using Numbers = std::vector<std::int64_t>;

constexpr std::int64_t kRows = 4;
constexpr std::int64_t kWidth = 8;

// The abstract state, and the table if there is one.
struct Snapshot {
  Numbers free;
  std::map<std::int64_t, Numbers> rows;
  std::vector<RequestPool::Slot> table;

  bool operator==(const Snapshot&) const = default;
};

// A pool with its table, in host memory or lagging behind.
struct Subject {
  RequestPool pool{kRows, 0, kWidth};
  std::vector<RequestPool::Slot> table;

  explicit Subject(bool on_host) : table(kRows * kWidth) {
    if (on_host) pool.mirror(table.data());
  }

  Snapshot snapshot() const {
    Snapshot seen{pool.free_rows(), {}, table};
    for (const std::int64_t row : pool.live_rows()) {
      const auto slots = pool.row(row);
      seen.rows[row] = Numbers(slots.begin(), slots.end());
    }
    return seen;
  }

  std::size_t commit() {
    const std::size_t count = pool.unsent_count();
    Numbers places(count);
    std::vector<RequestPool::Slot> slots(count);
    pool.pack(places, slots);
    for (std::size_t i = 0; i < count; ++i) table[static_cast<std::size_t>(places[i])] = slots[i];
    pool.sent();
    return count;
  }
};

// Rows 0, 1, 2 live with 2, 1 and 8 slots, and an observer if asked for.
std::unique_ptr<Subject> used(bool on_host, bool observed) {
  auto subject = std::make_unique<Subject>(on_host);
  subject->pool.alloc(3);
  subject->pool.write_run(0, 0, 2, Numbers{11, 12});
  subject->pool.write_run(1, 0, 1, Numbers{21});
  subject->pool.write_run(2, 0, 8, Numbers{31, 32, 33, 34, 35, 36, 37, 38});
  if (observed) subject->pool.attach({[](void*, const Operation&) noexcept {}, nullptr});
  return subject;
}

template <class Action>
void check_strong_guarantee(Action action) {
  for (const bool on_host : {false, true}) {
    for (const bool observed : {false, true}) {
      const Snapshot before = used(on_host, observed)->snapshot();
      test::fail_each_allocation(
          [&] { return used(on_host, observed); }, [&](auto& subject) { action(subject->pool); },
          [&](auto& subject) {
            CHECK(subject->snapshot() == before);
            subject->pool.check(on_host ? subject->table.data() : nullptr);
            action(subject->pool);
            subject->pool.check(on_host ? subject->table.data() : nullptr);
            subject->commit();
            subject->pool.check(subject->table.data());
          });
    }
  }
}

TEST(no_memory_for_alloc) {
  check_strong_guarantee([](RequestPool& pool) { pool.alloc(1); });
}

TEST(no_memory_for_free) {
  check_strong_guarantee([](RequestPool& pool) { pool.free(Numbers{2, 0}); });
}

TEST(no_memory_for_a_refused_free) {
  const auto subject = used(true, false);
  const Snapshot before = subject->snapshot();
  for (std::int64_t n = 1; n < 9; ++n) {
    const test::FailNthAllocation armed(n);
    try {
      const std::array<std::int64_t, 3> rows{0, 1, 0};
      subject->pool.free(rows);
    } catch (const std::exception&) {
      continue;
    }
    CHECK(false);
  }
  CHECK(subject->snapshot() == before);
  subject->pool.free(Numbers{0, 1, 2});
}

TEST(no_memory_for_a_run) {
  check_strong_guarantee([](RequestPool& pool) { pool.write_run(0, 1, 5, Numbers{5, 6, 7, 8}); });
}

TEST(no_memory_for_pairs) {
  check_strong_guarantee([](RequestPool& pool) {
    pool.write(Numbers{0, 1, 0, 2, 1}, Numbers{2, 1, 3, 0, 2}, Numbers{5, 6, 7, 8, 9});
  });
}

TEST(no_memory_for_clear) {
  check_strong_guarantee([](RequestPool& pool) { pool.clear(); });
}

TEST(a_steady_state_allocates_results_only) {
  Subject subject(false);
  const Numbers slots{5, 6, 7, 8};
  std::int64_t before = 0;
  for (int turn = 0; turn < 3'000; ++turn) {
    if (turn == 2'000) before = test::allocation_count;
    const auto rows = subject.pool.alloc(2);
    for (const std::int64_t row : *rows) subject.pool.write_run(row, 0, 4, slots);
    subject.pool.free(*rows);
  }
  CHECK(test::allocation_count == before + 1'000);  // what alloc returned
}

TEST(writes_without_a_commit_take_bounded_memory) {
  const auto subject = used(false, false);
  for (std::int64_t turn = 0; turn < 10'000; ++turn) {
    subject->pool.write(Numbers{0, 2, 1}, Numbers{turn % 2, turn % 8, 0}, Numbers{5, 6, 7});
  }
  CHECK(PlantedFault::unsent_capacity(subject->pool) <= 64);
  CHECK(subject->commit() == 2 + 1 + 8);
}

TEST(alloc_and_free_of_every_row_refuse_as_they_should) {
  const auto subject = used(true, false);
  RequestPool& pool = subject->pool;
  CHECK(pool.alloc(2) == std::nullopt);
  CHECK(test::throws<ContractError>("REQ-4: ", [&] { pool.alloc(-1); }));
  CHECK(test::throws<ContractError>("REQ-4: free names row 0 twice",
                                    [&] { pool.free(Numbers{0, 0}); }));
  CHECK(test::throws<ContractError>("REQ-4: free names row 3, which is not live",
                                    [&] { pool.free(Numbers{0, 3}); }));
  CHECK(test::throws<ContractError>("REQ-7: position 8 is not in [0, 8)",
                                    [&] { pool.write_run(2, 7, 9, Numbers{1, 2}); }));
  CHECK(test::throws<ContractError>("REQ-1: row 3 is not live", [&] { pool.row(3); }));
}

TEST(runs_at_the_ends_of_64_bits) {
  const auto subject = used(true, false);
  constexpr std::int64_t low = std::numeric_limits<std::int64_t>::min();
  constexpr std::int64_t high = std::numeric_limits<std::int64_t>::max();
  RequestPool& pool = subject->pool;
  CHECK(test::throws<ContractError>("REQ-7: 1 values were given for 18446744073709551615",
                                    [&] { pool.write_run(0, low, high, Numbers{1}); }));
  CHECK(test::throws<ContractError>("REQ-7: position", [&] {
    pool.write_run(0, high - 1, high, Numbers{1});
  }));
  CHECK(test::throws<ContractError>("REQ-7: position", [&] {
    pool.write_run(0, low, low + 1, Numbers{1});
  }));
  CHECK(test::throws<ContractError>("REQ-7: slot", [&] { pool.write_run(0, 0, 1, Numbers{low}); }));
}

TEST(check_names_planted_faults) {
  const auto plant = [](auto fault) {
    const auto subject = used(true, false);
    fault(subject->pool);
    return test::throws<ContractError>("REQ-1: ", [&] { subject->pool.check(nullptr); });
  };
  CHECK(plant([](RequestPool& pool) { PlantedFault::lose_a_free_row(pool); }));
  CHECK(plant([](RequestPool& pool) {
    pool.free(Numbers{0});
    PlantedFault::free_a_live_row(pool, 0);
  }));
  Subject fresh(true);
  PlantedFault::list_a_row_twice(fresh.pool);
  CHECK(test::throws<ContractError>("REQ-1: ", [&] { fresh.pool.check(nullptr); }));

  const auto subject = used(true, false);
  subject->table[2 * kWidth + 7] = 99;
  CHECK(test::throws<ContractError>("REQ-8: req_to_token[2, 7] is 99, the books have 38",
                                    [&] { subject->pool.check(subject->table.data()); }));
}

// What the pool should hold: the shortest text that does the same.
struct Model {
  std::deque<std::int64_t> free;
  std::map<std::int64_t, Numbers> live;

  Model() {
    for (std::int64_t row = 0; row < kRows; ++row) free.push_back(row);
  }

  bool write(const Numbers& rows, const Numbers& positions, const Numbers& slots) {
    auto after = live;
    for (const std::int64_t row : rows) {
      if (!after.contains(row)) return false;
    }
    for (std::size_t i = 0; i < positions.size(); ++i) {
      Numbers& books = after[rows.size() == 1 ? rows[0] : rows[i]];
      const auto end = static_cast<std::int64_t>(books.size());
      if (positions[i] < 0 || positions[i] > end || positions[i] >= kWidth || slots[i] < 1) {
        return false;
      }
      if (positions[i] == end) books.push_back(0);
      books[static_cast<std::size_t>(positions[i])] = slots[i];
    }
    live = after;
    return true;
  }

  bool give_back(const Numbers& rows) {
    const auto before = *this;
    for (const std::int64_t row : rows) {
      if (live.erase(row) == 0) {
        *this = before;
        return false;
      }
      free.push_back(row);
    }
    return true;
  }
};

class History {
 public:
  History(unsigned seed, bool on_host) : random_(seed), on_host_(on_host), subject_(on_host) {}

  void step() {
    switch (draw(0, 9)) {
      case 0: case 1: alloc(); break;
      case 2: give_back(); break;
      case 3: case 4: case 5: write_run(); break;
      case 6: case 7: case 8: write(); break;
      default:
        if (draw(0, 9) == 0) {
          subject_.pool.clear();
          model_ = Model();
        } else {
          subject_.commit();
          CHECK(subject_.commit() == 0);
        }
    }
    compare();
  }

  int refused() const { return refused_; }

 private:
  std::int64_t draw(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(random_);
  }

  Numbers draw_some(std::size_t count, std::int64_t low, std::int64_t high) {
    Numbers numbers(count);
    std::generate(numbers.begin(), numbers.end(), [&] { return draw(low, high); });
    return numbers;
  }

  // The pool accepts the call if, and only if, the model does.
  template <class Call>
  void expect(bool accepted, Call call) {
    refused_ += accepted ? 0 : 1;
    CHECK(test::throws<ContractError>("REQ-", call) == !accepted);
  }

  void alloc() {
    const std::int64_t count = draw(0, 3);
    const auto taken = subject_.pool.alloc(count);
    CHECK(taken.has_value() == (count <= static_cast<std::int64_t>(model_.free.size())));
    for (const std::int64_t row : taken.value_or(Numbers{})) {
      CHECK(row == model_.free.front());
      model_.free.pop_front();
      model_.live[row] = {};
    }
  }

  void give_back() {
    const Numbers rows = draw_some(static_cast<std::size_t>(draw(0, 2)), -1, kRows);
    expect(model_.give_back(rows), [&] { subject_.pool.free(rows); });
  }

  void write_run() {
    const std::int64_t row = draw(0, kRows - 1);
    const std::int64_t start = draw(0, 4);
    const auto count = static_cast<std::size_t>(draw(1, 5));
    const Numbers slots = draw_some(count, draw(0, 9) == 0 ? 0 : 1, 99);
    Numbers positions;
    for (std::size_t i = 0; i < slots.size(); ++i) {
      positions.push_back(start + static_cast<std::int64_t>(i));
    }
    expect(model_.write({row}, positions, slots), [&] {
      subject_.pool.write_run(row, start, start + static_cast<std::int64_t>(slots.size()), slots);
    });
  }

  void write() {
    const auto count = static_cast<std::size_t>(draw(0, 4));
    const Numbers rows = draw_some(count, 0, draw(1, kRows));
    Numbers positions;
    for (const std::int64_t row : rows) {
      const auto found = model_.live.find(row);
      const std::size_t end = found == model_.live.end() ? 0 : found->second.size();
      positions.push_back(draw(0, static_cast<std::int64_t>(end)) - (draw(0, 20) == 0 ? 1 : 0));
    }
    const Numbers slots = draw_some(count, 1, 99);
    expect(model_.write(rows, positions, slots),
           [&] { subject_.pool.write(rows, positions, slots); });
  }

  void compare() {
    const Snapshot seen = subject_.snapshot();
    CHECK(seen.rows == model_.live);
    CHECK(std::equal(seen.free.begin(), seen.free.end(), model_.free.begin(), model_.free.end()));
    subject_.pool.check(subject_.table.data());
    if (on_host_) CHECK(subject_.pool.unsent_count() == 0);
  }

  std::mt19937 random_;
  bool on_host_;
  Subject subject_;
  Model model_;
  int refused_ = 0;
};

TEST(random_histories_agree_with_the_model) {
  int refused = 0;
  for (unsigned seed = 0; seed < 60; ++seed) {
    History history(seed, seed % 2 == 0);
    for (int step = 0; step < 500; ++step) history.step();
    refused += history.refused();
  }
  CHECK(refused > 3'000);
}

}  // namespace
}  // namespace kvspec
