// Linear layers of few rows, whose weights are read from memory once.

#pragma once

#include <vector>

#include "threads.h"
#include "vectors.h"

namespace {

constexpr int64_t DEPTH = 128;    // rows of a panel that are processed at a time: at most half of L1
constexpr int64_t AHEAD = 16384;  // bytes that prefetching is ahead of reading

// A linear layer. Its weight [out][in] is packed as panels [ceil(out / WIDTH)][in][WIDTH].
struct Linear {
  const void* weight;
  const float *scale, *bias;  // per output; null: none
  int64_t in, out, type;      // 0 float32, 1 bfloat16, 2 float16, 3 int8

  int64_t panels() const { return (out + WIDTH - 1) / WIDTH; }

  // acc[m][WIDTH] = x @ panel^T * scale + bias
  void panel(const Rows& x, int64_t index, float* acc) const {
    switch (type) {
      case 0: sum(static_cast<const float*>(weight), x, index, acc); break;
      case 1: sum(static_cast<const bf16*>(weight), x, index, acc); break;
      case 2: sum(static_cast<const f16*>(weight), x, index, acc); break;
      case 3: sum(static_cast<const int8_t*>(weight), x, index, acc); break;
    }
    if (!scale && !bias) return;
    const int64_t first = index * WIDTH, columns = std::min<int64_t>(WIDTH, out - first);
    float factor[WIDTH], shift[WIDTH];
    for (int64_t c = 0; c < WIDTH; ++c) {
      factor[c] = scale && c < columns ? scale[first + c] : 1.f;
      shift[c] = bias && c < columns ? bias[first + c] : 0.f;
    }
    for (int64_t r = 0; r < x.m; ++r)
      for (int64_t c = 0; c < WIDTH; ++c) acc[r * WIDTH + c] = acc[r * WIDTH + c] * factor[c] + shift[c];
  }

 private:
  template <class W>
  void sum(const W* weights, const Rows& x, int64_t index, float* acc) const {
    const int64_t line = WIDTH * sizeof(W);
    std::fill(acc, acc + x.m * WIDTH, 0.f);
    for (int64_t k0 = 0; k0 < in; k0 += DEPTH) {
      const int64_t depth = std::min(DEPTH, in - k0);
      const W* block = weights + (index * in + k0) * WIDTH;
      for (int64_t t = 0; t < x.tiles; ++t) {
        // A single tile prefetches the weights that it reads soon; several tiles share prefetching
        // those of the next block.
        const char* ahead = reinterpret_cast<const char*>(block) + t * (line * depth / x.tiles);
        ahead += x.tiles == 1 ? AHEAD / 4 : AHEAD;
        rows_by_columns(x.height(t), x.column(t, k0), block, WIDTH, depth, acc + t * x.rows * WIDTH,
                        WIDTH, ahead, std::max<int64_t>(1, line / x.tiles));
      }
    }
  }
};

// All threads of a team call the functions below, and share their work.

// y[m][out] = x @ w^T
void multiply(TeamThread& thread, const Linear& w, const Rows& x, float* y) {
  std::vector<float> acc(x.m * WIDTH);
  thread.parallel_for(w.panels(), 1, [&](int64_t p, int64_t) {
    w.panel(x, p, acc.data());
    const int64_t columns = std::min<int64_t>(WIDTH, w.out - p * WIDTH);
    for (int64_t r = 0; r < x.m; ++r)
      std::copy_n(acc.data() + r * WIDTH, columns, y + r * w.out + p * WIDTH);
  });
}

// Copies rows [m][k] into the layout of the micro-kernel.
void pack(TeamThread& thread, const float* x, const Rows& to) {
  thread.parallel_for(to.m, to.rows, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      float* row = to.at(r);
      const int64_t stride = to.stride(r);
      for (int64_t i = 0; i < to.k; ++i) row[i * stride] = x[r * to.k + i];
    }
  });
}

}  // namespace
