// Python bindings of host memory.  Spec: HOST.
#include "kvspec/host_memory.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "convert.hpp"
#include "kvspec/contract.hpp"
#include "kvspec/host_pages.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using kvspec::ArenaKind;
using kvspec::ArenaOptions;
using kvspec::HostArena;
using kvspec::HugePages;

namespace {

// An integer of Python, numpy or torch, the nearest of 64 bits.
std::int64_t integer(nb::handle given) {
  const nb::object index = nb::steal(PyNumber_Index(given.ptr()));
  if (!index.is_valid()) throw nb::python_error();
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow == 0) return value;
  return overflow > 0 ? std::numeric_limits<std::int64_t>::max()
                      : std::numeric_limits<std::int64_t>::min();
}

std::optional<std::int64_t> optional_integer(nb::handle given) {
  if (given.is_none()) return std::nullopt;
  return integer(given);
}

ArenaKind kind_of(const std::string& name) {
  for (const ArenaKind kind : {ArenaKind::torch, ArenaKind::heap, ArenaKind::mmap, ArenaKind::shm,
                               ArenaKind::pinned}) {
    if (name == kvspec::name_of(kind)) return kind;
  }
  kvspec::refuse("HOST-3", "kind '" + name + "' is not one of torch, heap, mmap, shm, pinned");
}

HugePages huge_pages_of(const std::string& name) {
  if (name == "no") return HugePages::no;
  if (name == "transparent") return HugePages::transparent;
  if (name == "explicit") return HugePages::explicitly;
  kvspec::refuse("HOST-3", "huge_pages '" + name + "' is not one of no, transparent, explicit");
}

// What an arena is asked for.
struct Request {
  Request(const std::string& kind_name, nb::handle size, nb::handle alignment, bool populate,
          const std::string& huge_pages, nb::handle numa_node, std::string label,
          std::optional<std::string> attach, std::string node_folder)
      : kind(kind_of(kind_name)), nbytes(integer(size)) {
    options.alignment = optional_integer(alignment);
    options.populate = populate;
    options.huge_pages = huge_pages_of(huge_pages);
    options.numa_node = optional_integer(numa_node);
    options.label = std::move(label);
    options.attach = std::move(attach);
    options.node_folder = std::move(node_folder);
    mapped_bytes = HostArena::require(kind, nbytes, options);
  }

  ArenaKind kind;
  std::int64_t nbytes;
  ArenaOptions options;
  std::int64_t mapped_bytes = 0;
};

// A Python object that can be let go, or called, from any thread.
std::shared_ptr<nb::object> shared(nb::object object) {
  return {new nb::object(std::move(object)), [](nb::object* held) {
            const nb::gil_scoped_acquire gil;
            const nb::error_scope pending;
            std::unique_ptr<nb::object>(held).reset();
          }};
}

std::function<void()> caller(nb::object function) {
  if (function.is_none()) return {};
  return [held = shared(std::move(function))] {
    const nb::gil_scoped_acquire gil;
    const nb::error_scope pending;  // an exception may be why the arena is dropped: it goes on
    try {
      (*held)();
    } catch (nb::python_error& error) {
      error.discard_as_unraisable("HostArena");
    }
  };
}

// The arena, mapped by open(), so that Python can ask for a budget between the two.
struct HostBlock {
  explicit HostBlock(Request given) : request(std::move(given)) {}

  void open(bool lock) {
    request.options.lock = lock;
    const nb::gil_scoped_release released;
    arena.emplace(request.kind, request.nbytes, request.options);
  }
  void adopt(std::uintptr_t address, nb::object storage) {
    arena = HostArena::adopt(reinterpret_cast<std::byte*>(address), request.nbytes,
                             [held = shared(std::move(storage))] {}, request.options);
  }
  HostArena& get() {
    if (!arena) throw nb::value_error("an arena that was not opened");
    return *arena;
  }

  Request request;
  std::optional<HostArena> arena;
};

// What a tensor holds: its share of the memory, and the arena that it is a share of, so that the
// object lives as long as the memory does.
struct Holder {
  std::shared_ptr<std::byte> memory;
  nb::object arena;
};

nb::object share(HostBlock& block, nb::handle offset, nb::handle nbytes) {
  const std::int64_t count = integer(nbytes);
  auto held = std::make_unique<Holder>(block.get().share(integer(offset), count), nb::find(block));
  std::byte* const data = held->memory.get();
  const nb::capsule owner(held.release(), [](void* given) noexcept {
    std::unique_ptr<Holder> last(static_cast<Holder*>(given));
  });
  using Memory = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::device::cpu>;
  return kvspec::bindings::Torch::get().from_capsule(
      nb::cast(Memory(data, {static_cast<std::size_t>(count)}, owner)));
}

void populate(HostBlock& block, nb::handle offset, nb::handle nbytes, nb::handle threads) {
  const std::int64_t begin = integer(offset);
  const std::int64_t count = integer(nbytes);
  std::optional<int> wanted;
  if (const auto given = optional_integer(threads)) {
    wanted = static_cast<int>(std::clamp<std::int64_t>(*given, 0, 1024));
  }
  HostArena& arena = block.get();
  const nb::gil_scoped_release released;
  arena.populate(begin, count, wanted);
}

nb::dict counters(HostBlock& block) {
  const kvspec::ArenaCounters counters = block.get().counters();
  nb::dict named;
  named["pages_populated"] = counters.pages_populated;
  named["populate_threads"] = counters.populate_threads;
  return named;
}

