// Radix tree: the core of the caches in python/kvspec/native.
#include "kvspec/radix_cache.hpp"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include "convert.hpp"
#include "kvspec/digest.hpp"
#include "kvspec/page_set.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using kvspec::InsertPlan;
using kvspec::Interval;
using kvspec::PageId;
using kvspec::RadixHandle;
using kvspec::RadixReceipt;
using kvspec::RadixTree;
using kvspec::Token;
using kvspec::bindings::Array;
using kvspec::bindings::Integers;

namespace {

// The tokens of a key (KEY-1).  Memory of 32-bit integers without gaps is read in place; 64-bit
// integers and lists are copied; anything else, and every refusal, is kvspec.prefix_key's.
class Tokens {
 public:
  explicit Tokens(nb::handle given) {
    if (PyList_CheckExact(given.ptr()) ? copy_list(given) : read(given)) return;
    if (!read(nb::module_::import_("kvspec.prefix_key").attr("key_words")(given))) {
      throw nb::type_error("kvspec.prefix_key.key_words gave no buffer of 32-bit integers");
    }
  }
  Tokens(const Tokens&) = delete;
  Tokens& operator=(const Tokens&) = delete;

  std::span<const Token> span() const noexcept { return span_; }

 private:
  bool copy_list(nb::handle list) {
    const auto count = static_cast<std::size_t>(PyList_GET_SIZE(list.ptr()));
    copy_.resize(count);
    for (std::size_t at = 0; at < count; ++at) {
      PyObject* number = PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(at));
      if (!PyLong_CheckExact(number)) return false;
      int overflow = 0;
      const long long token = PyLong_AsLongLongAndOverflow(number, &overflow);
      if (overflow != 0 || !std::in_range<Token>(token)) return false;
      copy_[at] = static_cast<Token>(token);
    }
    span_ = copy_;
    return true;
  }

  // Whether it is memory that needs no more than copying.
  bool read(nb::handle given) {
    Array array;
    if (!kvspec::bindings::read_memory(given, array) || array.ndim() != 1) return false;
    if (array.device_type() != nb::device::cpu::value) return false;
    const bool in_a_row = array.shape(0) < 2 || array.stride(0) == 1;
    if (array.dtype() == nb::dtype<Token>() && in_a_row) {
      span_ = {static_cast<const Token*>(array.data()), array.shape(0)};
      kept_ = std::move(array);
      return true;
    }
    return array.dtype() == nb::dtype<std::int64_t>() && in_a_row &&
           narrow({static_cast<const std::int64_t*>(array.data()), array.shape(0)});
  }

  bool narrow(std::span<const std::int64_t> tokens) {
    copy_.resize(tokens.size());
    std::int64_t astray = 0;
    for (std::size_t at = 0; at < tokens.size(); ++at) {
      copy_[at] = static_cast<Token>(tokens[at]);
      astray |= tokens[at] ^ copy_[at];
    }
    span_ = copy_;
    return astray == 0;
  }

  Array kept_;  // keeps memory alive that is read in place
  std::vector<Token> copy_;
  std::span<const Token> span_;
};

std::string_view frame_of(const nb::bytes& frame) { return {frame.c_str(), frame.size()}; }

nb::list intervals(const std::vector<Interval>& given) {
  nb::list pairs;
  for (const auto& [start, stop] : given) pairs.append(nb::make_tuple(start, stop));
  return pairs;
}

nb::tuple path(const kvspec::RadixPath& given) {
  nb::list tokens;
  for (const Token token : given.tokens) tokens.append(token);
  return nb::make_tuple(nb::bytes(given.space.data(), given.space.size()), nb::tuple(tokens));
}

nb::object slots(std::span<const PageId> pages, std::int32_t page_size) {
  return kvspec::bindings::tensor(kvspec::slots_of(pages, page_size));
}

nb::object first_slots(std::span<const PageId> pages, std::int32_t page_size) {
  kvspec::Slots firsts(pages.size());
  std::ranges::transform(pages, firsts.span().begin(), [page_size](PageId page) {
    return static_cast<std::int64_t>(page) * page_size;
  });
  return kvspec::bindings::tensor(std::move(firsts));
}

