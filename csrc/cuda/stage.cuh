// Copies: from global memory to a step in shared memory, and from there and from the caches to registers.
#pragma once

#include "cuda/copy.cuh"
#include "cuda/decoders.cuh"

namespace matquant::cuda {

// What one lane copies for each step of a warp's share, one after the other. Offsets have 32 bits: to compute them is
// most of what is to be done besides the products.
template <class Element, DecoderForm form, int width, int groups>
class Copier {
  public:
    __device__ Copier(const Arguments<Element>& arguments, const Shape& shape, const Share& share, int lane)
        : arguments_(arguments), shape_(shape), lane_(lane), step_(share.begin), end_(share.end) {
        tile_bytes_ = shape.resident_width * kPlaneBytes;
        const int first_tile = share.tile_row * shape.tile_columns + share.begin * kStepTiles;
        weights_ = static_cast<uint32_t>(first_tile) * tile_bytes_ + lane * 16;
        decoders_ = share.first_decoders + static_cast<uint32_t>(share.tile_row) * row_bytes<form>(shape) +
                    step_bytes(form) + lane % kGroupLanes * 16;
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
        uint8_t* target = stage + kStepTiles * width * kPlaneBytes + lane_ * 16;
        const int first = groups == 1 ? step_ >> shape_.group_shift : groups * step_;
#pragma unroll
        for (int copied = 0; copied < groups; copied += kGroupsAtOnce) {
            if (groups >= kGroupsAtOnce || lane_ < groups * kGroupLanes) {
                // The last step may have fewer groups.
                const int group = groups == 1 ? first : min(first + copied + lane_ / kGroupLanes, shape_.groups - 1);
                copy_async(target + copied * group_bytes(form),
                           arguments_.decoders + (decoders_ + static_cast<uint32_t>(group) * group_bytes(form)));
            }
        }
    }

    static constexpr int kGroupLanes = group_bytes(form) / 16;  // lanes that copy a group's decoders
    static constexpr int kGroupsAtOnce = kLanes / kGroupLanes;

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
        const int steps = shape.steps();
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
template <DecoderForm form, int width>
class Stage {
  public:
    __device__ Stage(const uint8_t* memory, int lane, int decoders_of_lane)
        : weights_(memory + lane * 16), decoders_(memory + kStepTiles * width * kPlaneBytes + decoders_of_lane) {}

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

    __device__ void load_decoders(int group, GroupDecoders<form>& decoders) const {
        decoders.load(decoders_ + group * group_bytes(form));
    }

  private:
    __device__ static uint4 load(const uint8_t* source) { return *reinterpret_cast<const uint4*>(source); }

    const uint8_t *weights_, *decoders_;
};

}  // namespace matquant::cuda
