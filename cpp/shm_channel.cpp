#include "kvspec/shm_channel.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstring>
#include <ctime>
#include <fcntl.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <system_error>
#include <unistd.h>
#include <utility>

#include "kvspec/contract.hpp"

namespace kvspec {

namespace {

// The layout (CHAN-29).
constexpr std::size_t kLine = 128;
constexpr std::size_t kWritten = kLine;
constexpr std::size_t kClosed = kLine + 8;
constexpr std::size_t kReadersBell = 2 * kLine;
constexpr std::size_t kWritersBell = 3 * kLine;
constexpr std::size_t kStates = 4 * kLine;
constexpr std::size_t kBlockHeader = 64;
constexpr off_t kLocks = off_t{1} << 62;
constexpr std::array<char, 8> kMagic{'K', 'V', 'C', 'H', 'A', 'N', '0', '1'};
constexpr int kSpins = 100;

struct Limit {
  const char* name;
  std::int64_t value;
  const char* text;
};
constexpr std::array<Limit, 3> kLimits{{{"block_bytes", std::int64_t{1} << 40, "2^40"},
                                        {"block_count", std::int64_t{1} << 20, "2^20"},
                                        {"reader_count", 256, "256"}}};

constexpr std::size_t lines(std::size_t bytes) noexcept {
  return (bytes + kLine - 1) / kLine * kLine;
}

std::array<std::int64_t, 3> numbers(const ShmChannel::Shape& shape) noexcept {
  return {shape.block_bytes, shape.block_count, shape.reader_count};
}

bool is_sound(const ShmChannel::Shape& shape) noexcept {
  const auto values = numbers(shape);
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (values[i] < 1 || values[i] > kLimits[i].value) return false;
  }
  return true;
}

std::size_t cursors_offset(const ShmChannel::Shape& shape) noexcept {
  return kStates + lines(4 * static_cast<std::size_t>(shape.reader_count));
}

std::size_t blocks_offset(const ShmChannel::Shape& shape) noexcept {
  return cursors_offset(shape) + kLine * static_cast<std::size_t>(shape.reader_count);
}

std::size_t block_stride(const ShmChannel::Shape& shape) noexcept {
  return lines(kBlockHeader + static_cast<std::size_t>(shape.block_bytes));
}

// REQUIRES: is_sound; at most 2^40 * 2^20 and a little, so it does not overflow.
std::size_t segment_bytes(const ShmChannel::Shape& shape) noexcept {
  return blocks_offset(shape) + block_stride(shape) * static_cast<std::size_t>(shape.block_count);
}

ShmChannel::Shape checked(const ShmChannel::Shape& shape) {
  const auto values = numbers(shape);
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (values[i] >= 1 && values[i] <= kLimits[i].value) continue;
    refuse("CHAN-3", std::string(kLimits[i].name) + " " + std::to_string(values[i]) +
                         " is not in [1, " + kLimits[i].text + "]");
  }
  return shape;
}

// What the segment says of itself.
ShmChannel::Shape described(const SharedSegment& segment) {
  if (static_cast<std::size_t>(segment.bytes()) >= kStates &&
      std::memcmp(segment.data(), kMagic.data(), kMagic.size()) == 0) {
    std::array<std::int64_t, 3> values{};
    std::memcpy(values.data(), segment.data() + kMagic.size(), sizeof(values));
    const ShmChannel::Shape shape{values[0], values[1], values[2]};
    if (is_sound(shape) && segment_bytes(shape) <= static_cast<std::size_t>(segment.bytes())) {
      return shape;
    }
  }
  refuse("CHAN-5", "the segment " + segment.name() + " is no channel of this layout");
}

std::int64_t checked_reader(std::int64_t reader, const ShmChannel::Shape& shape,
                            const char* clause) {
  if (reader < 0 || reader >= shape.reader_count) {
    refuse(clause, "reader " + std::to_string(reader) + " is not in [0, " +
                       std::to_string(shape.reader_count) + ")");
  }
  return reader;
}

