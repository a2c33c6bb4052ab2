// Arenas of host memory in C++: shares, memory that runs out, and every order of destruction.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "check.hpp"
#include "kvspec/contract.hpp"
#include "kvspec/host_memory.hpp"
#include "kvspec/host_pages.hpp"

namespace {

using kvspec::ArenaKind;
using kvspec::ArenaOptions;
using kvspec::ContractError;
using kvspec::HostArena;
using kvspec::HostMemoryError;
using kvspec::test::throws;

constexpr ArenaKind kKinds[] = {ArenaKind::heap, ArenaKind::mmap, ArenaKind::shm,
                                ArenaKind::pinned};
constexpr std::int64_t kPage = 4096;

ArenaOptions plain() { return {}; }

bool is_mapped(std::byte* address) { return kvspec::host_pages::is_mapped(address, 1); }

TEST(every_byte_can_be_written) {
  for (const ArenaKind kind : kKinds) {
    HostArena arena(kind, 3 * kPage + 7, plain());
    std::memset(arena.address(), 1, static_cast<std::size_t>(arena.nbytes()));
    arena.check();
    CHECK(arena.resident_bytes() == arena.mapped_bytes());
    arena.close();
    CHECK(arena.closed() && arena.mapped_bytes() == 0);
  }
}

TEST(a_share_keeps_the_memory_of_an_arena_that_is_gone) {
  for (const ArenaKind kind : kKinds) {
    std::optional<HostArena> arena(std::in_place, kind, 3 * kPage, plain());
    std::byte* const address = arena->address();
    int released = 0;
    arena->on_release([&released] { CHECK(released++ == 0); }, [&released] { ++released; });
    std::shared_ptr<std::byte> share = arena->share(kPage, 10);
    CHECK(throws<ContractError>("HOST-16: ", [&] { arena->close(); }));
    HostArena moved = std::move(*arena);
    arena.reset();
    CHECK(moved.share_count() == 1 && released == 0);
    { const HostArena last = std::move(moved); }
    std::memset(share.get(), 5, 10);
    CHECK(released == 0 && share.get() == address + kPage);
    share.reset();
    CHECK(released == 2);
    if (kind != ArenaKind::heap) CHECK(!is_mapped(address));
  }
}

TEST(adopted_memory_is_given_back_once) {
  std::vector<std::byte> memory(1000);
  int given_back = 0;
  {
    HostArena arena =
        HostArena::adopt(memory.data(), 1000, [&given_back] { ++given_back; }, plain());
    const auto share = arena.share(0, 1000);
    CHECK(arena.kind() == ArenaKind::torch && arena.address() == memory.data());
  }
  CHECK(given_back == 1);
}

TEST(alignments_and_sizes_are_exact) {
  for (const std::int64_t alignment : {std::int64_t{1}, std::int64_t{64}, 2 * kPage * 256}) {
    for (const ArenaKind kind : {ArenaKind::heap, ArenaKind::mmap, ArenaKind::pinned}) {
      ArenaOptions options;
      options.alignment = alignment;
      HostArena arena(kind, 5 * kPage + 1, options);
      CHECK(reinterpret_cast<std::uintptr_t>(arena.address()) %
                static_cast<std::uintptr_t>(alignment) == 0);
      CHECK(arena.mapped_bytes() == (kind == ArenaKind::heap ? 5 * kPage + 1 : 6 * kPage));
    }
  }
}

TEST(what_is_refused_names_its_clause) {
  const auto make = [](ArenaKind kind, std::int64_t nbytes, const ArenaOptions& options) {
    return [=] { HostArena arena(kind, nbytes, options); };
  };
  ArenaOptions node;
  node.numa_node = 999;
  ArenaOptions attach;
  attach.attach = "kvspec.x.1.1.0";
  CHECK(throws<ContractError>("HOST-3: nbytes 0", make(ArenaKind::heap, 0, plain())));
  CHECK(throws<ContractError>("HOST-3: numa_node 999", make(ArenaKind::mmap, 1, node)));
  CHECK(throws<ContractError>("HOST-3: attach", make(ArenaKind::mmap, 1, attach)));
  CHECK(throws<ContractError>("SHM-7: ", make(ArenaKind::shm, 1, attach)));
  HostArena arena(ArenaKind::mmap, 2 * kPage, plain());
  constexpr std::int64_t most = INT64_MAX;
  CHECK(throws<ContractError>("HOST-14: ", [&] { arena.share(most, most); }));
  CHECK(throws<ContractError>("HOST-14: ", [&] { arena.share(-1, 1); }));
  CHECK(throws<ContractError>("HOST-20: ", [&] { arena.discard(kPage, most); }));
  CHECK(throws<ContractError>("HOST-20: ", [&] { arena.discard(1, kPage); }));
  CHECK(throws<ContractError>("HOST-20: ", [&] { arena.populate(0, 1, 0); }));
  arena.close();
  CHECK(throws<ContractError>("HOST-18: address", [&] { static_cast<void>(arena.address()); }));
}

TEST(pages_are_populated_by_many_threads_and_discarded) {
  HostArena arena(ArenaKind::mmap, 9 << 20, plain());
  CHECK(arena.resident_bytes() == 0);
  arena.address()[5 << 20] = std::byte{7};
  arena.populate(0, arena.nbytes(), 4);
  CHECK(arena.resident_bytes() == 9 << 20 && arena.address()[5 << 20] == std::byte{7});
  CHECK(arena.counters().pages_populated == (9 << 20) / kPage);
  CHECK(arena.counters().populate_threads == 4);
  arena.discard(4 << 20, 2 << 20);
  CHECK(arena.resident_bytes() == 7 << 20 && arena.address()[5 << 20] == std::byte{0});
}

TEST(two_arenas_over_one_segment) {
  HostArena arena(ArenaKind::shm, 100, plain());
  ArenaOptions options;
  options.attach = arena.name();
  HostArena other(ArenaKind::shm, 100, options);
  arena.address()[99] = std::byte{3};
  CHECK(other.address()[99] == std::byte{3} && other.address() != arena.address());
  CHECK(throws<ContractError>("HOST-3: nbytes 101",
                              [&] { HostArena wrong(ArenaKind::shm, 101, options); }));
  arena.close();
  CHECK(other.address()[99] == std::byte{3});
}

// Whatever allocation fails, no memory is left behind that nobody knows: LeakSanitizer says so for
// the heap, and the kernel for the others.
TEST(memory_that_runs_out_leaves_nothing) {
  for (const ArenaKind kind : kKinds) {
    const auto before = kvspec::host_pages::proc_number("/proc/self/status", "VmLck");
    kvspec::test::fail_each_allocation(
        [] { return 0; }, [kind](int) { HostArena arena(kind, 4 * kPage, plain()); }, [](int) {});
    CHECK(kvspec::host_pages::proc_number("/proc/self/status", "VmLck") == before);
  }
}

TEST(lists_of_nodes) {
  CHECK(!kvspec::host_pages::nodes("/nonexistent"));
  const auto nodes = kvspec::host_pages::nodes("/sys/devices/system/node");
  if (!nodes) return;
  CHECK(!nodes->memory.empty());
  ArenaOptions options;
  options.numa_node = nodes->memory.front();
  options.populate = true;
  for (const ArenaKind kind : {ArenaKind::mmap, ArenaKind::shm, ArenaKind::pinned}) {
    HostArena arena(kind, 3 * kPage, options);
    const auto found = arena.numa_nodes();
    CHECK(found && found->size() == 1);
    CHECK(found->at(nodes->memory.front()) == static_cast<std::size_t>(3 * kPage));
  }
}

}  // namespace
