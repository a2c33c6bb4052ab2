// Arenas of host memory.  Spec: HOST.
#include "kvspec/host_memory.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstdlib>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include "kvspec/contract.hpp"
#include "kvspec/host_pages.hpp"
#include "kvspec/shared_memory.hpp"

namespace kvspec {

namespace {

constexpr std::int64_t kMaxBytes = std::int64_t{1} << 47;  // what a process can address
constexpr std::size_t kMaxAlignment = std::size_t{2} << 20;
constexpr std::size_t kTorchAlignment = 64;

bool is_malloc(ArenaKind kind) { return kind == ArenaKind::torch || kind == ArenaKind::heap; }

std::size_t most_alignment(ArenaKind kind) {
  if (kind == ArenaKind::torch) return kTorchAlignment;
  return kind == ArenaKind::shm ? host_pages::page_bytes() : kMaxAlignment;
}

std::size_t own_alignment(ArenaKind kind, HugePages huge) {
  if (kind == ArenaKind::torch) return kTorchAlignment;
  if (kind == ArenaKind::heap) return alignof(std::max_align_t);
  return huge == HugePages::no ? host_pages::page_bytes() : host_pages::huge_page_bytes();
}

std::size_t page_of(HugePages huge) {
  return huge == HugePages::explicitly ? host_pages::huge_page_bytes() : host_pages::page_bytes();
}

std::string list(const std::vector<int>& numbers) {
  std::string text = "[";
  for (const int number : numbers) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(number);
  }
  return text + "]";
}

std::string range(std::int64_t offset, std::int64_t nbytes) {
  // What does not fit into 64 bits is out of every arena, and its text need not be exact.
  std::int64_t end = 0;
  if (__builtin_add_overflow(offset, nbytes, &end)) end = nbytes;
  return "bytes [" + std::to_string(offset) + ", " + std::to_string(end) + ")";
}

bool lies_in(std::int64_t offset, std::int64_t nbytes, std::int64_t size) {
  return offset >= 0 && nbytes >= 0 && offset <= size && nbytes <= size - offset;
}

void require_alignment(ArenaKind kind, std::int64_t alignment) {
  const auto most = static_cast<std::int64_t>(most_alignment(kind));
  if (alignment < 1 || alignment > most || !std::has_single_bit(std::uint64_t(alignment))) {
    refuse("HOST-3", "alignment " + std::to_string(alignment) +
                         " is not a power of two of at most " + std::to_string(most) +
                         ", the most that " + name_of(kind) + " gives");
  }
}

void require_node(ArenaKind kind, std::int64_t node, const ArenaOptions& options) {
  const std::string given = "numa_node " + std::to_string(node);
  if (is_malloc(kind)) {
    refuse("HOST-3", given + " is for mmap, shm and pinned: the pages of " + name_of(kind) +
                         " are shared with other blocks");
  }
  if (options.attach) refuse("HOST-3", given + " is the creator's to choose, not an attacher's");
  const auto nodes = host_pages::nodes(options.node_folder);
  if (!nodes) refuse("HOST-3", given + " was given, and this kernel has no NUMA nodes");
  const auto& memory = nodes->memory;
  if (std::find(memory.begin(), memory.end(), node) == memory.end()) {
    refuse("HOST-3", given + " has no memory: the nodes with memory are " + list(memory));
  }
}

std::byte* heap_block(std::size_t nbytes, std::size_t alignment) {
  void* block = nullptr;
  if (alignment <= alignof(std::max_align_t)) {
    block = std::malloc(nbytes);
  } else if (::posix_memalign(&block, alignment, nbytes) != 0) {
    block = nullptr;
  }
  if (block != nullptr) return static_cast<std::byte*>(block);
  throw HostMemoryError("HOST-4", "heap cannot have " + std::to_string(nbytes) +
                                      " bytes: " + host_pages::reason(ENOMEM));
}

}  // namespace

const char* name_of(ArenaKind kind) noexcept {
  constexpr std::array names{"torch", "heap", "mmap", "shm", "pinned"};
  return names[static_cast<std::size_t>(kind)];
}

// The memory itself.  The arena and the shares own it together.
struct HostArena::Region {
  Region() = default;
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  ~Region() {
    if (address == nullptr) return;
    const bool own = ::getpid() == owner;  // what a fork inherited was not asked for by it
    if (own && before) before();
    give_back(*this);
    if (own && after) after();
  }

  std::byte* address = nullptr;  // null until there is memory to give back
  std::size_t mapped = 0;
  pid_t owner = ::getpid();
  int segment = -1;  // shm: its descriptor
  std::function<void(Region&)> give_back;
  std::function<void()> before;
  std::function<void()> after;
};

