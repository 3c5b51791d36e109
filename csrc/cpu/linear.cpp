// matquant::linear on the CPU: finds the weight, packs the activations and has the threads multiply.
#include "cpu/linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "check.h"
#include "cpu/isa.h"
#include "cpu/layout.h"
#include "cpu/second_bytes.h"

namespace matquant::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPackingTokens = 8;     // the fewest that are worth a thread
constexpr int64_t kLine = 64;             // of the cache, in bytes
constexpr int64_t kPackingSpans = 16384;  // of all tokens, the fewest whose second bytes are worth one

Element element_of(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::BFloat16:
            return Element::kBFloat16;
        case ScalarType::Half:
            return Element::kHalf;
        case ScalarType::Float:
            return Element::kFloat;
        default:
            STD_TORCH_CHECK(false, "x: found dtype ", torch::headeronly::toString(dtype),
                            ", expected BFloat16, Half or Float");
    }
}

// Memory that is kept from call to call, on huge pages where it is large and the system has them: fresh pages would
// cost a hundredth of a prompt's time, and scattered ones collide in the second cache.
template <class T>
class Scratch {
  public:
    T* take(int64_t count) {
        if (count > capacity_) {
            const size_t size = ceil_div(count * sizeof(T), kHugePage) * kHugePage;
            data_.reset(static_cast<T*>(std::aligned_alloc(kHugePage, size)));
            STD_TORCH_CHECK(data_ != nullptr, "no memory for ", size, " bytes of activations");
#ifdef __linux__
            madvise(data_.get(), size, MADV_HUGEPAGE);
#endif
            capacity_ = count;
        }
        return data_.get();
    }

  private:
    static constexpr int64_t kHugePage = 1 << 21;
    struct Free {
        void operator()(T* data) const { std::free(data); }
    };
    std::unique_ptr<T, Free> data_;
    int64_t capacity_ = 0;
};

// How activations are rounded: see Product.
struct Rounding {
    int bits;
    float outlier;
};

constexpr float kNever = std::numeric_limits<float>::infinity();
constexpr Rounding kRoundings[] = {{8, kNever}, {8, 3.0f}, {8, 1.5f}};  // at widths from kMinWidth
static_assert(std::size(kRoundings) == kMostWidthOf8Bits - kMinWidth + 1);

// As many bits as lose nothing that matters: for float32 what keeps its precision, else what changes the model's
// predictions by less than a hundredth of what slices of this width do already (docs/design/cpu-kernels.md). All of a
// weight is rounded as its widest part asks for, so that what it gives does not depend on how it lies in segments, and
// activations are packed once.
Rounding choose_rounding(const Weight& weight, int32_t widest, Element element) {
    if (weight.activation_bits) {
        return {static_cast<int>(*weight.activation_bits), kNever};
    }
    if (element == Element::kFloat) {
        return {24, kNever};
    }
    return widest <= kMostWidthOf8Bits ? kRoundings[widest - kMinWidth] : Rounding{16, kNever};
}

// Activations of a block of tokens, packed: those of all tasks, one after the other.
struct PackedActivations {
    Scratch<uint8_t> steps;
    Scratch<uint8_t> second_bytes;
    Scratch<int32_t> second_counts;
    Scratch<Factor> factors;
};

// How much of each a task takes, or how much those before it have taken.
struct Room {
    int64_t steps = 0, second_bytes = 0, second_counts = 0, factors = 0;

    Room operator+(const Room& other) const {
        return {steps + other.steps, second_bytes + other.second_bytes, second_counts + other.second_counts,
                factors + other.factors};
    }
};

// A task and how it is divided.
struct Part {
    const Task* task;
    std::shared_ptr<const Plan> plan;
    std::vector<Product> products;  // of each segment, but for the tokens
    Room room;
};

// All but where its packed activations lie.
Part describe(const Task& task, int64_t threads) {
    const Weight& weight = *task.weight;
    const Kernel& kernel = *isa_in_use().kernel;
    const Span past = count_spans(weight.columns, weight.group_size);
    const int64_t tokens = std::min(task.tokens, kBlockTokens);
    Part part = {&task, task.prepared->plan(weight, threads), {}, {}};
    const Rounding rounding = choose_rounding(weight, part.plan->widest, task.product.element);
    const int64_t bytes = (past.chunk() * tokens + kSpareTokens) * kernel.chunk_bytes(rounding.bits);
    // In whole lines of the cache, as elements of four bytes or more are too.
    const auto whole = [](int64_t count) { return ceil_div(count, kLine) * kLine; };
    part.room = {whole(bytes), rounding.outlier == kNever ? 0 : whole(bytes), whole(past.index()),
                 whole(past.index() * tokens)};
    Product product = task.product;
    product.activation_bits = rounding.bits;
    product.outlier = rounding.outlier;
    for (const PreparedWeight::Rows& segment : task.prepared->segments()) {
        product.plane_stride = segment.plane_stride;
        part.products.push_back(product);
    }
    return part;
}

// Gives each task room for its packed activations.
void take_room(std::vector<Part>& parts, PackedActivations& scratch) {
    Room total;
    for (const Part& part : parts) {
        total = total + part.room;
    }
    uint8_t* steps = scratch.steps.take(total.steps);
    uint8_t* second_bytes = scratch.second_bytes.take(std::max<int64_t>(total.second_bytes, 1));
    int32_t* second_counts = scratch.second_counts.take(total.second_counts);
    Factor* factors = scratch.factors.take(total.factors);
    Room before;
    for (Part& part : parts) {
        for (Product& product : part.products) {
            product.activations = steps + before.steps;
            product.second_bytes = second_bytes + before.second_bytes;
            product.second_counts = second_counts + before.second_counts;
            product.factors = factors + before.factors;
        }
        before = before + part.room;
    }
}

