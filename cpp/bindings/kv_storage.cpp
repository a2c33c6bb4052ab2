// KV storage: torch tensors as rows of bytes.  Which they are is python/kvspec/native's to say.
#include "kvspec/kv_storage.hpp"

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "convert.hpp"
#include "kvspec/contract.hpp"

namespace nb = nanobind;
using kvspec::HostSlots;
using kvspec::KVStorage;
using kvspec::RowMemory;
using kvspec::SlotSpan;
using kvspec::bindings::Array;
using kvspec::bindings::Integers;

namespace {

// A tensor [rows, ...] on the CPU, each row without gaps, kept alive.
class Rows {
 public:
  explicit Rows(nb::handle given) {
    if (!kvspec::bindings::read_memory(given, array_) || array_.ndim() == 0 ||
        array_.device_type() != nb::device::cpu::value) {
      throw nb::type_error("a tensor of rows in host memory is required");
    }
    const auto item = static_cast<std::size_t>(array_.itemsize());
    std::size_t elements = 1;
    for (std::size_t axis = array_.ndim(); axis-- > 1;) {
      if (array_.shape(axis) > 1 && array_.stride(axis) != static_cast<std::int64_t>(elements)) {
        throw nb::value_error("the elements of a row have to follow one another");
      }
      elements *= array_.shape(axis);
    }
    memory_ = {static_cast<std::byte*>(const_cast<void*>(static_cast<const void*>(array_.data()))),
               static_cast<std::int64_t>(array_.shape(0)),
               array_.stride(0) * static_cast<std::int64_t>(item), elements * item};
  }

  const RowMemory& memory() const noexcept { return memory_; }

 private:
  Array array_;
  RowMemory memory_;
};

void require_alike(const RowMemory& one, const RowMemory& other) {
  if (one.row_bytes != other.row_bytes) {
    throw nb::value_error("rows of equal length are required");
  }
}

void require_count(const RowMemory& given, SlotSpan slots) {
  if (given.row_count != static_cast<std::int64_t>(slots.size())) {
    throw nb::value_error("one row is required for each slot");
  }
}

// The storage, with the tensors that it is over.
struct Storage : KVStorage {
  using KVStorage::KVStorage;

  void add_tensor(nb::handle tensor) {
    kept.emplace_back(tensor);
    if (kept.back().memory().row_count != row_count()) {
      throw nb::value_error("a tensor of row_count rows is required");
    }
    add(kept.back().memory());
  }

  // REQUIRES: the tensor was added.
  const RowMemory& known(std::size_t index) const {
    if (index >= tensor_count()) throw nb::index_error("no such tensor");
    return tensor(index);
  }

  void write_two(const std::string& clause, nb::handle loc, std::size_t one, nb::handle first,
                 std::size_t other, nb::handle second) {
    const Integers slots(loc, clause.c_str());
    const Rows ones(first), others(second);
    const std::array tensors{one, other};
    const std::array given{ones.memory(), others.memory()};
    for (std::size_t i = 0; i < 2; ++i) {
      require_alike(known(tensors[i]), given[i]);
    }
    write(clause, slots, tensors, given);
  }

  void write_one(const std::string& clause, nb::handle loc, std::size_t one, nb::handle first) {
    const Integers slots(loc, clause.c_str());
    const Rows rows(first);
    require_alike(known(one), rows.memory());
    write(clause, slots, std::array{one}, std::array{rows.memory()});
  }

  void read_into(const std::string& clause, nb::handle loc, std::size_t index, nb::handle out) {
    const Integers slots(loc, clause.c_str());
    const Rows rows(out);
    require_alike(known(index), rows.memory());
    require_count(rows.memory(), slots);
    read(clause, slots, index, rows.memory());
  }

  void move_rows(const std::string& clause, nb::handle targets, nb::handle sources,
                 std::size_t count) {
    if (count > tensor_count()) throw nb::index_error("no such tensor");
    const Integers to(targets, clause.c_str());
    move(clause, to, Integers(sources, clause.c_str()), count);
  }

