// The product of few tokens with a layer's slices: y = x W^T + bias, at the speed of memory.
//
// A block of threads takes one row of tiles, a share of its columns and some tokens; each of its warps takes a share of
// these and needs nobody else until the end: it copies its tiles, the activations and decoders for them into its part
// of shared memory, some tiles ahead, and multiplies. Then the warps' sums are added in order, and if the columns were
// divided among several blocks, the last of these to come adds the blocks' sums in order. So results do not depend on
// timing.
//
// Within a group, with the weight scale * c + offset, the magic value m of dequantize.cuh and A = m + c,
//     sum_k x_k (scale c_k + offset)  =  scale (sum_k x_k A_k - sum_k x_k m_k) + offset sum_k x_k.
// The two sums without codes are one product with constants, its upper rows -m and its lower rows 1.
#pragma once

#include "cuda/copy.cuh"
#include "cuda/dequantize.cuh"

namespace matquant::cuda {

constexpr int kWarps = 4;
constexpr int kMaxPartitions = 8;
constexpr int kBaseBits = 2;
constexpr int kMaxWidth = 8;
constexpr int kNone = 0xff;

// A layer and a product, as the host describes them.
struct Shape {
    int32_t tokens;
    int32_t rows;       // outputs of all partitions
    int32_t tile_rows;  // of all partitions
    int32_t tile_columns;
    int32_t resident_width;
    int32_t groups;
    int32_t group_shift;  // a group has 2^shift steps; unused where a step has several
    int32_t partitions;
    int32_t partition_tiles[kMaxPartitions];  // where each begins, in rows of tiles
    int32_t partition_rows[kMaxPartitions];   // and in outputs
    uint64_t decoders_of_widths;              // a byte for each of 2..8: the index of its decoders, kNone without

    __device__ int decoder_of(int width) const {
        if (width < kBaseBits || width > kMaxWidth) {
            return kNone;
        }
        return static_cast<int>(decoders_of_widths >> (width - kBaseBits) * 8 & 0xff);
    }
};

// The part of a fused layer that a row of tiles belongs to.
struct Partition {
    int index = 0;
    int first_row = 0;  // of the row of tiles
    int end_of_rows;    // of the partition

    __device__ Partition(const Shape& shape, int tile_row) : end_of_rows(shape.rows) {
        int first_tile = 0;
#pragma unroll
        for (int next = 1; next < kMaxPartitions; ++next) {
            if (next < shape.partitions) {
                const bool reached = tile_row >= shape.partition_tiles[next];
                index += reached ? 1 : 0;
                first_tile = max(first_tile, reached ? shape.partition_tiles[next] : 0);
                first_row = max(first_row, reached ? shape.partition_rows[next] : 0);
                end_of_rows = min(end_of_rows, reached ? shape.rows : shape.partition_rows[next]);
            }
        }
        first_row += (tile_row - first_tile) * kTileRows;
    }
};

template <class Element>
struct Arguments {
    const typename Element::Type* input;  // [tokens, steps * kStepTiles * kTileColumns], zero past the layer's columns
    const uint8_t* planes;                // [tile rows, tile columns, resident width, kPlaneBytes]
    const uint8_t* decoders;              // [decoder widths, tile rows, groups, kDecoderBytes]
    const int32_t* active_width;          // [partitions]
    const typename Element::Type* bias;   // [rows] or nullptr
    typename Element::Type* output;       // [tokens, rows]
    float* partial_sums;                  // [blocks that divide columns, tile rows, tokens, kTileRows]
    uint32_t* arrivals;                   // [passes, tile rows], zero before and after
};

// A warp takes its tiles in steps of two: 128 columns. `groups` is the number of groups in a step: 1 (of 128 columns or
// more), 2 or 4.
constexpr int kStepTiles = 2;

// Steps that a warp has under way, and what one takes of shared memory.
template <int width>
constexpr int kStages = width <= 4 ? 3 : 2;
template <int width, int groups>
constexpr int kStageBytes = kStepTiles * width * kPlaneBytes + groups * kDecoderBytes;
template <int token_tiles>
constexpr int kSumBytes = kTileRows * token_tiles * kTokens * 4;  // of one warp

__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }

// Shared memory of a block whose layer has slices of up to this width.
template <int token_tiles, int groups>
__host__ __device__ constexpr int shared_bytes(int width) {
    const int weights = kStepTiles * kPlaneBytes, decoders = groups * kDecoderBytes;
    const int narrow = kStages<4> * ((width < 4 ? width : 4) * weights + decoders);
    const int wide = width <= 4 ? 0 : kStages<8> * (width * weights + decoders);
    return kWarps * larger(larger(narrow, wide), kSumBytes<token_tiles>);
}

