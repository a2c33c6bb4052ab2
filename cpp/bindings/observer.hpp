// Python callables as observers of rooms.
#pragma once

#include <utility>

#include <nanobind/nanobind.h>

#include "kvspec/observer.hpp"

namespace kvspec::bindings {

namespace nb = nanobind;

// The observer that calls `callable` with a kvspec.interfaces.observer.Operation; none for None.
// What it raises goes to sys.unraisablehook (OBS-2).  REQUIRES: `callable` outlives it.
Observer python_observer(nb::handle callable) noexcept;

// Attaches `callable` to a room, and keeps it alive in `kept`.
template <class Room>
void attach(Room& room, nb::object& kept, nb::object callable) {
  room.attach(python_observer(callable));
  kept = std::move(callable);
}

}  // namespace kvspec::bindings
