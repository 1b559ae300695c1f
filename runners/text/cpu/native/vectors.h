// Vectors of this CPU's width, and the micro-kernel that all other kernels use.
//
// The vector types of GCC and Clang make one source serve AVX-512, AVX2 and NEON. Weights may be
// float32, bfloat16, float16 or int8; arithmetic is always in float32.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // raised in GCC 12's header
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;
#elif defined(__aarch64__)
constexpr int LANES = 4, ROWS = 3;
#else
constexpr int LANES = 8, ROWS = 6;
#endif
constexpr int VECS = 2, WIDTH = LANES * VECS;  // columns of a tile, and of a panel of packed weights

template <class T, int N> struct Vec { typedef T type __attribute__((vector_size(N * sizeof(T)), aligned(sizeof(T)), may_alias)); };
using vf = Vec<float, LANES>::type;
using vi = Vec<int32_t, LANES>::type;
using vu = Vec<uint32_t, LANES>::type;

struct bf16 { uint16_t bits; };
using f16 = _Float16;  // needs GCC 12 or Clang 15

inline vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
inline vf load(const bf16* p) {
  const auto half = *reinterpret_cast<const Vec<uint16_t, LANES>::type*>(p);
  return reinterpret_cast<vf>(__builtin_convertvector(half, vu) << 16);
}
// Intrinsics, because compilers turn the generic conversions of these types into scalar code.
#if defined(__AVX512F__)
inline vf load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline vf load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#elif defined(__AVX2__) && defined(__F16C__)
inline vf load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline vf load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
#else
inline vf load(const f16* p) {
  return __builtin_convertvector(*reinterpret_cast<const Vec<f16, LANES>::type*>(p), vf);
}
inline vf load(const int8_t* p) {
  const auto byte = *reinterpret_cast<const Vec<int8_t, LANES>::type*>(p);
  return __builtin_convertvector(__builtin_convertvector(byte, vi), vf);
}
#endif

// e^x for x <= 0, accurate to about one unit in the last place: the polynomial of Cephes' expf.
inline vf exponential(vf input) {
  const vf x = input < -87.f ? vf{} - 87.f : input;
  const vi whole = __builtin_convertvector(x * 1.44269504f - 0.5f, vi);  // truncation rounds, for x <= 0
  const vf n = __builtin_convertvector(whole, vf);
  const vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  // Zero instead of a denormal: arithmetic with denormals is two orders of magnitude slower.
  return input < -87.f ? vf{} : p * reinterpret_cast<vf>((whole + 127) << 23);
}

// acc[R][WIDTH] += x[R][depth] @ w[depth][WIDTH], with all accumulators in registers. x is stored by
// column, [depth][R], if ROW is 0, else by row with a stride of ROW. Meanwhile `next` is prefetched.
template <int R, int ROW, class W>
inline void tile(const float* x, const W* w, int64_t w_stride, int64_t depth, float* acc,
                 int64_t acc_stride, const char* next, int64_t next_step) {
  vf sum[R][VECS];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECS; ++v) sum[r][v] = load(acc + r * acc_stride + v * LANES);
  for (int64_t i = 0; i < depth; ++i) {
    if (next_step) __builtin_prefetch(next + i * next_step, 0, 2);
    if (next_step > 64) __builtin_prefetch(next + i * next_step + 64, 0, 2);
    vf column[VECS];
    for (int v = 0; v < VECS; ++v) column[v] = load(w + i * w_stride + v * LANES);
    for (int r = 0; r < R; ++r) {
      const float scalar = ROW ? x[r * ROW + i] : x[i * R + r];
      for (int v = 0; v < VECS; ++v) sum[r][v] += scalar * column[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < VECS; ++v)
      *reinterpret_cast<vf*>(acc + r * acc_stride + v * LANES) = sum[r][v];
}

template <int ROW = 0, class W>
void rows_by_columns(int64_t rows, const float* x, const W* w, int64_t w_stride, int64_t depth,
                     float* acc, int64_t acc_stride, const char* next, int64_t next_step) {
  switch (rows) {
#define TILE(R) case R: if constexpr (R <= ROWS) tile<R, ROW>(x, w, w_stride, depth, acc, acc_stride, next, next_step); break;
    TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
#undef TILE
  }
}

// m rows of k elements as the micro-kernel reads them: tiles of at most ROWS rows, each stored as
// [k][rows of the tile].
struct Rows {
  float* data;
  int64_t m, k, tiles, rows;  // rows: of each tile except the last, which may have fewer

  // Two small tiles are faster than a large one: the second reads weights that the first brought into
  // the cache, and meanwhile the next weights are prefetched.
  Rows(float* data, int64_t m, int64_t k)
      : data(data), m(m), k(k), tiles(m <= ROWS / 2 ? 1 : std::max<int64_t>(2, (m + ROWS - 1) / ROWS)),
        rows((m + tiles - 1) / tiles) {}

  // Rows stored one after the other, as in a tensor.
  static Rows row_major(float* data, int64_t m, int64_t k) {
    Rows rows(data, m, k);
    rows.tiles = m, rows.rows = 1;
    return rows;
  }

  int64_t height(int64_t tile) const { return std::min(rows, m - tile * rows); }
  const float* column(int64_t tile, int64_t column) const {
    return data + tile * rows * k + column * height(tile);
  }
  // The elements of row r are at(r)[0], at(r)[stride(r)], at(r)[2 * stride(r)], ...
  float* at(int64_t r) const { return data + r / rows * rows * k + r % rows; }
  int64_t stride(int64_t r) const { return height(r / rows); }
};

}  // namespace
