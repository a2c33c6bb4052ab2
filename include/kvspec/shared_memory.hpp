// Shared memory: named segments that survive failure and leak nothing.  Spec: SHM.
//
//     $ ls /dev/shm
//     kvspec.<label>.<pid>.<start time>.<serial>      the first owner, who may be dead
//
// A handle holds a shared flock on the segment, through an open file description of its own, for as
// long as it is open.  The kernel drops the lock when the process dies, however it dies, so
//
//     a segment is alive <=> somebody has a lock on it
//
// and a lock that excludes all others, taken without waiting, says that nobody has it any more: the
// last one to close (SHM-9), an attacher that came too late (SHM-7) and a reaper (SHM-13) remove a
// name under that lock alone.  Creating and attaching take the shared lock and then look whether
// the name still leads there.  There is no lock for the whole of /dev/shm, nobody waits for anybody
// (SHM-20), and a number of a process decides nothing: it is reused, and means nothing in another
// namespace.
//
// The size of a segment is 0 until all of it is reserved, so nobody maps what /dev/shm cannot hold.
//
// A handle is not thread-safe; create, attach and reap are.  Linux only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <sys/types.h>
#include <vector>

namespace kvspec {

// A segment that was removed because nobody held it.
struct Reaped {
  std::string name;
  std::int64_t bytes;
};

class SharedSegment {
 public:
  // A new segment of exactly `bytes` zeros, all of them reserved, under a name that nobody had
  // (SHM-1, SHM-2, SHM-3); dead segments are reaped first (SHM-15).  With `populate` its pages are
  // in this process's page tables too.  REQUIRES: label is [A-Za-z0-9_-]{1,64}, bytes >= 1 (SHM-4).
  // Throws HostMemoryError, and leaves neither name nor descriptor, if the machine has not the
  // memory, the descriptors or the address space (SHM-5).  O(names in /dev/shm + bytes).
  static SharedSegment create(std::string_view label, std::int64_t bytes, bool populate = false);

  // Another handle on the segment, equal to its creator's (SHM-6).  REQUIRES: somebody of this user
  // holds it, and its creator has returned (SHM-7).  Throws HostMemoryError as create.  O(1).
  static SharedSegment attach(const std::string& name);

  // Removes the segments of this user that nobody holds (SHM-13), never one that somebody does
  // (SHM-14); those removed, by name.  O(names in /dev/shm).
  static std::vector<Reaped> reap();

  SharedSegment() noexcept = default;  // closed
  SharedSegment(SharedSegment&& other) noexcept;
  SharedSegment& operator=(SharedSegment&& other) noexcept;
  ~SharedSegment() { close(); }

  const std::string& name() const noexcept { return name_; }
  std::byte* data() const noexcept { return data_; }  // null if closed
  std::span<std::byte> span() const noexcept { return {data_, static_cast<std::size_t>(bytes_)}; }
  std::int64_t bytes() const noexcept { return bytes_; }  // also when closed
  int fd() const noexcept { return fd_; }                 // -1 if closed
  bool closed() const noexcept { return fd_ < 0; }
  // Whether this process opened the handle, and is no child that inherited it (SHM-16).
  bool owned() const noexcept;
  // Whether its name still leads to it; of a closed one, whether the name is there.
  bool linked() const noexcept;

  // Throws ContractError if the segment is open and its name leads elsewhere (SHM-14) or its size
  // has changed (SHM-2).
  void check() const;

  // Gives the handle back; the last one takes the name with it (SHM-8, SHM-9).  In a child that
  // inherited the handle the mapping goes, and nothing else (SHM-16).  Again: nothing.
  void close() noexcept;

 private:
  bool take_name(std::string name);
  void reserve(std::int64_t bytes);
  void map(std::int64_t bytes, int flags);
  void require_alive(const std::string& name);
  void forget() noexcept;

  std::string name_;
  std::byte* data_ = nullptr;
  std::int64_t bytes_ = 0;
  int fd_ = -1;
  pid_t owner_ = -1;
};

}  // namespace kvspec