// A plan, and the page size that its positions are counted with.
struct Plan : InsertPlan {
  Plan(InsertPlan plan, std::int32_t unit) : InsertPlan(std::move(plan)), page_size(unit) {}

  std::int32_t page_size;

  std::int64_t prefix_count() const {
    return static_cast<std::int64_t>(resident.size()) * page_size;
  }
  std::int64_t reach_count() const { return static_cast<std::int64_t>(reach) * page_size; }

  nb::object duplicate_slots() const {
    std::vector<PageId> chosen;
    for (const Interval& interval : duplicate) {
      chosen.insert(chosen.end(), pages.begin() + interval.start / page_size,
                    pages.begin() + interval.stop / page_size);
    }
    return slots(chosen, page_size);
  }

  nb::object own_slots(std::int64_t start, std::int64_t stop) const {
    const auto count = static_cast<std::int64_t>(pages.size());
    const std::int64_t end = std::clamp((stop + page_size - 1) / page_size, std::int64_t{0}, count);
    const std::int64_t first = std::clamp(start / page_size, std::int64_t{0}, end);
    return slots({pages.data() + first, pages.data() + end}, page_size);
  }

  nb::object tree_slots(std::int64_t start) const {
    std::vector<PageId> held(pages);
    held.resize(reach);
    std::copy(resident.begin(), resident.end(), held.begin());
    const std::int64_t first = std::clamp(start, std::int64_t{0}, reach_count()) / page_size;
    return slots({held.data() + first, held.data() + held.size()}, page_size);
  }

  nb::object gained_slots() const {
    std::vector<PageId> gained(pages.begin() + std::ssize(resident),
                               pages.begin() + static_cast<std::ptrdiff_t>(reach));
    for (const std::size_t at : revived) gained.push_back(resident[at]);
    return slots(gained, page_size);
  }

  nb::object named_slots() const {
    kvspec::Slots named(reach + tail_slots.size());
    const std::span<std::int64_t> slots = named.span();
    for (std::size_t at = 0; at < reach; ++at) slots[at] = std::int64_t{pages[at]} * page_size;
    std::ranges::copy(tail_slots, slots.begin() + static_cast<std::ptrdiff_t>(reach));
    return kvspec::bindings::tensor(std::move(named));
  }

  nb::object revived_slots() const {
    if (revived.empty()) return nb::none();
    std::vector<PageId> tree;
    std::vector<PageId> own;
    for (const std::size_t at : revived) {
      tree.push_back(resident[at]);
      own.push_back(pages[at]);
    }
    return nb::make_tuple(first_slots(tree, page_size), first_slots(own, page_size));
  }

  nb::object pair_ranges() const {
    return nb::make_tuple(intervals(swa.shared), intervals(swa.adopted), intervals(swa.duplicate),
                          intervals(swa.tail));
  }
};

nb::object match(RadixTree& tree, const nb::bytes& frame, nb::handle tokens) {
  const Tokens key(tokens);
  kvspec::RadixMatch found = tree.match(frame_of(frame), key.span());
  return nb::make_tuple(kvspec::bindings::tensor(std::move(found.slots)), std::move(*found.node));
}

nb::object peek(const RadixTree& tree, const nb::bytes& frame, nb::handle tokens) {
  const Tokens key(tokens);
  return kvspec::bindings::tensor(tree.peek(frame_of(frame), key.span()).slots);
}

Plan plan_insert(RadixTree& tree, const nb::bytes& frame, nb::handle tokens, nb::handle value) {
  const Tokens key(tokens);
  const Integers given(value, "CACHE-10");
  return {tree.plan_insert(frame_of(frame), key.span(), given.span()), tree.page_size()};
}

