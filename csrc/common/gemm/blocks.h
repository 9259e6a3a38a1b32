// Matrix products of small and middling blocks, for one thread, with float32 accumulators.
//
//   dot_product      C (m, n) = A B^T    A rows (m, k), B (n, k)     few rows: straight from memory, no packing
//   product_nt       C (m, n) = A B^T    A rows (m, k), B (n, k)     B packed by panels, transposed on the way
//   product_nn       C (m, n) = A B      A rows (m, k), B (k, n)     B packed by panels
//   product_tn       D (m, n) = A^T B    A rows (k, m), B rows (k, n), D in the dtype of A and B
//
// turned.h has another product_nt, for tile registers. With `onto` the packed products with C add to what it holds.
//
// C is float32 with a row stride that is a multiple of kPanel and at least n rounded up to it. "Rows" may be gathered.
// Every element of C is a sum of chains of additions along k (in dot_product of kLanes of them, by a tree), whose order
// depends on k alone: results do not depend on how a caller cuts m and n into blocks.
//
// Included only by files that are compiled once for each instruction set (see vector.h).
#pragma once

#include "common/gemm/amx.h"

namespace r1kernels::R1KERNELS_ISA {

// Row r of a matrix: data + (index ? index[r] : r) * stride.
template <typename T>
struct Rows {
    const T* data;
    int64_t stride;
    const int32_t* index;

    const T* operator[](int64_t row) const { return data + (index ? index[row] : row) * stride; }
    Rows from(int64_t row) const {
        return index ? Rows{data, stride, index + row} : Rows{data + row * stride, stride, nullptr};
    }
};

constexpr int64_t kChain = 128;  // cells: longer chains lose digits, and so much of a panel stays in the first-level cache

constexpr int64_t kBlockRows = 256;     // the most rows (m) of one call
constexpr int64_t kBlockColumns = 256;  // the most columns (n) of one call, a multiple of every kPanel
constexpr int64_t kBlockDepth = 384;  // cells along k that are packed at a time

// What one thread needs, 64-byte aligned: floats or cells, all of 4 bytes.
struct Workspace {
    float* base;
    float* product() const { return base; }                                       // (kBlockRows, kBlockColumns)
    void* left() const { return base + kBlockRows * kBlockColumns; }              // kBlockRows * kBlockDepth cells
    void* right() const { return base + kBlockRows * (kBlockColumns + kBlockDepth); }  // kPanel * kBlockDepth cells
    static constexpr int64_t kFloats = kBlockRows * (kBlockColumns + kBlockDepth) + 64 * kBlockDepth;
};

// --- tiles of rows, and the inner loop without packing ---

// Rows of a block in tiles of nearly equal size: a tile of one row would wait for its own additions. In tile registers all
// but the last are whole.
template <typename T>
struct Tiles {
    static constexpr int64_t kRows = kInTiles<T> ? kStripRows : kTileRows;
    int64_t rows, count;
    explicit Tiles(int64_t rows) : rows(rows), count((rows + kRows - 1) / kRows) {}
    int64_t first(int64_t tile) const {
        if constexpr (kInTiles<T>) return tile < count ? tile * kRows : rows;
        return tile * rows / count;
    }
};

constexpr int kDotRows = kLanes >= 16 ? 4 : 2;  // times kDotColumns are kLanes accumulators
constexpr int kDotColumns = kLanes / kDotRows;

// C (kRows, columns) = A B^T over k elements, for at most kDotColumns rows of B. With `ahead` the rows behind these are
// fetched meanwhile, into the second-level cache.
template <int kRows, typename T>
inline void dot_tile(const Rows<T>& a, const T* b, int64_t b_stride, int64_t columns, int64_t k, float* c,
                     int64_t c_stride, bool ahead) {
    constexpr int64_t kStep = AlongK<T>::kElements;
    const T* left[kRows];
    const T* right[kDotColumns];
    for (int i = 0; i < kRows; ++i) left[i] = a[i];
    for (int j = 0; j < kDotColumns; ++j) right[j] = b + (j < columns ? j : columns - 1) * b_stride;
    Floats sums[kLanes] = {};
    int64_t at = 0;
    for (; at + kStep <= k; at += kStep) {
        CellVector<T> columns_at[kDotColumns];
#pragma GCC unroll 8
        for (int j = 0; j < kDotColumns; ++j) columns_at[j] = AlongK<T>::load_whole(right[j] + at);
        if (ahead) {
#pragma GCC unroll 8
            for (int j = 0; j < kDotColumns; ++j) __builtin_prefetch(right[j] + kDotColumns * b_stride + at, 0, 2);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            const CellVector<T> row_at = AlongK<T>::load_whole(left[i] + at);
#pragma GCC unroll 8
            for (int j = 0; j < kDotColumns; ++j) {
                sums[i * kDotColumns + j] = multiply_add(sums[i * kDotColumns + j], row_at, columns_at[j]);
            }
        }
    }
    if (at < k) {
        for (int i = 0; i < kRows; ++i) {
            const CellVector<T> row_at = AlongK<T>::load_part(left[i] + at, k - at);
            for (int j = 0; j < kDotColumns; ++j) {
                sums[i * kDotColumns + j] = multiply_add(sums[i * kDotColumns + j], row_at,
                                                         AlongK<T>::load_part(right[j] + at, k - at));
            }
        }
    }
    float totals[kLanes];
    store(totals, sums_over_lanes(sums));
    for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < columns; ++j) c[i * c_stride + j] = totals[i * kDotColumns + j];
    }
}

