// The geometry of one call and the index maps between its input and its output. No torch here: g++ and nvcc compile
// everything in this folder alone.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define CARAFE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CARAFE_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace carafe {

CARAFE_HOST_DEVICE int64_t ceil_div(int64_t numerator, int64_t denominator) {
  return (numerator + denominator - 1) / denominator;
}

// Rounds towards minus infinity, which C++ division does not.
CARAFE_HOST_DEVICE int64_t floor_div(int64_t numerator, int64_t denominator) {
  return numerator >= 0 ? numerator / denominator : -ceil_div(-numerator, denominator);
}

CARAFE_HOST_DEVICE int64_t smaller(int64_t first, int64_t second) { return first < second ? first : second; }

// Everything about a call but its data. All offsets are 64 bits wide: maps of more than 2^31 elements are ordinary.
struct Shape {
  int64_t batch, channels, height, width;  // features
  int64_t out_height, out_width;           // those of output_height(), output_width() that are wanted, the first ones
  int64_t kernel, groups;                  // k, G
  int64_t up, down;                        // the scale up / down, coprime

  // Of the whole output.
  CARAFE_HOST_DEVICE int64_t output_height() const { return ceil_div(height * up, down); }
  CARAFE_HOST_DEVICE int64_t output_width() const { return ceil_div(width * up, down); }

  CARAFE_HOST_DEVICE int64_t radius() const { return kernel / 2; }
  CARAFE_HOST_DEVICE int64_t taps() const { return kernel * kernel; }
  CARAFE_HOST_DEVICE int64_t mask_channels() const { return groups * taps(); }
  CARAFE_HOST_DEVICE int64_t group_channels() const { return channels / groups; }
  CARAFE_HOST_DEVICE int64_t group_of(int64_t channel) const { return channel / group_channels(); }

  CARAFE_HOST_DEVICE bool inside(int64_t row, int64_t column) const {
    return row >= 0 && row < height && column >= 0 && column < width;
  }

  // The source index of an output index, along either axis.
  CARAFE_HOST_DEVICE int64_t source(int64_t output) const { return output * down / up; }

  // The outputs of source s are first_output(s) .. first_output(s + 1) - 1 (before clipping to those that are wanted);
  // there may be none where down > up.
  CARAFE_HOST_DEVICE int64_t first_output(int64_t source) const { return ceil_div(source * up, down); }
};

// A four-dimensional tensor as kernels see it: any strides.
template <class T>
struct Map {
  T* data;
  int64_t batch_stride, channel_stride, row_stride, column_stride;

  CARAFE_HOST_DEVICE T* pointer(int64_t n, int64_t c, int64_t i, int64_t j) const {
    return data + n * batch_stride + c * channel_stride + i * row_stride + j * column_stride;
  }
  CARAFE_HOST_DEVICE bool has_adjacent_channels() const { return channel_stride == 1 && column_stride != 1; }
  CARAFE_HOST_DEVICE T& at(int64_t n, int64_t c, int64_t i, int64_t j) const { return *pointer(n, c, i, j); }
};

}  // namespace carafe
