// Tells the emulation how kernels of mixtures of experts are called: those that are not products.
#include "native/experts.cuh"

#include "native/indexed_rows.cuh"

namespace native = w4a16::native;

namespace {

template <class... Parameters>
bool add_kernels(void (*... kernels)(Parameters)) {
  (emulation::add_kernel(kernels), ...);
  return true;
}

const bool kAdded =
    add_kernels(&native::count_routes<native::kRoutingThreads>, &native::route<native::kRoutingThreads>,
                &native::list_token_tiles<native::kRoutingThreads>, &native::list_indexed_rows<native::kRoutingThreads>,
                &native::gather_rows<native::kRowThreads>, &native::activate_rows<native::kRowThreads>,
                &native::combine_rows<native::kRowThreads>);

}  // namespace
