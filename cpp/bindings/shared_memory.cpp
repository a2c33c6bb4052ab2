// Shared memory: a handle, and the tensors that keep its mapping alive.
#include "kvspec/shared_memory.hpp"

#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include "convert.hpp"
#include "kvspec/contract.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// Tensors have a share in the segment, so that none outlives the mapping.
struct Segment {
  std::shared_ptr<kvspec::SharedSegment> shared;

  explicit Segment(kvspec::SharedSegment segment)
      : shared(std::make_shared<kvspec::SharedSegment>(std::move(segment))) {}

  long tensor_count() const noexcept { return shared.use_count() - 1; }

  kvspec::SharedSegment& open(const char* call) const {
    if (shared->closed()) {
      kvspec::refuse("SHM-10", std::string(call) + " of " + shared->name() + ", which is closed");
    }
    return *shared;
  }
};

nb::object interface(const char* name) {
  return nb::module_::import_("kvspec.interfaces.shared_memory").attr(name);
}

nb::object tensor(const Segment& self) {
  const kvspec::SharedSegment& segment = self.open("tensor");
  using Share = std::shared_ptr<kvspec::SharedSegment>;
  auto share = std::make_unique<Share>(self.shared);
  const nb::capsule owner(share.get(), [](void* kept) noexcept {
    delete static_cast<Share*>(kept);
  });
  share.release();
  using Memory = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::device::cpu>;
  const Memory memory(segment.data(), {segment.span().size()}, owner);
  return kvspec::bindings::Torch::get().from_capsule(nb::cast(memory));
}

void close(Segment& self) {
  if (self.tensor_count() > 0 && !self.shared->closed()) {
    kvspec::refuse("SHM-11", std::to_string(self.tensor_count()) + " tensors over " +
                                 self.shared->name() + " are alive");
  }
  self.shared->close();
}

nb::list reap() {
  nb::list reaped;
  for (const kvspec::Reaped& segment : kvspec::SharedSegment::reap()) {
    reaped.append(interface("Reaped")(segment.name, segment.bytes));
  }
  return reaped;
}

void def_lifetime(nb::class_<Segment>& segment) {
  segment
      .def_static(
          "create",
          [](const std::string& label, std::int64_t nbytes, bool populate) {
            return Segment(kvspec::SharedSegment::create(label, nbytes, populate));
          },
          "label"_a, "nbytes"_a, "populate"_a = false, nb::call_guard<nb::gil_scoped_release>(),
          nb::sig("def create(label: str, nbytes: int, populate: bool = False) -> SharedSegment"),
          "A new segment of exactly `nbytes` zeros under a name that nobody had (SHM-1 to SHM-5).")
      .def_static(
          "attach",
          [](const std::string& name) { return Segment(kvspec::SharedSegment::attach(name)); },
          "name"_a, "Another handle on a segment that somebody holds (SHM-6, SHM-7).")
      .def_static("reap", &reap,
                  nb::sig("def reap() -> list[kvspec.interfaces.shared_memory.Reaped]"),
                  "Remove every segment of ours that no process holds (SHM-13, SHM-14).")
      .def("close", &close, "Give the handle back; the last takes the name (SHM-8, SHM-9).")
      .def("__enter__", [](nb::object self) { return self; },
           nb::sig("def __enter__(self) -> SharedSegment"))
      .def("__exit__", [](Segment& self, nb::handle, nb::handle, nb::handle) { close(self); },
           "kind"_a.none(), "error"_a.none(), "traceback"_a.none(),
           nb::sig("def __exit__(self, kind: object, error: object, traceback: object) -> None"))
      .def("__getstate__", [](const Segment& self) { return self.open("a copy").name(); },
           "What a pickle has of it: its name (SHM-17).")
      .def("__setstate__", [](Segment& self, const std::string& name) {
        new (&self) Segment(kvspec::SharedSegment::attach(name));
      });
}

void def_memory(nb::class_<Segment>& segment) {
  segment
      .def_prop_ro("name", [](const Segment& self) { return self.shared->name(); },
                   "In /dev/shm, without the slash (SHM-1).")
      .def_prop_ro("nbytes", [](const Segment& self) { return self.shared->bytes(); },
                   "Exactly what was asked for (SHM-2).")
      .def_prop_ro(
          "address",
          [](const Segment& self) {
            return reinterpret_cast<std::uintptr_t>(self.open("address").data());
          },
          "Where it is mapped in this process.")
      .def("tensor", &tensor, nb::sig("def tensor(self) -> torch.Tensor"),
           "uint8 [nbytes] over the mapping, without a copy, on the CPU (SHM-12).")
      .def(
          "view",
          [](const Segment& self) {
            const kvspec::SharedSegment& kept = *self.shared;
            const long tensors = kept.closed() ? 0 : self.tensor_count();
            return interface("SharedSegmentView")(kept.closed(), kept.linked(), tensors,
                                                 kept.owned());
          },
          nb::sig("def view(self) -> kvspec.interfaces.shared_memory.SharedSegmentView"),
          "The abstract state.")
      .def("check", [](const Segment& self) { self.shared->check(); },
           "Raise ContractError if the name leads elsewhere, or the size changed (SHM-19).");
}

}  // namespace

void bind_shared_memory(nb::module_& m) {
  nb::class_<Segment> segment(m, "SharedSegment",
                              "A handle on a named segment of shared memory. Spec: SHM.");
  def_lifetime(segment);
  def_memory(segment);
}
