// The tile registers of AMX, eight of 16 rows of 64 bytes, and the instructions that the kernel needs of them.
//
// Not the compiler's intrinsics: these take the numbers of registers as literals, and a kernel that is unrolled by
// templates has them as constants.
#pragma once

#include <cstdint>

namespace matquant::cpu {
namespace {

constexpr int kTileRegisters = 8;
constexpr int kRegisterRows = 16;
constexpr int64_t kRegisterRowBytes = 64;

struct Tiles {
    // Gives each register its number of rows, and zeros. Until `release` the thread owns the registers' state.
    static void configure(const uint8_t (&rows)[kTileRegisters]) {
        struct alignas(64) {
            uint8_t palette = 1;
            uint8_t start_row = 0;
            uint8_t reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } shapes;
        for (int index = 0; index < kTileRegisters; ++index) {
            shapes.row_bytes[index] = kRegisterRowBytes;
            shapes.rows[index] = rows[index];
        }
        __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
    }
    static void release() { __asm__ volatile("tilerelease"); }

    template <int index>
    static void zero() {
        __asm__ volatile("tilezero %%tmm%c0" ::"i"(index));
    }
    // Rows that lie `stride` bytes apart.
    template <int index>
    static void load(const void* source, int64_t stride) {
        __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(index), "r"(source), "r"(stride) : "memory");
    }
    template <int index>
    static void store(void* target, int64_t stride) {
        __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(index), "r"(target), "r"(stride) : "memory");
    }
    // sums[i][j] += sum over k of left[i][k] * right[k / 4][4 * j + k % 4]: signed bytes by unsigned ones, in int32.
    template <int sums, int left, int right>
    static void dot() {
        __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(left), "i"(right));
    }
};

}  // namespace
}  // namespace matquant::cpu
