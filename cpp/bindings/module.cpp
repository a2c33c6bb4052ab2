// kvspec._core: one bind_<room> per room, and the border that ContractError crosses.
#include <nanobind/nanobind.h>

#include "kvspec/contract.hpp"

namespace nb = nanobind;

void bind_ownership_ledger(nb::module_& m);
void bind_page_allocator(nb::module_& m);
void bind_radix_cache(nb::module_& m);
void bind_request_pool(nb::module_& m);
void bind_slot_allocator(nb::module_& m);
void bind_swa_allocator(nb::module_& m);

NB_MODULE(_core, m) {
  // Imported at the first throw: stub generation loads this module outside the package.
  nb::register_exception_translator([](const std::exception_ptr& raised, void*) {
    try {
      std::rethrow_exception(raised);
    } catch (const kvspec::ContractError& error) {
      const nb::object type = nb::module_::import_("kvspec.errors").attr("ContractError");
      PyErr_SetString(type.ptr(), error.what());
    }
  });

  m.attr("__version__") = KVSPEC_VERSION;
  m.def("cuda_at_build", [] { return static_cast<bool>(KVSPEC_HAS_CUDA); });
  bind_slot_allocator(m);
  bind_page_allocator(m);
  bind_swa_allocator(m);
  bind_request_pool(m);
  bind_radix_cache(m);
  bind_ownership_ledger(m);
}
