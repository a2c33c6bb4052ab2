#include "kvspec/observer.hpp"

#include <exception>

#include <nanobind/nanobind.h>

#include "convert.hpp"
#include "observer.hpp"

namespace nb = nanobind;

namespace kvspec::bindings {
namespace {

void call_python(void* context, const Operation& operation) noexcept {
  const nb::handle callable(static_cast<PyObject*>(context));
  try {
    const nb::object type = nb::module_::import_("kvspec.interfaces.observer").attr("Operation");
    const nb::object slots = tensor_of(operation.slots);
    callable(type(operation.room, operation.name, slots, operation.number));
  } catch (nb::python_error& error) {
    error.restore();
    PyErr_WriteUnraisable(callable.ptr());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    PyErr_WriteUnraisable(callable.ptr());
  }
}

}  // namespace

Observer python_observer(nb::handle callable) noexcept {
  return callable.is_none() ? Observer{} : Observer{call_python, callable.ptr()};
}

}  // namespace kvspec::bindings
