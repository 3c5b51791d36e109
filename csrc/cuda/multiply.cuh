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

// The sums of -m x (upper rows) and of x (lower rows), for `count` products; their columns are those of the tile's
// products first, first + 1, ...
template <class Element, int width, int count>
__device__ Sums multiply_constants(const B* input, int first) {
    constexpr int kUpperBits = width < 4 ? width : 4, kLowerBits = width - kUpperBits;
    using Upper = Part<Element, kUpperBits, kLowerBits>;
    using Lower = Part<Element, larger(kLowerBits, 1), 0>;
    Sums sums = {};
#pragma unroll
    for (int product = 0; product < count; ++product) {
        A constants;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int q = 2 * ((first + product) % 4) + half;
            // The upper part's power of two is 2^4 times the lower part's, so their sum has a short mantissa.
            uint32_t magic = power_of_two<Element>(Upper::exponent_of(q));
            if (kLowerBits > 0) {
                const int places = Upper::exponent_of(q) - Lower::exponent_of(q);
                magic |= 1u << (Element::kMantissaBits - places);
            }
            constexpr uint32_t kSign = 0x8000;
            constants.word[2 * half] = (magic | kSign) * 0x10001u;
            constants.word[2 * half + 1] = power_of_two<Element>(0) * 0x10001u;
        }
        sums = Element::multiply(constants, input[product], sums);
    }
    return sums;
}

// A lane's words of a tile.
struct TileWords {
    uint32_t base[kRowTiles][2], planes[kMaxWidth][kRowTiles];

    // The operands of one row tile: the codes' upper bits, up to four, and their lower ones.
    template <class Element, int bits, int below>
    __device__ void upper(int row_tile, uint32_t (&words)[2][8]) const {
        Part<Element, bits, below>::unpack({{base[row_tile][0], base[row_tile][1]}},
                                           interleave<(bits < 4 ? 1 : 2)>(planes[2][row_tile], planes[3][row_tile]),
                                           words);
    }
    template <class Element, int bits>
    __device__ void lower(int row_tile, uint32_t (&words)[2][8]) const {
        Part<Element, bits, 0>::unpack(interleave<(bits < 2 ? 1 : 2)>(planes[4][row_tile], planes[5][row_tile]),
                                       interleave<(bits < 4 ? 1 : 2)>(planes[6][row_tile], planes[7][row_tile]), words);
    }
};

// A warp's sums over its steps, those of each token tile: [row tiles, 16 x 8].
template <class Element, DecoderKind kind, int width, int token_tiles, int groups>
__device__ void multiply_steps(const Arguments<Element>& arguments, const Shape& shape, const Share& share,
                               uint8_t* memory, Sums (&results)[token_tiles][kRowTiles]) {
    constexpr int kUpperBits = width < 4 ? width : 4, kLowerBits = width - kUpperBits;
    constexpr DecoderForm kForm = form_of(kind, width);
    constexpr bool kHasSteps = kForm == DecoderForm::kInt8;
    constexpr bool kScarce = kHasSteps && groups == 4;  // registers are
    constexpr bool kStepsAtEnd = kHasSteps && token_tiles == 1 && !kScarce;
    constexpr int kStageCount = stages(width);
    constexpr int kBytes = stage_bytes(kind, width, groups);
    // Sums are scaled once for a step where that is one group and there are registers for two tiles.
    constexpr int kTilesAtOnce = groups == 1 && width <= 4 && token_tiles <= 2 ? 2 : 1;
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
                    constants[token_tile][part] = multiply_constants<Element, width, kProducts>(
                        &input[token_tile][4 * (first % kInputTiles) + part * kProducts], part * kProducts);
                    if constexpr (kHasSteps) {
                        float (&sums)[4] = constants[token_tile][part].value;
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
                    tiles[tile].template upper<Element, kUpperBits, kLowerBits>(row_tile, words);
                    multiply();
                    if constexpr (kLowerBits > 0) {
                        tiles[tile].template lower<Element, kLowerBits>(row_tile, words);
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