Plan plan_row(RadixTree& tree, const nb::bytes& frame, nb::handle tokens, nb::handle row,
              std::int64_t protected_count, const RadixReceipt* receipt, bool locks) {
  const Tokens key(tokens);
  const Integers given(row, "CACHE-5");
  return {tree.plan_row(frame_of(frame), key.span(), given.span(), protected_count, receipt, locks),
          tree.page_size()};
}

void add_pairs(RadixTree& tree, Plan& plan, nb::handle pairs) {
  if (pairs.is_none()) return tree.add_pairs(plan, {});
  tree.add_pairs(plan, Integers(pairs, "SWA-20").span());
}

nb::tuple evict(RadixTree& tree, std::int64_t num_tokens, std::int64_t swa_num_tokens) {
  const kvspec::RadixEviction done = tree.evict(num_tokens, swa_num_tokens);
  const std::int32_t unit = tree.page_size();
  const bool buried = !done.tombstones.empty();
  return nb::make_tuple(first_slots(done.pages, unit),
                        buried ? first_slots(done.tombstones, unit) : nb::none(),
                        done.pair_count * unit);
}

RadixHandle commit_insert(RadixTree& tree, Plan& plan, std::int64_t priority) {
  return tree.commit_insert(std::exchange<InsertPlan>(plan, InsertPlan{}), priority);
}

RadixReceipt commit_row(RadixTree& tree, Plan& plan) {
  return tree.commit_row(std::exchange<InsertPlan>(plan, InsertPlan{}));
}

nb::object resolve(const RadixTree& tree, const RadixHandle& handle) {
  const std::optional<kvspec::RadixPath> found = tree.resolve(handle);
  return found ? nb::object(path(*found)) : nb::none();
}

nb::list pages(const RadixTree& tree) {
  nb::list all;
  for (const kvspec::RadixPage& page : tree.pages()) {
    all.append(nb::make_tuple(path(page.path),
                              nb::make_tuple(page.page, page.locks, page.last, page.born, page.hits,
                                             page.priority, page.cut, page.tombstone,
                                             page.swa_locks)));
  }
  return all;
}

nb::list open_receipts(const RadixTree& tree) {
  nb::list all;
  for (const kvspec::RadixPath& locked : tree.open_receipts()) all.append(path(locked));
  return all;
}

nb::dict counters(const RadixTree& tree) {
  const kvspec::RadixCounters counters = tree.counters();
  nb::dict named;
  named["tokens_compared"] = counters.tokens_compared;
  named["heap_moves"] = counters.heap_moves;
  named["leaves_evicted"] = counters.leaves_evicted;
  return named;
}

std::size_t hash(const RadixHandle& handle) {
  const std::size_t name = std::hash<std::string>()(handle.space);
  return kvspec::mix(kvspec::mix(name, handle.node), handle.incarnation);
}

void def_values(nb::module_& m) {
  nb::class_<RadixHandle>(m, "NodeHandle",
                          "Names a path and the incarnation of its last page (CACHE-14).")
      .def(
          "__eq__",
          [](const RadixHandle& self, nb::handle other) {
            return nb::isinstance<RadixHandle>(other) && self == nb::cast<RadixHandle>(other);
          },
          "other"_a.none(), nb::sig("def __eq__(self, other: object, /) -> bool"))
      .def("__hash__", &hash);

  nb::class_<RadixReceipt>(m, "LockReceipt", "One lock, worth one unlock (CACHE-11, CACHE-12).")
      .def_ro("delta", &RadixReceipt::delta)
      .def_ro("node", &RadixReceipt::node)
      .def_prop_ro("swa_uuid", &RadixReceipt::swa_uuid);
}

