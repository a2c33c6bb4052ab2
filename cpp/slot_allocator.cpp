#include "kvspec/slot_allocator.hpp"

namespace kvspec {

TokenToKVPoolAllocator::TokenToKVPoolAllocator(std::int64_t size, bool need_sort)
    : PageBooks(kSlotAllocator, size, /*page_size=*/1, need_sort) {}

}  // namespace kvspec
