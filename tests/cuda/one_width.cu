// One kernel for each width, so that their main loops can be told apart: see test_static.py.
#include "cuda/decode.cuh"

using namespace matquant::cuda;

template <class Element, matquant::DecoderKind kind, int width, int token_tiles, int groups>
__global__ void __launch_bounds__(kWarps* kLanes, token_tiles == 1 ? 3 : 2)
    one_width(const Arguments<Element> arguments, const Shape shape) {
    extern __shared__ __align__(16) uint8_t memory[];
    const int warp = threadIdx.x / kLanes;
    const int steps = shape.steps();
    const Share share = {static_cast<int>(blockIdx.x), 0, 0, warp * steps / kWarps, (warp + 1) * steps / kWarps};
    Sums results[token_tiles][kRowTiles] = {};
    if constexpr (kind == matquant::DecoderKind::kCodebook) {
        multiply_fours<Element, width, token_tiles, groups>(arguments, shape, share, 0, memory, results);
    } else {
        multiply_steps<Element, kind, width, token_tiles, groups>(
            arguments, shape, share, memory + warp * stages(width) * stage_bytes(kind, width, groups), results);
    }
    __syncthreads();
    const BlockSums<token_tiles> sums(memory);
    sums.store(warp, threadIdx.x % kLanes, results);
    __syncthreads();
    for (int value = threadIdx.x; value < kTileRows * token_tiles * kTokens; value += blockDim.x) {
        arguments.partial_sums[value] = sums.total(value / kTileRows, value % kTileRows);
    }
}

// ELEMENT, KIND and TOKEN_TILES come from the command line.
#define MATQUANT_ONE(width)                                                                          \
    template __global__ void one_width<ELEMENT, matquant::DecoderKind::KIND, width, TOKEN_TILES, 1>( \
        const Arguments<ELEMENT>, const Shape);

MATQUANT_ONE(2)
MATQUANT_ONE(3)
MATQUANT_ONE(4)
MATQUANT_ONE(5)
MATQUANT_ONE(6)
MATQUANT_ONE(7)
MATQUANT_ONE(8)
