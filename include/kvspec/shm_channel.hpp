// A channel of one writer and several readers in shared memory.  Spec: CHAN.
//
//     writer --> [ ring of block_count blocks ] --> reader 0, reader 1, ...    all of them get all
//
//     written - block_count <= read(r) <= written    for every reader r that counts (CHAN-1)
//
// What lies where in the segment is CHAN-29.  The writer alone moves `written`, reader r alone its
// `read`; each is on lines of its own.  A message is in its block before `written` counts it
// (CHAN-9): that store releases, a reader's load acquires; and the same way back for `read`.
//
// Sleep and bells.  A bell is a futex, odd while somebody may sleep on it.  Who is about to sleep
// makes it odd, then looks once more whether there is something to do, then sleeps on the odd
// value.  Who has published looks at the bell afterwards; an odd one it makes even, and wakes all.
// The four accesses are sequentially consistent, so one of the two sees the other: no wake-up is
// lost, and a sleeper that was killed leaves nothing behind but one wake too many.
//
// Who lives.  Each end has a lock on a byte of its own, through the segment's open file description
// (F_OFD_SETLK); the kernel drops it with the process.  A waiting end looks at its peers' locks
// before it sleeps and every death_check seconds (CHAN-20, CHAN-21, CHAN-27).  Only the holder of a
// place's lock writes its state, so attach and drop_reader exclude each other.
//
// One thread at a time uses an end; a second one is refused (CHAN-26).  Linux only.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvspec/shared_memory.hpp"

namespace kvspec {

// Exact costs so far (CHAN-30).
struct ShmChannelCounters {
  std::int64_t bytes_copied = 0;
  std::int64_t looks = 0;   // how often a wait looked whether its peers live
  std::int64_t sleeps = 0;  // futex waits
  std::int64_t wakes = 0;   // futex wakes: bells that were odd
};

// The abstract state; `writer` and `readers` in the words of the specification.
struct ShmChannelView {
  std::string writer;
  std::uint64_t written;
  std::vector<std::uint64_t> read;
  std::vector<std::string> readers;
};

// How long a call waits, and who may interrupt it.
struct Patience {
  std::optional<double> seconds;  // none: for ever
  void (*interrupt)() = nullptr;  // called between sleeps; what it throws ends the wait
};

class ShmChannel {
 public:
  struct Shape {
    std::int64_t block_bytes;
    std::int64_t block_count;
    std::int64_t reader_count;

    bool operator==(const Shape&) const = default;
  };

  // The writer's end of a new channel (CHAN-2).  REQUIRES: CHAN-3.  Throws what SharedSegment does.
  ShmChannel(std::string_view label, const Shape& shape);
  // The end of a reader (CHAN-4).  REQUIRES: CHAN-5.
  ShmChannel(const std::string& name, std::int64_t reader);
  ShmChannel(const ShmChannel&) = delete;
  ShmChannel& operator=(const ShmChannel&) = delete;
  // Without close() the end is gone, as if its process had died.
  ~ShmChannel() = default;

  const std::string& name() const noexcept { return segment_.name(); }
  const Shape& shape() const noexcept { return shape_; }
  std::optional<std::int64_t> reader() const noexcept { return reader_; }
  double death_check() const noexcept { return death_check_; }
  void set_death_check(double seconds);  // REQUIRES: in [0.001, 60] (CHAN-26)

  // Whoever calls this end; a second thread, and a call on a closed end, are refused (CHAN-26).
  class Turn {
   public:
    Turn(ShmChannel& end, const char* name);
    ~Turn() { end_.busy_.store(false, std::memory_order_release); }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

    // REQUIRES: the end is of this kind, has no block open, the timeout is a time (CHAN-26).
    void require_writer(const std::optional<double>& timeout = 0) const;
    void require_reader(const std::optional<double>& timeout = 0) const;

   private:
    void require(const std::optional<double>& timeout) const;
    [[noreturn]] void refuse(const std::string& what) const;

    ShmChannel& end_;
    const char* name_;
  };

  // All that follow REQUIRE that the caller has the Turn, and has asked it for the right kind.

