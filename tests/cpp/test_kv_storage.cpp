// KV storage by itself: a model beside random calls, strides, memory that runs out, refusals.
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "check.hpp"
#include "kvspec/contract.hpp"
#include "kvspec/kv_storage.hpp"

namespace kvspec {
namespace {

using Numbers = std::vector<std::int64_t>;
using Bytes = std::vector<std::byte>;
using test::throws;

constexpr std::int64_t kRows = 12;
constexpr std::int64_t kSink = 4;

// Memory of exactly its rows, so that a byte beyond it is found by the sanitizer.
struct Memory {
  Bytes bytes;
  RowMemory rows;

  Memory(std::int64_t count, std::size_t row_bytes, std::int64_t stride)
      : bytes(count == 0 ? 0 : static_cast<std::size_t>((count - 1) * stride) + row_bytes),
        rows{bytes.data(), count, stride, row_bytes} {}

  void fill(std::mt19937& random) {
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  }
  Bytes row(std::int64_t i) const {
    return {rows.row(i), rows.row(i) + static_cast<std::ptrdiff_t>(rows.row_bytes)};
  }
};

// Two tensors of rows of 24 and of 7 bytes, the second with gaps.
struct Subject {
  Memory keys{kRows, 24, 24};
  Memory values{kRows, 7, 11};
  KVStorage storage;

