// Request pool: the books.  The table and its device are torch's: python/kvspec/native.
#include "kvspec/request_pool.hpp"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include "convert.hpp"
#include "kvspec/contract.hpp"
#include "observer.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using kvspec::RequestPool;
using kvspec::bindings::Integers;

namespace {

using Table = nb::ndarray<const RequestPool::Slot, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Memory = nb::ndarray<RequestPool::Slot, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Packed = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// The books with the Python objects that they refer to.
struct RequestRows : RequestPool {
  using RequestPool::RequestPool;

  nb::object table = nb::none();  // owns the memory that is mirrored
  nb::object observer = nb::none();

  // The observer may refer back to the pool.
  static int traverse(PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    if (!nb::inst_ready(self)) return 0;
    const RequestRows& rows = *nb::inst_ptr<RequestRows>(self);
    Py_VISIT(rows.table.ptr());
    Py_VISIT(rows.observer.ptr());
    return 0;
  }
  static int clear_references(PyObject* self) {
    RequestRows& rows = *nb::inst_ptr<RequestRows>(self);
    rows.attach(kvspec::Observer{});
    rows.observer = nb::none();
    return 0;
  }
  static inline PyType_Slot slots[] = {
      {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
      {Py_tp_clear, reinterpret_cast<void*>(clear_references)},
      {0, nullptr}};
};

// An integer of Python, numpy or torch, the nearest of 64 bits; nothing if it is none.
std::optional<std::int64_t> integer(nb::handle given) {
  const nb::object index = nb::steal(PyNumber_Index(given.ptr()));
  if (!index.is_valid()) {
    PyErr_Clear();
    return std::nullopt;
  }
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow == 0) return value;
  return overflow > 0 ? std::numeric_limits<std::int64_t>::max()
                      : std::numeric_limits<std::int64_t>::min();
}

std::int64_t required_integer(nb::handle given) {
  if (const auto value = integer(given)) return *value;
  throw nb::type_error("an integer is required");
}

// One row, an integer without a dimension, or several.
class Rows {
 public:
  Rows(nb::handle given, const char* clause) {
    if (!names_one(given)) {
      several_.emplace(given, clause);
      return;
    }
    const auto row = integer(given);
    if (!row) kvspec::refuse(clause, std::string(nb::repr(given).c_str()) + " is not a row");
    one_ = *row;
  }

  bool is_one() const noexcept { return !several_; }
  std::int64_t one() const noexcept { return one_; }
  std::span<const std::int64_t> span() const noexcept {
    return several_ ? several_->span() : std::span<const std::int64_t>(&one_, 1);
  }

 private:
  static bool names_one(nb::handle given) {
    if (PyLong_Check(given.ptr())) return true;
    if (PyList_Check(given.ptr()) || !nb::hasattr(given, "__index__")) return false;
    return !nb::hasattr(given, "ndim") || given.attr("ndim").equal(nb::int_(0));
  }

  std::int64_t one_ = 0;
  std::optional<Integers> several_;
};

// A slice as it stands: nothing is clamped to the row, and -1 is not its last position.
struct Slice {
  std::int64_t start, stop, step;

  Slice(nb::handle given, std::int64_t width)
      : start(bound(given, "start", 0)),
        stop(bound(given, "stop", width)),
        step(bound(given, "step", 1)) {
    if (step == 0) refuse_type(given);
  }

  std::uint64_t count() const noexcept {
    const auto low = static_cast<std::uint64_t>(step > 0 ? start : stop);
    const auto high = static_cast<std::uint64_t>(step > 0 ? stop : start);
    if (step > 0 ? start >= stop : stop >= start) return 0;
    const auto unit = static_cast<std::uint64_t>(step);
    return (high - low - 1) / (step > 0 ? unit : 0 - unit) + 1;
  }

  // REQUIRES: there is memory for count() of them.
  std::vector<std::int64_t> positions() const {
    std::vector<std::int64_t> all(count());
    std::int64_t next = start;
    for (std::size_t i = 0; i < all.size(); ++i, next += i < all.size() ? step : 0) all[i] = next;
    return all;
  }

 private:
  [[noreturn]] static void refuse_type(nb::handle given) {
    kvspec::refuse("REQ-7", std::string(nb::repr(given).c_str()) +
                                " is not a slice of 64-bit integers");
  }

