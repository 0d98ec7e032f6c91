// One step's reading of a gradient on a CPU: `native.py` says what is computed, and `sweep_ref` there says it in torch.
//
// Each thread takes a range of rows in blocks, and each block in panels of columns, so that what is multiplied stays in
// the caches. All products run through one register-blocked kernel, C += a b, which broadcasts numbers of one operand
// and reads vectors of the other:
//
//     B A      a = rows of B,             b = A, packed in strips of columns
//     F X      a = rows of the block,     b = X, packed in strips of columns
//     Y^T F    a = columns of Y,          b = rows of the block
//
// GCC's and Clang's vector extensions; no header of torch's, no intrinsic, so any processor they compile for.

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>

namespace {

typedef float Vector __attribute__((vector_size(64)));
typedef float Half __attribute__((vector_size(32)));
typedef int32_t Mask __attribute__((vector_size(64)));
typedef int64_t Long;

constexpr int LANES = 16;
constexpr int STRIP = 64;           // columns of a strip: four vectors
constexpr int PANEL = 256;          // columns of a panel: four strips
constexpr int PITCH = PANEL + 16;   // of a block in memory: no power of two, whose rows would share a few cache lines
constexpr int BLOCK = 96;           // rows of a block at most: a multiple of every ROWS below
constexpr int AHEAD = 4;            // rows: a panel of one is too short for the hardware to foresee the next
constexpr float DIRECTION_BOUND = 0x1p64f;  // the root of the largest number, as `rules.cut_direction_` has it
constexpr int ROWS[] = {0, 12, 12, 8, 6};  // rows of C in registers, by its vectors: 12 to 24 of 32 registers

enum Past : int32_t { PLAIN, SQUARED, FLOORED };
enum Target : int32_t { NOTHING, MAGNITUDE, SQUARE, SECOND };
enum Rule : int32_t { NONE, ADAM, SIGN };

// A thin operand: B, Y, X, or A transposed. The rows of B and Y lie together, `column` is 1.
struct Thin {
    const float *data;
    Long k, row, column;  // how wide it is; strides, in numbers
    float *out;           // of products: contiguous
    float scale;          // of A: what it is multiplied by where it is packed
};

}  // namespace

// Mirrored by `native.Arguments`.
struct Arguments {
    Long m, n, threads;
    const float *grad;  // (m, n)
    float *weight;      // (m, n)
    Thin m_b, m_a, v_b, v_a;
    Thin right[2], left[2];  // of the gradient and of the target
    int32_t past, target, rule;
    float bound, floor, decay, rate, gain, eps;
    // If the floor is to be found, these are written, and the floor is taken for zero: the sum of the magnitudes of the
    // negative entries of the history's B A and their number; and, (m, k), the product of their places, as ones, with X.
    double *below;
    float *below_right;
    float *scratch;
};

namespace {

inline Long up(Long x, Long to) { return (x + to - 1) / to * to; }

inline bool any(Mask mask) {
    Long parts[sizeof mask / sizeof(Long)], bits = 0;
    memcpy(parts, &mask, sizeof mask);
    for (Long part : parts)
        bits |= part;
    return bits != 0;
}

// Numbers that a packed X has in a row: whole vectors, or half of one.
inline Long packed(Long k) { return k <= LANES / 2 ? LANES / 2 : up(k, LANES); }

// To [-bound, bound]; NaN stays.
inline float cut(float x, float bound) {
    x = x > bound ? bound : x;
    return x < -bound ? -bound : x;
}

template <class V> inline V load(const float *from) {
    V x;
    memcpy(&x, from, sizeof x);
    return x;
}

template <class V> inline void store(float *to, V x) { memcpy(to, &x, sizeof x); }

// C (MR, NV vectors) = [C +] a b over `depth`. `a` steps by (a_row, a_depth), `b` by b_depth, C by c_row.
template <class V, int NV, int MR, bool ADD>
inline __attribute__((always_inline)) void kernel(Long depth, const float *a, Long a_row, Long a_depth,
                                                  const float *b, Long b_depth, float *c, Long c_row) {
    constexpr int lanes = sizeof(V) / sizeof(float);
    V sum[MR][NV];
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++)
            sum[i][j] = V{};
#pragma GCC unroll 1
    for (Long k = 0; k < depth; k++, a += a_depth, b += b_depth) {
        V row[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++)
            row[j] = load<V>(b + j * lanes);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++)
                sum[i][j] += a[i * a_row] * row[j];
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++)
            store(c + i * c_row + j * lanes, ADD ? load<V>(c + i * c_row + j * lanes) + sum[i][j] : sum[i][j]);
}

