// Strips as matrices: what the windows of neighbouring sites of a row have together, as it lies in a patch in shared
// memory, [pixel][channel]; and where a lane finds the row of eight channels that it gives to ldmatrix.
#pragma once

#include "fragments.h"

namespace carafe::gpu::tensor {

constexpr int kMatrix = 8;  // rows of a matrix that ldmatrix loads, and elements of a row

// The pixels that the windows of Rows x Sites sites have together, row by row: pixel w is (w / kWidth, w % kWidth).
template <int Side, int Sites, int Rows = 1>
struct StripWindow {
  static constexpr int kSites = Sites, kWidth = Side + Sites - 1, kPixels = (Side + Rows - 1) * kWidth;
  static constexpr int kMatrices = (kPixels + kMatrix - 1) / kMatrix;

  // Beyond the last pixel come others of this window again, of the same banks, to be multiplied by zero: nothing else
  // reaches the strip's sums.
  static __host__ __device__ constexpr int pixel(int w) {
    return w < kPixels ? w : kPixels - kMatrix + (w - kPixels) % kMatrix;
  }
  // The tap by which a site of the first row reads pixel w; -1 where it does not.
  static __host__ __device__ constexpr int tap(int w, int site) {
    const int row = w / kWidth, column = w % kWidth - site;
    return row < Side && column >= 0 && column < Side ? row * Side + column : -1;
  }
};

// A patch. Pixels have an odd number of units of eight channels, and rows are apart such that eight pixels of a strip's
// window that follow one another use all banks once.
template <class Strip, int Rows, int Columns, int Channels>
struct Patch {
  static constexpr int kRows = Rows, kColumns = Columns, kChannels = Channels;
  static constexpr int kPixelUnits = Channels / kMatrix + 1;
  static constexpr int kRowUnits =
      Columns * kPixelUnits + (Strip::kWidth % 8 == 0 ? 0 : (Strip::kWidth + 7 * Columns) * kPixelUnits % 8);
  static constexpr int kPixel = kPixelUnits * kMatrix, kRow = kRowUnits * kMatrix;
  static constexpr int kSize = Rows * kRow;
  static_assert(Channels % (2 * kMatrix) == 0, "a pixel has an odd number of units");

  static __host__ __device__ constexpr int at(int row, int column) { return row * kRow + column * kPixel; }
  // Pixel w of the strip whose first window begins at the patch's first pixel.
  static __host__ __device__ constexpr int at_window(int w) {
    const int pixel = Strip::pixel(w);
    return at(pixel / Strip::kWidth, pixel % Strip::kWidth);
  }
  // What a lane gives to load_matrices<4>, from pixel `first` of the window on: pixels 0 to 7 and channels 0 to 7,
  // then eight more channels, then both again of the next eight pixels. Transposed they are A of channels x pixels.
  static __device__ __forceinline__ int channels_by_pixels(int lane, int first) {
    return at_window(first + lane / 16 * kMatrix + lane % kMatrix) + lane / kMatrix % 2 * kMatrix;
  }
  // The same, but first the next eight pixels, then the next channels. As it lies this is A of pixels x channels.
  static __device__ __forceinline__ int pixels_by_channels(int lane, int first) {
    return at_window(first + lane % 16) + lane / 16 * kMatrix;
  }
};

}  // namespace carafe::gpu::tensor
