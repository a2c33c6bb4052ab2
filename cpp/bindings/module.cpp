// kvspec._core: one bind_<room> per room, and the border that exceptions cross.
#include <nanobind/nanobind.h>

#include "kvspec/contract.hpp"

namespace nb = nanobind;

void bind_host_memory(nb::module_& m);
void bind_kv_storage(nb::module_& m);
void bind_ownership_ledger(nb::module_& m);
void bind_page_allocator(nb::module_& m);
void bind_radix_cache(nb::module_& m);
void bind_request_pool(nb::module_& m);
void bind_shared_memory(nb::module_& m);
void bind_shm_channel(nb::module_& m);
void bind_slot_allocator(nb::module_& m);
void bind_swa_allocator(nb::module_& m);

namespace {

// Sets the exception of kvspec.errors, which is imported at the first throw: stub generation loads
// this module outside the package.
void raise(const char* type, const std::exception& error) {
  const nb::object raised = nb::module_::import_("kvspec.errors").attr(type);
  PyErr_SetString(raised.ptr(), error.what());
}

}  // namespace

NB_MODULE(_core, m) {
  // Tensors keep the arenas that they lie in, and a process may end with tensors.
  nb::set_leak_warnings(false);

  nb::register_exception_translator([](const std::exception_ptr& raised, void*) {
    try {
      std::rethrow_exception(raised);
    } catch (const kvspec::ContractError& error) {
      raise("ContractError", error);
    } catch (const kvspec::HostMemoryError& error) {
      raise("HostMemoryError", error);
    } catch (const kvspec::PeerDiedError& error) {
      raise("PeerDiedError", error);
    }
  });

  m.attr("__version__") = KVSPEC_VERSION;
  m.def("cuda_at_build", [] { return static_cast<bool>(KVSPEC_HAS_CUDA); });
  bind_slot_allocator(m);
  bind_page_allocator(m);
  bind_swa_allocator(m);
  bind_request_pool(m);
  bind_host_memory(m);
  bind_kv_storage(m);
  bind_shared_memory(m);
  bind_shm_channel(m);
  bind_radix_cache(m);
  bind_ownership_ledger(m);
}