  explicit Subject(bool checked = true) : storage(kRows, kSink, checked) {
    storage.add(keys.rows);
    storage.add(values.rows);
  }
  std::vector<Bytes> snapshot() const {
    std::vector<Bytes> rows;
    for (std::int64_t i = kSink; i < kRows; ++i) {
      rows.push_back(keys.row(i));
      rows.push_back(values.row(i));
    }
    return rows;
  }
  void write(const Numbers& slots, const Memory& k, const Memory& v) {
    storage.write("KV-12", slots, std::array<std::size_t, 2>{0, 1}, std::array{k.rows, v.rows});
  }
};

Numbers some_slots(std::mt19937& random, std::int64_t low, std::int64_t high) {
  Numbers slots(random() % 6);
  for (auto& slot : slots) slot = low + static_cast<std::int64_t>(random() % (high - low));
  return slots;
}

bool is_fit(const Numbers& slots, bool once) {
  std::set<std::int64_t> seen;
  for (const std::int64_t slot : slots) {
    if (slot < 0 || slot >= kRows) return false;
    if (once && slot >= kSink && !seen.insert(slot).second) return false;
  }
  return true;
}

TEST(random_writes_and_moves_beside_a_model) {
  std::mt19937 random(7);
  Subject subject;
  std::vector<std::array<Bytes, 2>> model(kRows);
  for (std::int64_t i = 0; i < kRows; ++i) {
    model[static_cast<std::size_t>(i)] = {subject.keys.row(i), subject.values.row(i)};
  }
  const auto at = [&](std::int64_t slot) -> auto& { return model[static_cast<std::size_t>(slot)]; };
  for (int turn = 0; turn < 4000; ++turn) {
    const Numbers slots = some_slots(random, turn % 7 == 0 ? -1 : 0, turn % 7 == 1 ? 14 : 12);
    if (turn % 2 == 0) {
      Memory k(std::ssize(slots), 24, turn % 3 == 0 ? 24 : 31);
      Memory v(std::ssize(slots), 7, 7);
      k.fill(random);
      v.fill(random);
      const bool refused =
          throws<ContractError>("KV-12: ", [&] { subject.write(slots, k, v); });
      CHECK(refused == !is_fit(slots, true));
      if (refused) continue;
      for (std::int64_t i = 0; i < std::ssize(slots); ++i) {
        at(slots[static_cast<std::size_t>(i)]) = {k.row(i), v.row(i)};
      }
    } else {
      const Numbers sources = some_slots(random, 0, 12);
      const bool refused = throws<ContractError>(
          "KV-15: ", [&] { subject.storage.move("KV-15", slots, sources, 2); });
      CHECK(refused == !(is_fit(slots, true) && slots.size() == sources.size()));
      if (refused) continue;
      const auto before = model;
      for (std::size_t i = 0; i < slots.size(); ++i) {
        at(slots[i]) = before[static_cast<std::size_t>(sources[i])];
      }
    }
    for (std::int64_t i = kSink; i < kRows; ++i) {
      CHECK(at(i)[0] == subject.keys.row(i));
      CHECK(at(i)[1] == subject.values.row(i));
    }
  }
}

TEST(rows_of_the_storage_are_read_before_they_are_written) {
  std::mt19937 random(9);
  Subject subject;
  subject.keys.fill(random);
  const Bytes first = subject.keys.row(4);
  const Bytes second = subject.keys.row(5);
  const RowMemory shifted{subject.keys.rows.row(4), 2, 24, 24};
  subject.storage.write("KV-12", Numbers{5, 6}, std::array<std::size_t, 1>{0},
                        std::array{shifted});
  CHECK(subject.keys.row(5) == first);
  CHECK(subject.keys.row(6) == second);
}

TEST(an_unchecked_storage_takes_the_last_row_and_no_slot_beyond) {
  std::mt19937 random(11);
  Subject subject(false);
  Memory k(3, 24, 24);
  Memory v(3, 7, 7);
  k.fill(random);
  subject.write({5, 6, 5}, k, v);
  CHECK(subject.keys.row(5) == k.row(2));
  const auto before = subject.snapshot();
  for (const std::int64_t slot : {std::int64_t{-1}, kRows, INT64_MAX, INT64_MIN}) {
    CHECK(throws<ContractError>("KV-12: slot ", [&] { subject.write({5, 6, slot}, k, v); }));
  }
  CHECK(throws<ContractError>("KV-12: 3 rows", [&] { subject.write({5, 6}, k, v); }));
  CHECK(subject.snapshot() == before);
}

TEST(no_memory_for_a_write_of_its_own_rows_or_a_move) {
  const auto make = [] {
    auto subject = std::make_unique<Subject>();
    std::mt19937 random(13);
    subject->keys.fill(random);
    subject->values.fill(random);
    return subject;
  };
  const auto before = make()->snapshot();
  const auto unchanged = [&](const auto& subject) { CHECK(subject->snapshot() == before); };
  test::fail_each_allocation(
      make,
      [](auto& subject) {
        const RowMemory shifted{subject->keys.rows.row(4), 2, 24, 24};
        subject->storage.write("KV-12", Numbers{5, 6}, std::array<std::size_t, 1>{0},
                               std::array{shifted});
      },
      unchanged);
  test::fail_each_allocation(
      make,
      [](auto& subject) { subject->storage.move("KV-15", Numbers{5, 6}, Numbers{4, 5}, 2); },
      unchanged);
}

TEST(books_of_the_host_beside_a_model) {
  std::mt19937 random(17);
  constexpr std::int64_t kSize = 24;
  constexpr std::int64_t kPage = 4;
  HostSlots books(kSize, kPage, 1, 9);
  std::deque<std::int64_t> free;
  for (std::int64_t page = 0; page < kSize / kPage; ++page) free.push_back(page);
  std::set<std::int64_t> held;
  for (int turn = 0; turn < 4000; ++turn) {
    if (random() % 2 == 0) {
      const auto pages = static_cast<std::size_t>(random() % 4);
      const auto slots = books.alloc(static_cast<std::int64_t>(pages) * kPage);
      CHECK(slots.has_value() == (pages <= free.size()));
      for (std::size_t i = 0; slots && i < pages; ++i) {
        CHECK(slots->span()[i * kPage] == free.front() * kPage);
        held.insert(free.front());
        free.pop_front();
      }
    } else {
      const auto page = static_cast<std::int64_t>(random() % (kSize / kPage));
      Numbers slots{page * kPage, page * kPage + 1, page * kPage + 2, page * kPage + 3};
      if (random() % 4 == 0) slots.pop_back();
      const bool refused = throws<ContractError>("KV-28: ", [&] { books.free(slots); });
      CHECK(refused == !(slots.size() == kPage && held.contains(page)));
      if (!refused) {
        held.erase(page);
        free.push_back(page);
      }
    }
    CHECK(books.available_size() == std::ssize(free) * kPage);
    CHECK(books.held_slots().size() == held.size() * kPage);
  }
  CHECK(throws<ContractError>("KV-28: alloc(3)", [&] { books.alloc(3); }));
}

TEST(a_refused_free_leaves_every_page_held) {
  HostSlots books(8, 2, 1, 9);
  books.alloc(6);
  const Numbers twice{0, 1, 2, 3, 0, 1};
  CHECK(throws<ContractError>("KV-28: slot 0 is named twice", [&] { books.free(twice); }));
  const Numbers last{0, 1, 6, 7};
  CHECK(throws<ContractError>("KV-28: free names slot 6", [&] { books.free(last); }));
  CHECK(books.free(Numbers{0, 1, 2, 3, 4, 5}) == 6);
}

TEST(a_transfer_names_what_is_there) {
  HostSlots books(8, 2, 1, 9);
  books.alloc(4);
  books.require_transfer(Numbers{0, 3}, Numbers{8, 1});
  const auto refused = [&](std::string_view text, const Numbers& host, const Numbers& device) {
    return throws<ContractError>(text, [&] { books.require_transfer(host, device); });
  };
  CHECK(refused("KV-31: slot 4 of the host is free", {0, 4}, {1, 2}));
  CHECK(refused("KV-31: slot 0 of the device is not in [1, 9)", {0, 1}, {1, 0}));
  CHECK(refused("KV-31: slot 1 of the device is named twice", {0, 1}, {1, 1}));
  CHECK(refused("KV-31: slot 8 of the host is not in [0, 8)", {0, 8}, {1, 2}));
  CHECK(refused("KV-31: 1 slots of the host were given for 2", {0}, {1, 2}));
}

}  // namespace
}  // namespace kvspec
