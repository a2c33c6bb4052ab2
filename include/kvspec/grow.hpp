// Room in a vector before a change, so that the change cannot throw.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace kvspec {

// Room for `extra` more elements, so that adding them cannot throw.  Amortised O(1) each.
template <class Element>
void grow(std::vector<Element>& elements, std::size_t extra) {
  if (elements.capacity() - elements.size() >= extra) return;
  elements.reserve(std::max(elements.size() + extra, elements.capacity() * 2));
}

}  // namespace kvspec
