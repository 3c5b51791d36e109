// matquant::embedding on the CPU: rows of a weight, decoded at the width that is active now.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "check.h"
#include "cpu/entries.h"
#include "cpu/layout.h"
#include "cpu/linear_by_row.h"
#include "cpu/prepared_weight.h"

namespace matquant::cpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kColumnsOfThread = 1 << 14;  // the fewest that are worth a thread

// A weight of one partition at a width.
struct Rows {
    const uint8_t* planes;
    const uint8_t* codebook;  // of the width, if there is one
    const uint8_t* decoders;  // of the width
    int64_t columns, group_size;
    int64_t tiles, tile_rows;
    DecoderForm form;
    int width;
    int pairs;  // of planes, the others are single

    int64_t groups() const { return ceil_div(columns, group_size); }

    // What a row has in one of so many blocks of a tile, from a plane on: a byte for each column of a step.
    uint32_t word(int64_t tile_row, int64_t lane, int64_t tile, int64_t plane, int64_t blocks, int64_t block) const {
        const int64_t first = (plane * tile_rows + blocks * tile_row) * tiles + blocks * tile + block;
        uint32_t result;
        std::memcpy(&result, planes + first * kPlaneBytes + lane * kStepColumns, sizeof(result));
        return result;
    }

    // The codes of a row in the four columns of a step, one in each byte.
    uint32_t codes(int64_t tile_row, int64_t lane, int64_t tile, int step) const {
        uint32_t result = 0;
        for (int pair = 0; pair < pairs; ++pair) {
            result = result << 2 | (word(tile_row, lane, tile, 2 * pair, 2, step / 4) >> step % 4 * 2 & 0x03030303);
        }
        for (int plane = 2 * pairs; plane < width; ++plane) {
            result = result << 1 | (word(tile_row, lane, tile, plane, 1, 0) >> step & 0x01010101);
        }
        return result;
    }

    struct Decoder {
        float scale, offset;
    };
    Decoder decoder(int64_t tile_row, int64_t lane, int64_t group) const {
        const uint8_t* row = decoders + tile_row * decoder_bytes(form, groups());
        if (form == DecoderForm::kFloat16) {
            const Half* halves = reinterpret_cast<const Half*>(row) + group * 2 * kTileRows + lane;
            return {halves[0], halves[kTileRows]};
        }
        const BFloat16* steps = reinterpret_cast<const BFloat16*>(row) + lane;
        if (form == DecoderForm::kCodebook) {
            return {static_cast<float>(row[(2 + group) * kTileRows + lane]) * steps[0], 0.0f};
        }
        const uint8_t* codes = row + (2 + group) * 2 * kTileRows + lane;
        const float scale = static_cast<float>(codes[0]) * steps[0];
        const float centre = static_cast<float>(static_cast<int8_t>(codes[kTileRows])) * steps[kTileRows];
        return {scale, std::fma(-0.5f * static_cast<float>((1 << width) - 1), scale, centre)};
    }

    // What the scale is multiplied with: the codes themselves, or their levels in the codebook.
    struct Levels {
        float column[kStepColumns];
    };
    // The level of an entry and the increments of a code's bits up to `last`.
    static float sum_up(const uint8_t* entry, int64_t code, int width, int last) {
        int64_t sum = *entry;
        for (int bit = kBaseBits + 1; bit <= last; ++bit) {
            entry += kEntryPlaneBytes;
            sum += (code >> (width - bit) & 1) * *entry;
        }
        return static_cast<float>(sum) - kZeroLevel;
    }
    Levels levels(int64_t tile_row, int64_t lane, int64_t tile, int step) const {
        Levels result;
        const uint32_t four = codes(tile_row, lane, tile, step);
        if (form != DecoderForm::kCodebook) {
            for (int64_t column = 0; column < kStepColumns; ++column) {
                result.column[column] = static_cast<float>(four >> 8 * column & 0xff);
            }
            return result;
        }
        const uint32_t indices = word(tile_row, lane, tile, 0, 2, step / 4);
        const int place = step % kPlaces;
        for (int64_t column = 0; column < kStepColumns; ++column) {
            const int index = static_cast<int>(indices >> 8 * column & 0xff);
            const uint8_t* entry = codebook + index % kEntries * kPlaces + place;
            const int64_t code = four >> 8 * column & 0xff;
            float level = sum_up(entry, code, width, coarse_bits(width));
            if (width > kWidestWhole) {
                level += kFineUnit * sum_up(entry + coarse_planes(width) * kEntryPlaneBytes, code, width, width);
            }
            result.column[column] = changes_sign(index, place) ? -level : level;
        }
        return result;
    }

    template <class T>
    void decode(int64_t row, T* target) const {
        const int64_t tile_row = row / kTileRows, lane = row % kTileRows;
        Decoder current = {};
        for (int64_t column = 0; column < columns; column += kStepColumns) {
            const Levels four =
                levels(tile_row, lane, column / kTileColumns, static_cast<int>(column % kTileColumns / kStepColumns));
            for (int64_t index = column; index < std::min(column + kStepColumns, columns); ++index) {
                if (index % group_size == 0) {
                    current = decoder(tile_row, lane, index / group_size);
                }
                target[index] = static_cast<T>(current.scale * four.column[index - column] + current.offset);
            }
        }
    }
};