  std::vector<Rows> kept;
};

void copy_between(nb::handle to, nb::handle to_slots, nb::handle from, nb::handle from_slots) {
  const Rows target(to), source(from);
  const Integers targets(to_slots, "KV-31"), sources(from_slots, "KV-31");
  require_alike(target.memory(), source.memory());
  if (targets.span().size() != sources.span().size()) {
    throw nb::value_error("as many slots on either side are required");
  }
  for (const auto& [rows, slots] : {std::pair{target.memory(), targets.span()},
                                    std::pair{source.memory(), sources.span()}}) {
    for (const std::int64_t slot : slots) {
      if (slot < 0 || slot >= rows.row_count) throw nb::index_error("no such row");
    }
  }
  if (target.memory().meets(source.memory())) {
    throw nb::value_error("memories that do not meet are required");
  }
  kvspec::copy_rows(target.memory(), targets, source.memory(), sources);
}

void bind_storage(nb::module_& m) {
  nb::class_<Storage>(m, "KVStorage", "Tensors of rows that slots name. Spec: KV.")
      .def(nb::init<std::int64_t, std::int64_t, bool>(), nb::arg("row_count"),
           nb::arg("sink_count"), nb::arg("checked"))
      .def("add", &Storage::add_tensor, nb::arg("tensor"),
           nb::sig("def add(self, tensor: torch.Tensor) -> None"),
           "One more tensor, of row_count rows.")
      .def("write", &Storage::write_one, nb::arg("clause"), nb::arg("slots").none(),
           nb::arg("tensor"), nb::arg("given"), "Rows of one tensor (KV-9, KV-12, KV-13).")
      .def("write_two", &Storage::write_two, nb::arg("clause"), nb::arg("slots").none(),
           nb::arg("tensor"), nb::arg("given"), nb::arg("other_tensor"), nb::arg("other_given"),
           "Rows of two tensors, or of none (KV-9, KV-12, KV-13).")
      .def("read", &Storage::read_into, nb::arg("clause"), nb::arg("slots").none(),
           nb::arg("tensor"), nb::arg("out"), "Copy rows (KV-16, KV-18).")
      .def("move", &Storage::move_rows, nb::arg("clause"), nb::arg("targets").none(),
           nb::arg("sources").none(), nb::arg("tensor_count"),
           "Rows of the first tensors (KV-14, KV-15).")
      .def("require_move",
           [](Storage& self, const std::string& clause, nb::handle targets, nb::handle sources) {
             const Integers to(targets, clause.c_str());
             self.require_move(clause, to, Integers(sources, clause.c_str()));
           },
           nb::arg("clause"), nb::arg("targets").none(), nb::arg("sources").none(),
           "Refuse slots that a move cannot take (KV-15).")
      .def("require_targets",
           [](Storage& self, const std::string& clause, nb::handle slots) {
             const Integers named(slots, clause.c_str());
             self.require_targets(clause, named);
             return named.span().size();
           },
           nb::arg("clause"), nb::arg("slots").none(),
           "Refuse a slot out of range or named twice beyond the sink; how many there are.")
      .def("require_rows",
           [](const Storage& self, const std::string& clause, nb::handle slots) {
             const Integers named(slots, clause.c_str());
             self.require_rows(clause, named);
             return named.span().size();
           },
           nb::arg("clause"), nb::arg("slots").none(),
           "Refuse a slot out of range; how many there are.")
      .def_prop_ro("rows_copied", &Storage::rows_copied, "Exact cost so far (KV-34).");
}

void bind_host(nb::module_& m) {
  nb::class_<HostSlots>(m, "HostSlots", "The books of a host pool. Spec: KV.")
      .def(nb::init<std::int64_t, std::int64_t, std::int64_t, std::int64_t>(), nb::arg("size"),
           nb::arg("page_size"), nb::arg("device_first"), nb::arg("device_end"))
      .def("available_size", &HostSlots::available_size, "How many slots `alloc` can hand out.")
      .def("alloc",
           [](HostSlots& self, std::int64_t need_size) {
             auto slots = self.alloc(need_size);
             return slots ? kvspec::bindings::tensor(std::move(*slots)) : nb::none();
           },
           nb::arg("need_size"),
           nb::sig("def alloc(self, need_size: int) -> torch.Tensor | None"),
           "Take the slots that have been free longest, or None (KV-25, KV-26, KV-28).")
      .def("free",
           [](HostSlots& self, nb::handle indices) {
             return self.free(Integers(indices, "KV-28"));
           },
           nb::arg("indices").none(), "Give whole pages back; how many slots (KV-27, KV-28).")
      .def("clear", &HostSlots::clear, "Make every slot free (KV-27).")
      .def("require_transfer",
           [](HostSlots& self, nb::handle host, nb::handle device) {
             const Integers here(host, "KV-31");
             self.require_transfer(here, Integers(device, "KV-31"));
             return here.span().size();
           },
           nb::arg("host").none(), nb::arg("device").none(),
           "Refuse slots that do not fit each other (KV-31); how many there are.")
      .def("require_page", &HostSlots::require_page, nb::arg("slot"),
           "Refuse where no held page begins (KV-33).")
      .def("free_slots", &HostSlots::free_slots, "The next to be handed out first. O(size).")
      .def("held_slots", &HostSlots::held_slots, "Ascending. O(size).");
  m.def("copy_rows", &copy_between, nb::arg("to"), nb::arg("to_slots"), nb::arg("from_"),
        nb::arg("from_slots"),
        "Rows of one tensor into another that does not share memory (KV-29, KV-30).");
}

}  // namespace

void bind_kv_storage(nb::module_& m) {
  bind_storage(m);
  bind_host(m);
}
