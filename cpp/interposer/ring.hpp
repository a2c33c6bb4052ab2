#pragma once
// What the interposer writes and python/kvspec/allocation_chain/ring.py reads: a header, then
// records of one size. The memory is the caller's, and all of it has pages before the first mark.

#include <cstddef>
#include <cstdint>

namespace kvspec::interposer {

inline constexpr std::uint64_t magic = 0x314e494148435653;  // "SVCHAIN1"
inline constexpr std::size_t frame_slots = 32;
inline constexpr std::size_t text_bytes = 64;

enum class Entry : std::uint32_t { call = 1, mark = 2, step = 3 };

// The order is that of FUNCTIONS in ring.py.
enum class Function : std::uint32_t {
  malloc_,
  calloc_,
  realloc_,
  aligned_alloc_,
  posix_memalign_,
  free_,
  mmap_,
  mmap64_,
  munmap_,
  mremap_,
  brk_,
  sbrk_,
  madvise_,
  mlock_,
  munlock_,
  shm_open_,
  shm_unlink_,
  ftruncate_,
  ftruncate64_,
  posix_fallocate_,
  cuda_host_alloc,
  cuda_malloc_host,
  cuda_host_register,
  cuda_host_unregister,
  cuda_free_host,
};

struct Header {
  std::uint64_t magic;
  std::uint64_t capacity;  // records that fit
  std::uint64_t next;      // records asked for: more than capacity, if some were dropped
  std::uint64_t record_bytes;
};

// A call: arguments and result. A mark: `values` are minor faults, major faults, the program break,
// the clock of the day (ns), virtual bytes and resident bytes. A step of a touch: minor and major
// faults during it, then virtual, resident and the range's resident bytes after it.
struct Record {
  std::uint64_t begin_ns, end_ns;  // CLOCK_MONOTONIC
  Entry entry;
  Function function;
  std::uint32_t phase;
  std::uint32_t thread;
  std::uint64_t values[6];
  std::uint64_t result;
  std::int32_t error;
  std::uint32_t frame_count;
  std::uint64_t frames[frame_slots];  // return addresses, the caller's first
  char text[text_bytes];
};

static_assert(sizeof(Record) == 32 + 48 + 16 + 8 * frame_slots + text_bytes);

}  // namespace kvspec::interposer
