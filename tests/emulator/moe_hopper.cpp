// The Hopper kernels of the grouped products and their plan under the emulator, for pytest. Addresses come as integers
// (Tensor.data_ptr()).
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <vector>

#include "common/launch.cuh"
#include "moe/cuda_sm90a_rows.cuh"
#include "moe/cuda_sm90a_weights.cuh"

namespace nb = nanobind;
using namespace r1kernels;
using namespace r1kernels::moe::hopper;

namespace {

constexpr int64_t kProcessors = 3;  // of the emulated device: blocks have several tiles each

template <class T>
T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

// Members by name; the rest is 0.
template <class Value>
Value get(const nb::dict& call, const char* name) {
    return call.contains(name) ? nb::cast<Value>(call[name]) : Value{};
}
template <class T>
T* pointer(const nb::dict& call, const char* name) { return at<T>(get<uintptr_t>(call, name)); }

R1kernelsMoeSchedule schedule_of(const nb::dict& call) {
    R1kernelsMoeSchedule schedule = {};
    schedule.rows = get<int64_t>(call, "rows");
    schedule.experts = get<int64_t>(call, "experts");
    schedule.tile_rows = kBlockM;
    schedule.tile_count = get<int64_t>(call, "tile_count");
    schedule.tiles = pointer<R1kernelsMoeTile>(call, "tiles");
    schedule.bounds = pointer<int32_t>(call, "bounds");
    return schedule;
}

R1kernelsMoeRows rows_of(const nb::dict& call, const std::string& name) {
    return {pointer<const void>(call, name.c_str()), pointer<const int32_t>(call, (name + "_index").c_str()),
            get<int32_t>(call, "divisor")};
}

R1kernelsMoeProduct product_of(const nb::dict& call) {
    R1kernelsMoeProduct product = {};
    product.element = Element{get<int32_t>(call, "element")};
    product.epilogue = R1kernelsMoeEpilogue(get<int32_t>(call, "epilogue"));
    product.gating = {Activation{get<int32_t>(call, "activation")}, 1.0f, INFINITY, 0.0f};
    product.transposed = get<int32_t>(call, "transposed");
    product.clear_rest = get<int32_t>(call, "clear_rest");
    product.x = rows_of(call, "x");
    product.weight = pointer<const void>(call, "weight");
    product.columns = get<int64_t>(call, "columns");
    product.depth = get<int64_t>(call, "depth");
    product.schedule = schedule_of(call);
    product.out = pointer<void>(call, "out");
    product.activated = pointer<void>(call, "activated");
    product.pre_activation = pointer<const void>(call, "pre_activation");
    product.scales = pointer<const float>(call, "scales");
    product.order = pointer<const int32_t>(call, "order");
    product.partials = pointer<float>(call, "partials");
    product.scale = call.contains("scale") ? get<float>(call, "scale") : 1.0f;
    product.low.rows = pointer<const void>(call, "low");
    return product;
}

R1kernelsMoeWeightProduct weight_product_of(const nb::dict& call) {
    R1kernelsMoeWeightProduct product = {};
    product.element = Element{get<int32_t>(call, "element")};
    product.left = rows_of(call, "left");
    product.right = rows_of(call, "right");
    product.m = get<int64_t>(call, "m");
    product.n = get<int64_t>(call, "n");
    product.schedule = schedule_of(call);
    product.out = pointer<void>(call, "out");
    return product;
}

template <class Kernel, class Call>
int run(Kernel kernel, int64_t blocks, const Call& call) {
    return launch(kernel, blocks, kThreads, kSharedBytes, nullptr, call);
}

template <class Scalar>
int run_rows(const R1kernelsMoeProduct& product) {
    const RowPlan plan = plan_of(product, kProcessors);
    const RowCall call = {plan.x, plan.weight, product, static_cast<int>(plan.column_tiles),
                          static_cast<int>(plan.tiles)};
    return run(row_kernel_of<Scalar>(product), plan.blocks, call);
}

template <class Scalar>
int run_weights(const R1kernelsMoeWeightProduct& product) {
    const WeightPlan plan = plan_of(product, kProcessors);
    const WeightCall call = {plan.left, plan.right, product, static_cast<int>(plan.m_tiles),
                             static_cast<int>(plan.n_tiles), static_cast<int>(plan.tiles)};
    if (product.left.index != nullptr) return run(hopper_weights_kernel<Scalar, true, false>, plan.blocks, call);
    if (product.right.index != nullptr) return run(hopper_weights_kernel<Scalar, false, true>, plan.blocks, call);
    return run(hopper_weights_kernel<Scalar, false, false>, plan.blocks, call);
}

nb::dict described(const Boxes& boxes) {
    nb::dict dict;
    dict["dims"] = std::vector<uint64_t>(boxes.dims, boxes.dims + 3);
    dict["strides"] = std::vector<uint64_t>(boxes.strides, boxes.strides + 2);
    dict["box"] = std::vector<uint32_t>(boxes.box, boxes.box + 3);
    dict["bytes"] = boxes.bytes();
    return dict;
}

}  // namespace

