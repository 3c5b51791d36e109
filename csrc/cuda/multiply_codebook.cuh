// A warp's products of its tiles with the tokens, where weights are levels of a codebook times a group's scale.
//
// Codes go straight from global memory to registers, those of the next tiles while these are multiplied: shared memory
// is read by look-ups as fast as it can be, so that to stage codes in it would cost what memory gains by it.
#pragma once

#include "cuda/levels.cuh"
#include "cuda/stage.cuh"

namespace matquant::cuda {

// A tile's words and the scales of its groups.
template <int parts>
struct FourTile {
    TileWords words;
    GroupDecoders<DecoderForm::kCodebook> decoders[parts];
};

// A share of a row of tiles as one lane reads it, some tiles at a time.
template <int width, int groups, int count>
class FourReader {
  public:
    static constexpr int kParts = groups == 4 ? 2 : 1;  // groups of a tile

    __device__ FourReader(const uint8_t* planes, const uint8_t* decoders, const Shape& shape, const Share& share,
                          int lane)
        : shape_(shape), tile_bytes_(shape.resident_width * kPlaneBytes), tile_(share.begin * kStepTiles) {
        const size_t tile_row = share.tile_row;
        planes_ = planes + tile_row * shape.tile_columns * tile_bytes_ + lane * 16;
        decoders_ = decoders + tile_row * row_bytes<DecoderForm::kCodebook>(shape) +
                    step_bytes(DecoderForm::kCodebook) + lane / 4 * (kGroupBytes / 8);
    }

    // In place of tiles past the last that is read again, for activations that are zero, or for nothing.
    __device__ void load_next(FourTile<kParts> (&tiles)[count]) {
#pragma unroll
        for (int index = 0; index < count; ++index) {
            const uint32_t tile = min(tile_ + index, shape_.tile_columns - 1);
            load_words(planes_ + static_cast<uint64_t>(tile) * tile_bytes_, tiles[index].words);
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                const uint32_t group = groups == 1   ? tile / kStepTiles >> shape_.group_shift
                                       : groups == 2 ? tile
                                                     : min(2 * tile + part, shape_.groups - 1);
                tiles[index].decoders[part].load(decoders_ + static_cast<uint64_t>(group) * kGroupBytes);
            }
        }
        tile_ += count;
    }

  private:
    static constexpr int kGroupBytes = group_bytes(DecoderForm::kCodebook);

    __device__ static void load_words(const uint8_t* source, TileWords& words) {
        const auto load = [&](int plane) {
            return __ldg(reinterpret_cast<const uint4*>(source + plane * kPlaneBytes));
        };
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4 run = load(half);
            words.base[2 * half][0] = run.x;
            words.base[2 * half][1] = run.y;
            words.base[2 * half + 1][0] = run.z;
            words.base[2 * half + 1][1] = run.w;
        }
#pragma unroll
        for (int plane = kBaseBits; plane < width; ++plane) {
            const uint4 run = load(plane);
            words.planes[plane][0] = run.x;
            words.planes[plane][1] = run.y;
            words.planes[plane][2] = run.z;
            words.planes[plane][3] = run.w;
        }
    }

    const Shape& shape_;
    const uint8_t *planes_, *decoders_;
    uint32_t tile_bytes_;
    int tile_;
};

// A lane's activations: of a token those of its sixteen columns of a tile, as operands for the four fours.
template <class Element, int token_tiles>
class FourInput {
  public:
    __device__ FourInput(const Arguments<Element>& arguments, const Shape& shape, const Share& share, int lane)
        : input_(reinterpret_cast<const uint8_t*>(arguments.input)) {
        const int steps = shape.steps();
#pragma unroll
        for (int token_tile = 0; token_tile < token_tiles; ++token_tile) {
            // Tokens that there are not are copies of the last one: their sums go nowhere.
            const int token = min(share.first_token + token_tile * kTokens + lane / 4, shape.tokens - 1);
            offsets_[token_tile] =
                static_cast<uint32_t>(token * steps + share.begin) * kStepColumns * 2 + lane % 4 * 32;
        }
    }

