#include "kvspec/ownership_ledger.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "convert.hpp"
#include "kvspec/slots.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using kvspec::OwnershipLedger;
using kvspec::SlotRuns;
using kvspec::bindings::Integers;

namespace {

constexpr const char* kClause = "LEDGER-14";
constexpr std::array kOwnerKinds{"free", "pending", "reserved", "request", "tree", "copy"};
constexpr std::array kFaultKinds{"leak",           "double free",  "alias",
                                 "use after free", "dangling row", "sentinel"};

// The classes of kvspec.interfaces.ownership_ledger, found at the first use and kept for the life
// of the process.
struct Classes {
  nb::handle owner, step, fault, view;

  static const Classes& get() {
    static const Classes classes = [] {
      const nb::module_ room = nb::module_::import_("kvspec.interfaces.ownership_ledger");
      const auto kept = [&](const char* name) { return nb::object(room.attr(name)).release(); };
      return Classes{kept("Owner"), kept("Step"), kept("Fault"), kept("LedgerView")};
    }();
    return classes;
  }
};

nb::object python_owner(const OwnershipLedger::Owner& owner) {
  return Classes::get().owner(kOwnerKinds[static_cast<std::size_t>(owner.kind)], owner.who);
}

nb::list python_faults(const OwnershipLedger& ledger,
                       const std::vector<OwnershipLedger::Fault>& faults) {
  nb::list found;
  for (const OwnershipLedger::Fault& fault : faults) {
    found.append(Classes::get().fault(kFaultKinds[static_cast<std::size_t>(fault.kind)],
                                      ledger.pool_name(fault.pool), fault.page, fault.row,
                                      fault.action, python_owner(fault.owner),
                                      python_owner(fault.other)));
  }
  return found;
}

nb::list python_history(const OwnershipLedger& ledger, std::string_view pool, std::int64_t page) {
  nb::list steps;
  for (const auto& [action, owner] : ledger.history(pool, page)) {
    steps.append(Classes::get().step(action, python_owner(owner)));
  }
  return steps;
}

nb::dict python_counts(const OwnershipLedger& ledger, std::string_view pool) {
  nb::dict named;
  const auto counts = ledger.counts(pool);
  for (std::size_t kind = 0; kind < counts.size(); ++kind) named[kOwnerKinds[kind]] = counts[kind];
  return named;
}

nb::dict python_counters(const OwnershipLedger& ledger) {
  nb::dict named;
  named["slots_seen"] = ledger.counters().slots_seen;
  named["pages_moved"] = ledger.counters().pages_moved;
  named["rows_looked_at"] = ledger.counters().rows_looked_at;
  return named;
}

nb::object python_view(const OwnershipLedger& ledger) {
  nb::dict owners;
  nb::set groups;
  for (std::size_t pool = 0; pool < ledger.pool_count(); ++pool) {
    nb::list pages;
    for (const OwnershipLedger::Owner& owner : ledger.owners(pool)) {
      pages.append(python_owner(owner));
    }
    const nb::str name(ledger.pool_name(pool).c_str());
    owners[name] = nb::tuple(pages);
    if (ledger.group_open(pool)) groups.add(name);
  }
  nb::dict rows;
  for (const std::int64_t row : ledger.live_rows()) {
    rows[nb::int_(row)] = nb::tuple(nb::cast(ledger.row_pages(row)));
  }
  return Classes::get().view(owners, rows, nb::tuple(nb::cast(ledger.copies_in_flight())),
                             nb::steal(PyFrozenSet_New(groups.ptr())), ledger.action());
}

void construct(OwnershipLedger* self, std::int64_t page_size, nb::handle page_counts,
               std::int64_t row_count, std::int64_t step_count) {
  nb::dict given;
  if (PyDict_Update(given.ptr(), page_counts.ptr()) != 0) nb::raise_python_error();
  OwnershipLedger::PageCounts counts;
  for (const auto& [name, count] : given) {
    std::pair<std::string, std::int64_t> pool;
    if (!nb::try_cast(name, pool.first) || !nb::try_cast(count, pool.second)) {
      throw nb::type_error("page_counts maps names to integers");
    }
    counts.push_back(std::move(pool));
  }
  new (self) OwnershipLedger(page_size, counts, row_count, step_count);
}

using Bound = nb::class_<OwnershipLedger>;

// Effects on slots of a pool.
void def_slots(Bound& ledger) {
  ledger
      .def("take", [](OwnershipLedger& self, std::string_view pool, nb::handle slots) {
             self.guard("take", pool);
             self.take(pool, Integers(slots, kClause));
           },
           "pool"_a, "slots"_a.none(), "An allocator handed these out (LEDGER-2). O(slots).")
      .def("give", [](OwnershipLedger& self, std::string_view pool, nb::handle slots) {
             self.guard("give", pool);
             self.give(pool, Integers(slots, kClause));
           },
           "pool"_a, "slots"_a.none(), "These were given back (LEDGER-3). O(slots).")
      .def("adopt_slots", [](OwnershipLedger& self, nb::handle slots) {
             self.guard("adopt_slots");
             self.adopt_slots(Integers(slots, kClause));
           },
           "slots"_a.none(), "The tree has the pages of these slots (LEDGER-5). O(slots).")
      .def("copy_begin", [](OwnershipLedger& self, std::string_view pool, nb::handle slots) {
             self.guard("copy_begin", pool);
             return self.copy_begin(pool, Integers(slots, kClause));
           },
           "pool"_a, "slots"_a.none(), "A copy of these is in flight (LEDGER-9). O(slots).")
      .def("copy_end", &OwnershipLedger::copy_end, "copy"_a, "It is done (LEDGER-9). O(pages).")
      .def("open_group", &OwnershipLedger::open_group, "pool"_a,
           "What is given back from here on is pending (LEDGER-3). O(1).")
      .def("close_group", &OwnershipLedger::close_group, "pool"_a,
           "What is pending is free (LEDGER-8). O(pending pages).")
      .def("clear", &OwnershipLedger::clear, "pool"_a,
           "Everything is free, and no group is open (LEDGER-8). O(pages).");
}

// Effects on rows.
void def_rows(Bound& ledger) {
  ledger
      .def("take_rows", [](OwnershipLedger& self, nb::handle rows) {
             self.guard("take_rows");
             self.take_rows(Integers(rows, kClause));
           },
           "rows"_a.none(), "These rows are live, and name nothing (LEDGER-11). O(rows named).")
      .def("give_rows", [](OwnershipLedger& self, nb::handle rows) {
             self.guard("give_rows");
             self.give_rows(Integers(rows, kClause));
           },
           "rows"_a.none(), "These rows are free (LEDGER-7, LEDGER-11). O(pages they name).")
      .def("clear_rows", &OwnershipLedger::clear_rows, "Every row is free (LEDGER-8). O(rows).")
      .def("write",
           [](OwnershipLedger& self, std::int64_t row, std::int64_t start, nb::handle slots) {
             self.guard("write");
             self.write(row, start, Integers(slots, kClause));
           },
           "row"_a, "start"_a, "slots"_a.none(),
           "The positions from start on of a row name these (LEDGER-4). O(slots).")
      .def("adopt", &OwnershipLedger::adopt, "row"_a, "stop"_a,
           "The tree has the request's whole pages in [0, stop) of the row (LEDGER-5). O(pages).");
}

void def_reading(Bound& ledger) {
  ledger
      .def("owner", [](const OwnershipLedger& self, std::string_view pool, std::int64_t page) {
             return python_owner(self.owner(pool, page));
           },
           "pool"_a, "page"_a,
           nb::sig("def owner(self, pool: str, page: int)"
                   " -> kvspec.interfaces.ownership_ledger.Owner"),
           "Who has a page, or a row of the pool `rows` (LEDGER-1). O(1).")
      .def("counts", &python_counts, "pool"_a,
           nb::sig("def counts(self, pool: str) -> dict[str, int]"),
           "How many pages each kind of owner has. O(1).")
      .def("history", &python_history, "pool"_a, "page"_a,
           nb::sig("def history(self, pool: str, page: int)"
                   " -> list[kvspec.interfaces.ownership_ledger.Step]"),
           "What became of a page, the newest first (LEDGER-13). O(steps).")
      .def("row_pages", &OwnershipLedger::row_pages, "row"_a,
           "The page of each page-sized stretch of a live row, from position 0. O(pages).")
      .def("view", &python_view,
           nb::sig("def view(self) -> kvspec.interfaces.ownership_ledger.LedgerView"),
           "The abstract state. O(pages).")
      .def("counters", &python_counters, nb::sig("def counters(self) -> dict[str, int]"),
           "Exact costs so far (LEDGER-15).")
      .def("check", &OwnershipLedger::check,
           "Raise ContractError if the books are broken (LEDGER-1). O(pages).");
}

// A run may end behind the last of 64 bits.
nb::list slot_runs(nb::handle slots) {
  const Integers given(slots, "REC-2");
  nb::list found;
  for (SlotRuns runs(given); runs.next();) {
    const auto [start, count] = runs.run();
    const auto stop = static_cast<std::uint64_t>(start) + count;
    const nb::int_ end = start < 0 ? nb::int_(static_cast<std::int64_t>(stop)) : nb::int_(stop);
    found.append(nb::make_tuple(start, end));
  }
  return found;
}

}  // namespace

