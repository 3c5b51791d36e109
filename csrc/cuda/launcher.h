// What starts kernels, and the product of a layer over it. On a GPU the CUDA runtime starts them (device.cu); a
// function that the caller gives can take its place (callback.cpp), for kernels that are compiled at run time, and for
// tests.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <span>

#include "cuda/plan.h"
#include "weight.h"

namespace matquant::cuda {

// What a pointer among a kernel's arguments points to; null for what there is none of.
struct Memory {
    const void* data;
    int64_t bytes;
};

class Launcher {
  public:
    virtual ~Launcher() = default;
    // Multiprocessors of the device.
    virtual int processors() const = 0;
    // Starts the plan's kernel, whose arguments are the pointers and then the plan's shape.
    virtual void launch(const Plan& plan, std::span<const Memory> pointers) const = 0;
};

// The product of `x` [..., in_features] and a weight at the widths that are active when the kernels run, each of `rows`
// at those of its slot then: nothing waits for the device, so that a captured graph follows a switch. Arguments are
// checked before anything is started. `splits` is for make_plans.
torch::stable::Tensor multiply(const Launcher& launcher, const Weight& weight, const torch::stable::Tensor& x,
                               int64_t out_features, const std::optional<torch::stable::Tensor>& bias,
                               const std::optional<Rows>& rows = std::nullopt,
                               std::optional<int64_t> splits = std::nullopt);

}  // namespace matquant::cuda
