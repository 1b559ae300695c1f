// CPU kernels of the ragged engine, as C functions: what `library.py` calls.

#include "decoder.h"

extern "C" {

int triptych_panel_width() { return WIDTH; }
int triptych_block_size() { return BLOCK; }

// x [rows][in] -> y [rows][out]
void triptych_linear(const Linear* layer, const float* x, float* y, int64_t m) {
  if (m == 0) return;
  const std::unique_ptr<float[]> room(new float[m * layer->in]);
  const Rows rows(room.get(), m, layer->in);
  together([&](Member& member) {
    pack(member, x, rows);
    multiply(member, *layer, rows, y);
  });
}

void triptych_rms_norm(const Norm* norm, const float* x, float* out, int64_t rows, int64_t size) {
  together([&](Member& member) {
    member.share(rows, FEW_ROWS, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) (*norm)(x + r * size, out + r * size, 1, size);
    });
  });
}

// x [rows][in] -> out [rows][out] by way of `inner` = down.in gated numbers.
void triptych_gated_mlp(const Linear* gate_up, const Linear* down, const float* x, float* out, int64_t m) {
  if (m == 0) return;
  const std::unique_ptr<float[]> room(new float[m * (gate_up->in + down->in)]);
  const Rows rows(room.get(), m, gate_up->in), inner(room.get() + m * gate_up->in, m, down->in);
  together([&](Member& member) {
    pack(member, x, rows);
    gate(member, *gate_up, rows, inner);
    multiply(member, *down, inner, out);
  });
}

// Writes the step's keys and values into their blocks, then attends every row over its sequence.
// q, k, v are read by (row, head) strides; out is [rows][heads][value_size].
void triptych_attention(const Heads* q, const Heads* k, const Heads* v, const Pool* pool, float* out,
                        const Segment* segments, int64_t count, const int32_t* tables, const Shape* shape,
                        const float* sinks) {
  const Plan plan(segments, count, tables, *shape);
  together([&](Member& member) {
    member.share(plan.rows(), FEW_ROWS, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) store(plan, r, *k, *v, *pool, *shape);
    });
    attend_all(member, plan, *q, *pool, Rows::plain(out, plan.rows(), shape->heads * shape->value_size),
               *shape, sinks);
  });
}

// All layers of a model, in place on x [rows][hidden]; cos, sin are [rows][key_size].
void triptych_decode(const Layer* layers, int64_t count, float* x, const float* cos, const float* sin,
                     const Segment* segments, int64_t segment_count, const int32_t* tables) {
  decode(layers, count, x, cos, sin, Plan(segments, segment_count, tables, layers->shape));
}

}  // extern "C"
