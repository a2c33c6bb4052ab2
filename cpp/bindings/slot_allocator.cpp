#include "kvspec/slot_allocator.hpp"

#include <cstdint>
#include <utility>

#include <nanobind/nanobind.h>

#include "allocator.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using kvspec::bindings::Bound;

void bind_slot_allocator(nb::module_& m) {
  using Allocator = Bound<kvspec::TokenToKVPoolAllocator>;
  nb::class_<kvspec::PageBooks::Ticket>(m, "Ticket", "Worth one restore_state.");
  nb::class_<Allocator> allocator(m, "TokenToKVPoolAllocator", "A queue of slots. Spec: SLOT.",
                                  nb::type_slots(Allocator::slots), nb::dynamic_attr());
  allocator.def(
      "__init__",
      [](Allocator* self, std::int64_t size, nb::object dtype, nb::handle device,
         nb::object kvcache, bool need_sort) {
        new (self) Allocator(std::move(dtype), device, std::move(kvcache), size, need_sort);
      },
      "size"_a, "dtype"_a, "device"_a, "kvcache"_a.none(), "need_sort"_a);
  kvspec::bindings::def_allocator(allocator);
  kvspec::bindings::def_free(allocator);
}
