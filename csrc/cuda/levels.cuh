// The levels of codebooks as operands of the tensor cores.
//
// Levels are whole numbers of at most 8 bits, or sixteenths of such: both types of activations hold them exactly, so
// they are operands as they are, and a group's scale is applied to sums. A block looks them up in tables in its shared
// memory, two places of a four at a time, places 0 and 2 or 1 and 3, which are a word of an operand. Shared memory
// gives 128 bytes a clock, and these are two for each weight: at 2 and 3 bits that is what limits a product. So
// float16, whose mantissa has room for bytes, has tables of bytes there, one look-up for all four places.
//
// Up to four bits a table has all signs of an entry too. Of wider codes each two further bits have a table of their
// own, without signs, and levels are sums of whole units and sums of sixteenths.
#pragma once

#include "cuda/codebook.cuh"

namespace matquant::cuda {

// Two values of 16 bits.
template <class Element>
__device__ uint32_t pair_of(float first, float second) {
    const typename Element::Type values[2] = {Element::from_float(first), Element::from_float(second)};
    return *reinterpret_cast<const uint16_t*>(&values[0]) |
           static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&values[1])) << 16;
}

// What an index changes in the word of two places that are in different halves of a four: their signs.
__device__ inline uint32_t signs_of(uint32_t index) {
    return (changes_sign(index, 0) ? 0x8000u : 0) | (changes_sign(index, kPlaces - 1) ? 0x80000000u : 0);
}

// Two places' values for each setting of two further bits, of the two planes from `first_bit` on. Bits that a width
// does not have add nothing, so that whatever stands in their place does not matter.
class PlacePair {
  public:
    // `planes` has the base level, where there is one, and then `bits` increments, `unit` the size of one.
    __device__ PlacePair(const uint8_t* planes, int bits, int first_bit, int entry, int place, float unit) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint8_t* level = planes + entry * kPlaces + place + 2 * half;
            const float upper = first_bit < bits ? level[(first_bit + 1) * kEntryPlaneBytes] : 0.0f;
            const float lower = first_bit + 1 < bits ? level[(first_bit + 2) * kEntryPlaneBytes] : 0.0f;
            const float base = first_bit == 0 ? *level - kZeroLevel : 0.0f;
#pragma unroll
            for (int field = 0; field < 4; ++field) {
                values_[half][field] = unit * (base + (field & 2 ? upper : 0.0f) + (field & 1 ? lower : 0.0f));
            }
        }
    }
    // The fields of the first place are the lower bits.
    template <class Element>
    __device__ uint32_t word(int fields) const {
        return pair_of<Element>(values_[0][fields % 4], values_[1][fields / 4]);
    }

  private:
    float values_[2][4];
};

constexpr int kNumbers = 16 * kIndices;  // of an index and four further bits

// The tables of a width, and how its levels are looked up. `entry` and `pair` name the part that a thread fills in:
// there are as many of them as threads.

// Up to three bits float16 has the four levels as bytes, 128 more than they are, which become mantissas of values from
// 1024 on. At two bits each lane has a table in a memory bank of its own.
template <int width>
class ByteLevels {
  public:
    static constexpr int kCopies = width == 2 ? kLanes : 1;
    static constexpr int kFields = width == 2 ? 1 : 16;  // settings of the third bits
    static constexpr int kBytes = kIndices * kFields * kCopies * 4;
    static constexpr int kParts = 1;                 // of a level
    static constexpr uint32_t kExcess = 0x64806480;  // what values are more than levels: 1024 + 128, twice

    // The compiler is not to know the factor: it multiplies by others in the integer pipe, of which there is least. Nor
    // the magic value: it would bring selectors of bytes to registers for each use in its place.
    __device__ ByteLevels(uint8_t* memory, int lane)
        : memory_(memory),
          own_(memory + (width == 2 ? lane * 4 : 0)),
          number_bytes_(blockDim.x / kThreads * kCopies * 4),
          magic_(blockDim.x / kThreads * 0x64006400) {}

    __device__ void fill(const uint8_t* codebook, int entry, int pair) {
        const auto* planes = reinterpret_cast<const uint32_t*>(codebook) + entry;
        const uint32_t base = __ldg(planes), increments = width == 2 ? 0 : __ldg(planes + kEntries);
#pragma unroll
        for (int fields = 0; fields < kFields; ++fields) {
            const uint32_t four = base + (increments & places_of(fields));
#pragma unroll
            for (int sign = 0; sign < 2; ++sign) {
                const int index = entry + (2 * pair + sign) * kEntries;
                store((fields * kIndices + index) * kCopies, with_signs(four, index), entry);
            }
        }
    }