void def_plan(nb::module_& m) {
  nb::class_<Plan>(m, "InsertPlan", "What an insert will do (CACHE-8); carried out once.")
      .def_prop_ro("prefix_len", &Plan::prefix_count)
      .def_prop_ro("reach_len", &Plan::reach_count)
      .def_prop_ro("shared", [](const Plan& self) { return intervals(self.shared); },
                   nb::sig("def shared(self) -> list[tuple[int, int]]"))
      .def_prop_ro("adopted", [](const Plan& self) { return intervals(self.adopted); },
                   nb::sig("def adopted(self) -> list[tuple[int, int]]"))
      .def_prop_ro("duplicate", [](const Plan& self) { return intervals(self.duplicate); },
                   nb::sig("def duplicate(self) -> list[tuple[int, int]]"))
      .def_prop_ro("tail", [](const Plan& self) { return intervals(self.tail); },
                   nb::sig("def tail(self) -> list[tuple[int, int]]"))
      .def("duplicate_slots", &Plan::duplicate_slots,
           nb::sig("def duplicate_slots(self) -> torch.Tensor"),
           "The caller's slots in whose place the tree holds others.")
      .def("own_slots", &Plan::own_slots, "start"_a, "stop"_a,
           nb::sig("def own_slots(self, start: int, stop: int) -> torch.Tensor"),
           "The caller's, by position, to the end of the last page.")
      .def("tree_slots", &Plan::tree_slots, "start"_a,
           nb::sig("def tree_slots(self, start: int) -> torch.Tensor"),
           "What the tree will hold along the key from a position on.")
      .def("gained_slots", &Plan::gained_slots, nb::sig("def gained_slots(self) -> torch.Tensor"),
           "Those adopted, then those of the tree's tombstones that are revived.")
      .def("named_slots", &Plan::named_slots, nb::sig("def named_slots(self) -> torch.Tensor"),
           "Whose pairs `add_pairs` asks for: the whole pages' first slots, then the tail's.")
      .def("revived_slots", &Plan::revived_slots,
           nb::sig("def revived_slots(self) -> tuple[torch.Tensor, torch.Tensor] | None"),
           "The first slots of the tree's pages that revive, if any do, and of the caller's "
           "(SWARADIX-5).")
      .def("pair_ranges", &Plan::pair_ranges,
           nb::sig("def pair_ranges(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]], "
                   "list[tuple[int, int]], list[tuple[int, int]]]"),
           "Of the caller's window slots those shared, adopted, duplicate and tail (SWARADIX-6).");
}

void def_changes(nb::class_<RadixTree>& tree) {
  tree.def("match", &match, "frame"_a, "tokens"_a,
           nb::sig("def match(self, frame: bytes, tokens: object) -> "
                   "tuple[torch.Tensor, NodeHandle]"),
           "The longest resident prefix, touched (RADIX-1, RADIX-3).")
      .def("plan_insert", &plan_insert, "frame"_a, "tokens"_a, "value"_a,
           "What an insert would do, and its memory (CACHE-8, CACHE-10).")
      .def("plan_row", &plan_row, "frame"_a, "tokens"_a, "row"_a, "protected_len"_a,
           "receipt"_a.none(), "locks"_a, "What caching a request's row would do (CACHE-5).")
      .def("add_pairs", &add_pairs, "plan"_a, "pairs"_a.none(),
           "Say which window slots the caller has, None for all (SWARADIX-3 to SWARADIX-6).")
      .def("commit_insert", &commit_insert, "plan"_a, "priority"_a,
           "Carry a plan out (CACHE-9, RADIX-4).")
      .def("commit_row", &commit_row, "plan"_a, "Carry one out and lock what it reaches (CACHE-2).")
      .def("lock", &RadixTree::lock, "node"_a, "Lock a path (CACHE-11, CACHE-13, SWARADIX-11).")
      .def("unlock", nb::overload_cast<const RadixReceipt&>(&RadixTree::unlock), "node"_a,
           "Consume a receipt (CACHE-12, CACHE-13).")
      .def("unlock", nb::overload_cast<const RadixHandle&>(&RadixTree::unlock), "node"_a,
           "Consume the oldest open receipt of a node (CACHE-12, CACHE-13).")
      .def("evict", &evict, "num_tokens"_a, "swa_num_tokens"_a = 0,
           nb::sig("def evict(self, num_tokens: int, swa_num_tokens: int = 0) -> "
                   "tuple[torch.Tensor, torch.Tensor | None, int]"),
           "The first slot of each page evicted and of each tombstone made, if one is, and how "
           "many window tokens went (RADIX-8 to RADIX-13, SWARADIX-12 to SWARADIX-14).")
      .def("evict_commit", &RadixTree::evict_commit, "Let the last eviction's memory go.")
      .def("evict_undo", &RadixTree::evict_undo, "Take the last eviction back.")
      .def("reset", &RadixTree::reset, "Forget every page (CACHE-15, CACHE-16).");
}

