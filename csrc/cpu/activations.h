// Activations in the form that a kernel reads them, see Product in gemm.h.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "cpu/gemm.h"
#include "layout.h"

namespace matquant::cpu {
namespace {

constexpr int64_t kPackingRows = 16;  // the fewest that are worth a thread

// As Product::activations asks for.
template <class T>
void pack_activations(const T* source, int64_t rows, int64_t columns, float* packed) {
    torch::stable::parallel_for(0, rows, kPackingRows, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            for (int64_t first = 0; first < columns; first += kBlockColumns) {
                const int64_t count = std::min(kBlockColumns, columns - first);
                float* target = packed + first * rows + row * kBlockColumns;
                std::copy_n(source + row * columns + first, count, target);
                std::fill(target + count, target + ceil_div(count, kTileColumns) * kTileColumns, 0.0f);
            }
        }
    });
}

// As Product::bfloat16_activations and Product::activation_sums ask for; rows past `rows` are zero.
void pack_bfloat16(const c10::BFloat16* source, int64_t rows, const Product& product, uint16_t* packed, float* sums) {
    torch::stable::parallel_for(0, product.rows, kPackingRows, [&](int64_t first_row, int64_t last_row) {
        for (int64_t row = first_row; row < last_row; ++row) {
            int64_t segment = 0;
            for (int64_t begin = 0; begin < product.columns; ++segment) {
                const int64_t end = segment_end(product, begin);
                const int64_t in_block = begin % kBlockColumns;
                uint16_t* target = packed + (begin - in_block) * product.rows + row * kBlockColumns + in_block;
                float sum = 0.0f;
                for (int64_t column = begin; column < end; ++column) {
                    const c10::BFloat16 value = row < rows ? source[row * product.columns + column] : c10::BFloat16(0);
                    *target++ = value.x;
                    sum += static_cast<float>(value);
                }
                std::fill_n(target, ceil_div(end - begin, kRegisterColumns) * kRegisterColumns - (end - begin),
                            uint16_t{0});
                sums[segment * product.rows + row] = sum;
                begin = end;
            }
        }
    });
}

// Scratch memory for the activations of one block of rows.
class PackedActivations {
  public:
    // At most `rows` rows; `bfloat16` for kernels that take it.
    PackedActivations(int64_t rows, int64_t columns, bool bfloat16) : bfloat16_(bfloat16) {
        const int64_t size = padded_rows(rows) * ceil_div(columns, kBlockColumns) * kBlockColumns;
        if (bfloat16) {
            halves_.reset(new uint16_t[size]);
            // A segment has at least the columns of a register, but for the last.
            sums_.reset(new float[padded_rows(rows) * ceil_div(columns, kRegisterColumns)]);
        } else {
            floats_.reset(new float[size]);
        }
    }

    template <class T>
    void pack(const T* source, int64_t rows, Product& product) {
        product.rows = padded_rows(rows);
        product.activations = floats_.get();
        product.bfloat16_activations = halves_.get();
        product.activation_sums = sums_.get();
        if constexpr (std::is_same_v<T, c10::BFloat16>) {
            if (bfloat16_) {
                return pack_bfloat16(source, rows, product, halves_.get(), sums_.get());
            }
        }
        pack_activations(source, rows, product.columns, floats_.get());
    }

  private:
    // The tile unit takes 16 rows, or all of them where they are fewer.
    int64_t padded_rows(int64_t rows) const { return bfloat16_ && rows > 16 ? ceil_div(rows, 16) * 16 : rows; }

    bool bfloat16_;
    std::unique_ptr<float[]> floats_;
    std::unique_ptr<uint16_t[]> halves_;
    std::unique_ptr<float[]> sums_;
};

}  // namespace
}  // namespace matquant::cpu
