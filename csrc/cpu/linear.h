// Products on the CPU, as the operators over them see them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/prepared_weight.h"

namespace matquant::cpu {

// The product of a weight with some tokens.
struct Task {
    const Weight* weight;
    const PreparedWeight* prepared;
    Product product;  // all but what differs by segment
    int64_t tokens;
};

// A task whose input and output are all rows of `x` and `output`. An error if an argument contradicts the weight.
Task make_task(const Weight& weight, const torch::stable::Tensor& x, const std::optional<torch::stable::Tensor>& bias,
               torch::stable::Tensor& output);

// The result of a product, uninitialized: [..., out_features] of the dtype of `x`.
torch::stable::Tensor empty_output(const torch::stable::Tensor& x, int64_t out_features);

// Tasks whose weights share their planes. They are computed side by side: each thread takes a few rows of all of them
// before the next rows, so that memory is read once, for the first task, and the others find its planes in the cache.
// The first one's division among threads serves all: it should be the one that reads the most.
using Bundle = std::vector<Task>;

// Computes bundles one after the other, without the threads waiting for each other in between.
void multiply(const std::vector<Bundle>& bundles);

}  // namespace matquant::cpu