    // The row's words for places 0 and 2, and for 1 and 3.
    __device__ void look_up(const FourWords& row, int four, uint32_t (&words)[kParts][2]) const {
        const uint32_t number = number_of(row.indices, width == 2 ? 0 : row.thirds, four);
        const uint32_t found = *reinterpret_cast<const uint32_t*>(own_ + number * number_bytes_);
        words[0][0] = mask_or(found, magic_, 0x00ff00ff);
        words[0][1] = __byte_perm(found, magic_, 0x7351);
    }

  private:
    // The bytes whose third bits are set: of places 1, 0, 3 and 2.
    __device__ static constexpr uint32_t places_of(int fields) {
        return (fields & 1 ? 0xff00u : 0) | (fields & 2 ? 0xffu : 0) | (fields & 4 ? 0xff000000u : 0) |
               (fields & 8 ? 0xff0000u : 0);
    }
    // 256 less each byte of a half that changes its sign; no byte is 0, so nothing is carried from one to another.
    __device__ static uint32_t with_signs(uint32_t four, int index) {
        const uint32_t first = four & 0xffff, last = four >> 16;
        return ((changes_sign(index, 0) ? 0x10100 - first : first) & 0xffff) |
               (changes_sign(index, kPlaces - 1) ? 0x10100 - last : last) << 16;
    }
    __device__ void store(int place, uint32_t four, int entry) const {
        auto* table = reinterpret_cast<uint32_t*>(memory_) + place;
        if constexpr (kCopies == 1) {
            *table = four;
        } else {
#pragma unroll
            for (int copies = 0; copies < kCopies; copies += 4) {
                // Each thread begins elsewhere, so that few of them write to the same banks.
                *reinterpret_cast<uint4*>(table + (copies + 4 * entry) % kCopies) = {four, four, four, four};
            }
        }
    }

    uint8_t *memory_, *own_;  // all of it, and a lane's copy
    uint32_t number_bytes_, magic_;
};

// Both words of a four next to each other, so that one look-up reads them, at two bits. There are copies for all lanes
// that read at once, each in banks of its own.
template <class Element>
class FourLevels {
  public:
    static constexpr int kBytes = kIndices * 16 * 8;
    static constexpr int kParts = 1;
    static constexpr uint32_t kExcess = 0;

    __device__ FourLevels(uint8_t* memory, int lane) : memory_(memory), copy_(lane % kCopies * 8) {
        asm("" : "+r"(copy_));  // in a register, or each look-up would compute it anew
    }

    __device__ void fill(const uint8_t* codebook, int entry, int pair) {
        const uint32_t first = PlacePair(codebook, 0, 0, entry, 0, 1.0f).template word<Element>(0);
        const uint32_t second = PlacePair(codebook, 0, 0, entry, 1, 1.0f).template word<Element>(0);
#pragma unroll
        for (int sign = 0; sign < 2; ++sign) {
            const int index = entry + (2 * pair + sign) * kEntries;
            const uint32_t signs = signs_of(index);
            const uint2 four = {first ^ signs, second ^ signs};
#pragma unroll
            for (int copy = 0; copy < kCopies; ++copy) {
                // Each thread begins elsewhere, so that few of them write to the same banks.
                *reinterpret_cast<uint2*>(memory_ + index * kCopies * 8 + (copy + entry) % kCopies * 8) = four;
            }
        }
    }

    // The row's words for places 0 and 2, and for 1 and 3.
    __device__ void look_up(const FourWords& row, int four, uint32_t (&words)[kParts][2]) const {
        const uint32_t place = number_of(row.indices, 0, four) * (kCopies * 8) + copy_;
        const uint2 found = *reinterpret_cast<const uint2*>(memory_ + place);
        words[0][0] = found.x;
        words[0][1] = found.y;
    }

  private:
    static constexpr int kCopies = 16;

    uint8_t* memory_;
    uint32_t copy_;
};

// A word for each setting of two places' further bits, at three and four bits.
template <class Element, int width>
class PairLevels {
  public:
    static constexpr int kBytes = 2 * kNumbers * 4;
    static constexpr int kParts = 1;
    static constexpr uint32_t kExcess = 0;

    __device__ PairLevels(uint8_t* memory, int) : memory_(memory) {}