std::int64_t HostArena::require(ArenaKind kind, std::int64_t nbytes, const ArenaOptions& options) {
  if (nbytes < 1 || nbytes >= kMaxBytes) {
    refuse("HOST-3", "nbytes " + std::to_string(nbytes) + " is not in [1, 2^47)");
  }
  if (options.alignment) require_alignment(kind, *options.alignment);
  if (options.huge_pages != HugePages::no && kind != ArenaKind::mmap &&
      kind != ArenaKind::pinned) {
    refuse("HOST-3", std::string("huge pages are for mmap and pinned, not for ") + name_of(kind));
  }
  if (options.attach && kind != ArenaKind::shm) {
    refuse("HOST-3", std::string("attach is for shm, not for ") + name_of(kind));
  }
  if (options.numa_node) require_node(kind, *options.numa_node, options);
  if (is_malloc(kind)) return nbytes;
  return static_cast<std::int64_t>(
      host_pages::round_up(static_cast<std::size_t>(nbytes), page_of(options.huge_pages)));
}

HostArena::HostArena(ArenaKind kind, std::int64_t nbytes, const ArenaOptions& options)
    : HostArena(kind, nbytes) {
  const auto mapped = static_cast<std::size_t>(require(kind, nbytes, options));
  alignment_ = std::max(own_alignment(kind, options.huge_pages),
                        static_cast<std::size_t>(options.alignment.value_or(1)));
  page_bytes_ = static_cast<std::int64_t>(page_of(options.huge_pages));
  region_ = std::make_shared<Region>();
  region_->mapped = mapped;
  if (kind == ArenaKind::heap) {
    region_->give_back = [](Region& region) { std::free(region.address); };
    region_->address = heap_block(mapped, alignment_);
  } else if (kind == ArenaKind::shm) {
    open_segment(options);
  } else {
    map(options);
  }
  if (options.populate || kind == ArenaKind::pinned) populate(0, nbytes);
}

void HostArena::map(const ArenaOptions& options) {
  Region& region = *region_;
  region.give_back = [](Region& mine) {
    if (::getpid() == mine.owner) host_pages::unmap(mine.address, mine.mapped);
  };
  region.address = host_pages::map_zeros(name_of(kind_), region.mapped, alignment_,
                                         options.huge_pages == HugePages::explicitly);
  if (options.huge_pages == HugePages::transparent) {
    host_pages::advise_huge(region.address, region.mapped);
  }
  if (options.numa_node) {
    host_pages::bind(region.address, region.mapped, static_cast<int>(*options.numa_node));
  }
  if (kind_ == ArenaKind::pinned && options.lock) host_pages::lock(region.address, region.mapped);
}

void HostArena::open_segment(const ArenaOptions& options) {
  // The pages of a segment are reserved when it is created, so they are placed by then (HOST-11).
  std::optional<host_pages::OnNode> placed;
  if (options.numa_node) placed.emplace(static_cast<int>(*options.numa_node));
  auto segment = std::make_shared<SharedSegment>(
      options.attach ? SharedSegment::attach(*options.attach)
                     : SharedSegment::create(options.label, nbytes_));
  if (segment->bytes() != nbytes_) {
    refuse("HOST-3", "nbytes " + std::to_string(nbytes_) + " is not that of " + segment->name() +
                         ", which has " + std::to_string(segment->bytes()));
  }
  name_ = segment->name();
  Region& region = *region_;
  region.give_back = [segment](Region&) { segment->close(); };
  region.segment = segment->fd();
  region.address = segment->data();
  if (options.numa_node) {
    host_pages::bind(region.address, region.mapped, static_cast<int>(*options.numa_node));
  }
}

HostArena HostArena::adopt(std::byte* address, std::int64_t nbytes,
                           std::function<void()> give_back, const ArenaOptions& options) {
  HostArena arena(ArenaKind::torch, nbytes);
  arena.region_ = std::make_shared<Region>();
  arena.region_->mapped = static_cast<std::size_t>(require(ArenaKind::torch, nbytes, options));
  arena.region_->give_back = [back = std::move(give_back)](Region&) { back(); };
  arena.region_->address = address;
  arena.alignment_ = kTorchAlignment;
  arena.page_bytes_ = static_cast<std::int64_t>(host_pages::page_bytes());
  if (options.populate) arena.populate(0, nbytes);
  return arena;
}

void HostArena::on_release(std::function<void()> before, std::function<void()> after) {
  Region& region = open("on_release");
  region.before = std::move(before);
  region.after = std::move(after);
}

HostArena::Region& HostArena::open(const char* call) const {
  if (region_) return *region_;
  refuse("HOST-18", std::string(call) + " of an arena that is closed");
}

