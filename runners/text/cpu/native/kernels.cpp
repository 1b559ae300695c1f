// The CPU kernels as C functions, which `library.py` calls through ctypes.

#include "decoder.h"

extern "C" {

int triptych_panel_width() { return WIDTH; }
int triptych_block_size() { return BLOCK; }

// x [m][in] -> y [m][out]
void triptych_linear(const Linear* layer, const float* x, float* y, int64_t m) {
  if (m == 0) return;
  const std::unique_ptr<float[]> buffer(new float[m * layer->in]);
  const Rows rows(buffer.get(), m, layer->in);
  parallel_region([&](TeamThread& thread) {
    pack(thread, x, rows);
    multiply(thread, *layer, rows, y);
  });
}

// x [rows][size] -> out [rows][size]
void triptych_rms_norm(const Norm* norm, const float* x, float* out, int64_t rows, int64_t size) {
  parallel_region([&](TeamThread& thread) {
    thread.parallel_for(rows, ROW_CHUNK, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) (*norm)(x + r * size, out + r * size, 1, size);
    });
  });
}

// x [m][gate_up.in] -> out [m][down.out]
void triptych_gated_mlp(const Linear* gate_up, const Linear* down, const float* x, float* out, int64_t m) {
  if (m == 0) return;
  const std::unique_ptr<float[]> buffer(new float[m * (gate_up->in + down->in)]);
  const Rows rows(buffer.get(), m, gate_up->in), inner(buffer.get() + m * gate_up->in, m, down->in);
  parallel_region([&](TeamThread& thread) {
    pack(thread, x, rows);
    gated_activation(thread, *gate_up, rows, inner);
    multiply(thread, *down, inner, out);
  });
}

// Writes the batch's keys and values into their blocks, then computes the attention of every row over
// its sequence. out is [rows][heads][value_size]; sinks [heads] or null.
void triptych_attention(const Heads* q, const Heads* k, const Heads* v, const LayerKV* kv, float* out,
                        const Segment* segments, int64_t count, const int32_t* block_tables,
                        const Shape* shape, const float* sinks) {
  const AttentionPlan plan(segments, count, block_tables, *shape);
  parallel_region([&](TeamThread& thread) {
    thread.parallel_for(plan.rows(), ROW_CHUNK, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) store_kv(plan, r, *k, *v, *kv, *shape);
    });
    attend_batch(thread, plan, *q, *kv, Rows::row_major(out, plan.rows(), shape->heads * shape->value_size),
                 *shape, sinks);
  });
}

// All decoder layers of a model, in place on x [rows][hidden]; cos and sin are [rows][key_size].
void triptych_decoder(const Layer* layers, int64_t count, float* x, const float* cos, const float* sin,
                      const Segment* segments, int64_t segment_count, const int32_t* block_tables) {
  const AttentionPlan plan(segments, segment_count, block_tables, layers->shape);
  run_decoder(layers, count, x, cos, sin, plan);
}

}  // extern "C"
