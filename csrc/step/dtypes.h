// The dtypes of numbers in memory that a step takes, in one order for C++ and Python, and what they are computed in.
#pragma once
#include <cstdint>

namespace fastopt {

enum class DType : uint8_t { f32, f64, bf16, f16 };
constexpr const char* dtype_names[] = {"float32", "float64", "bfloat16", "float16"};   // as torch calls them
constexpr int dtype_count = sizeof(dtype_names) / sizeof(dtype_names[0]);

constexpr int64_t itemsize(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Whether the arithmetic for a parameter of this dtype, and so its scalars, is fp64; else it is fp32.
constexpr bool computes_in_f64(DType param) { return param == DType::f64; }

// Whether an update runs on memory itself, all of a parameter's state being of one dtype; else on blocks that are converted (apply.h).
constexpr bool runs_directly(DType param, DType state) {
  return state == param || (itemsize(param) == 2 && state == DType::f32) || (param == DType::f32 && itemsize(state) == 2);
}

}  // namespace fastopt