  // REQUIRES: a message of that many bytes fits a block (CHAN-8).
  void require_fits(std::size_t bytes) const;
  // Whether there was room for a message before the time was over (CHAN-7).  Throws PeerDiedError
  // if none will come (CHAN-20, CHAN-24).  O(reader_count) when it need not wait (CHAN-30).
  bool wait_for_room(const Patience& patience);
  // The block of the next message.  REQUIRES: wait_for_room() was true.
  std::span<std::byte> room() noexcept;
  // Makes its first bytes the last message (CHAN-6, CHAN-13).  REQUIRES: they are written.
  void publish(std::size_t bytes);
  // Copies and publishes (CHAN-6).  REQUIRES: wait_for_room(), require_fits().
  void put(std::span<const std::byte> message);

  // Whether there was a message before the time was over, or the writer closed (CHAN-10, CHAN-18).
  // Throws PeerDiedError if none will come (CHAN-21).  O(1) when it need not wait.
  bool wait_for_message(const Patience& patience);
  // The next message in its block.  REQUIRES: wait_for_message() was true.
  std::span<const std::byte> message() const;
  // It was received; its block may be written again (CHAN-9, CHAN-15).
  void advance();
  // Copies and advances (CHAN-9, CHAN-11).  REQUIRES: `into` is as long as message().
  void take(std::span<std::byte> into);

  // Whether no place was absent before the time was over (CHAN-25); as wait_for_room otherwise.
  bool wait_for_readers(const Patience& patience);
  // A place that is gone or absent counts no more (CHAN-22).  REQUIRES: CHAN-23.
  void drop_reader(std::int64_t reader);

  // Whether a block is open, so that nothing else may be called: its holder says (CHAN-26).
  void hold_block(bool held) noexcept { block_held_ = held; }
  bool holds_block() const noexcept { return block_held_; }

  // The channel ends, or the reader leaves (CHAN-18, CHAN-19).  In a child that inherited the end
  // nothing but its mapping and descriptor goes.
  void close() noexcept;

  // These need no Turn.
  bool closed() const noexcept { return segment_.closed(); }
  bool ended() const noexcept;  // CHAN-18
  ShmChannelView view() const;  // REQUIRES: not closed.  O(reader_count) system calls.
  ShmChannelCounters counters() const noexcept { return counters_; }
  // Throws ContractError if cursors or description are broken (CHAN-28).  O(reader_count).
  void check() const;

 private:
  using Word = std::uint64_t;
  using Half = std::uint32_t;
  enum State : Half { kAbsent, kAttached, kLeft, kDropped };
  static constexpr std::int64_t kWriter = -1;  // the place beside those of the readers

  std::atomic_ref<Word> word(std::size_t offset) const noexcept;
  std::atomic_ref<Half> half(std::size_t offset) const noexcept;
  std::atomic_ref<Word> cursor(std::int64_t reader) const noexcept;
  std::atomic_ref<Half> state(std::int64_t reader) const noexcept;
  std::size_t block_offset(Word number) const noexcept;
  bool counts(std::int64_t reader) const noexcept;

  bool lock(std::int64_t place, short kind) const;
  bool is_gone(std::int64_t place) const;
  std::string state_name(std::int64_t reader) const;

  bool has_room();
  bool has_message() noexcept;
  bool all_came() const noexcept;
  void notice_the_dead() const;
  bool is_over();
  template <class Ready, class Over>
  bool wait(std::size_t bell, const Patience& patience, Ready ready, Over over);
  template <class Ready>
  void sleep(std::size_t bell, double seconds, Ready ready);
  void ring(std::size_t bell) noexcept;

  SharedSegment segment_;
  Shape shape_;
  std::optional<std::int64_t> reader_;  // none: the writer's
  double death_check_ = 0.1;
  Word next_ = 0;   // of the writer: messages sent; of a reader: messages received
  Word known_ = 0;  // of the writer: where room ends, as last seen; of a reader: written
  bool block_held_ = false;
  std::atomic<bool> busy_ = false;
  ShmChannelCounters counters_;
};

}  // namespace kvspec