// A row of tiles, the tokens that it is multiplied with, and the steps of it that a warp takes.
struct Share {
    int tile_row;
    int decoder;  // its width's
    int first_token;
    int begin, end;
};

// What one lane copies for each step of a warp's share, one after the other. Offsets have 32 bits: to compute them is
// most of what is to be done besides the products.
template <class Element, int width, int groups>
class Copier {
  public:
    __device__ Copier(const Arguments<Element>& arguments, const Shape& shape, const Share& share, int lane)
        : arguments_(arguments), shape_(shape), lane_(lane), step_(share.begin), end_(share.end) {
        tile_bytes_ = shape.resident_width * kPlaneBytes;
        const int first_tile = share.tile_row * shape.tile_columns + share.begin * kStepTiles;
        weights_ = static_cast<uint32_t>(first_tile) * tile_bytes_ + lane * 16;
        decoders_ = static_cast<uint32_t>(share.decoder * shape.tile_rows + share.tile_row) * shape.groups;
        single_ = shape.tile_columns % kStepTiles == 0 ? -1 : shape.tile_columns / kStepTiles;
    }

    // Copies the next step to a stage. Past the end nothing is copied, but there still is a group of copies to count.
    __device__ void copy_next(uint8_t* stage) {
        if (step_ < end_) {
            copy(stage);
            ++step_;
        }
        commit_copies();
    }

  private:
    __device__ void copy(uint8_t* stage) {
        // In place of a second tile that there is not the first one is multiplied again, with zeros.
        const bool both = step_ != single_;
#pragma unroll
        for (int tile = 0; tile < kStepTiles; ++tile) {
            const uint8_t* weights = arguments_.planes + weights_ + (tile == 0 || !both ? 0 : tile_bytes_);
#pragma unroll
            for (int word = 0; word < width; ++word) {
                copy_async(stage + (tile * width + word) * kPlaneBytes + lane_ * 16, weights + word * kPlaneBytes);
            }
        }
        weights_ += kStepTiles * tile_bytes_;
        // 16 lanes copy a group's decoders.
        uint8_t* target = stage + kStepTiles * width * kPlaneBytes + lane_ * 16;
        const int first = groups == 1 ? step_ >> shape_.group_shift : groups * step_;
#pragma unroll
        for (int pair = 0; pair < (groups + 1) / 2; ++pair) {
            if (groups > 1 || lane_ < 16) {
                // The last step may have fewer groups.
                const int group = groups == 1 ? first : min(first + 2 * pair + lane_ / 16, shape_.groups - 1);
                copy_async(target + pair * 2 * kDecoderBytes,
                           arguments_.decoders + (decoders_ + group) * kDecoderBytes + lane_ % 16 * 16);
            }
        }
    }

    const Arguments<Element>& arguments_;
    const Shape& shape_;
    int lane_, step_, end_, single_;
    uint32_t weights_, decoders_, tile_bytes_;
};

// A lane's activations for each step, one after the other: of a token those for the eight products of two tiles. They
// come from the caches, for every row of tiles reads them. Tokens that there are not are copies of the last one: their
// sums are not written.
template <class Element, int token_tiles>
class Input {
  public:
    __device__ Input(const Arguments<Element>& arguments, const Shape& shape, const Share& share, int lane)
        : input_(reinterpret_cast<const uint8_t*>(arguments.input)) {
        const int steps = (shape.tile_columns + kStepTiles - 1) / kStepTiles;
#pragma unroll
        for (int token_tile = 0; token_tile < token_tiles; ++token_tile) {
            const int token = min(share.first_token + token_tile * kTokens + lane / 4, shape.tokens - 1);
            offsets_[token_tile] = static_cast<uint32_t>(token * steps + share.begin) * kStepBytes + lane % 4 * 16;
        }
    }

    // Those of `tiles` tiles of the step, from its tile `first` on.
    template <int tiles>
    __device__ void load(int first, B (&products)[token_tiles][4 * tiles]) const {
#pragma unroll
        for (int token_tile = 0; token_tile < token_tiles; ++token_tile) {
#pragma unroll
            for (int half = 0; half < 2 * tiles; ++half) {
                const uint8_t* source = input_ + offsets_[token_tile] + (2 * first + half) * kTileColumns;
                const uint4 run = __ldg(reinterpret_cast<const uint4*>(source));
                products[token_tile][2 * half] = {{run.x, run.y}};
                products[token_tile][2 * half + 1] = {{run.z, run.w}};
            }
        }
    }
    __device__ void advance() {
#pragma unroll
        for (int token_tile = 0; token_tile < token_tiles; ++token_tile) {
            offsets_[token_tile] += kStepBytes;
        }
    }

  private:
    static constexpr int kStepBytes = kStepTiles * kTileColumns * 2;  // of a token