void def_reading(nb::class_<RadixTree>& tree) {
  tree.def("peek", &peek, "frame"_a, "tokens"_a,
           nb::sig("def peek(self, frame: bytes, tokens: object) -> torch.Tensor"),
           "The longest resident prefix, untouched (RADIX-3).")
      .def("resolve", &resolve, "node"_a,
           nb::sig("def resolve(self, node: NodeHandle) -> "
                   "tuple[bytes, tuple[int, ...]] | None"),
           "Frame and tokens of a handle's path (CACHE-14).")
      .def(
          "path_slots",
          [](const RadixTree& self, const RadixHandle& node) {
            return kvspec::bindings::tensor(self.path_slots(node));
          },
          "node"_a, nb::sig("def path_slots(self, node: NodeHandle) -> torch.Tensor"),
          "The slots of a live handle's path.")
      .def(
          "resident_slots",
          [](const RadixTree& self) { return kvspec::bindings::tensor(self.resident_slots()); },
          nb::sig("def resident_slots(self) -> torch.Tensor"), "All resident slots, ascending.")
      .def("require_no_receipt", &RadixTree::require_no_receipt,
           "Refuse if one is open (CACHE-16).")
      .def("evictable_size", &RadixTree::evictable_token_count)
      .def("protected_size", &RadixTree::protected_token_count)
      .def("swa_evictable_size", &RadixTree::swa_evictable_token_count)
      .def("swa_protected_size", &RadixTree::swa_protected_token_count)
      .def(
          "first_slots",
          [](const RadixTree& self, bool tombstones) {
            return first_slots(self.resident_pages(tombstones), self.page_size());
          },
          "tombstones"_a, nb::sig("def first_slots(self, tombstones: bool) -> torch.Tensor"),
          "The first slot of each live page, or of each tombstone.")
      .def("pages", &pages,
           nb::sig("def pages(self) -> list[tuple[tuple[bytes, tuple[int, ...]], "
                   "tuple[int, int, int, int, int, int, bool, bool, int]]]"),
           "Of each resident page its path, and page, locks, last, born, hits, priority, cut, "
           "tombstone and window locks.")
      .def("open_receipts", &open_receipts,
           nb::sig("def open_receipts(self) -> list[tuple[bytes, tuple[int, ...]]]"),
           "Paths of the open receipts, oldest first.")
      .def("digest", &RadixTree::digest, "RADIX-17.")
      .def("check", &RadixTree::check, "RADIX-16.")
      .def("counters", &counters, nb::sig("def counters(self) -> dict[str, int]"), "RADIX-15.");
}

nb::object whole_pages(nb::handle row, std::int32_t page_size, const char* clause) {
  const Integers given(row, clause);
  return slots(kvspec::distinct_pages(given.span(), page_size, clause), page_size);
}

}  // namespace

void bind_radix_cache(nb::module_& m) {
  def_values(m);
  def_plan(m);
  nb::class_<RadixTree> tree(m, "RadixTree",
                             "Which pages hold the KV of which tokens. Spec: RADIX.");
  tree.def(nb::init<std::int32_t, std::string_view, std::string_view, std::int64_t>(),
           "page_size"_a, "eviction_policy"_a, "eviction_granularity"_a,
           "sliding_window_size"_a = 0);
  def_changes(tree);
  def_reading(tree);
  m.def("whole_pages", &whole_pages, "row"_a, "page_size"_a, "clause"_a,
        nb::sig("def whole_pages(row: object, page_size: int, clause: str) -> torch.Tensor"),
        "The slots of every page that a row has slots of, each page once, in order.");
}
