// Pages of this process, as the kernel has them.  Spec: HOST.
#include "kvspec/host_pages.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <fcntl.h>
#include <sched.h>
#include <string_view>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <system_error>
#include <thread>
#include <unistd.h>

#include "kvspec/contract.hpp"

namespace kvspec::host_pages {

namespace {

// Values of the kernel that the headers of an older libc lack.
constexpr int kPopulateWrite = 23;           // MADV_POPULATE_WRITE
constexpr unsigned kLockOnFault = 1;         // MLOCK_ONFAULT
constexpr int kBindPolicy = 2;               // MPOL_BIND
constexpr std::uint64_t kPresent = 1ULL << 63;    // of an entry of pagemap: has a page
constexpr std::uint64_t kExclusive = 1ULL << 56;  // and nobody else has it
constexpr std::size_t kBytesPerThread = std::size_t{64} << 20;
constexpr std::size_t kMaxThreads = 16;
constexpr std::size_t kMaxNodes = 1024;
constexpr std::size_t kBits = 8 * sizeof(unsigned long);

std::uintptr_t number(const std::byte* address) {
  return reinterpret_cast<std::uintptr_t>(address);
}

// An open file that is closed.
class File {
 public:
  explicit File(const char* path) : fd_(::open(path, O_RDONLY | O_CLOEXEC)) {}
  ~File() {
    if (fd_ >= 0) ::close(fd_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int fd() const noexcept { return fd_; }

 private:
  int fd_;
};

// Touches a byte of each page and leaves it as it is, whoever else is at it.
void touch(std::byte* begin, std::byte* end) {
  const std::size_t page = page_bytes();
  for (std::byte* at = begin; at < end; at += page) {
    __atomic_fetch_or(reinterpret_cast<unsigned char*>(at), static_cast<unsigned char>(0),
                      __ATOMIC_RELAXED);
  }
}

// 0, or the errno of what went wrong.
int populate_part(std::byte* begin, std::byte* end) {
  if (begin >= end) return 0;
  const auto nbytes = static_cast<std::size_t>(end - begin);
  while (::madvise(begin, nbytes, kPopulateWrite) != 0) {
    if (errno == EINTR || errno == EAGAIN) continue;
    if (errno != EINVAL) return errno;
    touch(begin, end);  // Linux before 5.14
    break;
  }
  return 0;
}

// What a small file of the kernel says; nothing if it cannot be opened.
std::optional<std::string> read_text(const std::string& path) {
  const File file(path.c_str());
  if (file.fd() < 0) return std::nullopt;
  std::string text;
  std::array<char, 4096> part;
  for (ssize_t count = 0; (count = ::read(file.fd(), part.data(), part.size())) > 0;) {
    text.append(part.data(), static_cast<std::size_t>(count));
  }
  return text;
}

// The number that a text begins with, which is taken from it.  Streams would ask for facets of the
// C++ library, of which a process that others share with us may have two.
template <class Number>
std::optional<Number> take_number(std::string_view& text) {
  Number value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{}) return std::nullopt;
  text.remove_prefix(static_cast<std::size_t>(end - text.data()));
  return value;
}

// The nodes of a list as the kernel writes it, "0-1,3".
std::optional<std::vector<int>> read_list(const std::string& path) {
  const std::optional<std::string> text = read_text(path);
  if (!text) return std::nullopt;
  std::vector<int> all;
  std::string_view rest = *text;
  while (const std::optional<int> first = take_number<int>(rest)) {
    int last = *first;
    if (rest.starts_with('-')) {
      rest.remove_prefix(1);
      last = take_number<int>(rest).value_or(last);
    }
    for (int node = *first; node <= last; ++node) all.push_back(node);
    if (!rest.starts_with(',')) break;
    rest.remove_prefix(1);
  }
  return all;
}

// Calls `each(bytes of the range on it, entry)` for every page of the range.
template <class Entry, class Fill, class Each>
void for_pages(const std::byte* address, std::size_t nbytes, Fill fill, Each each) {
  const std::size_t page = page_bytes();
  const std::uintptr_t begin = number(address);
  const std::uintptr_t end = begin + nbytes;
  std::array<Entry, 4096> entries;
  for (std::uintptr_t at = begin / page * page; at < end;) {
    const std::size_t count = std::min(entries.size(), (end - at + page - 1) / page);
    if (!fill(at, count, entries.data())) return;
    for (std::size_t i = 0; i < count; ++i, at += page) {
      each(std::min(at + page, end) - std::max(at, begin), entries[i]);
    }
  }
}

std::size_t resident_by_pagemap(const File& pagemap, const std::byte* address,
                                std::size_t nbytes) {
  std::size_t resident = 0;
  for_pages<std::uint64_t>(
      address, nbytes,
      [&](std::uintptr_t at, std::size_t count, std::uint64_t* entries) {
        const std::size_t wanted = count * sizeof(std::uint64_t);
        const auto place = static_cast<off_t>(at / page_bytes() * sizeof(std::uint64_t));
        return ::pread(pagemap.fd(), entries, wanted, place) == static_cast<ssize_t>(wanted);
      },
      [&](std::size_t on_it, std::uint64_t entry) {
        if ((entry & kPresent) != 0 && (entry & kExclusive) != 0) resident += on_it;
      });
  return resident;
}

std::size_t resident_by_mincore(const std::byte* address, std::size_t nbytes) {
  std::size_t resident = 0;
  for_pages<unsigned char>(
      address, nbytes,
      [](std::uintptr_t at, std::size_t count, unsigned char* entries) {
        return ::mincore(reinterpret_cast<void*>(at), count * page_bytes(), entries) == 0;
      },
      [&](std::size_t on_it, unsigned char entry) {
        if ((entry & 1U) != 0) resident += on_it;
      });
  return resident;
}

// The set of one node.  REQUIRES: node < kMaxNodes, as every node of the kernel is.
std::vector<unsigned long> mask_of(int node) {
  std::vector<unsigned long> mask(kMaxNodes / kBits);
  const auto bit = static_cast<std::size_t>(node);
  mask.at(bit / kBits) |= 1UL << (bit % kBits);
  return mask;
}

[[noreturn]] void refuse_node(int node, int error) {
  throw HostMemoryError("HOST-11", "the kernel gives no memory of node " + std::to_string(node) +
                                       ": " + reason(error));
}

std::string limit(rlim_t value) {
  return value == RLIM_INFINITY ? "unlimited" : std::to_string(value);
}

}  // namespace

std::string reason(int error) { return std::generic_category().message(error); }

std::size_t page_bytes() {
  static const auto bytes = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  return bytes;
}

std::size_t proc_number(const char* file, const std::string& field) {
  const std::string text = read_text(file).value_or(std::string());
  std::string_view rest = text;
  while (!rest.empty()) {
    const bool found = rest.starts_with(field) && rest.substr(field.size()).starts_with(':');
    rest.remove_prefix(found ? field.size() + 1 : std::min(rest.find('\n'), rest.size() - 1) + 1);
    if (!found) continue;
    rest.remove_prefix(std::min(rest.find_first_not_of(" \t"), rest.size()));
    const std::size_t value = take_number<std::size_t>(rest).value_or(0);
    return rest.starts_with(" kB") ? value * 1024 : value;
  }
  return 0;
}

std::size_t huge_page_bytes() {
  static const std::size_t bytes = proc_number("/proc/meminfo", "Hugepagesize");
  return bytes != 0 ? bytes : std::size_t{2} << 20;
}

std::byte* map_zeros(const std::string& kind, std::size_t nbytes, std::size_t alignment,
                     bool explicit_huge) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | (explicit_huge ? MAP_HUGETLB : 0);
  const std::size_t natural = explicit_huge ? huge_page_bytes() : page_bytes();
  const std::size_t spare = alignment > natural ? alignment - natural : 0;
  void* mapped = ::mmap(nullptr, nbytes + spare, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (mapped == MAP_FAILED) {
    const int error = errno;
    if (explicit_huge) {
      throw HostMemoryError(
          "HOST-8", std::to_string(nbytes) + " bytes of explicit huge pages are " +
                        std::to_string(nbytes / natural) + " pages of " + std::to_string(natural) +
                        ", and HugePages_Free is " +
                        std::to_string(proc_number("/proc/meminfo", "HugePages_Free")) + " of " +
                        std::to_string(proc_number("/proc/meminfo", "HugePages_Total")) +
                        ": write more to /proc/sys/vm/nr_hugepages, or ask for transparent ones");
    }
    throw HostMemoryError("HOST-4", kind + " cannot have " + std::to_string(nbytes) +
                                        " bytes: " + reason(error));
  }
  auto* const begin = static_cast<std::byte*>(mapped);
  std::byte* const address =
      begin + (round_up(number(begin), std::max(alignment, natural)) - number(begin));
  unmap(begin, static_cast<std::size_t>(address - begin));
  unmap(address + nbytes, spare - static_cast<std::size_t>(address - begin));
  ::madvise(address, nbytes, MADV_DONTFORK);
  return address;
}

void unmap(std::byte* address, std::size_t nbytes) noexcept {
  if (nbytes != 0) ::munmap(address, nbytes);
}

void advise_huge(std::byte* address, std::size_t nbytes) noexcept {
  ::madvise(address, nbytes, MADV_HUGEPAGE);
}

int populate_threads(std::size_t nbytes) {
  cpu_set_t mine;
  const bool known = ::sched_getaffinity(0, sizeof mine, &mine) == 0;
  const auto cpus = static_cast<std::size_t>(known ? CPU_COUNT(&mine) : 1);
  const std::size_t parts = (nbytes + kBytesPerThread - 1) / kBytesPerThread;
  return static_cast<int>(std::max<std::size_t>(1, std::min({parts, cpus, kMaxThreads})));
}

void populate(const std::string& kind, std::byte* address, std::size_t nbytes, int threads) {
  const std::size_t page = page_bytes();
  std::byte* const begin = address - number(address) % page;
  std::byte* const end = begin + round_up(static_cast<std::size_t>(address + nbytes - begin), page);
  const auto count = static_cast<std::size_t>(std::max(threads, 1));
  const std::size_t part =
      round_up(static_cast<std::size_t>(end - begin) / count + 1, huge_page_bytes());
  std::atomic<int> error = 0;
  const auto run = [&](std::size_t which) {
    const auto size = static_cast<std::size_t>(end - begin);
    const int failed = populate_part(begin + std::min(which * part, size),
                                     begin + std::min((which + 1) * part, size));
    if (failed != 0) error = failed;
  };
  {
    std::vector<std::jthread> others;
    others.reserve(count);
    for (std::size_t which = 1; which < count; ++which) {
      try {
        others.emplace_back(run, which);
      } catch (const std::system_error&) {  // no more threads: this one does it
        run(which);
      }
    }
    run(0);
  }
  if (error != 0) {
    throw HostMemoryError("HOST-4", kind + " cannot populate " + std::to_string(nbytes) +
                                        " bytes: " + reason(error));
  }
}

void lock(std::byte* address, std::size_t nbytes) {
  if (::syscall(SYS_mlock2, address, nbytes, kLockOnFault) == 0) return;
  rlimit limits{};
  ::getrlimit(RLIMIT_MEMLOCK, &limits);
  throw HostMemoryError(
      "HOST-23",
      "pinned has to lock " + std::to_string(nbytes) + " bytes; RLIMIT_MEMLOCK is " +
          limit(limits.rlim_cur) + " soft and " + limit(limits.rlim_max) + " hard, and " +
          std::to_string(proc_number("/proc/self/status", "VmLck")) +
          " bytes are locked already (VmLck): raise it with ulimit -l, LimitMEMLOCK= or"
          " --ulimit memlock=-1, or give the process CAP_IPC_LOCK");
}

std::size_t file_bytes(int fd) {
  struct stat status{};
  return ::fstat(fd, &status) == 0 ? static_cast<std::size_t>(status.st_blocks) * 512 : 0;
}

std::size_t resident_bytes(const std::byte* address, std::size_t nbytes) {
  const File pagemap("/proc/self/pagemap");
  if (pagemap.fd() < 0) return resident_by_mincore(address, nbytes);
  return resident_by_pagemap(pagemap, address, nbytes);
}

bool is_mapped(std::byte* address, std::size_t nbytes) {
  std::byte* const begin = address - number(address) % page_bytes();
  return ::msync(begin, static_cast<std::size_t>(address + nbytes - begin), MS_ASYNC) == 0;
}

std::optional<Nodes> nodes(const std::string& folder) {
  const auto memory = read_list(folder + "/has_memory");
  if (!memory) return std::nullopt;
  return Nodes{*memory, read_list(folder + "/has_cpu").value_or(std::vector<int>{})};
}

void bind(std::byte* address, std::size_t nbytes, int node) {
  const std::vector<unsigned long> mask = mask_of(node);
  if (::syscall(SYS_mbind, address, nbytes, kBindPolicy, mask.data(), kMaxNodes, 0U) != 0) {
    refuse_node(node, errno);
  }
}

OnNode::OnNode(int node) : mask_(kMaxNodes / kBits) {
  const std::vector<unsigned long> mask = mask_of(node);
  if (::syscall(SYS_get_mempolicy, &policy_, mask_.data(), kMaxNodes, nullptr, 0UL) != 0 ||
      ::syscall(SYS_set_mempolicy, kBindPolicy, mask.data(), kMaxNodes) != 0) {
    refuse_node(node, errno);
  }
}

OnNode::~OnNode() { ::syscall(SYS_set_mempolicy, policy_, mask_.data(), kMaxNodes); }

std::optional<std::map<int, std::size_t>> bytes_on_nodes(const std::byte* address,
                                                         std::size_t nbytes) {
  std::map<int, std::size_t> found;
  bool known = true;
  std::vector<void*> pages;
  for_pages<int>(
      address, nbytes,
      [&](std::uintptr_t at, std::size_t count, int* entries) {
        pages.clear();
        for (std::size_t i = 0; i < count; ++i) {
          pages.push_back(reinterpret_cast<void*>(at + i * page_bytes()));
        }
        known = ::syscall(SYS_move_pages, 0, count, pages.data(), nullptr, entries, 0) == 0;
        return known;
      },
      [&](std::size_t on_it, int entry) {
        if (entry >= 0) found[entry] += on_it;
      });
  if (!known) return std::nullopt;
  return found;
}

bool populates_on_request() {
  static const bool known = [] {
    void* page = ::mmap(nullptr, page_bytes(), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) return false;
    const bool done = ::madvise(page, page_bytes(), kPopulateWrite) == 0;
    ::munmap(page, page_bytes());
    return done;
  }();
  return known;
}

}  // namespace kvspec::host_pages