    const uint8_t* input_;
    uint32_t offsets_[token_tiles];
};

// One lane's view of a step in shared memory.
template <int width>
class Stage {
  public:
    __device__ Stage(const uint8_t* memory, int lane)
        : weights_(memory + lane * 16), decoders_(memory + kStepTiles * width * kPlaneBytes + lane / 4 * 32) {}

    // The lane's words: two for each row tile of the base field, one of a plane.
    __device__ void load_base(int tile, uint32_t (&words)[kRowTiles][2]) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4 run = load(weights_ + (tile * width + half) * kPlaneBytes);
            words[2 * half][0] = run.x;
            words[2 * half][1] = run.y;
            words[2 * half + 1][0] = run.z;
            words[2 * half + 1][1] = run.w;
        }
    }
    __device__ void load_plane(int tile, int plane, uint32_t (&words)[kRowTiles]) const {
        const uint4 run = load(weights_ + (tile * width + plane) * kPlaneBytes);
        words[0] = run.x;
        words[1] = run.y;
        words[2] = run.z;
        words[3] = run.w;
    }

    // Scales and offsets of the lane's rows, in pairs of rows g and g + 8.
    __device__ void load_decoders(int group, __half2 (&scales)[kRowTiles], __half2 (&offsets)[kRowTiles]) const {
        unpack(load(decoders_ + group * kDecoderBytes), scales);
        unpack(load(decoders_ + group * kDecoderBytes + 16), offsets);
    }

  private:
    __device__ static uint4 load(const uint8_t* source) { return *reinterpret_cast<const uint4*>(source); }
    __device__ static void unpack(const uint4& run, __half2 (&values)[kRowTiles]) {
        const uint32_t words[4] = {run.x, run.y, run.z, run.w};
#pragma unroll
        for (int index = 0; index < kRowTiles; ++index) {
            values[index] = *reinterpret_cast<const __half2*>(&words[index]);
        }
    }

    const uint8_t *weights_, *decoders_;
};

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
template <class Element, int width, int token_tiles, int groups>
__device__ void multiply_steps(const Arguments<Element>& arguments, const Shape& shape, const Share& share,
                               uint8_t* memory, Sums (&results)[token_tiles][kRowTiles]) {
    constexpr int kUpperBits = width < 4 ? width : 4, kLowerBits = width - kUpperBits;
    constexpr int kStageCount = kStages<width>;
    constexpr int kBytes = kStageBytes<width, groups>;
    // Sums are scaled once for a step where that is one group and there are registers for two tiles.
    constexpr int kTilesAtOnce = groups == 1 && width <= 4 && token_tiles <= 2 ? 2 : 1;
    constexpr int kInputTiles = token_tiles <= 2 ? kStepTiles : 1;  // whose activations are in registers at once
    constexpr int kParts = larger(groups / kStepTiles, 1);          // of what is taken at once, each with a decoder
    constexpr int kProducts = 4 * kTilesAtOnce / kParts;            // of a part

    const int lane = threadIdx.x % kLanes;
    Copier<Element, width, groups> copier(arguments, shape, share, lane);
#pragma unroll
    for (int index = 0; index < kStageCount - 1; ++index) {
        copier.copy_next(memory + index * kBytes);
    }
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
        const Stage<width> stage(memory + current, lane);
        free = current;
        current = current == (kStageCount - 1) * kBytes ? 0 : current + kBytes;

#pragma unroll
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
                }
            }
            __half2 scales[kParts][kRowTiles], offsets[kParts][kRowTiles];
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                stage.load_decoders(groups == 1 ? 0 : first * kParts + part, scales[part], offsets[part]);
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
                    const float2 scale = __half22float2(scales[part][row_tile]);
                    const float2 offset = __half22float2(offsets[part][row_tile]);
#pragma unroll
                    for (int token_tile = 0; token_tile < token_tiles; ++token_tile) {
                        const Sums& constant = constants[token_tile][part];
#pragma unroll
                        for (int index = 0; index < 4; ++index) {
                            float& result = results[token_tile][row_tile].value[index];
                            result += (index < 2 ? scale.x : scale.y) * sums[token_tile][part].value[index];
                            result += (index < 2 ? offset.x : offset.y) * constant.value[2 + index % 2];
                        }
                    }
                }
            }
        }
        input_of_steps.advance();
    }
}

// The sums of all warps, in order: shared [kWarps, tokens, kTileRows].
template <int token_tiles>
class BlockSums {
  public:
    __device__ explicit BlockSums(uint8_t* memory) : memory_(reinterpret_cast<float*>(memory)) {}

