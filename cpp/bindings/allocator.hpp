// What the bindings of all allocators share: attributes, books, tickets, observers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include "convert.hpp"
#include "kvspec/page_books.hpp"
#include "observer.hpp"

namespace kvspec::bindings {

namespace nb = nanobind;

// The attributes set on an instance of a class with nb::dynamic_attr(); null without any.
inline PyObject*& attributes(PyObject* self) {
  const Py_ssize_t offset = Py_TYPE(self)->tp_dictoffset;
  return *reinterpret_cast<PyObject**>(reinterpret_cast<std::byte*>(self) + offset);
}

// An allocator with the Python objects that it was given.  An attribute of an instance stands
// before the method of that name, which is how `instrument` listens.
template <class Core>
struct Bound : Core {
  template <class... Arguments>
  Bound(nb::object dtype_, nb::handle device_, nb::object kvcache_, Arguments... arguments)
      : Core(arguments...),
        dtype(std::move(dtype_)),
        device(nb::str(device_)),
        kvcache(std::move(kvcache_)) {}

  nb::object dtype;
  nb::str device;
  nb::object kvcache;
  nb::object observer = nb::none();

  // kvcache, observer and attributes may refer back to the allocator.
  static int traverse(PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(attributes(self));
    if (!nb::inst_ready(self)) return 0;
    const Bound& bound = *nb::inst_ptr<Bound>(self);
    Py_VISIT(bound.dtype.ptr());
    Py_VISIT(bound.kvcache.ptr());
    Py_VISIT(bound.observer.ptr());
    return 0;
  }
  static int clear(PyObject* self) {
    Py_CLEAR(attributes(self));
    if (!nb::inst_ready(self)) return 0;
    Bound& bound = *nb::inst_ptr<Bound>(self);
    bound.attach(Observer{});
    bound.observer = nb::none();
    bound.kvcache = nb::none();
    return 0;
  }
  static inline PyType_Slot slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(traverse)},
                                       {Py_tp_clear, reinterpret_cast<void*>(clear)},
                                       {0, nullptr}};
};

inline nb::object optional_tensor(std::optional<Slots> slots) {
  return slots ? tensor(std::move(*slots)) : nb::none();
}

// A kvspec.interfaces.slot_allocator.AllocatorView; `more` are its fields of a window pool.
template <class... More>
nb::object python_fields(const AllocatorView& view, const More&... more) {
  const auto tuple = [](const std::vector<PageId>& pages) { return nb::tuple(nb::cast(pages)); };
  const nb::object held = nb::steal(PyFrozenSet_New(nb::cast(view.held).ptr()));
  return nb::module_::import_("kvspec.interfaces.slot_allocator")
      .attr("AllocatorView")(tuple(view.free), tuple(view.release), tuple(view.pending), held,
                             view.group, more...);
}

inline nb::object python_view(const PageBooks& books) { return python_fields(books.view()); }

inline nb::dict python_counters(const AllocatorCounters& counters) {
  nb::dict named;
  named["pages_moved"] = counters.pages_moved;
  named["merges"] = counters.merges;
  named["pages_merged"] = counters.pages_merged;
  return named;
}

// The ticket given, or one that no allocator takes.
inline PageBooks::Ticket ticket_of(nb::handle given) {
  const PageBooks::Ticket* ticket = nullptr;
  return nb::try_cast(given, ticket) && ticket != nullptr ? *ticket : PageBooks::Ticket();
}

// Attributes and methods of BaseTokenToKVPoolAllocator.
template <class Core>
void def_allocator(nb::class_<Bound<Core>>& allocator) {
  using Self = Bound<Core>;
  allocator.def_prop_ro("size", &Self::size)
      .def_prop_ro("page_size", &Self::page_size)
      .def_ro("dtype", &Self::dtype, nb::sig("def dtype(self) -> torch.dtype"))
      .def_ro("device", &Self::device)
      .def_prop_ro("need_sort", &Self::need_sort)
      .def_prop_ro("is_not_in_free_group", [](const Self& self) { return !self.group_open(); })
      .def_prop_ro("free_pages", [](const Self& self) { return tensor_of(self.free_pages()); },
                   nb::sig("def free_pages(self) -> torch.Tensor"))
      .def_prop_ro("release_pages",
                   [](const Self& self) { return tensor_of(self.release_pages()); },
                   nb::sig("def release_pages(self) -> torch.Tensor"))
      .def("available_size", &Self::available_size)
      .def("pending_size", &Self::pending_size)
      .def("alloc", [](Self& self, std::int64_t need_size) {
             return optional_tensor(self.alloc(need_size));
           },
           nb::arg("need_size"), nb::sig("def alloc(self, need_size: int) -> torch.Tensor | None"))
      .def("free_group_begin", &Self::free_group_begin)
      .def("free_group_end", &Self::free_group_end)
      .def("backup_state", &Self::backup_state)
      .def("restore_state", [](Self& self, nb::handle state) {
             self.restore_state(ticket_of(state));
           },
           nb::arg("state").none())
      .def("clear", [](Self& self) { self.Core::clear(); })
      .def("get_kvcache", [](const Self& self) { return self.kvcache; })
      .def("attach", [](Self& self, nb::object observer) {
             attach(self, self.observer, std::move(observer));
           },
           nb::arg("observer").none())
      .def("view", [](const Self& self) { return python_view(self); },
           nb::sig("def view(self) -> kvspec.interfaces.slot_allocator.AllocatorView"))
      .def("digest", &Self::digest)
      .def("check", &Self::check)
      .def("counters", [](const Self& self) { return python_counters(self.counters()); },
           nb::sig("def counters(self) -> dict[str, int]"));
}

// `free` of an allocator of one pool.
template <class Core>
void def_free(nb::class_<Bound<Core>>& allocator) {
  allocator.def(
      "free",
      [](Bound<Core>& self, nb::handle free_index) {
        self.free(Integers(free_index, self.kind().argument));
      },
      nb::arg("free_index").none());
}

// What PagedTokenToKVPoolAllocator adds to them.
template <class Core>
void def_extend(nb::class_<Bound<Core>>& allocator) {
  using Self = Bound<Core>;
  allocator.def(
      "alloc_extend",
      [](Self& self, nb::handle prefix_lens, nb::handle seq_lens, nb::handle last_loc,
         std::int64_t extend_num_tokens) {
        const char* clause = self.kind().argument;
        const Integers prefixes(prefix_lens, clause);
        const Integers lengths(seq_lens, clause);
        return optional_tensor(self.alloc_extend(prefixes, lengths, Integers(last_loc, clause),
                                                 extend_num_tokens));
      },
      nb::arg("prefix_lens").none(), nb::arg("seq_lens").none(), nb::arg("last_loc").none(),
      nb::arg("extend_num_tokens"),
      nb::sig("def alloc_extend(self, prefix_lens: object, seq_lens: object, last_loc: object,"
              " extend_num_tokens: int) -> torch.Tensor | None"));
  allocator.def(
      "alloc_decode",
      [](Self& self, nb::handle seq_lens, nb::handle last_loc) {
        const char* clause = self.kind().argument;
        const Integers lengths(seq_lens, clause);
        return optional_tensor(self.alloc_decode(lengths, Integers(last_loc, clause)));
      },
      nb::arg("seq_lens").none(), nb::arg("last_loc").none(),
      nb::sig("def alloc_decode(self, seq_lens: object, last_loc: object)"
              " -> torch.Tensor | None"));
}

}  // namespace kvspec::bindings