// --- packing ---

// (m, depth) cells, row after row: elements [begin, begin + k) of each row of A.
template <typename T>
void pack_rows(const Rows<T>& a, int64_t m, int64_t begin, int64_t k, Cell<T>* to) {
    const int64_t depth = packed_cells<T>(k);
    for (int64_t row = 0; row < m; ++row) {
        const T* from = a[row] + begin;
        Cell<T>* cells = to + row * depth;
        int64_t cell = 0;
        for (; cell + kLanes <= depth; cell += kLanes) {
            store_vector(cells + cell, load_along_k(from + cell * kDepth<T>, k - cell * kDepth<T>));
        }
        if (cell < depth) {
            const CellVector<T> rest = load_along_k(from + cell * kDepth<T>, k - cell * kDepth<T>);
            memcpy(cells + cell, &rest, (depth - cell) * sizeof(Cell<T>));
        }
    }
}

// (depth, width) cells: columns [column, column + count) of rows [0, k); columns from `count` to `width` are 0.
template <typename T>
void pack_columns(const Rows<T>& a, int64_t k, int64_t column, int64_t count, int64_t width, Cell<T>* to) {
    for (int64_t row = 0; row < k; row += kDepth<T>) {
        const T* first = a[row] + column;
        const T* second = kDepth<T> == 2 && row + 1 < k ? a[row + 1] + column : nullptr;
        for (int64_t lane = 0; lane < width; lane += kLanes) {
            const int64_t left = count - lane;
            store_vector(to + lane, left > 0 ? down_k(first + lane, second ? second + lane : nullptr, left)
                                             : CellVector<T>{});
        }
        to += width;
    }
    memset(to, 0, (packed_cells<T>(k) - cells_of<T>(k)) * width * sizeof(Cell<T>));
}

// (whole strips, depth) cells: columns [column, column + count) of rows [0, k), turned into rows.
template <typename T>
void pack_turned(const Rows<T>& a, int64_t k, int64_t column, int64_t count, Cell<T>* to) {
    const int64_t depth = packed_cells<T>(k);
    for (int64_t cell = 0; cell < depth; cell += kLanes) {
        for (int64_t lane = 0; lane < count; lane += kLanes) {
            CellVector<T> block[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                const int64_t row = (cell + i) * kDepth<T>;
                const bool both = kDepth<T> == 2 && row + 1 < k;
                block[i] = row < k ? down_k(a[row] + column + lane, both ? a[row + 1] + column + lane : nullptr,
                                            count - lane)
                                   : CellVector<T>{};
            }
            transpose(block);
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) store_vector(to + (lane + i) * depth + cell, block[i]);
        }
    }
}