std::int64_t HostArena::share_count() const noexcept {
  return region_ ? static_cast<std::int64_t>(region_.use_count()) - 1 : 0;
}

std::byte* HostArena::address() const { return open("address").address; }

std::int64_t HostArena::mapped_bytes() const noexcept {
  return region_ ? static_cast<std::int64_t>(region_->mapped) : 0;
}

std::int64_t HostArena::pinned_bytes() const noexcept {
  return kind_ == ArenaKind::pinned ? mapped_bytes() : 0;
}

std::shared_ptr<std::byte> HostArena::share(std::int64_t offset, std::int64_t nbytes) {
  std::byte* const begin = open("tensor").address;
  if (!lies_in(offset, nbytes, nbytes_)) {
    refuse("HOST-14", range(offset, nbytes) + " are not in [0, " + std::to_string(nbytes_) + ")");
  }
  return {region_, begin + offset};
}

std::int64_t HostArena::resident_bytes() const {
  const Region& region = open("resident_bytes");
  const std::size_t resident =
      kind_ == ArenaKind::shm
          ? std::min(host_pages::file_bytes(region.segment), region.mapped)
          : host_pages::resident_bytes(region.address, region.mapped);
  return static_cast<std::int64_t>(resident);
}

std::optional<std::map<int, std::size_t>> HostArena::numa_nodes() const {
  const Region& region = open("numa_nodes");
  return host_pages::bytes_on_nodes(region.address, region.mapped);
}

void HostArena::require_range(const char* call, std::int64_t offset, std::int64_t nbytes) const {
  open(call);
  if (!lies_in(offset, nbytes, nbytes_)) {
    refuse("HOST-20", range(offset, nbytes) + " are not in [0, " + std::to_string(nbytes_) + ")");
  }
}

void HostArena::discard(std::int64_t offset, std::int64_t nbytes) {
  require_range("discard", offset, nbytes);
  if (kind_ != ArenaKind::mmap && kind_ != ArenaKind::shm) {
    refuse("HOST-20", std::string("discard is for mmap and shm, not for ") + name_of(kind_));
  }
  const std::int64_t end = offset + nbytes;
  if (offset % page_bytes_ != 0 || (end % page_bytes_ != 0 && end != nbytes_)) {
    refuse("HOST-20", range(offset, nbytes) + " are not whole pages of " +
                          std::to_string(page_bytes_) + " bytes");
  }
  if (nbytes == 0) return;
  const auto length = host_pages::round_up(static_cast<std::size_t>(nbytes),
                                           static_cast<std::size_t>(page_bytes_));
  const int advice = kind_ == ArenaKind::shm ? MADV_REMOVE : MADV_DONTNEED;
  if (::madvise(region_->address + offset, length, advice) != 0) {
    throw HostMemoryError("HOST-19", "the kernel does not discard " + std::to_string(length) +
                                         " bytes: " + host_pages::reason(errno));
  }
}

void HostArena::populate(std::int64_t offset, std::int64_t nbytes, std::optional<int> threads) {
  require_range("populate", offset, nbytes);
  if (threads && *threads < 1) {
    refuse("HOST-20", "threads " + std::to_string(*threads) + " is not at least 1");
  }
  if (nbytes == 0) return;
  const std::shared_ptr<Region> kept = region_;  // whoever closes it meanwhile
  const auto size = static_cast<std::size_t>(nbytes);
  const int count = threads.value_or(host_pages::populate_threads(size));
  host_pages::populate(name_of(kind_), kept->address + offset, size, count);
  const std::size_t page = host_pages::page_bytes();
  const std::size_t before = reinterpret_cast<std::uintptr_t>(kept->address + offset) % page;
  counters_.pages_populated +=
      static_cast<std::int64_t>(host_pages::round_up(before + size, page) / page);
  counters_.populate_threads += count;
}

void HostArena::close() {
  if (const std::int64_t alive = share_count(); alive != 0) {
    refuse("HOST-16", "close of an arena with " + std::to_string(alive) +
                          (alive == 1 ? " tensor alive" : " tensors alive"));
  }
  region_.reset();
}

void HostArena::check() const {
  if (!region_) return;
  std::byte* const address = region_->address;
  if (reinterpret_cast<std::uintptr_t>(address) % alignment_ != 0) {
    refuse("HOST-1", "the address is not a multiple of " + std::to_string(alignment_));
  }
  if (!host_pages::is_mapped(address, region_->mapped)) {
    refuse("HOST-1", "not all of " + std::to_string(region_->mapped) + " bytes are mapped");
  }
}

}  // namespace kvspec
