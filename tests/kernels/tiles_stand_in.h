// The tile registers of AMX in plain C++, so that every machine tests the kernel, and sanitizers see what it reads.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace matquant::cpu {
namespace {

constexpr int kTileRegisters = 8;
constexpr int kRegisterRows = 16;
constexpr int64_t kRegisterRowBytes = 64;

struct TileRegister {
    int rows = 0;  // none before `configure` and after `release`
    uint8_t bytes[kRegisterRows][kRegisterRowBytes];
};

struct Tiles {
    static inline thread_local TileRegister registers[kTileRegisters];

    static void require(bool condition) {
        if (!condition) {
            std::abort();
        }
    }
    static void configure(const uint8_t (&rows)[kTileRegisters]) {
        for (int index = 0; index < kTileRegisters; ++index) {
            require(rows[index] >= 1 && rows[index] <= kRegisterRows);
            registers[index] = {.rows = rows[index], .bytes = {}};
        }
    }
    static void release() {
        for (TileRegister& each : registers) {
            each.rows = 0;
        }
    }

    template <int index>
    static void zero() {
        require(registers[index].rows > 0);
        std::memset(registers[index].bytes, 0, sizeof(registers[index].bytes));
    }
    template <int index>
    static void load(const void* source, int64_t stride) {
        require(registers[index].rows > 0);
        for (int row = 0; row < registers[index].rows; ++row) {
            std::memcpy(registers[index].bytes[row], static_cast<const uint8_t*>(source) + row * stride,
                        kRegisterRowBytes);
        }
    }
    template <int index>
    static void store(void* target, int64_t stride) {
        require(registers[index].rows > 0);
        for (int row = 0; row < registers[index].rows; ++row) {
            std::memcpy(static_cast<uint8_t*>(target) + row * stride, registers[index].bytes[row], kRegisterRowBytes);
        }
    }
    template <int sums, int left, int right>
    static void dot() {
        const int rows = registers[sums].rows;
        require(rows > 0 && registers[left].rows == rows && registers[right].rows == kRegisterRows);
        for (int row = 0; row < rows; ++row) {
            int32_t totals[kRegisterRowBytes / 4];
            std::memcpy(totals, registers[sums].bytes[row], sizeof(totals));
            for (int64_t column = 0; column < kRegisterRowBytes; ++column) {
                for (int64_t output = 0; output < kRegisterRowBytes / 4; ++output) {
                    totals[output] += static_cast<int8_t>(registers[left].bytes[row][column]) *
                                      registers[right].bytes[column / 4][4 * output + column % 4];
                }
            }
            std::memcpy(registers[sums].bytes[row], totals, sizeof(totals));
        }
    }
};

}  // namespace
}  // namespace matquant::cpu
