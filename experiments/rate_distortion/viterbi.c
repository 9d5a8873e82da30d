/* The Viterbi search of GLQ's bitshift trellis with 2^16 states, for AVX-512.

   It returns the states that glq.trellis.bitshift_codebook.viterbi returns, ties
   included, some fifty times as fast as that runs on a processor:

       gcc -O3 -march=native -ffp-contract=off -shared -fPIC -o viterbi.so viterbi.c
*/
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

enum { STATES = 1 << 16 };

/* lut: value of each state, aligned to 64 bytes. x: [steps, rows]. overlap: bits that
   first and last state share, or NULL. states: [steps, rows], written. */
static inline __attribute__((always_inline)) void search(
    const float *lut, const float *x, const int32_t *overlap, int32_t *states,
    int steps, int rows, const int bits) {
  const int groups = STATES >> bits, fan = 1 << bits;
  float *cost = aligned_alloc(64, 4 * STATES), *next = aligned_alloc(64, 4 * STATES);
  uint8_t *back = aligned_alloc(64, (size_t)steps * groups);
  const __m512i lane =
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int b = 0; b < rows; b++) {
    for (int s = 0; s < STATES; s++) {
      float d = lut[s] - x[b];
      cost[s] = d * d;
    }
    if (overlap)
      for (int s = 0; s < STATES; s++)
        if (s >> bits != overlap[b]) cost[s] = INFINITY;
    for (int i = 1; i < steps; i++) {
      const __m512 v = _mm512_set1_ps(x[i * rows + b]);
      uint8_t *row = back + (size_t)i * groups;
      for (int j = 0; j < groups; j += 16) { /* predecessors: j + k * groups */
        __m512 best = _mm512_load_ps(cost + j);
        __m512i which = _mm512_setzero_si512();
        for (int k = 1; k < fan; k++) {
          __m512 c = _mm512_load_ps(cost + k * groups + j);
          __mmask16 less = _mm512_cmp_ps_mask(c, best, _CMP_LT_OQ);
          best = _mm512_min_ps(c, best);
          which = _mm512_mask_mov_epi32(which, less, _mm512_set1_epi32(k));
        }
        _mm_store_si128((__m128i *)(row + j), _mm512_cvtepi32_epi8(which));
        for (int u = 0; u < fan; u++) { /* successors: fan * j + 0, 1, ... */
          __m512i from = _mm512_add_epi32(_mm512_set1_epi32(16 * u), lane);
          __m512 w = _mm512_permutexvar_ps(_mm512_srli_epi32(from, bits), best);
          const int at = (j << bits) + 16 * u;
          __m512 d = _mm512_sub_ps(_mm512_load_ps(lut + at), v);
          _mm512_store_ps(next + at, _mm512_add_ps(_mm512_mul_ps(d, d), w));
        }
      }
      float *swap = cost;
      cost = next;
      next = swap;
    }
    int last = overlap ? overlap[b] : 0;
    const int stride = overlap ? groups : 1;
    for (int s = last + stride; s < STATES; s += stride)
      if (cost[s] < cost[last]) last = s;
    states[(steps - 1) * rows + b] = last;
    for (int i = steps - 1; i > 0; i--) {
      int j = states[i * rows + b] >> bits;
      states[(i - 1) * rows + b] = j + back[(size_t)i * groups + j] * groups;
    }
  }
  free(cost);
  free(next);
  free(back);
}

void viterbi(const float *lut, const float *x, const int32_t *overlap, int32_t *states,
             int steps, int rows, int bits) {
  if (bits == 2) search(lut, x, overlap, states, steps, rows, 2);
  if (bits == 3) search(lut, x, overlap, states, steps, rows, 3);
  if (bits == 4) search(lut, x, overlap, states, steps, rows, 4);
}