// (depth, width) cells: elements [begin, begin + k) of `count` rows of B, transposed; rows from there to `width` are 0.
template <typename T>
void pack_transposed(const Rows<T>& b, int64_t count, int64_t width, int64_t begin, int64_t k, Cell<T>* to) {
    const int64_t depth = packed_cells<T>(k);
    for (int64_t first = 0; first < width; first += kLanes) {
        for (int64_t cell = 0; cell < depth; cell += kLanes) {
            CellVector<T> block[kLanes];
            const int64_t at = cell * kDepth<T>;
#pragma GCC unroll 16
            for (int row = 0; row < kLanes; ++row) {
                block[row] = first + row < count ? load_along_k(b[first + row] + begin + at, k - at) : CellVector<T>{};
            }
            transpose(block);
            const int64_t filled = depth - cell < kLanes ? depth - cell : kLanes;
            if (filled == kLanes) {
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) store_vector(to + (cell + i) * width + first, block[i]);
            } else {
                for (int i = 0; i < filled; ++i) store_vector(to + (cell + i) * width + first, block[i]);
            }
        }
    }
}

// --- products ---

template <typename T>
void dot_product(const Rows<T>& a, int64_t m, const T* b, int64_t b_stride, int64_t n, int64_t k, float* c,
                 int64_t c_stride) {
    for (int64_t column = 0; column < n; column += kDotColumns) {
        const T* columns = b + column * b_stride;
        const int64_t count = n - column < kDotColumns ? n - column : kDotColumns;
        for (int64_t row = 0; row < m; row += kDotRows) {
            const Rows<T> rows = a.from(row);
            float* to = c + row * c_stride + column;
            switch (m - row) {
                case 1: dot_tile<1>(rows, columns, b_stride, count, k, to, c_stride, row == 0); break;
                case 2: dot_tile<2>(rows, columns, b_stride, count, k, to, c_stride, row == 0); break;
                case 3:
                    dot_tile<kDotRows < 3 ? kDotRows : 3>(rows, columns, b_stride, count, k, to, c_stride, row == 0);
                    break;
                default: dot_tile<kDotRows>(rows, columns, b_stride, count, k, to, c_stride, row == 0);
            }
        }
    }
}

// C (m, n) = A times what `pack_panel(begin, k, column, to)` packs for the panel from `column` on; where that is false, the
// panel has no columns.
template <typename T, typename PackPanel>
void packed_product(const Rows<T>& a, int64_t m, int64_t n, int64_t k, float* c, int64_t c_stride,
                    const Workspace& workspace, bool onto, const PackPanel& pack_panel) {
    [[maybe_unused]] const Registers<T> registers;
    auto* left = static_cast<Cell<T>*>(workspace.left());
    auto* right = static_cast<Cell<T>*>(workspace.right());
    const Tiles<T> tiles(m);
    for (int64_t begin = 0; begin < k; begin += kBlockDepth * kDepth<T>) {
        const int64_t size = k - begin < kBlockDepth * kDepth<T> ? k - begin : kBlockDepth * kDepth<T>;
        const int64_t depth = packed_cells<T>(size);
        pack_rows(a, m, begin, size, left);
        for (int64_t column = 0; column < n; column += kPanel) {
            if (!pack_panel(begin, size, column, right)) continue;
            for (int64_t cell = 0; cell < depth; cell += kChain) {
                const int64_t chain = depth - cell < kChain ? depth - cell : kChain;
                for (int64_t i = 0; i < tiles.count; ++i) {
                    const int64_t row = tiles.first(i);
                    const StridedCells<Cell<T>> rows = {left + row * depth + cell, depth, 1};
                    tile(tiles.first(i + 1) - row, rows, right + cell * kPanel, chain, c + row * c_stride + column,
                         c_stride, onto || begin + cell > 0);
                }
            }
        }
    }
}

template <typename T>
void product_nt(const Rows<T>& a, int64_t m, const T* b, int64_t b_stride, int64_t n, int64_t k, float* c,
                int64_t c_stride, const Workspace& workspace, bool onto = false) {
    packed_product(a, m, n, k, c, c_stride, workspace, onto,
                   [&](int64_t begin, int64_t size, int64_t column, Cell<T>* to) {
                       pack_transposed(Rows<T>{b, b_stride, nullptr}.from(column), n - column, kPanel, begin, size, to);
                       return true;
                   });
}