    __device__ void fill(const uint8_t* codebook, int entry, int pair) {
        const PlacePair places(codebook, width - kBaseBits, 0, entry, pair, 1.0f);
        auto* table = reinterpret_cast<uint32_t*>(memory_) + pair * kNumbers;
#pragma unroll
        for (int fields = 0; fields < 16; ++fields) {
            const uint32_t word = places.word<Element>(fields);
#pragma unroll
            for (int index = entry; index < kIndices; index += kEntries) {
                table[fields * kIndices + index] = word ^ signs_of(index);
            }
        }
    }

    __device__ void look_up(const FourWords& row, int four, uint32_t (&words)[kParts][2]) const {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            const uint32_t number = number_of(row.indices, bits_of_pair(row.further[0], pair), four);
            words[0][pair] = reinterpret_cast<const uint32_t*>(memory_)[pair * kNumbers + number];
        }
    }

  private:
    uint8_t* memory_;
};

// Past four bits. The parts of a level are whole units and sixteenths; of the last two bits there are no whole ones. A
// number leaves room where an index has its signs: there are the tables of the other pair and of other bits.
template <class Element, int width>
class SummedLevels {
  public:
    static constexpr int kTwos = further_twos(width);
    static constexpr int kBytes = kNumbers * (kTwos > 2 ? 12 : 8);
    static constexpr int kParts = 2;
    static constexpr uint32_t kExcess = 0;

    __device__ SummedLevels(uint8_t* memory, int) : memory_(memory) {}

    __device__ void fill(const uint8_t* codebook, int entry, int pair) {
        constexpr int kWhole = coarse_planes(width);
        const uint8_t* fine = codebook + kWhole * kEntryPlaneBytes;
#pragma unroll
        for (int two = 0; two < kTwos; ++two) {
            const PlacePair whole(codebook, kWhole - 1, 2 * two, entry, pair, 1.0f);
            const PlacePair sixteenths(fine, width - kBaseBits, 2 * two, entry, pair, kFineUnit);
#pragma unroll
            for (int fields = 0; fields < 16; ++fields) {
                const uint32_t number = fields * kIndices + entry, low = sixteenths.template word<Element>(fields);
                if (two < 2) {
                    both(two, pair)[number] = {whole.template word<Element>(fields), low};
                } else {
                    last(pair)[number] = low;
                }
            }
        }
    }

    __device__ void look_up(const FourWords& row, int four, uint32_t (&words)[kParts][2]) const {
        const uint32_t entries = row.indices & 0x3f3f3f3f;
        // The uppermost bits of bytes 1 and 3 are the signs of the two halves.
        const uint32_t signs =
            permute_bytes(row.indices, row.indices << 1, (8 + four) * 0x11 | (12 + four) * 0x1100) & 0x80008000;
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            uint32_t whole, sixteenths;
#pragma unroll
            for (int two = 0; two < kTwos; ++two) {
                const uint32_t number = number_of(entries, bits_of_pair(row.further[two], pair), four);
                if (two == 2) {
                    sixteenths = Element::add(sixteenths, last(pair)[number]);
                    continue;
                }
                const uint2 found = both(two, pair)[number];
                whole = two == 0 ? found.x : Element::add(whole, found.x);
                sixteenths = two == 0 ? found.y : Element::add(sixteenths, found.y);
            }
            words[0][pair] = whole ^ signs;
            words[1][pair] = sixteenths ^ signs;
        }
    }

  private:
    // Of the first four further bits, and of the last two.
    __device__ uint2* both(int two, int pair) const {
        return reinterpret_cast<uint2*>(memory_) + (2 * two + pair) * kEntries;
    }
    __device__ uint32_t* last(int pair) const {
        return reinterpret_cast<uint32_t*>(memory_ + kNumbers * 8) + pair * kEntries;
    }

    uint8_t* memory_;
};

template <class Element, int width>
struct LevelsOf {
    using Type = SummedLevels<Element, width>;
};
template <class Element>
struct LevelsOf<Element, 2> {
    using Type = FourLevels<Element>;
};
template <class Element>
struct LevelsOf<Element, 3> {
    using Type = PairLevels<Element, 3>;
};
template <class Element>
struct LevelsOf<Element, 4> {
    using Type = PairLevels<Element, 4>;
};
template <>
struct LevelsOf<Half, 2> {
    using Type = ByteLevels<2>;
};
template <>
struct LevelsOf<Half, 3> {
    using Type = ByteLevels<3>;
};

}  // namespace matquant::cuda
