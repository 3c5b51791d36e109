// A warp's products of its steps with the tokens.
//
// Within a group, with the weight scale * c + offset, the magic value m of dequantize.cuh and A = m + c,
//     sum_k x_k (scale c_k + offset)  =  scale (sum_k x_k A_k - sum_k x_k m_k) + offset sum_k x_k.
// The two sums without codes are one product with constants, its upper rows -m and its lower rows 1. With int8's
// scale * (c - middle) + centre they are -(m + middle) and 1. Its scales and centres are multiples of the rows' steps.
// Where there are registers for two sums of each result, they are summed as such, and multiplied by the steps at the
// end.
#pragma once

#include "cuda/dequantize.cuh"
#include "cuda/stage.cuh"

namespace matquant::cuda {

// -m of the columns 2 q and 2 q + 1 of a lane, as the two values of a word.
template <class Element, int width>
__host__ __device__ constexpr uint32_t magic_of(int q) {
    using Codes = Parts<Element, width>;
    constexpr uint32_t kSign = 0x8000;
    uint32_t magic = kSign | power_of_two<Element>(Codes::Upper::exponent_of(q));
    if (Codes::kLowerBits > 0) {
        // Two parts' powers of two are no further apart than the mantissa reaches.
        const int places = Codes::Upper::exponent_of(q) - Codes::Lower::exponent_of(q);
        magic |= 1u << (Element::kMantissaBits - places);
    }
    return magic * 0x10001u;
}
template <class Element>
constexpr uint32_t kOnes = power_of_two<Element>(0) * 0x10001u;

// The sums of -m x (upper rows) and of x (lower rows), for `count` products; their columns are those of the tile's
// products first, first + 1, ...
template <class Element, int width, int count>
__device__ Sums multiply_constants(const B* input, int first) {
    Sums sums = {};
#pragma unroll
    for (int product = 0; product < count; ++product) {
        const int q = 2 * ((first + product) % 4);
        const A constants = {
            {magic_of<Element, width>(q), kOnes<Element>, magic_of<Element, width>(q + 1), kOnes<Element>}};
        sums = Element::multiply(constants, input[product], sums);
    }
    return sums;
}

// The same with half as many products: tokens are the rows, with the first words of two products' columns in the upper
// and with the second ones in the lower eight, and constants are the columns. Of a token's sums a lane has one, which
// others need.
template <class Element, int width>
class ConstantColumns {
  public:
    __device__ explicit ConstantColumns(int lane) : source_(lane % 4 * 8) {
        const int column = lane / 4;
        const bool ones = column % 4 >= 2;  // or -m: even columns those of the first words, odd ones of the second
#pragma unroll
        for (int q = 0; q < 8; q += 2) {
            const uint32_t first = magic_of<Element, width>(q), second = magic_of<Element, width>(q + 1);
            words_[q / 2] = ones ? kOnes<Element> : column % 2 == 0 ? first : second;
        }
    }

    template <int count>
    __device__ Sums multiply(const B* input, int first) const {
        Sums sums = {};
#pragma unroll
        for (int product = 0; product < count; product += 2) {
            const B &one = input[product], &next = input[product + 1];
            const A tokens = {{one.word[0], one.word[1], next.word[0], next.word[1]}};
            const int index = (first + product) % 4;
            sums = Element::multiply(tokens, {{words_[index], words_[index + 1]}}, sums);
        }
        const float sum = sums.value[0] + sums.value[3];
        // Of the tokens 2 t and 2 t + 1.
        Sums exchanged;
#pragma unroll
        for (int index = 0; index < 4; ++index) {
            exchanged.value[index] = __shfl_sync(0xffffffff, sum, source_ + index % 2 * 4 + index / 2);
        }
        return exchanged;
    }

