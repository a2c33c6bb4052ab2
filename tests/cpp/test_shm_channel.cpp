// The channel by itself: threads as ends of one segment, deaths, memory that runs out.
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "kvspec/contract.hpp"
#include "kvspec/shm_channel.hpp"

namespace kvspec {
namespace {

using Turn = ShmChannel::Turn;
using Message = std::vector<std::byte>;

constexpr Patience kNow{0.0};
constexpr Patience kLong{60.0};

Message numbered(std::uint64_t number, std::size_t bytes) {
  Message message(bytes);
  for (std::size_t i = 0; i < bytes; ++i) {
    message[i] = static_cast<std::byte>(number * 31 + i * 7);
  }
  return message;
}

std::size_t length_of(std::uint64_t number) { return number * 7919 % 1025; }

bool send(ShmChannel& end, const Message& message, const Patience& patience) {
  const Turn turn(end, "send");
  turn.require_writer(patience.seconds);
  end.require_fits(message.size());
  if (!end.wait_for_room(patience)) return false;
  end.put(message);
  return true;
}

std::optional<Message> receive(ShmChannel& end, const Patience& patience) {
  const Turn turn(end, "receive");
  turn.require_reader(patience.seconds);
  if (!end.wait_for_message(patience)) return std::nullopt;
  Message message(end.message().size());
  end.take(message);
  return message;
}

struct Group {
  ShmChannel writer;
  std::vector<std::unique_ptr<ShmChannel>> readers;

  Group(std::int64_t block_count, std::int64_t reader_count, std::int64_t block_bytes = 1024)
      : writer("cpp", {block_bytes, block_count, reader_count}) {
    for (std::int64_t reader = 0; reader < reader_count; ++reader) {
      readers.push_back(std::make_unique<ShmChannel>(writer.name(), reader));
    }
  }
};

// Everybody gets everything, whole and in order, through a ring that is full or empty all the time.
void run_threads(std::int64_t block_count, std::uint64_t message_count) {
  Group group(block_count, 3);
  std::atomic<int> right = 0;
  std::vector<std::thread> threads;
  for (auto& reader : group.readers) {
    threads.emplace_back([&right, &reader, message_count] {
      std::uint64_t number = 0;
      while (const auto message = receive(*reader, kLong)) {
        if (*message != numbered(number, length_of(number))) return;
        ++number;
      }
      if (number == message_count && reader->ended()) ++right;
      reader->close();
    });
  }
  for (std::uint64_t number = 0; number < message_count; ++number) {
    CHECK(send(group.writer, numbered(number, length_of(number)), kLong));
    if (number % 500 == 0) group.writer.check();
  }
  group.writer.close();
  for (std::thread& thread : threads) thread.join();
  CHECK(right == 3);
}

TEST(threads_get_everything_through_one_block) { run_threads(1, 2'000); }
TEST(threads_get_everything_through_four_blocks) { run_threads(4, 4'000); }

TEST(a_sleeping_end_is_woken) {
  Group group(1, 2);
  for (auto& reader : group.readers) reader->set_death_check(60);
  group.writer.set_death_check(60);
  std::thread thread([&group] {
    for (int turn = 0; turn < 300; ++turn) {
      for (auto& reader : group.readers) receive(*reader, kLong);
    }
  });
  for (std::uint64_t number = 0; number < 300; ++number) {
    CHECK(send(group.writer, numbered(number, 8), kLong));
  }
  thread.join();
}

TEST(a_waiting_writer_notices_a_death_and_goes_on) {
  Group group(1, 2);
  CHECK(send(group.writer, numbered(0, 3), kNow));
  CHECK(!send(group.writer, numbered(1, 3), kNow));
  CHECK(receive(*group.readers[0], kNow) == numbered(0, 3));
  std::thread thread([&group] { group.readers[1].reset(); });
  CHECK(test::throws<PeerDiedError>("CHAN-20: reader 1 of ",
                                    [&] { send(group.writer, numbered(1, 3), kLong); }));
  thread.join();
  group.writer.drop_reader(1);
  CHECK(send(group.writer, numbered(1, 3), kNow));
  CHECK(receive(*group.readers[0], kNow) == numbered(1, 3));
}

TEST(a_waiting_reader_notices_a_death_and_has_what_was_sent) {
  auto writer = std::make_unique<ShmChannel>("cpp", ShmChannel::Shape{16, 2, 1});
  ShmChannel reader(writer->name(), 0);
  send(*writer, numbered(0, 16), kNow);
  CHECK(writer->wait_for_room(kNow));
  std::memset(writer->room().data(), 0xff, 16);  // half-written, and never published
  std::thread thread([&writer] { writer.reset(); });
  CHECK(receive(reader, kLong) == numbered(0, 16));
  CHECK(test::throws<PeerDiedError>("CHAN-21: the writer of ", [&] { receive(reader, kLong); }));
  thread.join();
}

TEST(attach_and_drop_exclude_each_other) {
  for (int turn = 0; turn < 200; ++turn) {
    ShmChannel writer("cpp", {8, 1, 1});
    std::unique_ptr<ShmChannel> reader;
    std::thread thread([&] {
      try {
        reader = std::make_unique<ShmChannel>(writer.name(), 0);
      } catch (const ContractError&) {
        return;
      }
    });
    bool dropped = true;
    try {
      writer.drop_reader(0);
    } catch (const ContractError&) {
      dropped = false;
    }
    thread.join();
    CHECK(!(dropped && reader));
    CHECK(writer.view().readers[0] == (dropped ? "dropped" : reader ? "attached" : "absent"));
  }
}

TEST(a_second_thread_is_refused) {
  ShmChannel writer("cpp", {8, 1, 1});
  const Turn turn(writer, "send");
  std::atomic<bool> refused = false;
  std::thread thread([&] {
    refused = test::throws<ContractError>("CHAN-26: close: another thread",
                                          [&] { const Turn other(writer, "close"); });
  });
  thread.join();
  CHECK(refused);
}

TEST(no_memory_leaves_no_channel) {
  const auto make = [] { return 0; };
  const auto create = [](int) { const ShmChannel writer("cpp", {8, 1, 1}); };
  CHECK(test::fail_each_allocation(make, create, [](int) {}) > 0);
  ShmChannel writer("cpp", {8, 1, 1});
  const auto attach = [&](int) { const ShmChannel reader(writer.name(), 0); };
  const test::FailNthAllocation armed(1);
  CHECK(test::throws<std::bad_alloc>("", [&] { attach(0); }));
  CHECK(writer.view().readers[0] == "absent");
}

}  // namespace
}  // namespace kvspec
