/* The two passes of the fused optimizers over the parameters of one type; pslib/fused.py compiles and calls them.

   A chunk is (tensor, first coordinate, count).  Threads take chunks from a shared counter; each chunk has its own row of
   partial sums, and a tensor's rows are added in order, so that no result depends on the number of threads.
   With stride p > 1 the buffers s and x0 hold only the first 16 of every 16p coordinates, and the sums a², G², N and ‖s/α‖²
   are over those. */

#ifndef X

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
/* What a pass will need some lines later: the processor alone does not ask for it early enough. */
#define AHEAD(x) __builtin_prefetch(x + 1024)
#define AHEAD_TO_WRITE(x) __builtin_prefetch(x + 512, 1)
#define EACH for (int j = 0; j < LANES; j++)

/* The columns of the table of scalars, one row a tensor; the same order as in fused.py. */
enum { BETA2, NEW2, R, EPS, U, BETA1, NEW1, BETA3, NEW3, H, KEPT, SIGN, SCALARS };

typedef double Wide __attribute__((vector_size(LANES * sizeof(double))));
#define WIDE(v) __builtin_convertvector(v, Wide)
static inline double total(Wide v) { double sum = 0; EACH sum += v[j]; return sum; }

/* Add each tensor's rows of partial sums, in order. */
void add_up(int64_t chunks, int64_t sums, const int64_t *chunk, const double *partial, double *total) {
  for (int64_t c = 0; c < chunks; c++)
    for (int64_t k = 0; k < sums; k++) total[chunk[3 * c] * sums + k] += partial[c * sums + k];
}

#define NAME(f) NAME_(f, SUFFIX)
#define NAME_(f, s) NAME__(f, s)
#define NAME__(f, s) f##_##s

#define X float
#define T float
#define BITS int32_t
#define SQRT sqrtf
#define SUFFIX float32
#include "kernels.c"
#define X double
#define T double
#define BITS int64_t
#define SQRT sqrt
#define SUFFIX float64
#include "kernels.c"
#define X uint16_t
#define T float
#define BITS int32_t
#define SQRT sqrtf
#define SUFFIX bfloat16
#define HALF
#include "kernels.c"

#else

#define V NAME(vector)
#define MASK NAME(mask)
typedef T V __attribute__((vector_size(LANES * sizeof(T)), aligned(sizeof(T)), may_alias));
typedef BITS MASK __attribute__((vector_size(LANES * sizeof(T)), aligned(sizeof(T)), may_alias));

#ifdef HALF
static inline V NAME(get)(const X *x) {
  MASK u;
  EACH u[j] = (int32_t)((uint32_t)x[j] << 16);
  return (V)u;
}
static inline void NAME(put)(X *x, V y) {
  MASK u = (MASK)y, finite = y == y;
  EACH x[j] = finite[j] ? (uint16_t)(((uint32_t)u[j] + 0x7fff + ((uint32_t)u[j] >> 16 & 1)) >> 16) : 0x7fc0;
}
#else
static inline V NAME(get)(const X *x) { return *(const V *)x; }
static inline void NAME(put)(X *x, V y) { *(V *)x = y; }
#endif
#define GET NAME(get)
#define PUT NAME(put)

static inline V NAME(root)(V v) { EACH v[j] = SQRT(v[j]); return v; }
/* y/a, and 0 where a is 0. */
static inline V NAME(over)(V y, V a) { return (V)((MASK)(y / a) & (a > 0)); }
#define ROOT NAME(root)
#define OVER NAME(over)
#define ALWAYS static inline __attribute__((always_inline))

/* Σ(ug)², Σα², Σv̂/α² and, if wanted, Σ(ug)²/α² of 16 coordinates.  `has` says whether there is a gradient, `kept` whether
   they belong to the slice; like `ratio` and `plain` (ε = 0) these are constants wherever it is used. */