// The three products, each of `rows` rows of C that are NV vectors wide. What the compiler knows of strides, it is told.

template <int NV, int MR = ROWS[NV]>
void reconstruct(Long rows, Long depth, const float *b, Long b_row, const float *a, float *c) {
    for (; rows >= MR; rows -= MR, b += MR * b_row, c += MR * STRIP)
        kernel<Vector, NV, MR, false>(depth, b, b_row, 1, a, STRIP, c, STRIP);
    if constexpr (MR > 1)
        if (rows > 0)
            reconstruct<NV, MR - 1>(rows, depth, b, b_row, a, c);
}

template <class V, int NV, int MR = ROWS[NV]>
void times_right(Long rows, Long depth, const float *block, const float *x, float *c, Long c_row) {
    for (; rows >= MR; rows -= MR, block += MR * PITCH, c += MR * c_row)
        kernel<V, NV, MR, true>(depth, block, PITCH, 1, x, NV * (sizeof(V) / sizeof(float)), c, c_row);
    if constexpr (MR > 1)
        if (rows > 0)
            times_right<V, NV, MR - 1>(rows, depth, block, x, c, c_row);
}

template <int NV, int MR = ROWS[NV]>
void times_left(Long rows, Long depth, const float *y, Long y_row, const float *block, float *c) {
    for (; rows >= MR; rows -= MR, y += MR, c += MR * STRIP)
        kernel<Vector, NV, MR, true>(depth, y, 1, y_row, block, PITCH, c, STRIP);
    if constexpr (MR > 1)
        if (rows > 0)
            times_left<NV, MR - 1>(rows, depth, y, y_row, block, c);
}

#define BY_VECTORS(count, function, ...)                 \
    switch (count) {                                     \
    case 1: function<1>(__VA_ARGS__); break;             \
    case 2: function<2>(__VA_ARGS__); break;             \
    case 3: function<3>(__VA_ARGS__); break;             \
    default: function<4>(__VA_ARGS__);                   \
    }

template <int NV> void times_right_whole(Long rows, Long depth, const float *block, const float *x, float *c, Long c_row) {
    times_right<Vector, NV>(rows, depth, block, x, c, c_row);
}

inline int vectors(Long columns) { return columns >= STRIP ? STRIP / LANES : int((columns + LANES - 1) / LANES); }

// A transposed (n, k) as strips of columns, each (k, STRIP), padded with zeros.
void pack_strips(const Thin &thin, Long n, float *to) {
#pragma omp for schedule(static) nowait
    for (Long strip = 0; strip < up(n, STRIP) / STRIP; strip++)
        for (Long k = 0; k < thin.k; k++)
            for (Long j = 0; j < STRIP; j++) {
                Long column = strip * STRIP + j;
                to[(strip * thin.k + k) * STRIP + j] =
                    column < n ? thin.scale * thin.data[column * thin.row + k * thin.column] : 0.0f;
            }
}

// X (n, k) as strips of columns, one after the other, padded with zeros.
void pack_columns(const Thin &thin, Long n, float *to) {
    Long wide = packed(thin.k);
#pragma omp for schedule(static) nowait
    for (Long j = 0; j < n; j++)
        for (Long start = 0; start < wide; start += STRIP) {
            Long width = wide - start < STRIP ? wide - start : STRIP;
            for (Long k = 0; k < width; k++)
                to[start * n + j * width + k] =
                    start + k < thin.k ? thin.data[j * thin.row + (start + k) * thin.column] : 0.0f;
        }
}

