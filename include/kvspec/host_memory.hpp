// Host memory: one arena of one kind, and shares of it that keep it alive.  Spec: HOST.
//
//     address is a multiple of the alignment; [address, address + nbytes) is mapped (HOST-1)
//     mapped_bytes is nbytes, or nbytes in whole pages, never the next power of two (HOST-2)
//
// The memory belongs to the arena and to every share together, and goes back when the last of them
// is gone (HOST-15); close() is refused while there are shares (HOST-16).  A child of fork that
// drops an arena unmaps nothing: it has no part of it (HOST-10), and may have mapped something else
// there.  Not thread-safe, but shares can be dropped from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>

namespace kvspec {

enum class ArenaKind : std::uint8_t { torch, heap, mmap, shm, pinned };
enum class HugePages : std::uint8_t { no, transparent, explicitly };

const char* name_of(ArenaKind kind) noexcept;

struct ArenaOptions {
  std::optional<std::int64_t> alignment;  // of the first byte; absent: what the kind gives
  bool populate = false;
  HugePages huge_pages = HugePages::no;
  std::optional<std::int64_t> numa_node;
  std::string label = "arena";            // in the name of a new segment
  std::optional<std::string> attach;      // the name of a segment that somebody has
  bool lock = true;                       // pinned: by mlock; false if a device registers it
  std::string node_folder = "/sys/devices/system/node";
};

// Exact costs so far (HOST-27).
struct ArenaCounters {
  std::int64_t pages_populated = 0;
  std::int64_t populate_threads = 0;  // started for it, those that called among them
};

class HostArena {
 public:
  // Refuses what no machine could give (HOST-3); the bytes that would be mapped (HOST-2).
  static std::int64_t require(ArenaKind kind, std::int64_t nbytes, const ArenaOptions& options);

  // Maps; HostMemoryError if the machine has it not, and nothing stays behind (HOST-4).
  // REQUIRES: as require() (HOST-3); the kind is not torch, whose memory adopt() takes.
  // O(1), or O(pages) if they are populated (HOST-7) or pinned (HOST-22).
  HostArena(ArenaKind kind, std::int64_t nbytes, const ArenaOptions& options);

  // An arena of kind torch over memory that `give_back` gives back.
  static HostArena adopt(std::byte* address, std::int64_t nbytes, std::function<void()> give_back,
                         const ArenaOptions& options);

  HostArena(HostArena&&) = default;
  HostArena& operator=(HostArena&&) = default;

  // Calls `before` when the memory is about to be unmapped, and `after` when it is.
  void on_release(std::function<void()> before, std::function<void()> after);

  ArenaKind kind() const noexcept { return kind_; }
  std::int64_t nbytes() const noexcept { return nbytes_; }
  bool closed() const noexcept { return region_ == nullptr; }
  std::int64_t share_count() const noexcept;   // of those alive
  // Refuses a call of a closed arena (HOST-18).
  void require_open(const char* call) const { static_cast<void>(open(call)); }
  std::byte* address() const;                  // REQUIRES: not closed (HOST-18)
  std::int64_t mapped_bytes() const noexcept;  // 0 when closed (HOST-2)
  std::int64_t pinned_bytes() const noexcept;  // 0 unless pinned (HOST-22)
  std::int64_t page_bytes() const noexcept { return page_bytes_; }  // what discard() goes by
  std::optional<std::string> name() const { return name_; }         // of the segment (HOST-24)
  ArenaCounters counters() const noexcept { return counters_; }

  // A share of the memory at an offset (HOST-13, HOST-15).  REQUIRES: the bytes lie in the arena
  // (HOST-14).
  std::shared_ptr<std::byte> share(std::int64_t offset, std::int64_t nbytes);

  // Of mapped_bytes, those on pages that have memory (HOST-21).  O(pages).
  std::int64_t resident_bytes() const;
  // How many of them are on each node; nothing where the kernel has no NUMA (HOST-12).  O(pages).
  std::optional<std::map<int, std::size_t>> numa_nodes() const;

  // Gives whole pages back, which then read as zeros (HOST-19).  REQUIRES: mmap or shm; the bytes
  // are whole pages of the arena (HOST-20).  O(pages).
  void discard(std::int64_t offset, std::int64_t nbytes);

  // Gives every page of the bytes memory of its own (HOST-7), with so many threads, or as many as
  // host_pages::populate_threads says.  REQUIRES: the bytes lie in the arena (HOST-20).
  void populate(std::int64_t offset, std::int64_t nbytes, std::optional<int> threads = {});

  // Gives the memory back (HOST-17).  REQUIRES: no share is alive (HOST-16).
  void close();

  // Throws ContractError if HOST-1 is broken (HOST-29).  O(mappings).
  void check() const;

 private:
  struct Region;

  HostArena(ArenaKind kind, std::int64_t nbytes) : kind_(kind), nbytes_(nbytes) {}
  void map(const ArenaOptions& options);
  void open_segment(const ArenaOptions& options);
  Region& open(const char* call) const;
  void require_range(const char* call, std::int64_t offset, std::int64_t nbytes) const;

  ArenaKind kind_;
  std::int64_t nbytes_;
  std::int64_t page_bytes_ = 0;
  std::size_t alignment_ = 1;
  std::optional<std::string> name_;
  ArenaCounters counters_;
  std::shared_ptr<Region> region_;  // null when closed; shares have the others
};

}  // namespace kvspec
