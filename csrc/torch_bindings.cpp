// The operators' schemas and nothing else; each backend registers its own implementations. What an operator means is
// said in vllm_matquant/kernels/ops.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(matquant, m) {
    m.def("new_weight(int columns, int group_size, str decoder_kind, str layout, int? activation_bits) -> int");
    m.def(
        "add_segment(int weight, Tensor planes, Tensor decoders, Tensor active_width, int[] decoder_widths, "
        "int[] output_sizes) -> ()");
    m.def("free_weight(int weight) -> ()");
    m.def("linear(Tensor x, Tensor weight, int out_features, Tensor? bias) -> Tensor");
    m.def("linear_by_row(Tensor x, Tensor weights, Tensor slots, int out_features, Tensor? bias) -> Tensor");
    m.def("grouped_linear(Tensor x, Tensor weights, Tensor groups, Tensor? slots, int out_features) -> Tensor");
    m.def("embedding(Tensor rows, Tensor weight, int columns, ScalarType dtype) -> Tensor");
    m.def("embedding_by_row(Tensor rows, Tensor weights, Tensor slots, int columns, ScalarType dtype) -> Tensor");
    m.def(
        "cuda_linear(Tensor x, Tensor weights, Tensor? slots, int out_features, Tensor? bias, int launcher, "
        "int processors, int? splits) -> Tensor");
    m.def("cuda_instances() -> (str[] names, str[] definitions)");
    m.def("repack_codes(Tensor base, Tensor[] planes, int[] output_sizes, str layout, Tensor(a!) out) -> ()");
    m.def(
        "solve_columns(Tensor copies, Tensor scales, Tensor offsets, Tensor group_of_column, Tensor coupling, "
        "Tensor? current, int fixed_bits, Tensor slices, Tensor lambdas, bool mean_error, int begin, int end) -> "
        "(Tensor, Tensor)");
    m.def(
        "solve_fours(Tensor copies, Tensor scales, Tensor group_of_column, Tensor factors, Tensor coupling, "
        "Tensor? current, Tensor books, int[] widths, Tensor lambdas, int begin, int end) -> (Tensor, Tensor)");
    m.def("codebook_levels(Tensor codes, Tensor planes) -> Tensor");
    m.def("codebook_sums(Tensor codes, Tensor weights, int width) -> Tensor");
    m.def("read_memory(Tensor data) -> int");
    m.def("cpu_isa() -> str");
    m.def("cpu_isas() -> str[]");
}
