// Rows that are computed with different weights in one call: each row has a slot, and each slot a weight.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "weight.h"

namespace matquant::cpu {

// How many of the first `rows` rows have each slot. An error if one of them has none of those of `weights`.
//   slots    int32 [at least rows]
//   weights  int64 [slots], numbers of weights, or 0 where a slot has none
std::vector<int64_t> count_rows(const torch::stable::Tensor& slots, int64_t rows, const torch::stable::Tensor& weights);

// An error unless two weights are one layer's, read at several widths.
void check_same_planes(const Weight& weight, const Weight& first);

}  // namespace matquant::cpu
