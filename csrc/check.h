// Checks of operator arguments: each message names the argument, what was found and what was expected.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <sstream>
#include <string>
#include <vector>

namespace matquant {

template <class Integers>
std::string to_string(const Integers& values) {
    std::ostringstream text;
    text << '[';
    const char* separator = "";
    for (const auto value : values) {
        text << separator << value;
        separator = ", ";
    }
    text << ']';
    return text.str();
}

inline void check_tensor(const char* name, const torch::stable::Tensor& tensor, torch::headeronly::ScalarType dtype,
                         const std::vector<int64_t>& sizes) {
    const auto found = tensor.sizes();
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": found dtype ",
                    torch::headeronly::toString(tensor.scalar_type()), ", expected ",
                    torch::headeronly::toString(dtype));
    STD_TORCH_CHECK(std::vector<int64_t>(found.begin(), found.end()) == sizes, name, ": found shape ", to_string(found),
                    ", expected ", to_string(sizes));
    STD_TORCH_CHECK(tensor.is_contiguous(), name, ": found strides ", to_string(tensor.strides()),
                    ", expected a contiguous tensor");
}

inline void check_output_sizes(const std::vector<int64_t>& output_sizes) {
    STD_TORCH_CHECK(!output_sizes.empty(), "output_sizes: found none, expected at least one");
    for (const int64_t size : output_sizes) {
        STD_TORCH_CHECK(size > 0, "output_sizes: found ", to_string(output_sizes), ", expected positive sizes");
    }
}

}  // namespace matquant