void relax() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) noexcept {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

// -- memory ---------------------------------------------------------------------------------------

std::atomic_ref<ShmChannel::Word> ShmChannel::word(std::size_t offset) const noexcept {
  return std::atomic_ref<Word>(*reinterpret_cast<Word*>(segment_.data() + offset));
}

std::atomic_ref<ShmChannel::Half> ShmChannel::half(std::size_t offset) const noexcept {
  return std::atomic_ref<Half>(*reinterpret_cast<Half*>(segment_.data() + offset));
}

std::atomic_ref<ShmChannel::Word> ShmChannel::cursor(std::int64_t reader) const noexcept {
  return word(cursors_offset(shape_) + kLine * static_cast<std::size_t>(reader));
}

std::atomic_ref<ShmChannel::Half> ShmChannel::state(std::int64_t reader) const noexcept {
  return half(kStates + 4 * static_cast<std::size_t>(reader));
}

std::size_t ShmChannel::block_offset(Word number) const noexcept {
  const Word index = number % static_cast<Word>(shape_.block_count);
  return blocks_offset(shape_) + block_stride(shape_) * static_cast<std::size_t>(index);
}

bool ShmChannel::counts(std::int64_t reader) const noexcept {
  const Half found = state(reader).load(std::memory_order_acquire);
  return found == kAbsent || found == kAttached;
}

// -- ends -----------------------------------------------------------------------------------------

ShmChannel::ShmChannel(std::string_view label, const Shape& shape)
    : segment_(SharedSegment::create(label,
                                     static_cast<std::int64_t>(segment_bytes(checked(shape))))),
      shape_(shape),
      known_(static_cast<Word>(shape.block_count)) {
  lock(kWriter, F_WRLCK);
  const auto values = numbers(shape);
  std::memcpy(segment_.data() + kMagic.size(), values.data(), sizeof(values));
  std::memcpy(segment_.data(), kMagic.data(), kMagic.size());
}

ShmChannel::ShmChannel(const std::string& name, std::int64_t reader)
    : segment_(SharedSegment::attach(name)),
      shape_(described(segment_)),
      reader_(checked_reader(reader, shape_, "CHAN-5")) {
  const auto refuse_place = [&](const std::string& found) {
    refuse("CHAN-5",
           "the place of reader " + std::to_string(reader) + " is " + found + ", not absent");
  };
  if (!lock(reader, F_WRLCK)) refuse_place("attached");
  const Half found = state(reader).load(std::memory_order_acquire);
  if (found == kAttached) refuse_place("gone");
  if (found != kAbsent) refuse_place(state_name(reader));
  state(reader).store(kAttached, std::memory_order_seq_cst);
  ring(kWritersBell);
}

void ShmChannel::close() noexcept {
  if (closed()) return;
  if (segment_.owned()) {
    if (reader_) {
      state(*reader_).store(kLeft, std::memory_order_seq_cst);
      ring(kWritersBell);
    } else {
      half(kClosed).store(1, std::memory_order_seq_cst);
      ring(kReadersBell);
    }
  }
  block_held_ = false;
  segment_.close();
}

void ShmChannel::set_death_check(double seconds) {
  if (!(seconds >= 0.001 && seconds <= 60)) {
    refuse("CHAN-26", "death_check " + std::to_string(seconds) + " is not in [0.001, 60]");
  }
  death_check_ = seconds;
}

ShmChannel::Turn::Turn(ShmChannel& end, const char* name) : end_(end), name_(name) {
  if (end.busy_.exchange(true, std::memory_order_acquire)) {
    refuse("another thread is in a call of this end");
  }
  if (end.closed()) {
    end.busy_.store(false, std::memory_order_release);
    refuse("this end is closed");
  }
}

void ShmChannel::Turn::refuse(const std::string& what) const {
  kvspec::refuse("CHAN-26", std::string(name_) + ": " + what);
}

void ShmChannel::Turn::require_writer(const std::optional<double>& timeout) const {
  if (end_.reader_) {
    kvspec::refuse("CHAN-26", std::string(name_) + " is for the writer, this is the end of" +
                                  " reader " + std::to_string(*end_.reader_));
  }
  require(timeout);
}

void ShmChannel::Turn::require_reader(const std::optional<double>& timeout) const {
  if (!end_.reader_) {
    kvspec::refuse("CHAN-26", std::string(name_) + " is for readers, this is the writer's end");
  }
  require(timeout);
}

void ShmChannel::Turn::require(const std::optional<double>& timeout) const {
  if (end_.block_held_) refuse("a block of this end is open");
  if (timeout && !(*timeout >= 0)) {
    refuse("timeout " + (std::isnan(*timeout) ? "nan" : std::to_string(*timeout)) +
           " is not a time");
  }
}

// -- who lives ------------------------------------------------------------------------------------

namespace {

struct flock byte_lock(std::int64_t place, short kind) noexcept {
  struct flock found {};
  found.l_type = kind;
  found.l_whence = SEEK_SET;
  found.l_start = kLocks + 1 + static_cast<off_t>(place);
  found.l_len = 1;
  return found;
}

[[noreturn]] void fail(const char* what) {
  throw std::system_error(errno, std::generic_category(), what);
}

}  // namespace

// Takes the lock of a place or gives it back; whether nobody else has it.
bool ShmChannel::lock(std::int64_t place, short kind) const {
  struct flock wanted = byte_lock(place, kind);
  if (::fcntl(segment_.fd(), F_OFD_SETLK, &wanted) == 0) return true;
  if (errno != EAGAIN && errno != EACCES) fail("F_OFD_SETLK");
  return false;
}

// Whether nobody has the lock of a place that is not this end's own.
bool ShmChannel::is_gone(std::int64_t place) const {
  if (place == reader_.value_or(kWriter)) return false;
  struct flock found = byte_lock(place, F_WRLCK);
  if (::fcntl(segment_.fd(), F_OFD_GETLK, &found) != 0) fail("F_OFD_GETLK");
  return found.l_type == F_UNLCK;
}

std::string ShmChannel::state_name(std::int64_t reader) const {
  static constexpr std::array<const char*, 4> names{"absent", "attached", "left", "dropped"};
  Half found = state(reader).load(std::memory_order_acquire);
  if (found == kAttached && is_gone(reader)) {
    // Read again: it may have left before it let go of the lock.
    found = state(reader).load(std::memory_order_acquire);
    if (found == kAttached) return "gone";
  }
  return found < names.size() ? names[found] : "broken";
}

// -- sleep and bells ------------------------------------------------------------------------------

// Whether it became ready before the time was over, or before `over` said that it never will.
template <class Ready, class Over>
bool ShmChannel::wait(std::size_t bell, const Patience& patience, Ready ready, Over over) {
  if (ready()) return true;
  if (!patience.seconds || *patience.seconds > 0) {
    for (int spin = 0; spin < kSpins; ++spin) {
      relax();
      if (ready()) return true;
    }
  }
  const Clock::time_point start = Clock::now();
  for (;;) {
    ++counters_.looks;
    if (over()) return false;
    if (ready()) return true;
    double seconds = death_check_;
    if (patience.seconds) seconds = std::min(seconds, *patience.seconds - seconds_since(start));
    if (seconds <= 0) return false;
    sleep(bell, seconds, ready);
    if (ready()) return true;
    if (patience.interrupt != nullptr) patience.interrupt();
  }
}

// Sleeps until the bell rings, but for some seconds at most, and not if it is ready.
template <class Ready>
void ShmChannel::sleep(std::size_t bell, double seconds, Ready ready) {
  const auto value = half(bell);
  Half seen = value.load(std::memory_order_seq_cst);
  if (seen % 2 == 0 && !value.compare_exchange_strong(seen, seen + 1, std::memory_order_seq_cst)) {
    return;  // somebody rang, or is about to sleep too: look again
  }
  const Half odd = seen | 1;
  if (ready()) return;
  ++counters_.sleeps;
  const double whole = std::floor(seconds);
  const struct timespec time {
    static_cast<std::time_t>(whole), static_cast<long>((seconds - whole) * 1e9)
  };
  ::syscall(SYS_futex, segment_.data() + bell, FUTEX_WAIT, odd, &time, nullptr, 0);
}

// Wakes who sleeps.  REQUIRES: what they wait for was stored before, sequentially consistent.
void ShmChannel::ring(std::size_t bell) noexcept {
  const auto value = half(bell);
  Half seen = value.load(std::memory_order_seq_cst);
  if (seen % 2 == 0) return;
  // If it fails somebody else has rung it, after this was published.
  if (!value.compare_exchange_strong(seen, seen + 1, std::memory_order_seq_cst)) return;
  ++counters_.wakes;
  ::syscall(SYS_futex, segment_.data() + bell, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// -- the writer -----------------------------------------------------------------------------------

void ShmChannel::require_fits(std::size_t bytes) const {
  if (bytes <= static_cast<std::size_t>(shape_.block_bytes)) return;
  refuse("CHAN-8", "a message of " + std::to_string(bytes) + " bytes was given, a block has " +
                       std::to_string(shape_.block_bytes));
}

bool ShmChannel::has_room() {
  bool counted = false;
  for (std::int64_t reader = 0; reader < shape_.reader_count && !counted; ++reader) {
    counted = counts(reader);
  }
  if (!counted) {
    std::string states;
    for (std::int64_t reader = 0; reader < shape_.reader_count; ++reader) {
      states += (reader == 0 ? "" : ", ") + state_name(reader);
    }
    throw PeerDiedError("CHAN-24", "no reader is left: " + states);
  }
  if (next_ < known_) return true;
  Word slowest = next_;
  for (std::int64_t reader = 0; reader < shape_.reader_count; ++reader) {
    if (!counts(reader)) continue;
    slowest = std::min(slowest, cursor(reader).load(std::memory_order_seq_cst));
  }
  known_ = slowest + static_cast<Word>(shape_.block_count);
  return next_ < known_;
}

void ShmChannel::notice_the_dead() const {
  std::string gone;
  std::int64_t first = -1;
  for (std::int64_t reader = 0; reader < shape_.reader_count; ++reader) {
    if (state_name(reader) != "gone") continue;
    if (first < 0) first = reader;
    gone += (gone.empty() ? "" : ", ") + std::to_string(reader);
  }
  if (first < 0) return;
  throw PeerDiedError("CHAN-20", "reader " + gone + " of " + name() + " is gone, " +
                                     std::to_string(next_) + " messages were sent: drop_reader(" +
                                     std::to_string(first) + ") goes on without it");
}

bool ShmChannel::wait_for_room(const Patience& patience) {
  const auto over = [this] {
    notice_the_dead();
    return false;
  };
  return wait(kWritersBell, patience, [this] { return has_room(); }, over);
}

std::span<std::byte> ShmChannel::room() noexcept {
  return {segment_.data() + block_offset(next_) + kBlockHeader,
          static_cast<std::size_t>(shape_.block_bytes)};
}

void ShmChannel::publish(std::size_t bytes) {
  word(block_offset(next_)).store(bytes, std::memory_order_relaxed);
  word(kWritten).store(++next_, std::memory_order_seq_cst);
  ring(kReadersBell);
}

void ShmChannel::put(std::span<const std::byte> message) {
  if (!message.empty()) std::memcpy(room().data(), message.data(), message.size());
  counters_.bytes_copied += static_cast<std::int64_t>(message.size());
  publish(message.size());
}

bool ShmChannel::all_came() const noexcept {
  for (std::int64_t reader = 0; reader < shape_.reader_count; ++reader) {
    if (state(reader).load(std::memory_order_seq_cst) == kAbsent) return false;
  }
  return true;
}

bool ShmChannel::wait_for_readers(const Patience& patience) {
  const auto over = [this] {
    notice_the_dead();
    return false;
  };
  return wait(kWritersBell, patience, [this] { return all_came(); }, over);
}

void ShmChannel::drop_reader(std::int64_t reader) {
  checked_reader(reader, shape_, "CHAN-23");
  const std::string named = "reader " + std::to_string(reader);
  if (!counts(reader)) refuse("CHAN-23", named + " has been " + state_name(reader));
  if (!lock(reader, F_WRLCK)) refuse("CHAN-23", named + " is alive");
  state(reader).store(kDropped, std::memory_order_release);
  lock(reader, F_UNLCK);
}

// -- a reader -------------------------------------------------------------------------------------

bool ShmChannel::has_message() noexcept {
  if (next_ < known_) return true;
  known_ = word(kWritten).load(std::memory_order_seq_cst);
  return next_ < known_;
}

// Whether the writer has closed and nothing is left; throws if it is gone and nothing is left.
bool ShmChannel::is_over() {
  // What was sent is looked at after the writer was: it may have sent before it went.
  const bool is_closed = half(kClosed).load(std::memory_order_seq_cst) != 0;
  if (!is_closed && !is_gone(kWriter)) return false;
  const bool closed_since = half(kClosed).load(std::memory_order_seq_cst) != 0;
  if (has_message()) return false;
  if (closed_since) return true;
  throw PeerDiedError("CHAN-21", "the writer of " + name() + " is gone, its " +
                                     std::to_string(next_) + " messages were received");
}

bool ShmChannel::wait_for_message(const Patience& patience) {
  return wait(kReadersBell, patience, [this] { return has_message(); },
              [this] { return is_over(); });
}

std::span<const std::byte> ShmChannel::message() const {
  const std::size_t offset = block_offset(next_);
  const Word bytes = word(offset).load(std::memory_order_relaxed);
  if (bytes > static_cast<Word>(shape_.block_bytes)) {
    refuse("CHAN-1", "a message of " + std::to_string(bytes) + " bytes in a block");
  }
  return {segment_.data() + offset + kBlockHeader, static_cast<std::size_t>(bytes)};
}

void ShmChannel::advance() {
  cursor(*reader_).store(++next_, std::memory_order_seq_cst);
  ring(kWritersBell);
}

void ShmChannel::take(std::span<std::byte> into) {
  if (!into.empty()) std::memcpy(into.data(), message().data(), into.size());
  counters_.bytes_copied += static_cast<std::int64_t>(into.size());
  advance();
}

bool ShmChannel::ended() const noexcept {
  if (closed() || !reader_ || half(kClosed).load(std::memory_order_seq_cst) == 0) return false;
  return word(kWritten).load(std::memory_order_seq_cst) == next_;
}

// -- checking -------------------------------------------------------------------------------------

ShmChannelView ShmChannel::view() const {
  const bool gone = is_gone(kWriter);
  const bool is_closed = half(kClosed).load(std::memory_order_seq_cst) != 0;
  ShmChannelView seen{is_closed ? "closed" : gone ? "gone" : "open",
                      word(kWritten).load(std::memory_order_acquire), {}, {}};
  for (std::int64_t reader = 0; reader < shape_.reader_count; ++reader) {
    seen.read.push_back(cursor(reader).load(std::memory_order_acquire));
    seen.readers.push_back(state_name(reader));
  }
  return seen;
}

void ShmChannel::check() const {
  const auto values = numbers(shape_);
  if (std::memcmp(segment_.data(), kMagic.data(), kMagic.size()) != 0 ||
      std::memcmp(segment_.data() + kMagic.size(), values.data(), sizeof(values)) != 0) {
    refuse("CHAN-2", "the description in the segment is not the channel's");
  }
  for (std::int64_t reader = 0; reader < shape_.reader_count; ++reader) {
    if (!counts(reader)) continue;
    // Others go on meanwhile, so the writer's cursor is read before the reader's and after it.
    const Word before = word(kWritten).load(std::memory_order_acquire);
    const Word read = cursor(reader).load(std::memory_order_acquire);
    const Word written = word(kWritten).load(std::memory_order_acquire);
    const bool behind = before > read && before - read > static_cast<Word>(shape_.block_count);
    if ((read <= written && !behind) || !counts(reader)) continue;
    refuse("CHAN-1", "reader " + std::to_string(reader) + " has received " +
                         std::to_string(read) + " of " + std::to_string(written) +
                         " messages, in " + std::to_string(shape_.block_count) + " blocks");
  }
}

}  // namespace kvspec