// What is looked up where: the weight of row i is sources[slots[i]], or the only one.
struct LookUp {
    const std::vector<Rows>& sources;
    const int32_t* slots;
    const int64_t* rows;
    int64_t count;

    const Rows& source(int64_t index) const { return sources.size() == 1 ? sources.front() : sources[slots[index]]; }
};

template <class T>
void decode_rows(const LookUp& wanted, int64_t columns, Tensor& output) {
    T* target = static_cast<T*>(output.mutable_data_ptr());
    const int64_t grain = ceil_div(kColumnsOfThread, std::max<int64_t>(columns, 1));
    torch::stable::parallel_for(0, wanted.count, grain, [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) {
            wanted.source(index).decode(wanted.rows[index], target + index * columns);
        }
    });
}

Rows rows_of(const Weight& weight, int64_t columns) {
    const PreparedWeight& prepared = prepared_for_cpu(weight);
    const Segment& segment = weight.segments.front();
    STD_TORCH_CHECK(weight.segments.size() == 1 && segment.output_sizes.size() == 1,
                    "weight: found more than one partition, expected one");
    STD_TORCH_CHECK(columns == weight.columns, "columns: found ", columns, ", expected the weight's ", weight.columns);
    const int width = *segment.active_width.const_data_ptr<int32_t>();
    segment.check_active(width);
    const DecoderForm form = form_of(weight.decoder_kind, width);
    const uint8_t* decoders = segment.decoders.const_data_ptr<uint8_t>() + prepared.segments().front().decoders[width];
    return {
        .planes = segment.planes.const_data_ptr<uint8_t>(),
        .codebook = decoders,
        .decoders = decoders + shared_decoder_bytes(form, width),
        .columns = columns,
        .group_size = weight.group_size,
        .tiles = segment.planes.size(2),
        .tile_rows = segment.planes.size(1),
        .form = form,
        .width = width,
        .pairs = prepared.paired() ? width / 2 : 1,
    };
}

// Looks rows up in weights of the same features.
Tensor look_up(const Tensor& rows, const std::vector<std::shared_ptr<const Weight>>& weights, const int32_t* slots,
               int64_t columns, ScalarType dtype) {
    std::vector<Rows> sources;
    for (const std::shared_ptr<const Weight>& weight : weights) {
        sources.push_back(weight == nullptr ? Rows{} : rows_of(*weight, columns));
    }
    STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long, "rows: found dtype ",
                    torch::headeronly::toString(rows.scalar_type()), ", expected Long");
    const Tensor wanted = torch::stable::contiguous(rows);
    const LookUp all = {sources, slots, wanted.const_data_ptr<int64_t>(), wanted.numel()};
    for (int64_t index = 0; index < all.count; ++index) {
        const int64_t out_features = weights[sources.size() == 1 ? 0 : slots[index]]->out_features;
        STD_TORCH_CHECK(0 <= all.rows[index] && all.rows[index] < out_features, "rows: found ", all.rows[index],
                        ", expected 0 to ", out_features - 1);
    }
    std::vector<int64_t> sizes(rows.sizes().begin(), rows.sizes().end());
    sizes.push_back(columns);
    Tensor output = torch::stable::empty(sizes, dtype);
    switch (dtype) {
        case ScalarType::BFloat16:
            decode_rows<BFloat16>(all, columns, output);
            break;
        case ScalarType::Half:
            decode_rows<Half>(all, columns, output);
            break;
        case ScalarType::Float:
            decode_rows<float>(all, columns, output);
            break;
        default:
            STD_TORCH_CHECK(false, "dtype: found ", torch::headeronly::toString(dtype),
                            ", expected BFloat16, Half or Float");
    }
    return output;
}

Tensor embedding(const Tensor& rows, const Tensor& handle, int64_t columns, ScalarType dtype) {
    return look_up(rows, {find_weight(handle)}, nullptr, columns, dtype);
}

Tensor embedding_by_row(const Tensor& rows, const Tensor& weights, const Tensor& slots, int64_t columns,
                        ScalarType dtype) {
    const std::vector<int64_t> counts = count_rows(slots, rows.numel(), weights);
    std::vector<std::shared_ptr<const Weight>> found(std::max<size_t>(counts.size(), 2));  // one would stand for all
    for (size_t slot = 0; slot < counts.size(); ++slot) {
        if (counts[slot] > 0) {
            found[slot] = weight_of(weights.const_data_ptr<int64_t>()[slot]);
        }
    }
    return look_up(rows, found, slots.const_data_ptr<int32_t>(), columns, dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(matquant, CPU, m) {
    m.impl("embedding", TORCH_BOX(&embedding));
    m.impl("embedding_by_row", TORCH_BOX(&embedding_by_row));
}

}  // namespace matquant::cpu