NB_MODULE(moe_hopper, m) {
    m.def("set_seed", [](uint64_t seed) {
        emulator::set_seed(seed);
        machine::coin = {seed};
    });
    m.def("takes_product", [](const nb::dict& call) { return takes(product_of(call)); });
    m.def("takes_weight_product", [](const nb::dict& call) { return takes(weight_product_of(call)); });
    m.def("product", [](const nb::dict& call) {
        const auto product = product_of(call);
        return product.element == Element::float16 ? run_rows<__half>(product) : run_rows<__nv_bfloat16>(product);
    });
    m.def("weight_product", [](const nb::dict& call) {
        const auto product = weight_product_of(call);
        return product.element == Element::float16 ? run_weights<__half>(product) : run_weights<__nv_bfloat16>(product);
    });
    m.def("row_plan", [](const nb::dict& call, int64_t processors) {
        const RowPlan plan = plan_of(product_of(call), processors);
        nb::dict dict;
        dict["column_tiles"] = plan.column_tiles;
        dict["tiles"] = plan.tiles;
        dict["blocks"] = plan.blocks;
        dict["x"] = described(plan.x);
        dict["weight"] = described(plan.weight);
        return dict;
    });
    m.def("row_tiles", [](int tiles, int column_tiles) {
        std::vector<std::pair<int, int>> all;
        for (int t = 0; t < tiles; ++t) {
            const RowTile tile = row_tile_at(t, column_tiles);
            all.emplace_back(tile.row_tile, tile.column_tile);
        }
        return all;
    });
    m.def("weight_tiles", [](const nb::dict& call) {
        const WeightPlan plan = plan_of(weight_product_of(call), kProcessors);
        std::vector<std::tuple<int, int, int>> all;
        for (int t = 0; t < plan.tiles; ++t) {
            const WeightTile tile = weight_tile_at(t, static_cast<int>(plan.m_tiles), static_cast<int>(plan.n_tiles));
            all.emplace_back(tile.expert, tile.m_tile, tile.n_tile);
        }
        return all;
    });
    m.def("first_step_of", &first_step_of);
    m.def("k_major_offset", &k_major_offset);
    m.def("mn_major_offset", &mn_major_offset);
    m.attr("BLOCK_M") = kBlockM;
    m.attr("BLOCK_N") = kBlockN;
    m.attr("BLOCK_K") = kBlockK;
    m.attr("STAGES") = kStages;
    m.attr("GROUP") = kGroup;
    m.attr("STAGE_BYTES") = kStageBytesA + kStageBytesB;
    m.attr("SHARED_BYTES") = kSharedBytes;
    m.attr("PART_COLUMNS") = int{R1KERNELS_MOE_PART_COLUMNS};
}