    // Those of the tile `ahead` of the next one. Of a tile with two groups the first one's columns are those of the
    // first two lanes in four; to its products the others bring zeros.
    template <int parts>
    __device__ void load(int ahead, int lane, B (&products)[token_tiles][parts][4]) const {
#pragma unroll
        for (int token_tile = 0; token_tile < token_tiles; ++token_tile) {
            const auto* source =
                reinterpret_cast<const uint4*>(input_ + offsets_[token_tile] + ahead * kTileColumns * 2);
            const uint4 first = __ldg(source), second = __ldg(source + 1);
            // Two columns each: places 0, 1, 2, 3 of the fours 0 and 1, then of 2 and 3.
            const uint32_t words[2][4] = {{first.x, first.z, second.x, second.z},
                                          {first.y, first.w, second.y, second.w}};
#pragma unroll
            for (int four = 0; four < 4; ++four) {
                const uint32_t half = four % 2 == 0 ? 0x5410 : 0x7632;
                const uint32_t (&places)[4] = words[four / 2];
                const B tokens = {{__byte_perm(places[0], places[2], half), __byte_perm(places[1], places[3], half)}};
#pragma unroll
                for (int part = 0; part < parts; ++part) {
                    const uint32_t own = parts == 1 || lane % 4 / 2 == part ? 0xffffffff : 0;
                    products[token_tile][part][four] = {{tokens.word[0] & own, tokens.word[1] & own}};
                }
            }
        }
    }

    __device__ void advance(int tiles) {
#pragma unroll
        for (int token_tile = 0; token_tile < token_tiles; ++token_tile) {
            offsets_[token_tile] += tiles * kTileColumns * 2;
        }
    }

  private:
    const uint8_t* input_;
    uint32_t offsets_[token_tiles];
};

// The sums of what values are more than levels, the same for all rows.
template <class Element, uint32_t excess, int tiles, int token_tiles, int parts>
__device__ void subtract_excess(const B (&input)[tiles][token_tiles][parts][4], Sums (&sums)[token_tiles][parts]) {
    constexpr uint32_t kNegative = excess ^ 0x80008000;
    constexpr A kConstants = {{kNegative, kNegative, kNegative, kNegative}};
#pragma unroll
    for (int product = 0; product < tiles * 4; ++product) {
#pragma unroll
        for (int token_tile = 0; token_tile < token_tiles; ++token_tile) {
#pragma unroll
            for (int part = 0; part < parts; ++part) {
                Sums& sum = sums[token_tile][part];
                sum = Element::multiply(kConstants, input[product / 4][token_tile][part][product % 4], sum);
            }
        }
    }
}

