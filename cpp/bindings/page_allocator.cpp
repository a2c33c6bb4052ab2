#include "kvspec/page_allocator.hpp"

#include <cstdint>
#include <utility>

#include <nanobind/nanobind.h>

#include "allocator.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using kvspec::bindings::Bound;
using kvspec::bindings::Integers;
using kvspec::bindings::optional_tensor;

void bind_page_allocator(nb::module_& m) {
  using Allocator = Bound<kvspec::PagedTokenToKVPoolAllocator>;
  nb::class_<Allocator> allocator(m, "PagedTokenToKVPoolAllocator", "Whole pages. Spec: PAGE.",
                                  nb::type_slots(Allocator::slots));
  allocator.def(
      "__init__",
      [](Allocator* self, std::int64_t size, std::int64_t page_size, nb::object dtype,
         nb::handle device, nb::object kvcache, bool need_sort) {
        new (self)
            Allocator(std::move(dtype), device, std::move(kvcache), size, page_size, need_sort);
      },
      "size"_a, "page_size"_a, "dtype"_a, "device"_a, "kvcache"_a.none(), "need_sort"_a);
  kvspec::bindings::def_allocator(allocator);
  allocator.def(
      "alloc_extend",
      [](Allocator& self, nb::handle prefix_lens, nb::handle seq_lens, nb::handle last_loc,
         std::int64_t extend_num_tokens) {
        const char* clause = self.kind().argument;
        const Integers prefixes(prefix_lens, clause);
        const Integers lengths(seq_lens, clause);
        return optional_tensor(self.alloc_extend(prefixes, lengths, Integers(last_loc, clause),
                                                 extend_num_tokens));
      },
      "prefix_lens"_a.none(), "seq_lens"_a.none(), "last_loc"_a.none(), "extend_num_tokens"_a,
      nb::sig("def alloc_extend(self, prefix_lens: object, seq_lens: object, last_loc: object,"
              " extend_num_tokens: int) -> torch.Tensor | None"));
  allocator.def(
      "alloc_decode",
      [](Allocator& self, nb::handle seq_lens, nb::handle last_loc) {
        const char* clause = self.kind().argument;
        const Integers lengths(seq_lens, clause);
        return optional_tensor(self.alloc_decode(lengths, Integers(last_loc, clause)));
      },
      "seq_lens"_a.none(), "last_loc"_a.none(),
      nb::sig("def alloc_decode(self, seq_lens: object, last_loc: object)"
              " -> torch.Tensor | None"));
}