    __device__ void store(int warp, int lane, const Sums (&sums)[token_tiles][kRowTiles]) const {
#pragma unroll
        for (int token_tile = 0; token_tile < token_tiles; ++token_tile) {
#pragma unroll
            for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
                for (int index = 0; index < 4; ++index) {
                    const int token = token_tile * kTokens + lane % 4 * 2 + index % 2;
                    const int row = row_tile * 16 + lane / 4 + index / 2 * 8;
                    place(warp, token, row) = sums[token_tile][row_tile].value[index];
                }
            }
        }
    }
    __device__ float total(int token, int row) const {
        float sum = place(0, token, row);
#pragma unroll
        for (int warp = 1; warp < kWarps; ++warp) {
            sum += place(warp, token, row);
        }
        return sum;
    }

  private:
    __device__ float& place(int warp, int token, int row) const {
        return memory_[(warp * token_tiles * kTokens + token) * kTileRows + row];
    }

    float* memory_;
};

template <class Element, int token_tiles, int groups>
__device__ void decode(const Arguments<Element>& arguments, const Shape& shape, uint8_t* memory) {
    const int tile_row = blockIdx.x, warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const Partition partition(shape, tile_row);
    const int width = arguments.active_width[partition.index];
    const int decoder = shape.decoder_of(width);

    const int steps = (shape.tile_columns + kStepTiles - 1) / kStepTiles;
    const int workers = gridDim.y * kWarps, worker = blockIdx.y * kWarps + warp;
    const int first_token = blockIdx.z * token_tiles * kTokens;
    const Share share = {tile_row, decoder, first_token,
                         static_cast<int>(static_cast<long long>(worker) * steps / workers),
                         static_cast<int>(static_cast<long long>(worker + 1) * steps / workers)};

    Sums results[token_tiles][kRowTiles] = {};
#define MATQUANT_WIDTH(bits)                                                                              \
    case bits:                                                                                            \
        multiply_steps<Element, bits, token_tiles, groups>(                                               \
            arguments, shape, share, memory + warp * kStages<bits> * kStageBytes<bits, groups>, results); \
        break;
    switch (decoder == kNone ? 0 : width) {
        MATQUANT_WIDTH(2)
        MATQUANT_WIDTH(3)
        MATQUANT_WIDTH(4)
        MATQUANT_WIDTH(5)
        MATQUANT_WIDTH(6)
        MATQUANT_WIDTH(7)
        MATQUANT_WIDTH(8)
        default:  // a width without decoders: nothing that could be mistaken for a result
#pragma unroll
            for (int index = 0; index < token_tiles * kRowTiles * 4; ++index) {
                results[index / 4 / kRowTiles][index / 4 % kRowTiles].value[index % 4] = __int_as_float(0x7fffffff);
            }
    }
#undef MATQUANT_WIDTH

    __syncthreads();  // every warp is done with its part of the memory
    const BlockSums<token_tiles> sums(memory);
    sums.store(warp, lane, results);
    __syncthreads();

    const int values = kTileRows * min(token_tiles * kTokens, shape.tokens - first_token);
    const size_t first_value = (static_cast<size_t>(tile_row) * shape.tokens + first_token) * kTileRows;
    const size_t partial_stride = static_cast<size_t>(shape.tile_rows) * shape.tokens * kTileRows;
    float* partial_sums = arguments.partial_sums + first_value;
    uint32_t* arrivals = arguments.arrivals + blockIdx.z * shape.tile_rows + tile_row;
    bool last = true;
    if (gridDim.y > 1) {
        for (int value = threadIdx.x; value < values; value += blockDim.x) {
            partial_sums[blockIdx.y * partial_stride + value] = sums.total(value / kTileRows, value % kTileRows);
        }
        __shared__ bool is_last;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            is_last = atomicAdd(arrivals, 1) == gridDim.y - 1;
        }
        __syncthreads();
        last = is_last;
        __threadfence();
    }
    if (!last) {
        return;
    }
    for (int value = threadIdx.x; value < values; value += blockDim.x) {
        const int token = value / kTileRows, row = value % kTileRows;
        float sum = 0.0f;
        if (gridDim.y == 1) {
            sum = sums.total(token, row);
        } else {
            for (int block = 0; block < gridDim.y; ++block) {
                sum += __ldcg(&partial_sums[block * partial_stride + value]);
            }
        }
        if (partition.first_row + row < partition.end_of_rows) {
            if (arguments.bias != nullptr) {
                sum += Element::to_float(arguments.bias[partition.first_row + row]);
            }
            arguments.output[static_cast<size_t>(first_token + token) * shape.rows + partition.first_row + row] =
                Element::from_float(sum);
        }
    }
    if (gridDim.y > 1 && threadIdx.x == 0) {
        *arrivals = 0;
    }
}

}  // namespace matquant::cuda