// Two products of the same rows: the second's columns stand from `apart` (a multiple of kPanel, at least n) on.
template <typename T>
void product_nt_pair(const Rows<T>& a, int64_t m, const T* first, const T* second, int64_t b_stride, int64_t n,
                     int64_t k, int64_t apart, float* c, int64_t c_stride, const Workspace& workspace,
                     bool onto = false) {
    packed_product(a, m, apart + n, k, c, c_stride, workspace, onto,
                   [&](int64_t begin, int64_t size, int64_t column, Cell<T>* to) {
                       const T* b = column < apart ? first : second;
                       const int64_t row = column < apart ? column : column - apart;
                       if (row >= n) return false;
                       pack_transposed(Rows<T>{b, b_stride, nullptr}.from(row), n - row, kPanel, begin, size, to);
                       return true;
                   });
}

template <typename T>
void product_nn(const Rows<T>& a, int64_t m, const T* b, int64_t b_stride, int64_t n, int64_t k, float* c,
                int64_t c_stride, const Workspace& workspace, bool onto = false) {
    packed_product(a, m, n, k, c, c_stride, workspace, onto,
                   [&](int64_t begin, int64_t size, int64_t column, Cell<T>* to) {
                       const int64_t count = n - column < kPanel ? n - column : kPanel;
                       pack_columns(Rows<T>{b + begin * b_stride, b_stride, nullptr}, size, column, count, kPanel, to);
                       return true;
                   });
}

template <typename T>
void store_row(const float* from, int64_t count, T* to, bool streamed = false) {
    int64_t i = 0;
    if (streamed && begins_line(to)) {
        for (; i + kLine<T> <= count; i += kLine<T>) stream_line(to + i, from + i);
    }
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
    if (i < count) store_some(to + i, load_front(from + i, count - i), static_cast<int>(count - i));
}

// D (m, n) = A^T B over k rows of both, A at columns [a_column, a_column + m), B at [b_column, b_column + n). Where D is
// part of a large result, it is streamed.
template <typename T>
void product_tn(const Rows<T>& a, int64_t a_column, int64_t m, const Rows<T>& b, int64_t b_column, int64_t n, int64_t k,
                T* d, int64_t d_stride, bool streamed, const Workspace& workspace) {
    if (k == 0) {
        memset(workspace.product(), 0, n * sizeof(float));
        for (int64_t row = 0; row < m; ++row) store_row(workspace.product(), n, d + row * d_stride, streamed);
        if (streamed) end_streams();
        return;
    }
    [[maybe_unused]] const Registers<T> registers;
    auto* left = static_cast<Cell<T>*>(workspace.left());
    auto* right = static_cast<Cell<T>*>(workspace.right());
    const Tiles<T> tiles(m);
    const int64_t width = whole_vectors(m), step = kBlockDepth * kDepth<T>;
    // where one chain is all, a tile is stored at once and all tiles share one place in the first-level cache
    const bool shared = cells_of<T>(k) <= kChain;
    const int64_t sums_stride = shared ? kPanel : kBlockColumns;
    for (int64_t begin = 0; begin < k; begin += step) {
        const int64_t size = k - begin < step ? k - begin : step, depth = packed_cells<T>(size);
        if constexpr (kInTiles<T>) {
            pack_turned(a.from(begin), size, a_column, m, left);
        } else {
            pack_columns(a.from(begin), size, a_column, m, width, left);
        }
        const int64_t row_step = kInTiles<T> ? depth : 1, cell_step = kInTiles<T> ? 1 : width;
        for (int64_t column = 0; column < n; column += kPanel) {
            const int64_t count = n - column < kPanel ? n - column : kPanel;
            pack_columns(b.from(begin), size, b_column + column, count, kPanel, right);
            for (int64_t cell = 0; cell < depth; cell += kChain) {
                const int64_t chain = depth - cell < kChain ? depth - cell : kChain;
                const bool last = begin + size == k && cell + chain == depth;
                for (int64_t i = 0; i < tiles.count; ++i) {
                    const int64_t row = tiles.first(i), rows = tiles.first(i + 1) - row;
                    float* sums = workspace.product() + (shared ? 0 : row * kBlockColumns + column);
                    tile(rows, StridedCells<Cell<T>>{left + row * row_step + cell * cell_step, row_step, cell_step},
                         right + cell * kPanel, chain, sums, sums_stride, begin + cell > 0);
                    for (int64_t r = 0; last && r < rows; ++r) {
                        store_row(sums + r * sums_stride, count, d + (row + r) * d_stride + column, streamed);
                    }
                }
            }
        }
    }
    if (streamed) end_streams();
}

}  // namespace r1kernels::R1KERNELS_ISA
