// The scalar type of a call, from the name of its elements.
#pragma once

#include "common/elements.cuh"
#include "moe/element.h"

namespace r1kernels::moe {

// run(a value of the scalar type that `element` names)
template <class Run>
int with_scalar(Element element, Run run) {
    switch (element) {
        case Element::float32: return run(float{});
        case Element::float16: return run(__half{});
        case Element::bfloat16: return run(__nv_bfloat16{});
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace r1kernels::moe
