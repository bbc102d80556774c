"""The C core as Cython sees it: declarations only, see the headers in ext/."""

from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

ctypedef void (*bn_task)(void *arg, size_t index) noexcept nogil

cdef extern from "cpu.h" nogil:
    int BN_ISA_COUNT
    ctypedef int bn_isa
    const char *bn_isa_name(bn_isa isa)
    int bn_isa_compiled(bn_isa isa)
    uint32_t bn_isas_here()
    const char *bn_isas_up_to(const char *name, uint32_t *isas)
    const char *bn_isas_allowed(uint32_t *isas)

cdef extern from "dispatch.h" nogil:
    ctypedef void bn_any_fn()
    ctypedef struct bn_kernel:
        const char *op
        const char *format
        bn_isa isa
        bn_any_fn *fn
    const bn_kernel *bn_kernels(size_t *count)
    const bn_kernel *bn_find(const char *op, const char *format, uint32_t isas)

cdef extern from "layout.h" nogil:
    int BN_STEP, BN_PANEL, BN_VECTOR, BN_SUPER
    ctypedef struct bn_groups:
        size_t k, length, count, stride, padded
    bn_groups bn_make_groups(size_t k, size_t block_size)
    size_t bn_row_bytes(size_t k)
    size_t bn_super_panels(size_t n)
    size_t bn_panel_bytes(size_t n, const bn_groups *groups, int bits)
    size_t bn_step_bytes(int bits)
    size_t bn_t5_vectors(size_t steps)

cdef extern from "formats.h" nogil:
    int BN_FORMAT_COUNT
    ctypedef int bn_format
    ctypedef struct bn_format_info:
        const char *name
        const char *op_type
        bint four_levels
        size_t (*row_bytes)(size_t k) noexcept nogil
        const char *(*pack)(const uint8_t *codes, size_t k, uint8_t *row) noexcept nogil
        const char *(*unpack)(const uint8_t *row, size_t k, uint8_t *codes) noexcept nogil
    const bn_format_info *bn_formats

cdef extern from "parallel.h" nogil:
    ctypedef void bn_parallel_for(void *context, bn_task task, size_t count, void *arg) noexcept nogil
    ctypedef struct bn_threads:
        bn_parallel_for *run
        void *context
        size_t count

cdef extern from "panel.h" nogil:
    ctypedef struct bn_panel_source:
        bn_format format
        bint is_panels
        const uint8_t *weight
        size_t n
        bn_groups groups
        uint32_t isas
        bn_threads threads
    const char *bn_panel_build(const bn_panel_source *source, uint8_t *panels, int32_t *code_sum)

cdef extern from "t5.h" nogil:
    size_t bn_squeeze_panels(uint8_t *panels, size_t n, const bn_groups *groups)

cdef extern from "share.h" nogil:
    void bn_shared_totals(size_t *pieces, size_t *bytes)

cdef extern from "merge.h" nogil:
    ctypedef struct bn_merge:
        uint8_t ratio[4]
        size_t planes
        int bits
    const char *bn_merge_build(
        const bn_merge *merge,
        bn_format format,
        const uint8_t *weight,
        size_t n,
        const bn_groups *groups,
        uint32_t isas,
        bn_threads threads,
        uint8_t *panels,
        int32_t *code_sum,
    )

cdef extern from "selfcheck.h" nogil:
    uint32_t bn_right_isas(const bn_kernel *kernels, size_t count, uint32_t isas)