  static std::int64_t bound(nb::handle given, const char* name, std::int64_t absent) {
    const nb::object value = given.attr(name);
    if (value.is_none()) return absent;
    const auto found = integer(value);
    if (!found) refuse_type(given);
    return *found;
  }
};

void write(RequestRows& pool, nb::handle indices, nb::handle values) {
  pool.guard("write");
  if (!PyTuple_Check(indices.ptr()) || PyTuple_GET_SIZE(indices.ptr()) != 2) {
    kvspec::refuse("REQ-7",
                   "the indices are not (row, slice), (row, positions) or (rows, positions)");
  }
  const Rows rows(PyTuple_GET_ITEM(indices.ptr(), 0), "REQ-7");
  const nb::handle given = PyTuple_GET_ITEM(indices.ptr(), 1);
  if (!PySlice_Check(given.ptr())) {
    const Integers positions(given, "REQ-7");
    return pool.write(rows.span(), positions, Integers(values, "REQ-7"));
  }
  const Slice slice(given, pool.max_context_len());
  if (!rows.is_one()) {
    kvspec::refuse("REQ-7", "a slice needs one row; give several their positions");
  }
  const Integers slots(values, "REQ-7");
  if (slice.step == 1) return pool.write_run(rows.one(), slice.start, slice.stop, slots);
  RequestPool::require_count(slots.span().size(), slice.count());
  pool.write(rows.span(), slice.positions(), slots);
}

nb::object row(const RequestRows& pool, nb::handle given) {
  const std::span<const RequestPool::Slot> slots = pool.row(required_integer(given));
  kvspec::Slots copy(slots.size());
  std::copy(slots.begin(), slots.end(), copy.span().begin());
  return kvspec::bindings::tensor(std::move(copy));
}

void pack(RequestRows& pool, const Packed& packed) {
  const std::size_t count = pool.unsent_count();
  if (packed.size() != 12 * count) throw nb::value_error("12 bytes per position are required");
  auto* positions = reinterpret_cast<std::int64_t*>(packed.data());
  auto* slots = reinterpret_cast<RequestPool::Slot*>(positions + count);
  pool.pack({positions, count}, {slots, count});
}

void require_shape(const RequestPool& pool, std::size_t rows, std::size_t width) {
  if (rows != static_cast<std::size_t>(pool.row_count()) ||
      width != static_cast<std::size_t>(pool.max_context_len())) {
    throw nb::value_error("the table has not the shape of the pool");
  }
}

void mirror(RequestRows& rows, nb::object given) {
  const auto table = nb::cast<Memory>(given, false);
  require_shape(rows, table.shape(0), table.shape(1));
  rows.table = std::move(given);
  rows.mirror(table.data());
}

nb::dict counters(const RequestRows& rows) {
  const kvspec::RequestPoolCounters counters = rows.counters();
  nb::dict named;
  named["rows_moved"] = counters.rows_moved;
  named["positions_written"] = counters.positions_written;
  named["positions_sent"] = counters.positions_sent;
  return named;
}

// Methods of kvspec.interfaces.request_pool.ReqToTokenPool.
void def_public(nb::class_<RequestRows>& rows) {
  rows.def("available_size", &RequestRows::available_size,
           "How many rows `alloc` can hand out. O(1).")
      .def(
          "alloc",
          [](RequestRows& self, nb::handle need_size) {
            return self.alloc(required_integer(need_size));
          },
          "need_size"_a, nb::sig("def alloc(self, need_size: int) -> list[int] | None"),
          "Take the rows that have been free longest, or None (REQ-2, REQ-3, REQ-4).")
      .def(
          "free",
          [](RequestRows& self, nb::handle free_index) {
            self.guard("free");
            self.free(Rows(free_index, "REQ-4").span());
          },
          "free_index"_a.none(), "Give rows back (REQ-4, REQ-5). O(rows named).")
      .def("write", &write, "indices"_a.none(), "values"_a.none(),
           "Set positions of rows to slots (REQ-6, REQ-7). O(positions named).")
      .def("row", &row, "row"_a, nb::sig("def row(self, row: int) -> torch.Tensor"),
           "The slots of a live row: int64, a copy, on the CPU. O(length).")
      .def(
          "row_length",
          [](const RequestRows& self, nb::handle given) {
            return self.row(required_integer(given)).size();
          },
          "row"_a, nb::sig("def row_length(self, row: int) -> int"),
          "How many positions of a live row are written. O(1).")
      .def("clear", &RequestRows::clear, "Make every row free (REQ-9). O(rows).")
      .def_prop_ro("free_slots", &RequestRows::free_rows,
                   "The free rows, the next to be handed out first. O(rows).")
      .def(
          "attach",
          [](RequestRows& self, nb::object observer) {
            kvspec::bindings::attach(self, self.observer, std::move(observer));
          },
          "observer"_a.none(), "Report every operation from now on; None detaches (OBS-1).")
      .def("counters", &counters, nb::sig("def counters(self) -> dict[str, int]"),
           "Exact costs so far (REQ-13).");
}

// What python/kvspec/native builds the table with.
void def_table(nb::class_<RequestRows>& rows) {
  rows.def("live_rows", &RequestRows::live_rows, "The live rows, ascending. O(rows).")
      .def("mirror", &mirror, "table"_a, nb::sig("def mirror(self, table: torch.Tensor) -> None"),
           "Let `write` write to this table of zeros too (REQ-8).")
      .def("guard", &RequestRows::guard, "name"_a, "Refuse a call from an observer (OBS-3).")
      .def("unsent_count", &RequestRows::unsent_count, "Positions that a device's table lacks.")
      .def("pack", &pack, "packed"_a, nb::sig("def pack(self, packed: torch.Tensor) -> None"),
           "Write them: their places in the flat table as int64, then their slots as int32.")
      .def("sent", &RequestRows::sent, "The table has what was packed.")
      .def(
          "check_books",
          [](RequestRows& self, const std::optional<Table>& table) {
            if (table) require_shape(self, table->shape(0), table->shape(1));
            self.check(table ? table->data() : nullptr);
          },
          "table"_a.none(), nb::sig("def check_books(self, table: torch.Tensor | None) -> None"),
          "Raise ContractError if books or table are broken (REQ-10).");
}

}  // namespace

void bind_request_pool(nb::module_& m) {
  nb::class_<RequestRows> rows(m, "RequestRows", "The books of a request pool. Spec: REQ.",
                               nb::type_slots(RequestRows::slots));
  rows.def(nb::init<std::int64_t, std::int64_t, std::int64_t>(), "size"_a, "pre_alloc_size"_a,
           "max_context_len"_a);
  def_public(rows);
  def_table(rows);
}
