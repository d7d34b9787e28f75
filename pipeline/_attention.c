/* Attention of packed documents in bfloat16, for CPUs with AVX512-BF16; pipeline/attention.py is what uses it.

   For each document and head: softmax(q k' scale) v, with scores, exponentials and sums in float32. Keys are laid out
   as pairs of dimensions and values as pairs of positions, which is what the instruction multiplies; so laid out, both
   products run over whole vectors of 16 keys or 16 dimensions, for ROWS queries at a time. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define FAST __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
enum { ROWS = 8, KEYS = 32 };
static const float NEVER = -1e30f;

typedef uint16_t bf16;
typedef struct {
    uint32_t *keys;   /* (dims / 2, n_keys) pairs of dimensions */
    uint32_t *values; /* (n_keys / 2, dims) pairs of positions */
    float *scores;    /* (ROWS, n_keys), and in their place the exponentials (ROWS, n_keys) bf16 */
} Scratch;

/* 2^x by a polynomial of degree 3 on [-1/2, 1/2]: relative error 8e-5, far below bf16's. */
FAST static inline __m512 power_of_two(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(0.05517167f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.24261112f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.69326099f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.99992807f));
    return _mm512_scalef_ps(p, n);
}

/* sum[i] += pairs[i] . pair, for 16 pairs. */
FAST static inline __m512 dot(__m512 sum, const uint32_t *pairs, uint32_t pair) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(pairs), (__m512bh)_mm512_set1_epi32((int)pair));
}

FAST static void lay_out(const bf16 *k, const bf16 *v, int n, int n_keys, int dims, int stride, Scratch to) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i rows = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(stride / 2));
    for (int j = 0; j < n_keys; j += 16) {
        const __mmask16 there = n - j >= 16 ? 0xffff : n > j ? (1 << (n - j)) - 1 : 0;
        const uint32_t *first = (const uint32_t *)(k + (size_t)j * stride);
        for (int x = 0; x < dims / 2; x++) {
            const __m512i pairs = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, rows, first + x, 4);
            _mm512_storeu_si512(to.keys + (size_t)x * n_keys + j, pairs);
        }
    }
    for (int j = 0; j < n_keys; j += 2) {
        const bf16 *even = v + (size_t)j * stride, *odd = even + stride;
        uint32_t *row = to.values + (size_t)j / 2 * dims;
        for (int x = 0; x < dims; x += 16) {
            const __m256i none = _mm256_setzero_si256();
            const __m256i low = j < n ? _mm256_loadu_si256((const __m256i *)(even + x)) : none;
            const __m256i high = j + 1 < n ? _mm256_loadu_si256((const __m256i *)(odd + x)) : none;
            const __m512i shifted = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
            _mm512_storeu_si512(row + x, _mm512_or_si512(_mm512_cvtepu16_epi32(low), shifted));
        }
    }
}

/* ROWS dot products with each key. */
FAST static void score(const uint32_t *const query[ROWS], int n_keys, int dims, Scratch s) {
    for (int j = 0; j < n_keys; j += KEYS) {
        __m512 sums[ROWS][2];
        for (int i = 0; i < ROWS; i++)
            sums[i][0] = sums[i][1] = _mm512_setzero_ps();
        for (int x = 0; x < dims / 2; x++) {
            const uint32_t *keys = s.keys + (size_t)x * n_keys + j;
            for (int i = 0; i < ROWS; i++) {
                sums[i][0] = dot(sums[i][0], keys, query[i][x]);
                sums[i][1] = dot(sums[i][1], keys + 16, query[i][x]);
            }
        }
        for (int i = 0; i < ROWS; i++) {
            _mm512_storeu_ps(s.scores + (size_t)i * n_keys + j, sums[i][0]);
            _mm512_storeu_ps(s.scores + (size_t)i * n_keys + j + 16, sums[i][1]);
        }
    }
}

/* One row's scores as bf16 exponentials, in their own place; returns what they sum to. */
FAST static float exponentials(float *row, int n, int n_keys, float scale) {
    for (int j = n; j < n_keys; j++)
        row[j] = NEVER;
    __m512 most = _mm512_set1_ps(NEVER), sum = _mm512_setzero_ps();
    for (int j = 0; j < n_keys; j += 16)
        most = _mm512_max_ps(most, _mm512_loadu_ps(row + j));
    const float log2_e = 1.44269504f;
    const __m512 times = _mm512_set1_ps(scale * log2_e);
    const __m512 less = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(most)), times);
    bf16 *to = (bf16 *)row;
    for (int j = 0; j < n_keys; j += KEYS) {
        const __m512 a = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(row + j), times, less));
        const __m512 b = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(row + j + 16), times, less));
        sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
        _mm512_storeu_si512(to + j, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
    return _mm512_reduce_add_ps(sum);
}