// What the interface has.
void def_public(nb::class_<HostBlock>& block) {
  block.def_prop_ro(
          "address",
          [](HostBlock& self) { return reinterpret_cast<std::uintptr_t>(self.get().address()); },
          "Of the first byte, a multiple of the alignment (HOST-1).")
      .def_prop_ro(
          "mapped_bytes", [](HostBlock& self) { return self.get().mapped_bytes(); },
          "Address space taken for it, 0 when closed (HOST-2).")
      .def_prop_ro(
          "pinned_bytes", [](HostBlock& self) { return self.get().pinned_bytes(); },
          "How many bytes are locked or registered for it (HOST-22).")
      .def_prop_ro(
          "page_bytes", [](HostBlock& self) { return self.get().page_bytes(); },
          "What `discard` goes by (HOST-20).")
      .def_prop_ro(
          "name", [](HostBlock& self) { return self.get().name(); },
          "Of the segment, for shm (HOST-24).")
      .def(
          "resident_bytes", [](HostBlock& self) { return self.get().resident_bytes(); },
          "Of mapped_bytes, those on pages that have memory (HOST-21). O(pages).")
      .def(
          "numa_nodes", [](HostBlock& self) { return self.get().numa_nodes(); },
          "Bytes on each node, None without NUMA (HOST-12). O(pages).")
      .def("counters", &counters, nb::sig("def counters(self) -> dict[str, int]"),
           "Exact costs so far: `pages_populated`, `populate_threads` (HOST-27).")
      .def(
          "check", [](HostBlock& self) { self.get().check(); },
          "Raise ContractError if the memory is not as it must be (HOST-29).");
}

// What python/kvspec/native builds with.
void def_parts(nb::class_<HostBlock>& block) {
  block.def_prop_ro("wanted_bytes",
                    [](const HostBlock& self) { return self.request.mapped_bytes; },
                    "What open() will map (HOST-2).")
      .def_prop_ro("closed", [](HostBlock& self) { return self.get().closed(); })
      .def_prop_ro("share_count", [](HostBlock& self) { return self.get().share_count(); },
                   "How many tensors over it are alive.")
      .def("require_open",
           [](HostBlock& self, const char* call) { self.get().require_open(call); }, "call"_a,
           "Refuse a call of an arena that is closed (HOST-18).")
      .def("open", &HostBlock::open, "lock"_a, "Map it; `lock` says whether pinned locks it.")
      .def("adopt", &HostBlock::adopt, "address"_a, "storage"_a,
           "Take the memory of an object that is kept alive: kind torch.")
      .def(
          "on_release",
          [](HostBlock& self, nb::object before, nb::object after) {
            self.get().on_release(caller(std::move(before)), caller(std::move(after)));
          },
          "before"_a.none(), "after"_a.none(),
          "Call these when the memory is about to go back, and when it has.")
      .def("share", &share, "offset"_a, "nbytes"_a,
           nb::sig("def share(self, offset: int, nbytes: int) -> torch.Tensor"),
           "uint8 over bytes of the memory, which live as long (HOST-13, HOST-15).")
      .def(
          "discard_range",
          [](HostBlock& self, nb::handle offset, nb::handle nbytes) {
            self.get().discard(integer(offset), integer(nbytes));
          },
          "offset"_a, "nbytes"_a,
          nb::sig("def discard_range(self, offset: int, nbytes: int) -> None"),
          "Give whole pages back (HOST-19, HOST-20).")
      .def("populate_range", &populate, "offset"_a, "nbytes"_a, "threads"_a.none(),
           nb::sig("def populate_range(self, offset: int, nbytes: int, threads: int | None)"
                   " -> None"),
           "Give pages memory of their own (HOST-7, HOST-20).")
      .def("give_back",
           [](HostBlock& self) {
             HostArena& arena = self.get();
             const nb::gil_scoped_release released;
             arena.close();
           },
           "Give the memory back (HOST-16, HOST-17).");
}

nb::object nodes(const std::string& folder) {
  const auto found = kvspec::host_pages::nodes(folder);
  if (!found) return nb::none();
  return nb::make_tuple(nb::tuple(nb::cast(found->memory)), nb::tuple(nb::cast(found->cpu)));
}

}  // namespace

void bind_host_memory(nb::module_& m) {
  nb::class_<HostBlock> block(m, "HostBlock", "The memory of an arena. Spec: HOST.");
  block.def("__init__",
            [](HostBlock* self, const std::string& kind, nb::handle nbytes, nb::handle alignment,
               bool populate_it, const std::string& huge_pages, nb::handle numa_node,
               std::string label, std::optional<std::string> attach, std::string node_folder) {
              new (self) HostBlock(Request(kind, nbytes, alignment, populate_it, huge_pages,
                                           numa_node, std::move(label), std::move(attach),
                                           std::move(node_folder)));
            },
            "kind"_a, "nbytes"_a, "alignment"_a.none(), "populate"_a, "huge_pages"_a,
            "numa_node"_a.none(), "label"_a, "attach"_a.none(), "node_folder"_a,
            nb::sig("def __init__(self, kind: str, nbytes: int, alignment: int | None,"
                    " populate: bool, huge_pages: str, numa_node: int | None, label: str,"
                    " attach: str | None, node_folder: str) -> None"));
  def_public(block);
  def_parts(block);
  m.def("numa_node_lists", &nodes, "folder"_a,
        nb::sig("def numa_node_lists(folder: str) -> tuple[tuple[int, ...], tuple[int, ...]]"
                " | None"),
        "The NUMA nodes that have memory, and those that have CPUs (HOST-25).");
  m.def("populates_on_request", &kvspec::host_pages::populates_on_request,
        "Whether the kernel populates pages on request (HOST-25).");
  m.def("huge_page_bytes", &kvspec::host_pages::huge_page_bytes, "Of the default huge pages.");
}