// Points a task's products at its block of tokens.
void set_block(Part& part, int64_t first, int64_t count) {
    const Task& task = *part.task;
    const int64_t element_size = task.product.element == Element::kFloat ? 4 : 2;
    for (Product& product : part.products) {
        product.tokens = count;
        product.input = static_cast<const uint8_t*>(task.product.input) + first * product.columns * element_size;
        product.output = static_cast<uint8_t*>(task.product.output) + first * product.output_stride * element_size;
    }
}

// Packs the activations of a task's block of tokens, for all segments at once.
void pack(const Part& part) {
    const Kernel& kernel = *isa_in_use().kernel;
    const Product& any = part.products.front();
    torch::stable::parallel_for(0, any.tokens, kPackingTokens,
                                [&](int64_t begin, int64_t end) { kernel.pack(any, begin, end); });
    const int64_t spans = count_spans(any.columns, any.group_size).index();
    if (any.outlier == kNever) {
        std::fill_n(any.second_counts, spans, 0);
        return;
    }
    const int64_t bytes = kernel.chunk_bytes(any.activation_bits);
    torch::stable::parallel_for(0, spans, ceil_div(kPackingSpans, std::max<int64_t>(any.tokens, 1)),
                                [&](int64_t begin, int64_t end) { gather_second_bytes(any, bytes, begin, end); });
}

// A thread's rows of one bundle's products.
void multiply_rows(const Part* parts, size_t count, int64_t first_thread, int64_t last_thread) {
    const Kernel& kernel = *isa_in_use().kernel;
    const std::vector<int64_t>& begins = parts->plan->begins;
    for (size_t index = 0; index < parts->products.size(); ++index) {
        const PreparedWeight::Rows& segment = parts->task->prepared->segments()[index];
        const int64_t begin = std::max(segment.begin, begins[first_thread]);
        const int64_t end = std::min(segment.end, begins[last_thread]);
        const int64_t step = count == 1 ? end - begin : kUnitRows;
        for (int64_t row = begin; row < end; row += step) {
            for (const Part* part = parts; part < parts + count; ++part) {
                if (part->products[index].tokens > 0) {
                    kernel.multiply(part->products[index], part->plan->rows.data() + row, std::min(step, end - row));
                }
            }
        }
    }
}

}  // namespace

void multiply(const std::vector<Bundle>& bundles) {
    thread_local PackedActivations scratch;
    const int64_t threads = torch::stable::get_num_threads();
    std::vector<Part> parts;
    int64_t most_tokens = 0;
    for (const Bundle& bundle : bundles) {
        for (const Task& task : bundle) {
            parts.push_back(describe(task, threads));
            most_tokens = std::max(most_tokens, task.tokens);
        }
    }
    take_room(parts, scratch);
    for (int64_t first = 0; first < most_tokens; first += kBlockTokens) {
        for (Part& part : parts) {
            set_block(part, first, std::clamp<int64_t>(part.task->tokens - first, 0, kBlockTokens));
            pack(part);
        }
        torch::stable::parallel_for(0, threads, 1, [&](int64_t first_thread, int64_t last_thread) {
            const Part* part = parts.data();
            for (const Bundle& bundle : bundles) {
                multiply_rows(part, bundle.size(), first_thread, last_thread);
                part += bundle.size();
            }
        });
    }
}

Tensor empty_output(const Tensor& x, int64_t out_features) {
    STD_TORCH_CHECK(x.dim() > 0, "x: found a scalar, expected at least one dimension");
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = out_features;
    return torch::stable::empty(sizes, x.scalar_type());
}

Task make_task(const Weight& weight, const Tensor& x, const std::optional<Tensor>& bias, Tensor& output) {
    const PreparedWeight& prepared = prepared_for_cpu(weight);
    STD_TORCH_CHECK(x.size(-1) == weight.columns, "x: found ", x.size(-1), " columns, expected the weight's ",
                    weight.columns);
    const int64_t out_features = output.size(-1);
    STD_TORCH_CHECK(out_features == weight.out_features, "out_features: found ", out_features,
                    ", expected the weight's ", weight.out_features);
    const Element element = element_of(x.scalar_type());
    if (bias) {
        check_tensor("bias", *bias, x.scalar_type(), {out_features});
    }
    const Product product = {
        .columns = weight.columns,
        .group_size = weight.group_size,
        .plane_stride = 0,
        .paired = prepared.paired(),
        .decoder_kind = weight.decoder_kind,
        .activation_bits = 0,
        .outlier = kNever,
        .element = element,
        .tokens = 0,
        .input = x.const_data_ptr(),
        .activations = nullptr,
        .second_bytes = nullptr,
        .second_counts = nullptr,
        .factors = nullptr,
        .bias = bias ? bias->const_data_ptr() : nullptr,
        .output = output.mutable_data_ptr(),
        .output_stride = out_features,
    };
    return {&weight, &prepared, product, output.numel() / out_features};
}

namespace {

Tensor linear(const Tensor& x, const Tensor& handle, int64_t out_features, const std::optional<Tensor>& bias) {
    const std::shared_ptr<const Weight> weight = find_weight(handle);
    Tensor output = empty_output(x, out_features);
    const Tensor input = torch::stable::contiguous(x);
    multiply({{make_task(*weight, input, bias, output)}});
    return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(matquant, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }

}  // namespace matquant::cpu