ALWAYS void NAME(look)(int has, int kept, int ratio, int plain, const X *g, const T *v, T beta2, T new2, T r, T eps, T u, Wide acc[4]) {
  V sq = {0}, vj = {0};
  if (has) {
    V ug = u * GET(g);
    sq = ug * ug;
    acc[0] += WIDE(sq);
  }
  if (!kept) return;
  vj = *(const V *)v;
  if (has) vj = beta2 * vj + new2 * sq;
  V a = ROOT(vj) * r + eps;
  acc[1] += WIDE(a);
  if (!plain) acc[2] += WIDE(OVER(vj * (r * r), a));
  if (ratio) acc[3] += WIDE(OVER(sq, a));
}

void NAME(observe)(
    int64_t chunks, int64_t *next, const int64_t *chunk, const int64_t *stride, const int64_t *gs, const int64_t *vs,
    const double *scalars, int ratio, double *partial) {
  for (int64_t c; (c = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < chunks;) {
    int64_t t = chunk[3 * c], first = chunk[3 * c + 1], n = chunk[3 * c + 2], p = stride[t], i = 0, whole = n / LANES * LANES;
    const double *k = scalars + t * SCALARS;
    const X *g = gs[t] ? (const X *)gs[t] + first : 0;
    const T *v = (const T *)vs[t] + first;
    T beta2 = k[BETA2], new2 = k[NEW2], r = k[R], eps = k[EPS], u = k[U];
    Wide acc[4] = {{0}};
#define LOOK(has, kept, ratio, plain, g, v) NAME(look)(has, kept, ratio, plain, g, v, beta2, new2, r, eps, u, acc)
#define PASS(has, ratio, plain) \
    if (p == 1) { \
      for (; i < whole; i += LANES) { AHEAD(v + i); if (has) AHEAD(g + i); LOOK(has, 1, ratio, plain, g + i, v + i); } \
      X rest_g[LANES] = {0}; T rest_v[LANES] = {0}; \
      if (has) memcpy(rest_g, g + i, (n - i) * sizeof(X)); \
      memcpy(rest_v, v + i, (n - i) * sizeof(T)); \
      LOOK(has, 1, ratio, plain, rest_g, rest_v); \
      acc[1][0] -= (double)eps * (LANES - (n - i)); /* what was filled up has α² = ε */ \
    } else { \
      while (i < whole) { \
        LOOK(has, 1, ratio, plain, g + i, v + i); \
        i += LANES; \
        int64_t end = i + (p - 1) * LANES; \
        if (end > whole) end = whole; \
        if (has) for (; i < end; i += LANES) { AHEAD(g + i); LOOK(1, 0, 0, 1, g + i, v); } \
        i = end; \
      } \
      X rest_g[LANES] = {0}; \
      if (has) memcpy(rest_g, g + i, (n - i) * sizeof(X)); \
      if (has) LOOK(1, 0, 0, 1, rest_g, v); \
    }
    if (!g) { PASS(0, 0, 0) }
    else if (ratio && eps == 0) { PASS(1, 1, 1) }
    else if (ratio) { PASS(1, 1, 0) }
    else if (eps == 0) { PASS(1, 0, 1) }
    else { PASS(1, 0, 0) }
    for (int s = 0; s < 4; s++) partial[4 * c + s] = total(acc[s]);
    if (g && eps == 0) partial[4 * c + 2] = partial[4 * c + 1];
  }
}

/* One step of 16 coordinates; s and x0 only where they are kept.  Sums Σg(x₀ − x), Σs²/α² and Σα²(x₀ − x)². */
ALWAYS void NAME(go)(int has, int kept, X *x, const X *g, T *m, T *v, T *s, const X *x0, const T *k, Wide acc[3]) {
  V gj = {0}, ug = {0}, vj = *(V *)v, xj = GET(x);
  if (has) {
    gj = GET(g);
    ug = k[U] * gj;
    vj = k[BETA2] * vj + k[NEW2] * (ug * ug);
  }
  V a = ROOT(vj) * k[R] + k[EPS];
  if (kept) {
    V sj = k[BETA3] * *(V *)s, gone = GET(x0) - xj;
    if (has) sj += k[NEW3] * ug;
    if (has) acc[0] += WIDE(k[SIGN] * gj * gone);
    *(V *)s = sj;
    acc[1] += WIDE(sj * OVER(sj, a));
    acc[2] += WIDE(gone * gone * a);
  }
  if (has) {
    V mj = k[BETA1] * *(V *)m + k[NEW1] * ug;
    *(V *)m = mj;
    *(V *)v = vj;
    PUT(x, k[KEPT] * xj - k[H] * OVER(mj, a));
  }
}

void NAME(move)(
    int64_t chunks, int64_t *next, const int64_t *chunk, const int64_t *stride, const int64_t *xs, const int64_t *gs,
    const int64_t *ms, const int64_t *vs, const int64_t *ss, const int64_t *x0s, const double *scalars, const uint8_t *ok,
    double *partial) {
  if (!*ok) return;
  for (int64_t c; (c = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < chunks;) {
    int64_t t = chunk[3 * c], first = chunk[3 * c + 1], n = chunk[3 * c + 2], p = stride[t], i = 0, j = 0, whole = n / LANES * LANES;
    T k[SCALARS];
    for (int l = 0; l < SCALARS; l++) k[l] = scalars[t * SCALARS + l];
    X *x = (X *)xs[t] + first;
    const X *g = gs[t] ? (const X *)gs[t] + first : 0;
    T *m = (T *)ms[t] + first, *v = (T *)vs[t] + first;
    T *s = ss ? (T *)ss[t] + first / p : 0;
    const X *x0 = ss ? (const X *)x0s[t] + first / p : 0;
    Wide acc[3] = {{0}};
#define GO(has, kept) NAME(go)(has, kept, x + i, g + i, m + i, v + i, s + j, x0 + j, k, acc)
/* What is left over, less than 16 coordinates, is put into full vectors and taken back. */
#define REST(has, kept) { \
      X rx[LANES] = {0}, rg[LANES] = {0}, r0[LANES] = {0}; T rm[LANES] = {0}, rv[LANES] = {0}, rs[LANES] = {0}; \
      size_t left = n - i; \
      memcpy(rx, x + i, left * sizeof(X)); memcpy(rm, m + i, left * sizeof(T)); memcpy(rv, v + i, left * sizeof(T)); \
      if (has) memcpy(rg, g + i, left * sizeof(X)); \
      if (kept) { memcpy(rs, s + j, left * sizeof(T)); memcpy(r0, x0 + j, left * sizeof(X)); } \
      NAME(go)(has, kept, rx, rg, rm, rv, rs, r0, k, acc); \
      memcpy(x + i, rx, left * sizeof(X)); memcpy(m + i, rm, left * sizeof(T)); memcpy(v + i, rv, left * sizeof(T)); \
      if (kept) memcpy(s + j, rs, left * sizeof(T)); \
    }
    if (!s && g) {
      for (; i < whole; i += LANES) {
        AHEAD(g + i); AHEAD_TO_WRITE(x + i); AHEAD_TO_WRITE(m + i); AHEAD_TO_WRITE(v + i);
        GO(1, 0);
      }
      REST(1, 0)
    } else if (s && !g) {
      for (; i < whole; i += p * LANES, j += LANES) GO(0, 1);
      if (p == 1) REST(0, 1)
    } else if (s && p == 1) {
      for (; i < whole; i += LANES, j += LANES) {
        AHEAD(g + i); AHEAD(x0 + j); AHEAD_TO_WRITE(x + i); AHEAD_TO_WRITE(m + i); AHEAD_TO_WRITE(v + i); AHEAD_TO_WRITE(s + j);
        GO(1, 1);
      }
      REST(1, 1)
    } else if (s) {
      while (i < whole) {
        GO(1, 1);
        i += LANES;
        j += LANES;
        int64_t end = i + (p - 1) * LANES;
        if (end > whole) end = whole;
        for (; i < end; i += LANES) GO(1, 0);
      }
      REST(1, 0)
    }
    for (int q = 0; q < 3; q++) partial[3 * c + q] = total(acc[q]);
  }
}

#undef X
#undef T
#undef BITS
#undef SQRT
#undef SUFFIX
#undef V
#undef MASK
#undef GET
#undef PUT
#undef ROOT
#undef OVER
#undef ALWAYS
#undef LOOK
#undef PASS
#undef GO
#undef REST

#endif