// The places of everything in the scratch, in numbers.
struct Layout {
    Long strips, m_a, v_a, x[2], shared, y[2], block, found[3], own;

    explicit Layout(const Arguments &of) {
        strips = up(of.n, STRIP) / STRIP;
        Long at = 0;
        auto place = [&](Long size) {
            Long here = at;
            at += up(size, LANES);
            return here;
        };
        m_a = place(strips * STRIP * of.m_a.k);
        v_a = place(strips * STRIP * of.v_a.k);
        for (int i = 0; i < 2; i++)
            x[i] = place(of.n * (of.right[i].k ? packed(of.right[i].k) : 0));
        shared = at;
        at = 0;
        for (int i = 0; i < 2; i++)
            y[i] = place(strips * STRIP * of.left[i].k);
        block = place(2 * BLOCK * PITCH);
        for (int i = 0; i < 2; i++)
            found[i] = place(of.right[i].k ? BLOCK * packed(of.right[i].k) : 0);
        found[2] = place(of.below_right ? BLOCK * packed(of.right[1].k) : 0);
        own = at;
    }
};

struct Below {
    double sum = 0, count = 0;
};

struct Worker {
    const Arguments &of;
    const Layout &at;
    const float *shared;
    float *own;
    Below below;
    Long top = 0;  // row of the block at hand

    float *block(int i) const { return own + at.block + i * BLOCK * PITCH; }

    // Rows of the gradient, cut, and their magnitude or square where that is the target.
    void read(Long row, Long rows, Long column, Long width) {
        Long padded = up(width, LANES);
        const float bound = of.bound;
        for (Long i = 0; i < rows; i++) {
            const float *from = of.grad + (row + i) * of.n + column;
            float *g = block(0) + i * PITCH, *f = block(1) + i * PITCH;
            for (Long j = 0; j < width; j += LANES)
                __builtin_prefetch(from + AHEAD * of.n + j);
            for (Long j = 0; j < width; j++)
                g[j] = cut(from[j], bound);
            for (Long j = width; j < padded; j++)
                g[j] = 0.0f;
            if (of.target == MAGNITUDE)
                for (Long j = 0; j < padded; j++)
                    f[j] = fabsf(g[j]);
            else if (of.target == SQUARE)
                for (Long j = 0; j < padded; j++)
                    f[j] = g[j] * g[j];
        }
    }

    // Entries below zero in a row of a strip of the history's B A are counted and made zero. They are few, so that what
    // they select of X is added row by row. `found` is the row's place in the product.
    void take_below(Long width, Long column, float *history, float *found) {
        Mask some{};
        for (Long j = 0; j < width; j += LANES)
            some |= load<Vector>(history + j) < 0.0f;
        if (!any(some))
            return;
        const Long k = of.right[1].k, wide = packed(k);
        for (Long j = 0; j < width; j++)
            if (history[j] < 0.0f) {
                below.sum -= history[j];
                below.count++;
                history[j] = 0.0f;
                for (Long start = 0; of.below_right && start < k; start += STRIP) {
                    Long part = wide - start < STRIP ? wide - start : STRIP;
                    const float *x = shared + at.x[1] + start * of.n + (column + j) * part;
                    for (Long i = 0; i < part; i++)
                        found[start + i] += x[i];
                }
            }
    }

    inline __attribute__((always_inline)) void row_step(Long width, float *w, const float *g, const float *m,
                                                        const float *h) const {
        const float decay = of.decay, rate = of.rate, gain = of.gain, eps = of.eps;
        if (of.rule == SIGN)
            for (Long j = 0; j < width; j++) {
                float x = m[j] + g[j];
                float sign = float(x > 0.0f) - float(x < 0.0f);
                w[j] = decay * w[j] - rate * (x == x ? sign : x);  // NaN is passed on
            }
        else
            for (Long j = 0; j < width; j++) {
                float x = cut(m[j] + g[j], FLT_MAX) / (sqrtf(h[j] + g[j] * g[j]) + eps);
                w[j] = decay * w[j] - rate * cut(gain * x, DIRECTION_BOUND);
            }
    }

