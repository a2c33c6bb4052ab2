#include "kvspec/swa_allocator.hpp"

#include <cstdint>
#include <utility>

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include "allocator.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvspec::bindings {

using Allocator = Bound<SWATokenToKVPoolAllocator>;

// Found by def_allocator.
static nb::object python_view(const Allocator& allocator) {
  const SWAAllocatorView view = allocator.view();
  return python_fields(view.full, python_fields(view.swa), nb::tuple(nb::cast(view.pairs)));
}

namespace {

// What SWATokenToKVPoolAllocator gives back and moves.
void def_pairs(nb::class_<Allocator>& allocator) {
  allocator
      .def("free", [](Allocator& self, nb::handle free_index, nb::handle swa_index) {
             const char* clause = self.kind().argument;
             const Integers slots(free_index, clause);
             self.free(slots, Integers(swa_index, clause));
           },
           "free_index"_a.none(), "swa_index"_a.none() = nb::tuple())
      .def("free_swa", [](Allocator& self, nb::handle free_index) {
             self.free_swa(Integers(free_index, self.kind().argument));
           },
           "free_index"_a.none())
      .def("move_swa", [](Allocator& self, nb::handle tgt_loc, nb::handle src_loc) {
             const char* clause = self.kind().argument;
             const Integers targets(tgt_loc, clause);
             self.move_swa(targets, Integers(src_loc, clause));
           },
           "tgt_loc"_a.none(), "src_loc"_a.none());
}

void def_reading(nb::class_<Allocator>& allocator) {
  allocator.def_prop_ro("size_full", &Allocator::size_full)
      .def_prop_ro("size_swa", &Allocator::size_swa)
      .def("full_available_size", &Allocator::full_available_size)
      .def("swa_available_size", &Allocator::swa_available_size)
      .def("swa_pending_size", &Allocator::swa_pending_size)
      .def("translate_loc_from_full_to_swa",
           [](const Allocator& self, nb::handle kv_indices) {
             const Integers slots(kv_indices, self.kind().argument);
             return tensor(self.translate_loc_from_full_to_swa(slots));
           },
           "kv_indices"_a.none(),
           nb::sig("def translate_loc_from_full_to_swa(self, kv_indices: object) -> torch.Tensor"))
      .def_prop_ro("full_to_swa_index_mapping",
                   [](const Allocator& self) { return tensor(self.full_to_swa_index_mapping()); },
                   nb::sig("def full_to_swa_index_mapping(self) -> torch.Tensor"));
}

}  // namespace
}  // namespace kvspec::bindings

void bind_swa_allocator(nb::module_& m) {
  using kvspec::bindings::Allocator;
  nb::class_<Allocator> allocator(m, "SWATokenToKVPoolAllocator",
                                  "Slots of a full pool, each page with its pair in a window pool."
                                  " Spec: SWA.",
                                  nb::type_slots(Allocator::slots), nb::dynamic_attr());
  allocator.def(
      "__init__",
      [](Allocator* self, std::int64_t size, std::int64_t size_swa, nb::object dtype,
         nb::handle device, nb::object kvcache, bool need_sort, std::int64_t page_size) {
        new (self) Allocator(std::move(dtype), device, std::move(kvcache), size, size_swa,
                             page_size, need_sort);
      },
      "size"_a, "size_swa"_a, "dtype"_a, "device"_a, "kvcache"_a.none(), "need_sort"_a,
      "page_size"_a = 1);
  kvspec::bindings::def_allocator(allocator);
  kvspec::bindings::def_extend(allocator);
  kvspec::bindings::def_pairs(allocator);
  kvspec::bindings::def_reading(allocator);
}
