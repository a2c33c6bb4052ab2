// What the kernel is asked about pages of this process, and to do with them.  Spec: HOST.
//
// Linux alone.  Nothing here keeps state.  A call that the kernel refuses is a HostMemoryError, and
// what it had begun is undone; addresses and lengths are whole pages unless said otherwise.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace kvspec::host_pages {

// Of the base pages, in bytes.
std::size_t page_bytes();

// Of the default huge pages, in bytes: 2 MiB on x86-64.
std::size_t huge_page_bytes();

inline std::size_t round_up(std::size_t nbytes, std::size_t unit) {
  return (nbytes + unit - 1) / unit * unit;
}

// Private zeros (HOST-5), untouched (HOST-6), that no child of a fork sees (HOST-10), at a multiple
// of `alignment`; what was mapped beyond them to find one is unmapped again (HOST-2).
// HostMemoryError HOST-4, or HOST-8 if they are to be explicit huge pages.
std::byte* map_zeros(const std::string& kind, std::size_t nbytes, std::size_t alignment,
                     bool explicit_huge);
void unmap(std::byte* address, std::size_t nbytes) noexcept;

// Asks for huge pages where the kernel can make them (HOST-9).
void advise_huge(std::byte* address, std::size_t nbytes) noexcept;

// How many threads populate `nbytes`: one per 64 MiB begun, and at most one per CPU of the process.
int populate_threads(std::size_t nbytes);

// Gives every page of [address, address + nbytes) memory of its own, with so many threads, and
// leaves the bytes as they are (HOST-7).  Any range of mapped bytes will do.  O(pages / threads).
void populate(const std::string& kind, std::byte* address, std::size_t nbytes, int threads);

// Locks pages in memory as they get it (HOST-22); HostMemoryError HOST-23 says what the limit is.
void lock(std::byte* address, std::size_t nbytes);

// How many bytes of private memory lie on pages of their own; the page of zeros that reads are lent
// is none.  Any range of mapped bytes will do (HOST-21).  O(pages): 8 bytes are read for each.
std::size_t resident_bytes(const std::byte* address, std::size_t nbytes);

// How many bytes of a file in /dev/shm have memory, whoever has touched them (HOST-21).  O(1).
std::size_t file_bytes(int fd);

// Whether every page of the range is mapped.  O(mappings).
bool is_mapped(std::byte* address, std::size_t nbytes);

// The nodes that have memory and those that have CPUs, ascending; of a kernel without NUMA nothing.
struct Nodes {
  std::vector<int> memory;
  std::vector<int> cpu;
};
// `folder` is /sys/devices/system/node, or one with the same files.
std::optional<Nodes> nodes(const std::string& folder);

// Binds pages that are not there yet to a node (HOST-11).
void bind(std::byte* address, std::size_t nbytes, int node);

// While it lives, what this thread makes the kernel allocate lies on a node (HOST-11).
class OnNode {
 public:
  explicit OnNode(int node);
  ~OnNode();
  OnNode(const OnNode&) = delete;
  OnNode& operator=(const OnNode&) = delete;

 private:
  int policy_ = 0;  // as it was before
  std::vector<unsigned long> mask_;
};

// For each node, how many bytes of the range are on its pages; of a kernel without NUMA nothing
// (HOST-12).  O(pages).
std::optional<std::map<int, std::size_t>> bytes_on_nodes(const std::byte* address,
                                                         std::size_t nbytes);

// Whether the kernel populates on request (Linux 5.14), or pages have to be touched.
bool populates_on_request();

// The number behind `field` in a file of lines "field: number kB", in bytes with kB and as it
// stands without; 0 if there is none.
std::size_t proc_number(const char* file, const std::string& field);

// The text of an errno.
std::string reason(int error);

}  // namespace kvspec::host_pages
