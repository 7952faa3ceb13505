// libcublasLt.so.13 for machines without a GPU: cublasLtMatmul over column-major matrices in host memory.
//
//     D = epilogue(alpha op(A) op(B) + beta C),   op(A) m x k, op(B) k x n, C and D m x n
//
// Written from NVIDIA's description of cublasLt.h, not from the code that calls it.  Operands are read as float32
// (rounded to tf32 where the compute type allows it) or bfloat16, sums are double, results rounded once.  What the
// description forbids is refused with the status it names, and the reason on stderr; what it leaves open is taken
// strictly: pointers must be as aligned as the preference promised when the algorithm was chosen, the workspace is
// scribbled over, and C is not looked at where beta is 0.  Work is put on the stream of the simulated driver.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

extern "C" void simulation_enqueue(void *stream, void (*run)(void *), void *data, size_t size);

namespace {

enum Status { SUCCESS = 0, NOT_INITIALIZED = 1, ALLOC_FAILED = 3, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum Type { R_32F = 0, R_16BF = 14 };
enum Compute { COMPUTE_32F = 68, COMPUTE_32F_FAST_TF32 = 77 };
enum DescAttribute {
    SCALE_TYPE = 1,
    POINTER_MODE = 2,
    TRANSA = 3,
    TRANSB = 4,
    EPILOGUE = 7,
    BIAS_POINTER = 8,
    AUX_POINTER = 11,
    AUX_LD = 12,
    AUX_TYPE = 22,
    BIAS_TYPE = 26
};
enum PreferenceAttribute { MAX_WORKSPACE = 1, REDUCTION_MASK = 3, ALIGN_A = 5, ALIGN_B = 6, ALIGN_C = 7, ALIGN_D = 8 };
enum Epilogue { DEFAULT = 1, BIAS = 4, GELU_AUX = 160, GELU_AUX_BIAS = 164, DGELU = 192, BGRADA = 256, BGRADB = 512 };

const uint64_t HANDLE = 0x4c54, WORKSPACE = 4096;

struct Desc {
    int32_t compute, scale, pointer_mode, transa, transb, aux_type, bias_type;
    uint32_t epilogue;
    void *bias, *aux;
    int64_t aux_ld;
};

struct Layout {
    uint32_t type;
    uint64_t rows, cols;
    int64_t ld;
};

struct Preference {
    uint64_t workspace;
    uint32_t reduction, align_a, align_b, align_c, align_d;
};

// The 64 bytes of cublasLtMatmulAlgo_t: the problem it was chosen for.
struct Algo {
    uint32_t epilogue, transposes, align_a, align_b, align_c, align_d, align_bias, align_aux;
    uint64_t m, n, k, workspace;
};
static_assert(sizeof(Algo) == 64, "cublasLtMatmulAlgo_t");

struct Heuristic {
    Algo algo;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

Status refuse(Status status, const char *why) {
    fprintf(stderr, "simulated cublasLt: %s\n", why);
    return status;
}

uint32_t alignment(const void *pointer) {
    uint64_t address = (uint64_t)pointer;
    uint64_t lowest = address & (~address + 1);
    return lowest == 0 || lowest > 256 ? 256 : (uint32_t)lowest;
}

// ---- attributes ---------------------------------------------------------------------------------

struct Field {
    size_t offset, size;
};

const std::map<int, Field> DESC_FIELDS = {
    {0, {offsetof(Desc, compute), 4}},
    {SCALE_TYPE, {offsetof(Desc, scale), 4}},
    {POINTER_MODE, {offsetof(Desc, pointer_mode), 4}},
    {TRANSA, {offsetof(Desc, transa), 4}},
    {TRANSB, {offsetof(Desc, transb), 4}},
    {EPILOGUE, {offsetof(Desc, epilogue), 4}},
    {BIAS_POINTER, {offsetof(Desc, bias), 8}},
    {AUX_POINTER, {offsetof(Desc, aux), 8}},
    {AUX_LD, {offsetof(Desc, aux_ld), 8}},
    {AUX_TYPE, {offsetof(Desc, aux_type), 4}},
    {BIAS_TYPE, {offsetof(Desc, bias_type), 4}},
};

const std::map<int, Field> PREFERENCE_FIELDS = {
    {MAX_WORKSPACE, {offsetof(Preference, workspace), 8}}, {REDUCTION_MASK, {offsetof(Preference, reduction), 4}},
    {ALIGN_A, {offsetof(Preference, align_a), 4}},         {ALIGN_B, {offsetof(Preference, align_b), 4}},
    {ALIGN_C, {offsetof(Preference, align_c), 4}},         {ALIGN_D, {offsetof(Preference, align_d), 4}},
};

int set(void *object, const std::map<int, Field> &fields, int attribute, const void *value, size_t size) {
    auto field = fields.find(attribute);
    if (object == nullptr || value == nullptr) return refuse(INVALID_VALUE, "a null pointer");
    if (field == fields.end()) return refuse(INVALID_VALUE, "an attribute that is not simulated");
    if (size != field->second.size) return refuse(INVALID_VALUE, "the size is not that of the attribute");
    memcpy((char *)object + field->second.offset, value, size);
    return SUCCESS;
}

int get(const void *object, const std::map<int, Field> &fields, int attribute, void *value, size_t size,
        size_t *written) {
    auto field = fields.find(attribute);
    if (field == fields.end() || (size == 0 && written == nullptr)) return INVALID_VALUE;
    if (size != 0) {
        if (value == nullptr || size != field->second.size) return INVALID_VALUE;
        memcpy(value, (const char *)object + field->second.offset, size);
    }
    if (written != nullptr) *written = field->second.size;
    return SUCCESS;
}

// ---- what may be asked for ----------------------------------------------------------------------

bool biased(uint32_t epilogue) {
    return epilogue == BIAS || epilogue == GELU_AUX_BIAS || epilogue == BGRADA || epilogue == BGRADB;
}

bool auxiliary(uint32_t epilogue) { return epilogue == GELU_AUX || epilogue == GELU_AUX_BIAS || epilogue == DGELU; }

Status check(const Desc *desc, const Layout *a, const Layout *b, const Layout *c, const Layout *d) {
    for (const Layout *layout : {a, b, c, d}) {
        if (layout->rows == 0 || layout->cols == 0) return refuse(INVALID_VALUE, "an empty matrix");
        if (layout->ld < (int64_t)layout->rows) return refuse(INVALID_VALUE, "a leading dimension below the rows");
        if (layout->type != R_32F && layout->type != R_16BF) return refuse(NOT_SUPPORTED, "a type");
    }
    for (int transpose : {desc->transa, desc->transb})
        if (transpose != 0 && transpose != 1) return refuse(INVALID_VALUE, "an operation that is no N and no T");
    uint64_t m = desc->transa ? a->cols : a->rows, k = desc->transa ? a->rows : a->cols;
    uint64_t n = desc->transb ? b->rows : b->cols, inner = desc->transb ? b->cols : b->rows;
    if (k != inner || d->rows != m || d->cols != n || c->rows != m || c->cols != n)
        return refuse(INVALID_VALUE, "sizes that do not fit together");
    if (desc->scale != R_32F || desc->pointer_mode != 0) return refuse(NOT_SUPPORTED, "alpha, beta: not float, host");
    if (a->type != b->type || c->type != d->type || (a->type == R_32F && d->type != R_32F))
        return refuse(NOT_SUPPORTED, "a combination of types");
    if (desc->compute != COMPUTE_32F && !(desc->compute == COMPUTE_32F_FAST_TF32 && a->type == R_32F))
        return refuse(NOT_SUPPORTED, "a compute type");

    switch (desc->epilogue) {
    case DEFAULT:
    case BIAS:
    case GELU_AUX:
    case GELU_AUX_BIAS:
    case DGELU:
    case BGRADA:
    case BGRADB:
        break;
    default:
        return refuse(NOT_SUPPORTED, "an epilogue that is not simulated");
    }
    if (biased(desc->epilogue) && desc->bias_type != -1 && desc->bias_type != (int32_t)d->type)
        return refuse(NOT_SUPPORTED, "a bias that is not of D's type");
    if (auxiliary(desc->epilogue)) {
        if (desc->aux_type != -1 && desc->aux_type != (int32_t)d->type)
            return refuse(NOT_SUPPORTED, "an auxiliary matrix that is not of D's type");
        if (desc->aux_ld % 8 != 0 || desc->aux_ld < (int64_t)m)
            return refuse(INVALID_VALUE, "the auxiliary leading dimension is no multiple of 8, or below m");
        if (alignment(desc->aux) < 16) return refuse(NOT_SUPPORTED, "an auxiliary matrix that is not aligned");
    }
    return SUCCESS;
}

// ---- arithmetic ---------------------------------------------------------------------------------

uint32_t bits(float x) {
    uint32_t word;
    memcpy(&word, &x, 4);
    return word;
}

float from_bits(uint32_t word) {
    float x;
    memcpy(&x, &word, 4);
    return x;
}

// To nearest, ties to even, on the word without its last `drop` bits; NaN stays NaN, numbers too large become infinite.
uint32_t rounded(uint32_t word, int drop) {
    if ((word & 0x7fffffff) > 0x7f800000) return (word | 0x400000) >> drop << drop;
    uint32_t half = 1u << (drop - 1);
    return (word + (half - 1) + (word >> drop & 1)) >> drop << drop;
}

double load(const void *base, uint32_t type, uint64_t index) {
    if (type == R_32F) return ((const float *)base)[index];
    return from_bits((uint32_t)((const uint16_t *)base)[index] << 16);
}

// x in bfloat16 without rounding twice: through a float32 rounded to odd.
uint16_t to_bf16(double x) {
    float nearest = (float)x;
    uint32_t word = bits(nearest);
    if (std::isfinite(nearest) && (double)nearest != x) {
        if (std::fabs((double)nearest) > std::fabs(x)) word -= 1;
        word |= 1;
    }
    return (uint16_t)(rounded(word, 16) >> 16);
}

void store(void *base, uint32_t type, uint64_t index, double x) {
    if (type == R_32F)
        ((float *)base)[index] = (float)x;
    else
        ((uint16_t *)base)[index] = to_bf16(x);
}

const double GELU_SCALE = 0.79788456080286535588, GELU_CUBIC = 0.044715; // sqrt(2 / pi)

double gelu(double x) { return 0.5 * x * (1 + std::tanh(GELU_SCALE * (x + GELU_CUBIC * x * x * x))); }

double gelu_slope(double x) {
    double t = std::tanh(GELU_SCALE * (x + GELU_CUBIC * x * x * x));
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * GELU_SCALE * (1 + 3 * GELU_CUBIC * x * x);
}

struct Product {
    Desc desc;
    Layout a, b, c, d;
    const void *A, *B, *C;
    void *D, *workspace;
    size_t workspace_size;
    float alpha, beta;
};

// op(X) as rows x cols doubles, row after row.
std::vector<double> operand(const void *base, const Layout &x, int transpose, bool tf32) {
    uint64_t rows = transpose ? x.cols : x.rows, cols = transpose ? x.rows : x.cols;
    std::vector<double> out(rows * cols);
    for (uint64_t i = 0; i < rows; ++i) {
        for (uint64_t j = 0; j < cols; ++j) {
            double value = load(base, x.type, transpose ? i * x.ld + j : j * x.ld + i);
            out[i * cols + j] = tf32 ? from_bits(rounded(bits((float)value), 13)) : value;
        }
    }
    return out;
}

void multiply(void *data) {
    const Product &p = *(const Product *)data;
    const Desc &desc = p.desc;
    uint64_t m = p.d.rows, n = p.d.cols, k = desc.transa ? p.a.rows : p.a.cols;
    bool tf32 = desc.compute == COMPUTE_32F_FAST_TF32;
    std::vector<double> A = operand(p.A, p.a, desc.transa, tf32), B = operand(p.B, p.b, desc.transb, tf32);
    memset(p.workspace, 0xff, p.workspace_size);

    if (desc.epilogue == BGRADA || desc.epilogue == BGRADB) {
        bool of_a = desc.epilogue == BGRADA;
        for (uint64_t i = 0; i < (of_a ? m : n); ++i) {
            double sum = 0;
            for (uint64_t l = 0; l < k; ++l) sum += of_a ? A[i * k + l] : B[l * n + i];
            store(desc.bias, p.d.type, i, sum);
        }
    }
    std::vector<double> row(n);
    for (uint64_t i = 0; i < m; ++i) {
        row.assign(n, 0.0);
        for (uint64_t l = 0; l < k; ++l)
            for (uint64_t j = 0; j < n; ++j) row[j] += A[i * k + l] * B[l * n + j];
        double bias = desc.epilogue == BIAS || desc.epilogue == GELU_AUX_BIAS ? load(desc.bias, p.d.type, i) : 0.0;
        for (uint64_t j = 0; j < n; ++j) {
            double x = p.alpha * row[j] + bias;
            if (p.beta != 0) x += p.beta * load(p.C, p.c.type, j * p.c.ld + i);
            if (desc.epilogue == GELU_AUX || desc.epilogue == GELU_AUX_BIAS) {
                store(desc.aux, p.d.type, j * desc.aux_ld + i, x);
                x = gelu(x);
            } else if (desc.epilogue == DGELU) {
                x *= gelu_slope(load(desc.aux, p.d.type, j * desc.aux_ld + i));
            }
            store(p.D, p.d.type, j * p.d.ld + i, x);
        }
    }
}

} // namespace

// ---- the interface ------------------------------------------------------------------------------

#define API extern "C" __attribute__((visibility("default")))

API size_t cublasLtGetVersion() { return 130000; }

API const char *cublasLtGetStatusName(int status) {
    switch (status) {
    case SUCCESS:
        return "CUBLAS_STATUS_SUCCESS";
    case NOT_INITIALIZED:
        return "CUBLAS_STATUS_NOT_INITIALIZED";
    case ALLOC_FAILED:
        return "CUBLAS_STATUS_ALLOC_FAILED";
    case INVALID_VALUE:
        return "CUBLAS_STATUS_INVALID_VALUE";
    case NOT_SUPPORTED:
        return "CUBLAS_STATUS_NOT_SUPPORTED";
    default:
        return "CUBLAS_STATUS_UNKNOWN";
    }
}

API int cublasLtCreate(void **handle) {
    *handle = (void *)HANDLE;
    return SUCCESS;
}

API int cublasLtDestroy(void *handle) { return handle == (void *)HANDLE ? SUCCESS : NOT_INITIALIZED; }

API int cublasLtMatmulDescCreate(Desc **desc, int compute, int scale) {
    *desc = new Desc{};
    (*desc)->compute = compute;
    (*desc)->scale = scale;
    (*desc)->epilogue = DEFAULT;
    (*desc)->aux_type = (*desc)->bias_type = -1;
    return SUCCESS;
}

API int cublasLtMatmulDescDestroy(Desc *desc) {
    delete desc;
    return SUCCESS;
}

API int cublasLtMatmulDescSetAttribute(Desc *desc, int attribute, const void *value, size_t size) {
    return set(desc, DESC_FIELDS, attribute, value, size);
}

API int cublasLtMatmulDescGetAttribute(Desc *desc, int attribute, void *value, size_t size, size_t *written) {
    return get(desc, DESC_FIELDS, attribute, value, size, written);
}

API int cublasLtMatrixLayoutCreate(Layout **layout, int type, uint64_t rows, uint64_t cols, int64_t ld) {
    *layout = new Layout{(uint32_t)type, rows, cols, ld};
    return SUCCESS;
}

API int cublasLtMatrixLayoutDestroy(Layout *layout) {
    delete layout;
    return SUCCESS;
}

API int cublasLtMatmulPreferenceCreate(Preference **preference) {
    *preference = new Preference{0, 7, 256, 256, 256, 256};
    return SUCCESS;
}

API int cublasLtMatmulPreferenceDestroy(Preference *preference) {
    delete preference;
    return SUCCESS;
}

API int cublasLtMatmulPreferenceSetAttribute(Preference *preference, int attribute, const void *value, size_t size) {
    return set(preference, PREFERENCE_FIELDS, attribute, value, size);
}

API int cublasLtMatmulAlgoGetHeuristic(void *handle, const Desc *desc, const Layout *a, const Layout *b,
                                       const Layout *c, const Layout *d, const Preference *preference, int requested,
                                       Heuristic *results, int *count) {
    if (handle != (void *)HANDLE) return refuse(NOT_INITIALIZED, "no handle");
    if (requested <= 0) return refuse(INVALID_VALUE, "no algorithm was asked for");
    *count = 0;
    if (Status status = check(desc, a, b, c, d)) return status;
    // As the library's own: an algorithm that reads whole elements only.
    uint32_t element = a->type == R_32F ? 4 : 2;
    for (uint32_t promised : {preference->align_a, preference->align_b, preference->align_c, preference->align_d})
        if (promised < element) return refuse(NOT_SUPPORTED, "a matrix that is not aligned to its elements");
    Heuristic &result = results[0];
    memset(&result, 0, sizeof result);
    result.workspace = preference->workspace < WORKSPACE ? 0 : WORKSPACE;
    result.state = SUCCESS;
    result.waves = 1;
    result.algo = Algo{desc->epilogue,
                       (uint32_t)(2 * desc->transa + desc->transb),
                       preference->align_a,
                       preference->align_b,
                       preference->align_c,
                       preference->align_d,
                       alignment(desc->bias),
                       alignment(desc->aux),
                       d->rows,
                       d->cols,
                       desc->transa ? a->rows : a->cols,
                       result.workspace};
    *count = 1;
    return SUCCESS;
}

// Every product is made by the same algorithm, whose number is that of the real library's best on Hopper.
API int cublasLtMatmulAlgoConfigGetAttribute(const Algo *algo, int attribute, void *value, size_t size,
                                             size_t *written) {
    int32_t number = 66;
    if (algo == nullptr || attribute != 0 || value == nullptr || size != sizeof number) return INVALID_VALUE;
    memcpy(value, &number, sizeof number);
    if (written != nullptr) *written = sizeof number;
    return SUCCESS;
}

API int cublasLtMatmul(void *handle, const Desc *desc, const float *alpha, const void *A, const Layout *a,
                       const void *B, const Layout *b, const float *beta, const void *C, const Layout *c, void *D,
                       const Layout *d, const Algo *algo, void *workspace, size_t workspace_size, void *stream) {
    if (handle != (void *)HANDLE) return refuse(NOT_INITIALIZED, "no handle");
    if (Status status = check(desc, a, b, c, d)) return status;
    if (A == nullptr || B == nullptr || D == nullptr || (*beta != 0 && C == nullptr))
        return refuse(INVALID_VALUE, "a null matrix");
    if (algo == nullptr) return refuse(INVALID_VALUE, "no algorithm: it would be searched for at every call");
    if (algo->m != d->rows || algo->n != d->cols || algo->k != (desc->transa ? a->rows : a->cols) ||
        algo->epilogue != desc->epilogue || algo->transposes != (uint32_t)(2 * desc->transa + desc->transb))
        return refuse(INVALID_VALUE, "an algorithm that was chosen for another product");
    if (alignment(A) < algo->align_a || alignment(B) < algo->align_b || alignment(D) < algo->align_d ||
        (*beta != 0 && alignment(C) < algo->align_c) ||
        (biased(desc->epilogue) && alignment(desc->bias) < algo->align_bias) ||
        (auxiliary(desc->epilogue) && alignment(desc->aux) < algo->align_aux))
        return refuse(INVALID_VALUE, "a pointer is less aligned than was promised");
    if (biased(desc->epilogue) && desc->bias == nullptr) return refuse(INVALID_VALUE, "no bias");
    if (auxiliary(desc->epilogue) && desc->aux == nullptr) return refuse(INVALID_VALUE, "no auxiliary matrix");
    if (workspace_size < algo->workspace || (workspace == nullptr && algo->workspace != 0))
        return refuse(INVALID_VALUE, "a workspace that is too small");
    if (*beta != 0 && C == D && c->ld != d->ld) return refuse(INVALID_VALUE, "in place with another leading dimension");
    Product product = {*desc, *a, *b, *c, *d, A, B, C, D, workspace, (size_t)algo->workspace, *alpha, *beta};
    simulation_enqueue(stream, multiply, &product, sizeof product);
    return SUCCESS;
}