  private:
    int source_;
    uint32_t words_[4];
};

// A warp's sums over its steps, those of each token tile: [row tiles, 16 x 8].
template <class Element, DecoderKind kind, int width, int token_tiles, int groups>
__device__ void multiply_steps(const Arguments<Element>& arguments, const Shape& shape, const Share& share,
                               uint8_t* memory, Sums (&results)[token_tiles][kRowTiles]) {
    using Codes = Parts<Element, width>;
    constexpr DecoderForm kForm = form_of(kind, width);
    constexpr bool kHasSteps = kForm == DecoderForm::kInt8;
    constexpr bool kScarce = kHasSteps && groups == 4;  // registers are
    constexpr bool kStepsAtEnd = kHasSteps && token_tiles <= 2 && !kScarce;
    constexpr int kStageCount = stages(width);
    constexpr int kBytes = stage_bytes(kind, width, groups);
    // Sums are scaled once for a step where that is one group and there are registers for two tiles.
    constexpr int kTilesAtOnce = groups == 1 && width <= 4 && token_tiles <= 2 ? 2 : 1;
    // With more tokens the tensor cores have less time to spare than instructions do.
    constexpr bool kTokensAsRows = token_tiles > 1;
    // Tiles whose activations are in registers at once.
    constexpr int kInputTiles = token_tiles <= 2 && !kScarce ? kStepTiles : 1;
    constexpr int kParts = larger(groups / kStepTiles, 1);  // of what is taken at once, each with a decoder
    constexpr int kProducts = 4 * kTilesAtOnce / kParts;    // of a part

    // In registers, where there are enough: what is computed anew for each step takes from the integer pipe, of which
    // there is least.
    int lane = threadIdx.x % kLanes, decoders_of_lane = lane / 4 * (group_bytes(kForm) / 8);
    if (!kScarce) {
        asm("" : "+r"(lane), "+r"(decoders_of_lane));
    }
    Copier<Element, kForm, width, groups> copier(arguments, shape, share, lane);
#pragma unroll
    for (int index = 0; index < kStageCount - 1; ++index) {
        copier.copy_next(memory + index * kBytes);
    }
    const uint8_t* row_decoders =
        arguments.decoders + share.first_decoders + static_cast<size_t>(share.tile_row) * row_bytes<kForm>(shape);
    const ConstantColumns<Element, width> columns(lane);
    Sums centres[token_tiles][kRowTiles] = {};
    Input<Element, token_tiles> input_of_steps(arguments, shape, share, lane);
    int current = 0, free = (kStageCount - 1) * kBytes;
    for (int step = share.begin; step < share.end; ++step) {
        B input[token_tiles][4 * kInputTiles];
        if (kInputTiles == kStepTiles) {
            input_of_steps.template load<kInputTiles>(0, input);
        }
        wait_for_copies<kStageCount - 2>();
        __syncwarp();  // all lanes' copies have come, and all lanes are done with the stage that is copied to next
        copier.copy_next(memory + free);
        const Stage<kForm, width> stage(memory + current, lane, decoders_of_lane);
        free = current;
        current = current == (kStageCount - 1) * kBytes ? 0 : current + kBytes;

#pragma unroll(kScarce ? 1 : kStepTiles)
        for (int first = 0; first < kStepTiles; first += kTilesAtOnce) {
            if (kInputTiles == 1) {
                input_of_steps.template load<kInputTiles>(first, input);
            }
            Sums constants[token_tiles][kParts];
            TileWords tiles[kTilesAtOnce] = {};
#pragma unroll
            for (int tile = 0; tile < kTilesAtOnce; ++tile) {
                stage.load_base(first + tile, tiles[tile].base);
#pragma unroll
                for (int plane = kBaseBits; plane < width; ++plane) {
                    stage.load_plane(first + tile, plane, tiles[tile].planes[plane]);
                }
            }
#pragma unroll
            for (int token_tile = 0; token_tile < token_tiles; ++token_tile) {
#pragma unroll
                for (int part = 0; part < kParts; ++part) {
                    const B* tokens = &input[token_tile][4 * (first % kInputTiles) + part * kProducts];
                    Sums& constant = constants[token_tile][part];
                    if constexpr (kTokensAsRows) {
                        constant = columns.template multiply<kProducts>(tokens, part * kProducts);
                    } else {
                        constant = multiply_constants<Element, width, kProducts>(tokens, part * kProducts);
                    }
                    if constexpr (kHasSteps) {
                        float (&sums)[4] = constant.value;
                        sums[0] = fmaf(-kMiddle<width>, sums[2], sums[0]);
                        sums[1] = fmaf(-kMiddle<width>, sums[3], sums[1]);
                    }
                }
            }
            GroupDecoders<kForm> decoders[kParts];
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                stage.load_decoders(groups == 1 ? 0 : first * kParts + part, decoders[part]);
            }

#pragma unroll
            for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
                Sums sums[token_tiles][kParts];
#pragma unroll
                for (int token_tile = 0; token_tile < token_tiles; ++token_tile) {
#pragma unroll
                    for (int part = 0; part < kParts; ++part) {
                        const Sums& constant = constants[token_tile][part];
                        sums[token_tile][part] = {
                            {constant.value[0], constant.value[1], constant.value[0], constant.value[1]}};
                    }
                }
#pragma unroll
                for (int tile = 0; tile < kTilesAtOnce; ++tile) {
                    uint32_t words[2][8];
                    const auto multiply = [&] {
#pragma unroll
                        for (int product = 0; product < 4; ++product) {
                            const int q = 2 * product;
                            const A weights = {{words[0][q], words[1][q], words[0][q + 1], words[1][q + 1]}};
#pragma unroll
                            for (int token_tile = 0; token_tile < token_tiles; ++token_tile) {
                                const B& tokens = input[token_tile][4 * (first % kInputTiles + tile) + product];
                                Sums& sum = sums[token_tile][(4 * tile + product) / kProducts];
                                sum = Element::multiply(weights, tokens, sum);
                            }
                        }
                    };
                    Codes::Upper::unpack(tiles[tile], row_tile, words);
                    multiply();
                    if constexpr (Codes::kLowerBits > 0) {
                        Codes::Lower::unpack(tiles[tile], row_tile, words);
                        multiply();
                    }
                }
#pragma unroll
                for (int part = 0; part < kParts; ++part) {
                    float2 scale = decoders[part].scale(row_tile);
                    float2 addend = decoders[part].addend(row_tile);
                    if constexpr (kHasSteps && !kStepsAtEnd) {
                        const RowSteps steps(row_decoders, lane / 4, row_tile);
                        scale = matquant::cuda::multiply(scale, steps.scale);
                        addend = matquant::cuda::multiply(addend, steps.centre);
                    }
#pragma unroll
                    for (int token_tile = 0; token_tile < token_tiles; ++token_tile) {
                        const Sums& constant = constants[token_tile][part];
#pragma unroll
                        for (int index = 0; index < 4; ++index) {
                            float& result = results[token_tile][row_tile].value[index];
                            result += (index < 2 ? scale.x : scale.y) * sums[token_tile][part].value[index];
                            float& added = kStepsAtEnd ? centres[token_tile][row_tile].value[index] : result;
                            added += (index < 2 ? addend.x : addend.y) * constant.value[2 + index % 2];
                        }
                    }
                }
            }
        }
        input_of_steps.advance();
    }
    if constexpr (kStepsAtEnd) {
#pragma unroll
        for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
            const auto [scale, centre] = RowSteps(row_decoders, lane / 4, row_tile);
#pragma unroll
            for (int token_tile = 0; token_tile < token_tiles; ++token_tile) {
#pragma unroll
                for (int index = 0; index < 4; ++index) {
                    float& result = results[token_tile][row_tile].value[index];
                    const float added = (index < 2 ? centre.x : centre.y) * centres[token_tile][row_tile].value[index];
                    result = fmaf(index < 2 ? scale.x : scale.y, result, added);
                }
            }
        }
    }
}

}  // namespace matquant::cuda
