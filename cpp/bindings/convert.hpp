// Conversions at the border: host sequences of integers in, torch tensors on the CPU out.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "kvspec/contract.hpp"
#include "kvspec/slots.hpp"

namespace kvspec::bindings {

namespace nb = nanobind;

// torch's exchange functions.  Through `__dlpack__` and `from_dlpack`, which are Python, each
// tensor costs several microseconds more.
struct Torch {
  nb::handle tensor_type;
  nb::handle to_capsule;
  nb::handle from_capsule;

  // Found at the first use, which is when torch is there, and kept for the life of the process.
  static const Torch& get() {
    static const Torch torch{kept("torch", "Tensor"), kept("torch._C", "_to_dlpack"),
                             kept("torch._C", "_from_dlpack")};
    return torch;
  }

 private:
  static nb::handle kept(const char* module, const char* name) {
    return nb::object(nb::module_::import_(module).attr(name)).release();
  }
};

using Array = nb::ndarray<nb::ro>;

// Reads the memory of a tensor, an array or a buffer; false for what has none.
inline bool read_memory(nb::handle given, Array& array) {
  if (!given.type().is(Torch::get().tensor_type)) return nb::try_cast(given, array);
  try {
    return nb::try_cast(Torch::get().to_capsule(given), array);
  } catch (const nb::python_error&) {  // a tensor without plain memory
    return false;
  }
}

// The integers of a list, any other sequence, a buffer or a CPU tensor, in one dimension.  Memory
// of 64-bit integers without gaps is read in place, everything else is copied; a Python integer of
// more than 64 bits becomes the nearest of 64, which no pool has either.
class Integers {
 public:
  // Refuses with `clause` whatever else is given.
  Integers(nb::handle given, const char* clause) {
    if (PyList_Check(given.ptr()) || PyTuple_Check(given.ptr())) {
      copy_sequence(given, clause);
    } else if (Array array; read_memory(given, array)) {
      take_array(array, given, clause);
    } else {
      copy_iterable(given, clause);
    }
  }
  Integers(const Integers&) = delete;
  Integers& operator=(const Integers&) = delete;

  std::span<const std::int64_t> span() const noexcept { return span_; }
  operator std::span<const std::int64_t>() const noexcept { return span_; }

 private:
  static bool is_tensor(nb::handle given) {
    return nb::hasattr(given, "is_floating_point") && nb::hasattr(given, "device");
  }

  [[noreturn]] static void refuse_type(nb::handle given, const char* clause) {
    const auto text = [](nb::handle object) { return std::string(nb::str(object).c_str()); };
    if (is_tensor(given)) {
      const std::string device = text(given.attr("device"));
      if (text(given.attr("device").attr("type")) != "cpu") {
        refuse(clause, "a tensor on " + device + " was given; pass tensor.cpu()");
      }
      const nb::object shape = nb::steal(PySequence_List(nb::object(given.attr("shape")).ptr()));
      refuse(clause, "a tensor of shape " + text(shape) + " and " + text(given.attr("dtype")) +
                         " was given, not integers in one dimension");
    }
    if (nb::hasattr(given, "ndim") && !given.attr("ndim").equal(nb::int_(1))) {
      refuse(clause, text(given.type().attr("__name__")) + " has " + text(given.attr("ndim")) +
                         " dimensions, not 1");
    }
    refuse(clause, text(nb::repr(given)) + " is not a sequence of integers");
  }

  void copy_iterable(nb::handle given, const char* clause) {
    if (is_tensor(given)) refuse_type(given, clause);
    const nb::object sequence = nb::steal(PySequence_List(given.ptr()));
    if (!sequence.is_valid()) {
      PyErr_Clear();
      refuse_type(given, clause);
    }
    copy_sequence(sequence, clause, given);
  }

  void copy_sequence(nb::handle sequence, const char* clause, nb::handle given = {}) {
    const auto count = static_cast<std::size_t>(PySequence_Fast_GET_SIZE(sequence.ptr()));
    copy_.reserve(count);
    // The size is read again each time: __index__ of an element may change a list.
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(sequence.ptr()); ++i) {
      const nb::object number = nb::borrow(PySequence_Fast_GET_ITEM(sequence.ptr(), i));
      const nb::object index = nb::steal(PyNumber_Index(number.ptr()));
      if (!index.is_valid()) {
        PyErr_Clear();
        refuse_type(given.is_valid() ? given : sequence, clause);
      }
      int overflow = 0;
      const long long value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
      using Limits = std::numeric_limits<std::int64_t>;
      copy_.push_back(overflow == 0 ? value : overflow > 0 ? Limits::max() : Limits::min());
    }
    span_ = copy_;
  }

  template <class Signed, class Unsigned>
  void copy_array(const Array& array, bool is_signed) {
    return is_signed ? copy_elements<Signed>(array) : copy_elements<Unsigned>(array);
  }

  template <class Integer>
  void copy_elements(const Array& array) {
    const auto* data = static_cast<const Integer*>(array.data());
    for (std::size_t i = 0; i < array.shape(0); ++i) {
      const Integer value = data[static_cast<std::int64_t>(i) * array.stride(0)];
      const bool fits = std::in_range<std::int64_t>(value);
      copy_.push_back(fits ? static_cast<std::int64_t>(value)
                           : std::numeric_limits<std::int64_t>::max());
    }
    span_ = copy_;
  }

  void take_array(const Array& array, nb::handle given, const char* clause) {
    const nb::dlpack::dtype type = array.dtype();
    const bool is_signed = type.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Int);
    const bool is_unsigned = type.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::UInt);
    if (array.device_type() != nb::device::cpu::value || array.ndim() != 1 || type.lanes != 1 ||
        !(is_signed || is_unsigned)) {
      refuse_type(given, clause);
    }
    if (is_signed && type.bits == 64 && (array.stride(0) == 1 || array.shape(0) < 2)) {
      array_ = array;
      span_ = {static_cast<const std::int64_t*>(array.data()), array.shape(0)};
      return;
    }
    copy_.reserve(array.shape(0));
    switch (type.bits) {
      case 8: return copy_array<std::int8_t, std::uint8_t>(array, is_signed);
      case 16: return copy_array<std::int16_t, std::uint16_t>(array, is_signed);
      case 32: return copy_array<std::int32_t, std::uint32_t>(array, is_signed);
      case 64: return copy_array<std::int64_t, std::uint64_t>(array, is_signed);
      default: refuse_type(given, clause);
    }
  }

  Array array_;  // keeps memory alive that is read in place
  std::vector<std::int64_t> copy_;
  std::span<const std::int64_t> span_;
};

// A tensor in one dimension, on the CPU, that owns the integers given: int64 of Slots, int32 of
// WindowSlots.
template <class Integer>
nb::object tensor(Unzeroed<Integer> integers) {
  const std::size_t count = integers.count();
  std::unique_ptr<Integer[]> kept = integers.release();
  const nb::capsule owner(kept.get(), [](void* data) noexcept {
    delete[] static_cast<Integer*>(data);
  });
  using Memory = nb::ndarray<Integer, nb::ndim<1>, nb::device::cpu>;
  return Torch::get().from_capsule(nb::cast(Memory(kept.release(), {count}, owner)));
}

// The int64 tensor of a copy of any integers.
template <class Integers>
nb::object tensor_of(const Integers& integers) {
  Slots slots(std::size(integers));
  std::copy(std::begin(integers), std::end(integers), slots.span().begin());
  return tensor(std::move(slots));
}

}  // namespace kvspec::bindings
