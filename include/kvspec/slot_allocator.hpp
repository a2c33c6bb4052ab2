// Slot allocator: a queue of single slots.  Spec: SLOT.
//
// Page books with pages of one slot.  What is given back goes last, in the order given (SLOT-6).
#pragma once

#include <cstdint>

#include "kvspec/page_books.hpp"

namespace kvspec {

inline constexpr AllocatorKind kSlotAllocator{
    .room = "slot_allocator",
    .unit = "slot",
    .size_name = "size",
    .freed = "slots were freed",
    .books = "SLOT-1",
    .sink = "SLOT-1",
    .amount = "SLOT-4",
    .given_back = "SLOT-5",
    .group = "SLOT-8",
    .ticket = "SLOT-10",
    .argument = "SLOT-11",
    .requests = "",
    .pages = false,
};

class TokenToKVPoolAllocator : public PageBooks {
 public:
  // Owns the slots 1 .. size.  REQUIRES: 0 <= size < 2^31 - 1 (SLOT-11).  O(size).
  TokenToKVPoolAllocator(std::int64_t size, bool need_sort);
};

}  // namespace kvspec
