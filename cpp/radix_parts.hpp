// Small parts that several sources of the radix tree make their changes of.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "kvspec/grow.hpp"
#include "kvspec/radix_node.hpp"

namespace kvspec {

// The pages and tokens of a run in one allocation.  O(tokens).
inline RadixBuffer make_run(std::span<const PageId> pages, std::span<const Token> tokens) {
  RadixBuffer run{
      std::make_unique_for_overwrite<std::int32_t[]>(pages.size() + tokens.size()),
      static_cast<std::uint32_t>(pages.size())};
  std::copy(pages.begin(), pages.end(), run.data.get());
  std::copy(tokens.begin(), tokens.end(), run.data.get() + pages.size());
  return run;
}

// Adds [start, stop) to ascending intervals, unless it is empty.
inline void append(std::vector<Interval>& intervals, std::int64_t start, std::int64_t stop) {
  if (start == stop) return;
  if (!intervals.empty() && intervals.back().stop == start) {
    intervals.back().stop = stop;
  } else {
    intervals.push_back({start, stop});
  }
}

// The name of a namespace, ready to be put in the map without an allocation.
inline RadixSpaces::node_type make_name(std::string_view space) {
  RadixSpaces fresh;
  return fresh.extract(fresh.emplace(space, kNone).first);
}

}  // namespace kvspec
