// Tensor cores' instructions, for halves, from sm_80 on: a warp multiplies matrices that lie in its registers. A thread
// of it is g = lane / 4, t = lane % 4; a register has two neighbouring elements of a row of A (rows of a sum, or
// depth of B), the first of them in its low half.
//
//     A, 16 x 16        a[0]: row g, columns 2t and 2t + 1;  a[1]: row g + 8;  a[2], a[3]: the same, eight columns on
//     B, 16 x 8         b[0]: column g, rows 2t and 2t + 1;  b[1]: eight rows on
//     A x B, 16 x 8     sums[0], sums[1]: row g, columns 2t and 2t + 1;  sums[2], sums[3]: row g + 8
#pragma once

#include "../tile.h"

namespace carafe::gpu::tensor {

// Whether the code that is being compiled may use them; what a kernel does is in `if constexpr` of this.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kAvailable = false;
#else
constexpr bool kAvailable = true;
#endif
// Bytes of shared memory that a multiprocessor has, of the architecture that is being compiled for.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kSharedOfMultiprocessor = 100 << 10;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kSharedOfMultiprocessor = 164 << 10;
#else
constexpr int kSharedOfMultiprocessor = 228 << 10;
#endif
constexpr int kLeastMajor = 8;  // compute capability of a device that has them

// sums += A x B.
template <class T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, Half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// The same to a depth of 8: a[0], a[1] and b[0] of the above.
template <class T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[2], uint32_t b) {
  if constexpr (std::is_same_v<T, Half>) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  }
}

// Loads `Count` matrices of 8 x 8 from shared memory, 1, 2 or 4. `row`: lanes 0 to 7 give the rows of the first matrix,
// the next eight those of the second, ...; a row is 16 aligned bytes. A register has row g, columns 2t and 2t + 1;
// Transposed, rows 2t and 2t + 1 of column g.
template <int Count, bool Transposed, class T>
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[Count], const T* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (Count == 4 && Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (Count == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (Count == 2 && Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(matrices[0]), "=r"(matrices[1])
                 : "r"(address)
                 : "memory");
  } else {
    static_assert(Count == 2, "4, or 2, matrices");
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(matrices[0]), "=r"(matrices[1])
                 : "r"(address)
                 : "memory");
  }
}

// A matrix of 8 x 8, a register of each thread, transposed.
__device__ __forceinline__ uint32_t transpose(uint32_t matrix) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(matrix));
  return transposed;
}

// Starts to copy so many bytes from global to shared memory, or zeros where there is nothing.
template <int Bytes>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool exists) {
  const int read = exists ? Bytes : 0;
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(read) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(from), "r"(read), "n"(Bytes)
                 : "memory");
  }
}

}  // namespace carafe::gpu::tensor