    // A few rows of one strip: both moments out of their factors, and what depends on them.
    template <int NV> void tile(Long row, Long rows, Long inside, Long strip, float *g, float *f) {
        constexpr int width = NV * LANES;
        const float floor = of.floor;  // a copy: no write below can be to it
        alignas(64) float m[ROWS[NV] * STRIP], h[ROWS[NV] * STRIP];
        if (of.rule != NONE) {
            for (Long i = 0; i < rows; i++)
                for (Long j = 0; j < width; j += LANES)
                    __builtin_prefetch(of.weight + (row + i) * of.n + strip * STRIP + j, 1);
            reconstruct<NV>(rows, of.m_a.k, of.m_b.data + row * of.m_b.row, of.m_b.row,
                            shared + at.m_a + strip * of.m_a.k * STRIP, m);
        }
        reconstruct<NV>(rows, of.v_a.k, of.v_b.data + row * of.v_b.row, of.v_b.row,
                        shared + at.v_a + strip * of.v_a.k * STRIP, h);
        for (Long i = 0; i < rows; i++) {
            float *past = h + i * STRIP;
            if (of.below)
                take_below(width, strip * STRIP, past, own + at.found[2] + (row + i - top) * packed(of.right[1].k));
            if (of.past == SQUARED)
                for (int j = 0; j < width; j++)
                    past[j] *= past[j];
            else if (of.past == FLOORED)
                for (int j = 0; j < width; j++)
                    past[j] = past[j] < 0.0f ? floor : past[j];
            if (of.target == SECOND)
                for (int j = 0; j < width; j++)
                    f[i * PITCH + j] = past[j] + g[i * PITCH + j] * g[i * PITCH + j];
            if (of.rule != NONE) {
                float *w = of.weight + (row + i) * of.n + strip * STRIP;
                if (inside == STRIP)
                    row_step(STRIP, w, g + i * PITCH, m + i * STRIP, past);
                else
                    row_step(inside, w, g + i * PITCH, m + i * STRIP, past);
            }
        }
    }

    template <int NV> void strip_of_tiles(Long row, Long rows, Long inside, Long strip, Long offset) {
        for (Long i = 0; i < rows; i += ROWS[NV]) {
            Long some = rows - i < ROWS[NV] ? rows - i : ROWS[NV];
            tile<NV>(row + i, some, inside, strip, block(0) + i * PITCH + offset, block(1) + i * PITCH + offset);
        }
    }

    void right(int which, Long rows, Long column, Long width) {
        Long wide = packed(of.right[which].k);
        float *c = own + at.found[which];
        const float *x = shared + at.x[which];
        if (wide < LANES)
            return times_right<Half, 1>(rows, width, block(which), x + column * wide, c, wide);
        for (Long start = 0; start < wide; start += STRIP) {
            int count = vectors(wide - start);
            const float *strip = x + start * of.n + column * count * LANES;
            BY_VECTORS(count, times_right_whole, rows, width, block(which), strip, c + start, wide)
        }
    }

    void left(int which, Long row, Long rows, Long column, Long width) {
        const Thin &thin = of.left[which];
        const float *y = thin.data + row * thin.row;
        for (Long j = 0; j < width; j += STRIP) {
            float *c = own + at.y[which] + (column + j) * thin.k;
            BY_VECTORS(vectors(width - j), times_left, thin.k, rows, y, thin.row, block(which) + j, c)
        }
    }