// A warp's sums over its share, those of each token tile: [row tiles, 16 x 8].
template <class Element, int width, int token_tiles, int groups>
__device__ void multiply_fours(const Arguments<Element>& arguments, const Shape& shape, const Share& share,
                               int partition, uint8_t* memory, Sums (&results)[token_tiles][kRowTiles]) {
    using Table = typename LevelsOf<Element, width>::Type;
    static_assert(Table::kBytes <= table_bytes(width) && kThreads == 2 * kEntries);
    constexpr int kBookBytes = shared_decoder_bytes(DecoderKind::kCodebook, width);
    // Sums are scaled once for a step where that is one group and there are registers for two tiles.
    constexpr int kTilesAtOnce = groups == 1 && width <= kWidestWhole && token_tiles <= 2 ? 2 : 1;
    // Whether there are registers for the next tiles while these are multiplied.
    constexpr bool kAhead = width <= kWidestWhole;
    using Reader = FourReader<width, groups, kTilesAtOnce>;
    constexpr int kGroupParts = Reader::kParts;

    const int lane = threadIdx.x % kLanes;
    const uint8_t* decoders = arguments.decoders + share.first_decoders;
    Table table(memory, lane);
    table.fill(decoders + partition * kBookBytes, threadIdx.x % kEntries, threadIdx.x / kEntries);
    __syncthreads();
    if (share.begin == share.end) {
        return;
    }
    decoders += static_cast<size_t>(shape.partitions) * kBookBytes;

    FourInput<Element, token_tiles> input_of_tiles(arguments, shape, share, lane);
    Reader reader(arguments.planes, decoders, shape, share, lane);
    const int end = min(share.end * kStepTiles, shape.tile_columns);
    FourTile<kGroupParts> tiles[kTilesAtOnce], next[kTilesAtOnce];
    if (kAhead) {
        reader.load_next(next);
    }
    for (int first = share.begin * kStepTiles; first < end; first += kTilesAtOnce) {
        B input[kTilesAtOnce][token_tiles][kGroupParts][4];
        Sums excess[token_tiles][kGroupParts] = {};
#pragma unroll
        for (int index = 0; index < kTilesAtOnce; ++index) {
            tiles[index] = next[index];
            input_of_tiles.template load<kGroupParts>(index, lane, input[index]);
        }
        input_of_tiles.advance(kTilesAtOnce);
        reader.load_next(kAhead ? next : tiles);
        if constexpr (Table::kExcess != 0) {
            subtract_excess<Element, Table::kExcess>(input, excess);
        }
#pragma unroll
        for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
            Sums sums[token_tiles][kGroupParts];
#pragma unroll
            for (int token_tile = 0; token_tile < token_tiles; ++token_tile) {
#pragma unroll
                for (int part = 0; part < kGroupParts; ++part) {
                    sums[token_tile][part] = excess[token_tile][part];
                }
            }
#pragma unroll
            for (int index = 0; index < kTilesAtOnce; ++index) {
                FourWords rows[2];
                rows_of<width>(tiles[index].words, row_tile, rows);
#pragma unroll
                for (int four = 0; four < 4; ++four) {
                    uint32_t words[2][Table::kParts][2];
                    table.look_up(rows[0], four, words[0]);
                    table.look_up(rows[1], four, words[1]);
#pragma unroll
                    for (int level = 0; level < Table::kParts; ++level) {
                        const A weights = {
                            {words[0][level][0], words[1][level][0], words[0][level][1], words[1][level][1]}};
#pragma unroll
                        for (int token_tile = 0; token_tile < token_tiles; ++token_tile) {
#pragma unroll
                            for (int part = 0; part < kGroupParts; ++part) {
                                Sums& sum = sums[token_tile][part];
                                sum = Element::multiply(weights, input[index][token_tile][part][four], sum);
                            }
                        }
                    }
                }
            }
#pragma unroll
            for (int part = 0; part < kGroupParts; ++part) {
                const float2 scale = tiles[0].decoders[part].scale(row_tile);
#pragma unroll
                for (int token_tile = 0; token_tile < token_tiles; ++token_tile) {
#pragma unroll
                    for (int index = 0; index < 4; ++index) {
                        results[token_tile][row_tile].value[index] +=
                            (index < 2 ? scale.x : scale.y) * sums[token_tile][part].value[index];
                    }
                }
            }
        }
    }
    const uint8_t* steps = decoders + static_cast<size_t>(share.tile_row) * row_bytes<DecoderForm::kCodebook>(shape);
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
        const float2 step = scale_steps(steps, lane / 4, row_tile);
#pragma unroll
        for (int token_tile = 0; token_tile < token_tiles; ++token_tile) {
#pragma unroll
            for (int index = 0; index < 4; ++index) {
                results[token_tile][row_tile].value[index] *= index < 2 ? step.x : step.y;
            }
        }
    }
}

}  // namespace matquant::cuda