cdef extern from "kernel.h" nogil:
    ctypedef struct bn_dot_args:
        const uint8_t *panel
        const int8_t *q
        int32_t *acc
        size_t q_stride, rows, panels, steps, group_steps
    ctypedef void bn_dot_fn(const bn_dot_args *)
    ctypedef struct bn_tiles_args:
        uint8_t config[64]
        int back
    ctypedef void bn_tiles_fn(bn_tiles_args *)
    ctypedef struct bn_dotf_args:
        const uint8_t *panel
        const float *x
        float *acc
        size_t x_stride, rows, panels, steps, group_steps
    ctypedef void bn_dotf_fn(const bn_dotf_args *)
    ctypedef struct bn_actq_args:
        const float *x
        int8_t *q
        int64_t *sum
        float *inv_s
        bn_groups groups
        size_t q_stride
        float step
        int bits
    ctypedef void bn_actq_fn(const bn_actq_args *)
    ctypedef struct bn_scale_args:
        const int32_t *acc
        const int64_t *sum
        const int32_t *code_sum
        const float *scale
        const float *zero_point
        int32_t zero
        const float *factor
        const float *before
        const float *bias
        const float *rescale
        float *y
        size_t rows, parts, groups, sum_stride, y_stride, panels
    ctypedef void bn_scale_fn(const bn_scale_args *)
    ctypedef struct bn_widen_args:
        const uint16_t *x
        float *y
        size_t count
    ctypedef void bn_widen_fn(const bn_widen_args *)
    ctypedef struct bn_narrow_args:
        const float *x
        uint16_t *y
        size_t count
    ctypedef void bn_narrow_fn(const bn_narrow_args *)
    ctypedef struct bn_hadamard_args:
        const float *x
        const float *signs
        float *y
        size_t rows, k, block
    ctypedef void bn_hadamard_fn(const bn_hadamard_args *)
    enum:
        BN_KEYS
        BN_VALUES
        BN_ATTENTION_ROWS
    ctypedef struct bn_attention_args:
        const float *q
        const float *keys
        const float *values
        const float *mask
        float *scores
        float *y
        size_t q_stride, value_stride, mask_stride, y_stride
        size_t rows, tokens, value_width, width
        float scale
        int nan_to_zero
    ctypedef void bn_attention_fn(const bn_attention_args *)
    ctypedef struct bn_transpose_args:
        const float *x
        float *y
        size_t x_stride, y_stride, rows, cols
    ctypedef void bn_transpose_fn(const bn_transpose_args *)
    ctypedef struct bn_moments_args:
        const float *w
        double *moments
        bn_groups groups
    ctypedef void bn_moments_fn(const bn_moments_args *)
    ctypedef struct bn_optimum_args:
        const float *w
        float *scale
        uint32_t *keys
        bn_groups groups
        int levels
    ctypedef void bn_optimum_fn(const bn_optimum_args *)
    size_t bn_optimum_keys(const bn_groups *groups)
    ctypedef struct bn_step:
        float factor, low, high, scale
    ctypedef struct bn_assign_args:
        const float *w
        const bn_step *steps
        uint8_t *packed
        float *rest
        bn_groups groups
    ctypedef void bn_assign_fn(const bn_assign_args *)
    ctypedef struct bn_decode_args:
        const uint8_t *packed
        const float *scale
        const float *zero_point
        float *out
        bn_groups groups
        int add
    ctypedef void bn_decode_fn(const bn_decode_args *)
    ctypedef struct bn_compare_args:
        const float *w
        const float *decoded
        size_t count
        double error, signal
        size_t zeros
    ctypedef void bn_compare_fn(bn_compare_args *)

    ctypedef struct bn_panel_args:
        const uint8_t *rows
        uint8_t *panel
        size_t row_stride, panels, steps
    ctypedef void bn_panel_fn(const bn_panel_args *)

cdef extern from "matmul.h" nogil:
    ctypedef struct bn_matmul:
        pass
    ctypedef enum bn_float_type:
        BN_FLOAT32, BN_FLOAT16
    ctypedef struct bn_matmul_desc:
        size_t n, k, planes, block_size
        bn_format format
        bint is_panels
        const uint8_t *weight
        const float *scale
        const float *zero_point
        size_t scale_rows
        size_t zero_point_rows
        const float *bias
        int activation_bits
        float activation_scale
        bn_threads threads
    const char *bn_matmul_create(const bn_matmul_desc *desc, uint32_t isas, bn_matmul **layer)
    const char *bn_matmul_run(
        const bn_matmul *layer,
        const void *x,
        void *y,
        size_t m,
        bn_float_type type,
        bn_threads threads,
    )
    void bn_matmul_destroy(bn_matmul *layer)

