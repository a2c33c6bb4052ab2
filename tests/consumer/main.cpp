// A whole program over the installed package: take pages, give them back twice, be refused.
#include <iostream>

#include "kvspec/contract.hpp"
#include "kvspec/page_allocator.hpp"

int main() {
  kvspec::PagedTokenToKVPoolAllocator pages(/*size=*/64, /*page_size=*/16, /*need_sort=*/false);
  const auto slots = pages.alloc(32);
  if (!slots || pages.available_size() != 32) return 1;
  pages.free(slots->span());
  try {
    pages.free(slots->span());
  } catch (const kvspec::ContractError& error) {
    std::cout << error.what() << '\n';
    return 0;
  }
  return 1;
}
