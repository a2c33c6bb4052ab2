#include "kvspec/page_allocator.hpp"

#include <cstdint>
#include <utility>

#include <nanobind/nanobind.h>

#include "allocator.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using kvspec::bindings::Bound;

void bind_page_allocator(nb::module_& m) {
  using Allocator = Bound<kvspec::PagedTokenToKVPoolAllocator>;
  nb::class_<Allocator> allocator(m, "PagedTokenToKVPoolAllocator", "Whole pages. Spec: PAGE.",
                                  nb::type_slots(Allocator::slots), nb::dynamic_attr());
  allocator.def(
      "__init__",
      [](Allocator* self, std::int64_t size, std::int64_t page_size, nb::object dtype,
         nb::handle device, nb::object kvcache, bool need_sort) {
        new (self)
            Allocator(std::move(dtype), device, std::move(kvcache), size, page_size, need_sort);
      },
      "size"_a, "page_size"_a, "dtype"_a, "device"_a, "kvcache"_a.none(), "need_sort"_a);
  kvspec::bindings::def_allocator(allocator);
  kvspec::bindings::def_free(allocator);
  kvspec::bindings::def_extend(allocator);
}