    void panel(Long row, Long rows, Long column, Long width) {
        read(row, rows, column, width);
        if (of.below || of.rule != NONE || of.target == SECOND)
            for (Long j = 0; j < width; j += STRIP) {
                Long inside = width - j < STRIP ? width - j : STRIP, strip = (column + j) / STRIP;
                BY_VECTORS(vectors(inside), strip_of_tiles, row, rows, inside, strip, j)
            }
        for (int i = 0; i < 2; i++) {
            if (of.right[i].k)
                right(i, rows, column, width);
            if (of.left[i].k)
                left(i, row, rows, column, width);
        }
    }

    // A block's rows of a right product.
    void put(float *out, Long k, Long found, Long rows) {
        for (Long r = 0; out && r < rows; r++)
            memcpy(out + (top + r) * k, own + found + r * packed(k), k * sizeof(float));
    }

    void rows(Long first, Long last) {
        for (int i = 0; i < 2; i++)
            memset(own + at.y[i], 0, at.strips * STRIP * of.left[i].k * sizeof(float));
        Long blocks = (last - first + BLOCK - 1) / BLOCK;
        for (Long b = 0; b < blocks; b++) {
            Long row = first + (last - first) * b / blocks, rows = first + (last - first) * (b + 1) / blocks - row;
            top = row;
            memset(own + at.found[0], 0, (at.own - at.found[0]) * sizeof(float));
            for (Long column = 0; column < of.n; column += PANEL)
                panel(row, rows, column, of.n - column < PANEL ? of.n - column : PANEL);
            for (int i = 0; i < 2; i++)
                put(of.right[i].out, of.right[i].k, at.found[i], rows);
            put(of.below_right, of.right[1].k, at.found[2], rows);
        }
    }
};

Long team(const Arguments &of) {
    Long most = (of.m + ROWS[1] - 1) / ROWS[1];
    return of.threads < most ? of.threads : most;
}

}  // namespace

extern "C" {

// Numbers of scratch that `gossamer_sweep` needs.
Long gossamer_sweep_scratch(const Arguments *of) {
    Layout at(*of);
    return LANES + at.shared + team(*of) * at.own;
}

void gossamer_sweep(const Arguments *arguments) {
    const Arguments &of = *arguments;
    const Layout at(of);
    const Long threads = team(of);
    float *shared = of.scratch + (-(reinterpret_cast<uintptr_t>(of.scratch) / sizeof(float)) & (LANES - 1));
    Below below[threads];
#pragma omp parallel num_threads(threads)
    {
        // the team may be smaller than what was asked for; the parts are what they would have been
        pack_strips(of.m_a, of.n, shared + at.m_a);
        pack_strips(of.v_a, of.n, shared + at.v_a);
        for (int i = 0; i < 2; i++)
            if (of.right[i].k)
                pack_columns(of.right[i], of.n, shared + at.x[i]);
#pragma omp barrier
#pragma omp for schedule(static)
        for (Long part = 0; part < threads; part++) {
            Worker worker{of, at, shared, shared + at.shared + part * at.own, Below()};
            worker.rows(of.m * part / threads, of.m * (part + 1) / threads);
            below[part] = worker.below;
        }
        // always in the order of the parts, whoever was first
        for (int i = 0; i < 2; i++) {
            const Thin &thin = of.left[i];
#pragma omp for schedule(static) nowait
            for (Long row = 0; row < at.strips * thin.k; row++) {
                Long strip = row / thin.k, k = row % thin.k, column = strip * STRIP;
                Long inside = of.n - column < STRIP ? of.n - column : STRIP;
                const float *from = shared + at.shared + at.y[i] + row * STRIP;
                float *to = thin.out + k * of.n + column;
                memcpy(to, from, inside * sizeof(float));
                for (Long part = 1; part < threads; part++)
                    for (Long j = 0; j < inside; j++)
                        to[j] += from[part * at.own + j];
            }
        }
    }
    if (of.below) {
        of.below[0] = of.below[1] = 0;
        for (Long part = 0; part < threads; part++) {
            of.below[0] += below[part].sum;
            of.below[1] += below[part].count;
        }
    }
}
}