cdef extern from "weight.h" nogil:
    int BN_MAGNITUDE_BLOCK
    ctypedef enum bn_weight_type:
        BN_WEIGHT_FLOAT32, BN_WEIGHT_FLOAT16, BN_WEIGHT_BFLOAT16
    ctypedef struct bn_weight:
        const char *data
        Py_ssize_t row_stride, col_stride
        size_t n, k
        bn_weight_type type
        uint32_t isas
    int bn_weight_nonfinite(const bn_weight *w, size_t first, size_t last, size_t *count, size_t *where)
    int bn_weight_magnitudes(const bn_weight *w, size_t first, size_t last, float *magnitude, int *ternary)

cdef extern from "fit.h" nogil:
    ctypedef enum bn_rounding:
        BN_ROUND_ABSMEAN, BN_ROUND_TWN, BN_ROUND_MSE
    ctypedef struct bn_rule:
        bn_rounding rounding
        int levels
        bn_weight_type scale_type
    bn_step bn_step_of_moments(const bn_rule *rule, const double *moments, size_t count)
    bn_step bn_finish_twn(const bn_rule *rule, bn_step step, const double *products)
    bn_step bn_nearest_step(const bn_rule *rule, float scale)

cdef extern from "quantize.h" nogil:
    int BN_BINS
    ctypedef struct bn_grid:
        const bn_step *steps
        size_t planes, rows, block_size
    ctypedef struct bn_packed:
        const uint8_t *weight
        const float *scale
        const float *zero_point
        size_t n, k, planes, rows, block_size
        uint32_t isas
    ctypedef struct bn_difference:
        double error, signal
        size_t zeros
        int different
    int bn_moments(const bn_weight *w, const bn_grid *grid, size_t first, size_t last, double *moments)
    int bn_products(const bn_weight *w, const bn_grid *grid, size_t first, size_t last, double *products)
    int bn_histogram(
        const bn_weight *w, const bn_grid *grid, size_t first, size_t last, uint64_t *count, uint64_t *low
    )
    int bn_histogram_low(
        const bn_weight *w,
        const bn_grid *grid,
        const int32_t *slot,
        size_t first,
        size_t last,
        uint64_t *count,
    )
    int bn_assign(
        const bn_weight *w,
        const bn_grid *grid,
        size_t first,
        size_t last,
        uint8_t *weight,
        const bn_packed *packed,
        bn_difference *difference,
    )
    int bn_fit(
        const bn_weight *w,
        const bn_rule *rule,
        size_t planes,
        size_t block_size,
        size_t first,
        size_t last,
        bn_step *steps,
        int *held,
    )
    int bn_quantize(
        const bn_weight *w,
        const bn_rule *rule,
        size_t first,
        size_t last,
        float *scale,
        uint8_t *weight,
        const bn_packed *packed,
        bn_difference *difference,
        int *held,
    )
    int bn_assign_integer(
        const bn_weight *w,
        const float *factor,
        size_t rows,
        int bits,
        size_t first,
        size_t last,
        uint8_t *weight,
        const bn_packed *packed,
        bn_difference *difference,
    )
    void bn_dequantize(const bn_packed *packed, size_t first, size_t last, float *out)

cdef extern from "observe.h" nogil:
    ctypedef struct bn_observed:
        double mean, second, third, fourth
    bn_observed bn_observe(
        const float *x,
        size_t rows,
        size_t k,
        double *sum,
        double *abs_sum,
        double bins_per_unit,
        int64_t *histogram,
        size_t bins,
    )

cdef extern from "grid.h" nogil:
    int BN_GRID_LEVELS, BN_GRID_PARAMS
    ctypedef struct bn_levels:
        const float *coefficient
        size_t count, params
    ctypedef struct bn_sorted:
        pass
    void bn_fit_grid(
        const bn_levels *levels,
        const float *w,
        const float *importance,
        size_t count,
        const float *start,
        size_t starts,
        size_t rounds,
        float *theta,
    )
    void bn_sort_levels(const bn_levels *levels, const float *theta, bn_sorted *sorted)
    void bn_feedback(
        const bn_sorted *sorted,
        size_t levels,
        const int32_t *group,
        const float *feedback,
        size_t count,
        const float *base,
        float *state,
        uint8_t *index,
        float *error,
    )