void bind_ownership_ledger(nb::module_& m) {
  Bound ledger(m, "OwnershipLedger", "Who has every page, and since when. Spec: LEDGER.");
  ledger
      .def("__init__", &construct, "page_size"_a, "page_counts"_a, "row_count"_a,
           "step_count"_a = 65'536,
           nb::sig("def __init__(self, page_size: int,"
                   " page_counts: collections.abc.Mapping[str, int], row_count: int,"
                   " step_count: int = 65536) -> None"))
      .def("begin", &OwnershipLedger::begin, "action"_a, "An action begins (LEDGER-14). O(1).")
      .def("end", [](OwnershipLedger& self, bool by_hand) {
             return python_faults(self, self.end(by_hand));
           },
           "by_hand"_a = false,
           nb::sig("def end(self, by_hand: bool = False)"
                   " -> list[kvspec.interfaces.ownership_ledger.Fault]"),
           "It has ended: its faults (LEDGER-6, LEDGER-7, LEDGER-12).");
  def_slots(ledger);
  def_rows(ledger);
  def_reading(ledger);
  m.def("slot_runs", &slot_runs, "slots"_a.none(),
        nb::sig("def slot_runs(slots: object) -> list[tuple[int, int]]"),
        "Slots as runs [start, stop), in their order, as few as can be. O(slots).");
}
