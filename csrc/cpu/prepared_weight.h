// What the CPU keeps with a weight: where its rows of tiles are, and who multiplies them.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cpu/gemm.h"
#include "weight.h"

namespace matquant::cpu {

// Rows of tiles of a segment that are never divided: their outputs for a token fill a cache line, which one thread
// writes.
constexpr int64_t kUnitRows = 2;

// Whether planes past the base field lie in pairs. An error if the layout is none of the CPU's.
bool is_paired(const std::string& layout);

// The work of a product at the widths that are active now.
struct Plan {
    std::vector<int32_t> widths;  // of all partitions
    std::vector<TileRow> rows;    // of tiles, of all segments
    int32_t widest;               // of these
    std::vector<int64_t> begins;  // rows where each thread begins, and the end
};

class PreparedWeight : public Weight::Prepared {
  public:
    // Of one segment.
    struct Rows {
        int64_t begin, end;                           // rows of tiles in the plan
        int64_t plane_stride;                         // bytes of a plane
        std::array<int64_t, kMaxWidth + 1> decoders;  // for each width that has some, where they begin
        // The codebooks of each width, one for each partition, as TileRow has them.
        std::array<std::vector<uint8_t>, kMaxWidth + 1> codebooks;
    };

    // Of segments whose planes and decoders have been checked.
    explicit PreparedWeight(const Weight& weight);

    bool paired() const { return paired_; }
    const std::vector<Rows>& segments() const { return segments_; }

    // An error if an active width is not resident. Made anew only if a width or the number of threads has changed.
    std::shared_ptr<const Plan> plan(const Weight& weight, int64_t threads) const;

  private:
    std::shared_ptr<const Plan> make_plan(const Weight& weight, int64_t threads) const;

    bool paired_;
    std::vector<Rows> segments_;
    mutable std::mutex mutex_;
    mutable std::shared_ptr<const Plan> plan_;
};

// What the CPU keeps with a weight. An error if it has no segments, or lies in another backend's layout.
const PreparedWeight& prepared_for_cpu(const Weight& weight);

}  // namespace matquant::cpu