/* The weighted means of the values, for the first n_rows rows. */
FAST static void mean(const float *sums, int n_rows, int n_keys, int dims, int stride, Scratch s, bf16 *out) {
    for (int x = 0; x < dims; x += 32) {
        __m512 means[ROWS][2];
        for (int i = 0; i < ROWS; i++)
            means[i][0] = means[i][1] = _mm512_setzero_ps();
        for (int j = 0; j < n_keys / 2; j++) {
            const uint32_t *values = s.values + (size_t)j * dims + x;
            for (int i = 0; i < ROWS; i++) {
                const uint32_t weights = ((const uint32_t *)(s.scores + (size_t)i * n_keys))[j];
                means[i][0] = dot(means[i][0], values, weights);
                means[i][1] = dot(means[i][1], values + 16, weights);
            }
        }
        for (int i = 0; i < n_rows; i++) {
            const __m512 by = _mm512_set1_ps(1 / sums[i]);
            const __m512bh row = _mm512_cvtne2ps_pbh(_mm512_mul_ps(means[i][1], by), _mm512_mul_ps(means[i][0], by));
            _mm512_storeu_si512(out + (size_t)i * stride + x, (__m512i)row);
        }
    }
}

/* One head of one document. */
FAST static void attend_head(const bf16 *q, int n, int hidden, int dims, float scale, Scratch s, bf16 *out) {
    const int stride = 3 * hidden, n_keys = (n + KEYS - 1) / KEYS * KEYS;
    lay_out(q + hidden, q + 2 * hidden, n, n_keys, dims, stride, s);
    for (int first = 0; first < n; first += ROWS) {
        const int n_rows = n - first < ROWS ? n - first : ROWS;
        const uint32_t *query[ROWS];
        float sums[ROWS];
        for (int i = 0; i < ROWS; i++)
            query[i] = (const uint32_t *)(q + (size_t)(first + (i < n_rows ? i : 0)) * stride);
        score(query, n_keys, dims, s);
        for (int i = 0; i < ROWS; i++)
            sums[i] = exponentials(s.scores + (size_t)i * n_keys, n, n_keys, scale);
        mean(sums, n_rows, n_keys, dims, hidden, s, out + (size_t)first * hidden);
    }
}

/* Every head of every document; false where there is no memory. */
static int attend_all(const bf16 *qkv, bf16 *out, const int32_t *starts, int n, int heads, int dims, float scale) {
    const int hidden = heads * dims;
    size_t longest = KEYS;
    for (int i = 0; i < n; i++)
        if ((size_t)(starts[i + 1] - starts[i]) > longest)
            longest = starts[i + 1] - starts[i];
    longest = (longest + KEYS - 1) / KEYS * KEYS;
    Scratch s = {malloc(longest * dims * 2), malloc(longest * dims * 2), malloc(longest * ROWS * sizeof(float))};
    const int there = s.keys && s.values && s.scores;
    for (int i = 0; there && i < n; i++)
        for (int head = 0; head < heads; head++) {
            const size_t first = starts[i];
            attend_head(qkv + first * 3 * hidden + head * dims, starts[i + 1] - starts[i], hidden, dims, scale, s,
                        out + first * hidden + head * dims);
        }
    free(s.keys);
    free(s.values);
    free(s.scores);
    return there;
}

static int supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16");
}
#else
typedef uint16_t bf16;
static int attend_all(const bf16 *qkv, bf16 *out, const int32_t *starts, int n, int heads, int dims, float scale) {
    return 0;
}
static int supported(void) { return 0; }
#endif

static PyObject *is_supported(PyObject *self, PyObject *none) { return PyBool_FromLong(supported()); }

/* attend(qkv, out, starts, n_documents, heads, dims, scale): the first three are addresses. */
static PyObject *attend(PyObject *self, PyObject *args) {
    unsigned long long qkv, out, starts;
    int n, heads, dims, there;
    float scale;
    if (!PyArg_ParseTuple(args, "KKKiiif", &qkv, &out, &starts, &n, &heads, &dims, &scale))
        return NULL;
    if (dims % 32 || !supported()) {
        PyErr_SetString(PyExc_ValueError, "needs AVX512-BF16 and heads of a multiple of 32 dimensions");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    there = attend_all((const bf16 *)(uintptr_t)qkv, (bf16 *)(uintptr_t)out, (const int32_t *)(uintptr_t)starts, n,
                       heads, dims, scale);
    Py_END_ALLOW_THREADS
    if (!there)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"attend", attend, METH_VARARGS, "softmax(q k' scale) v of each document, (tokens, 3 hidden) to (tokens, hidden)"},
    {"is_supported", is_supported, METH_NOARGS, "Whether this CPU has the instructions"},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_attention", NULL, -1, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__attention(void) { return PyModule_Create(&module); }
