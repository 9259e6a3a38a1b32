// The torch op decode_attention on the CPU. Its schema and the shapes stand in r1kernels/attention/decode.py.
#include <algorithm>
#include <utility>
#include <vector>

#include "attention/cpu.h"
#include "common/share.h"
#include "common/stable.h"

namespace r1kernels {

namespace {

constexpr int64_t kItemRows = 16;  // of one head, which follow each other: the next row often reads the same prefixes

// A tensor whose last dimension is contiguous, of this size.
Vectors vectors_of(const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> sizes) {
    const int64_t dimensions = static_cast<int64_t>(sizes.size());
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": wrong dtype");
    STD_TORCH_CHECK(tensor.dim() == dimensions, name, ": expected ", dimensions, " dimensions, got ", tensor.dim());
    STD_TORCH_CHECK(tensor.stride(dimensions - 1) == 1 || tensor.size(dimensions - 1) <= 1, name,
                    ": expected a contiguous last dimension");
    int64_t dimension = 0;
    for (int64_t size : sizes) {
        STD_TORCH_CHECK(size < 0 || tensor.size(dimension) == size, name, ": expected size ", size, " at dimension ",
                        dimension, ", got ", tensor.size(dimension));
        ++dimension;
    }
    Vectors vectors = {static_cast<char*>(tensor.data_ptr()), {}};
    for (int64_t i = 0; i + 1 < dimensions; ++i) {
        vectors.strides[i] = tensor.stride(i) * static_cast<int64_t>(tensor.element_size());
    }
    return vectors;
}

// Rows are written by several threads at once: no two entries may share memory.
void check_apart(const char* name, const Tensor& tensor) {
    std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride and size
    for (int64_t i = 0; i < tensor.dim(); ++i) dimensions.emplace_back(tensor.stride(i), tensor.size(i));
    std::sort(dimensions.begin(), dimensions.end());
    int64_t extent = 1;
    for (const auto& [stride, size] : dimensions) {
        if (size <= 1) continue;
        STD_TORCH_CHECK(stride >= extent, name, ": expected entries that do not overlap");
        extent = stride * size;
    }
}

const int64_t* of_rows(const char* name, const Tensor& tensor, int64_t rows) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long, name, ": expected int64");
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == rows && tensor.is_contiguous(), name,
                    ": expected a contiguous tensor of ", rows, " entries");
    return static_cast<const int64_t*>(tensor.data_ptr());
}

void check_range(const char* name, const int64_t* values, int64_t rows, int64_t end) {
    for (int64_t row = 0; row < rows; ++row) {
        STD_TORCH_CHECK(values[row] >= 0 && values[row] < end, name, ": expected values in [0, ", end, "), got ",
                        values[row], " at position ", row);
    }
}

Tensor decode_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& key_cache,
                        const Tensor& value_cache, const Tensor& lengths, const std::vector<Tensor>& keys,
                        const std::vector<Tensor>& values, const std::vector<Tensor>& prefix_lengths,
                        const std::vector<Tensor>& places, const std::vector<int64_t>& widths,
                        const std::optional<Tensor>& sinks, double scale, int64_t window, double softcap) {
    const ScalarType dtype = query.scalar_type();
    DecodeAttention call = {};
    call.element = element_of("query", query);
    STD_TORCH_CHECK(query.dim() == 3 && key.dim() == 3 && value.dim() == 3, "query, key, value: expected 3 dimensions");
    const int64_t rows = call.rows = query.size(0), query_heads = query.size(1);
    call.heads = key.size(1);
    call.key_size = key.size(2);
    call.value_size = value.size(2);
    STD_TORCH_CHECK(call.heads > 0 && query_heads % call.heads == 0, "query: expected a multiple of ", call.heads, " heads");
    call.group = query_heads / call.heads;
    call.query = vectors_of("query", query, dtype, {rows, query_heads, call.key_size});
    call.key = vectors_of("key", key, dtype, {rows, call.heads, call.key_size});
    call.value = vectors_of("value", value, dtype, {rows, call.heads, call.value_size});
    const size_t prefixes = keys.size();
    STD_TORCH_CHECK(prefixes < static_cast<size_t>(kMostLevels), "prefixes: expected fewer than ", kMostLevels);
    STD_TORCH_CHECK(values.size() == prefixes && prefix_lengths.size() == prefixes && places.size() == prefixes &&
                        widths.size() == prefixes,
                    "prefixes: expected as many of each");
    call.level_count = static_cast<int64_t>(prefixes) + 1;
    std::vector<int64_t> text(rows, 1);
    for (int64_t l = 0; l < call.level_count; ++l) {
        const bool own = l + 1 == call.level_count;
        const Tensor &k = own ? key_cache : keys[l], &v = own ? value_cache : values[l];
        STD_TORCH_CHECK(k.dim() == 4, "keys: expected 4 dimensions, got ", k.dim());
        const int64_t nodes = k.size(0), tokens = k.size(2);
        DecodeLevel& level = call.levels[l];
        level.keys = vectors_of("keys", k, dtype, {nodes, call.heads, tokens, call.key_size});
        level.values = vectors_of("values", v, dtype, {nodes, call.heads, tokens, call.value_size});
        if (own) {
            check_apart("key_cache", k);
            check_apart("value_cache", v);
        }
        level.lengths = of_rows("lengths", own ? lengths : prefix_lengths[l], rows);
        check_range("lengths", level.lengths, rows, own ? tokens : tokens + 1);
        level.width = own ? 1 : widths[l];
        STD_TORCH_CHECK(level.width >= 1, "width: expected at least 1, got ", level.width);
        if (!own && places[l].numel() > 0) {
            level.place = of_rows("place", places[l], rows);
            check_range("place", level.place, rows, nodes * level.width);
        } else {
            STD_TORCH_CHECK(nodes * level.width >= rows, "keys: expected nodes for ", rows, " rows, got ", nodes);
        }
        for (int64_t row = 0; row < rows; ++row) text[row] += level.lengths[row];
    }
    STD_TORCH_CHECK(window >= 0, "window: expected at least 0, got ", window);
    call.scale = static_cast<float>(scale);
    call.window = window;
    call.softcap = static_cast<float>(softcap);
    if (sinks) {
        STD_TORCH_CHECK(sinks->scalar_type() == ScalarType::Float && sinks->is_contiguous() && sinks->numel() == query_heads,
                        "sinks: expected a contiguous float32 tensor of ", query_heads, " entries");
        call.sinks = static_cast<const float*>(sinks->data_ptr());
    }
    const Tensor out = empty_on(query, {rows, query_heads, call.value_size}, dtype);
    if (rows == 0) return out;
    call.out = out.data_ptr();

    int64_t longest = 0, seen = 0;
    for (int64_t tokens : text) {
        if (window > 0) tokens = std::min(tokens, window);
        longest = std::max(longest, tokens);
        seen += tokens;
    }
    const AttentionKernels& kernels = chosen_attention_kernels();
    const int64_t items = (rows + kItemRows - 1) / kItemRows;
    share(call.heads * items, seen * query_heads * (call.key_size + call.value_size), decode_scratch(call, longest),
          [&](int64_t item, void* scratch) {
              const int64_t first = item % items * kItemRows;
              kernels.decode(call, item / items, first, std::min(first + kItemRows, rows), scratch);
          });
    return out;
}

STABLE_TORCH_LIBRARY_IMPL(r1kernels, CPU, library) {
    library.impl("decode_attention_cpu", TORCH_BOX(&decode_attention));
}

}  // namespace

}  // namespace r1kernels
