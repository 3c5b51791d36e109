// matquant::cuda_linear: the product that a GPU computes, its kernels started by a function of the caller's.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "cuda/launcher.h"

namespace matquant::cuda {
namespace {

using torch::stable::Tensor;

// What the function is told of a kernel to start; vllm_matquant/kernels/cuda_launch.py has the same fields.
struct Launch {
    const char* kernel;
    int32_t grid[3];
    int32_t threads;  // of a block
    int32_t shared_bytes;
    int32_t pointers;
    const Memory* memory;  // that the pointers point to
    const void* shape;     // the kernel's last argument, passed by value
    int64_t shape_bytes;
};

using Function = int (*)(const Launch*);  // gives 0 if the kernel was started

class Callback : public Launcher {
  public:
    Callback(Function function, int processors) : function_(function), processors_(processors) {}
    int processors() const override { return processors_; }
    void launch(const Plan& plan, std::span<const Memory> pointers) const override {
        const Launch launch = {instances()[plan.instance].name,
                               {plan.grid[0], plan.grid[1], plan.grid[2]},
                               kThreads,
                               plan.shared_bytes,
                               static_cast<int32_t>(pointers.size()),
                               pointers.data(),
                               &plan.shape,
                               sizeof(Shape)};
        STD_TORCH_CHECK(function_(&launch) == 0, "launcher: it did not start ", launch.kernel);
    }

  private:
    Function function_;
    int processors_;
};

Tensor linear(const Tensor& x, const Tensor& handles, const std::optional<Tensor>& slots, int64_t out_features,
              const std::optional<Tensor>& bias, int64_t function, int64_t processors,
              const std::optional<int64_t>& splits) {
    const Readers readers = slots ? find_readers(handles) : Readers{find_weight(handles), 1};
    STD_TORCH_CHECK(function != 0, "launcher: found the address 0, expected a function's");
    STD_TORCH_CHECK(0 < processors && processors < 1 << 20, "processors: found ", processors, ", expected at least 1");
    const Callback launcher(reinterpret_cast<Function>(function), static_cast<int>(processors));
    const std::optional<Rows> rows = slots ? std::optional<Rows>({*slots, readers.count}) : std::nullopt;
    return multiply(launcher, *readers.first, x, out_features, bias, rows, splits);
}

std::tuple<std::vector<std::string>, std::vector<std::string>> instances_operator() {
    std::vector<std::string> names, definitions;
    for (const Instance& instance : instances()) {
        names.push_back(instance.name);
        definitions.push_back(instance.definition);
    }
    return {names, definitions};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(matquant, CompositeExplicitAutograd, m) {
    m.impl("cuda_linear", TORCH_BOX(&linear));
    m.impl("cuda_instances", TORCH_BOX(&instances_operator));
}

}  // namespace matquant::cuda
