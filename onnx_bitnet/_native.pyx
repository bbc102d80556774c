# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""The C core seen from Python: every function checks shapes, releases the GIL and calls C.

No algorithm lives here. ext/README.md tells how the C side is laid out.
"""

import functools
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport strcmp


# ---- instruction sets and the table of kernels -------------------------------------------------------------

def isas():
    """Return (name, runs here) of each compiled instruction set, weakest first."""
    cdef uint32_t here = bn_isas_here()
    return [
        (bn_isa_name(<bn_isa>isa).decode(), bool(here >> isa & 1))
        for isa in range(BN_ISA_COUNT)
        if bn_isa_compiled(<bn_isa>isa)
    ]


def allowed_isas(isa=None):
    """Return the names of the instruction sets that may be used.

    Args:
        isa: the strongest one allowed, right or not; None for what ONNX_BITNET_ISA says, or all that run
            here, without those that `wrong_isas` names.

    Raises:
        ValueError: there is no such instruction set, or it does not run here.
    """
    return _names(_allowed(isa))


def wrong_isas():
    """Return the names of the instruction sets that run here and give wrong results (ext/selfcheck.h)."""
    cdef size_t count
    cdef const bn_kernel *rows = bn_kernels(&count)
    cdef uint32_t here = bn_isas_here()
    return _names(here & ~bn_right_isas(rows, count, here))


def kernels():
    """Return (op, format, isa) of each compiled kernel, in the order of ext/kernels.inc."""
    cdef size_t count
    cdef const bn_kernel *rows = bn_kernels(&count)
    return [
        (rows[i].op.decode(), rows[i].format.decode(), bn_isa_name(rows[i].isa).decode())
        for i in range(count)
    ]


def find(op, format, isa=None):
    """Return the name of the instruction set whose kernel serves this op and format, or None without one.

    Args:
        op: as in `kernels`.
        format: as in `kernels`.
        isa: as in `allowed_isas`.
    """
    cdef bytes op_bytes = op.encode(), format_bytes = format.encode()
    cdef const bn_kernel *row = bn_find(op_bytes, format_bytes, _allowed(isa))
    return None if row == NULL else bn_isa_name(row.isa).decode()


cdef uint32_t _allowed(isa) except? 0:
    return _up_to(isa, os.environ.get("ONNX_BITNET_ISA") if isa is None else None)


@functools.cache
def _up_to(isa, environment):
    """Ask once per argument: looking for instruction sets takes long on virtual machines."""
    cdef uint32_t allowed = 0
    cdef const char *reason
    cdef bytes name
    cdef size_t count
    cdef const bn_kernel *rows = bn_kernels(&count)
    cdef uint32_t right
    if isa is None:
        reason = bn_isas_allowed(&allowed)
    else:
        name = isa.encode()
        reason = bn_isas_up_to(name, &allowed)
    if reason != NULL:
        raise ValueError(reason.decode() if isa is None else f"isa {isa!r}: {reason.decode()}")
    if isa is not None:
        return allowed
    right = bn_right_isas(rows, count, allowed)
    for wrong in _names(allowed & ~right):
        warnings.warn(
            f"the {wrong} kernels of onnx_bitnet give wrong results on this machine and are not used",
            RuntimeWarning,
            stacklevel=2,
        )
    return right


def _names(uint32_t isas):
    return [bn_isa_name(<bn_isa>isa).decode() for isa in range(BN_ISA_COUNT) if isas >> isa & 1]


cdef bn_any_fn *_kernel(const char *op, const char *format, isa) except NULL:
    """The kernel of exactly this instruction set."""
    cdef size_t count, i
    cdef const bn_kernel *rows = bn_kernels(&count)
    cdef bytes name = isa.encode()
    _allowed(isa)
    for i in range(count):
        if strcmp(rows[i].op, op) == 0 and strcmp(rows[i].format, format) == 0:
            if strcmp(bn_isa_name(rows[i].isa), name) == 0:
                return rows[i].fn
    raise ValueError(f"there is no kernel {op.decode()} {format.decode()} {isa}")


def _require(condition, message):
    if not condition:
        raise ValueError(message)


# ---- formats -----------------------------------------------------------------------------------------------

def formats():
    """Return (name, op type, holds four levels) of each format."""
    return [
        (bn_formats[i].name.decode(), bn_formats[i].op_type.decode(), bool(bn_formats[i].four_levels))
        for i in range(BN_FORMAT_COUNT)
    ]


cdef int _format(name) except -1:
    for i in range(BN_FORMAT_COUNT):
        if bn_formats[i].name.decode() == name:
            return i
    raise ValueError(f"no format {name!r}; there are {', '.join(row[0] for row in formats())}")


def row_bytes(format, size_t k):
    """Return the bytes of a row of k codes."""
    return bn_formats[_format(format)].row_bytes(k)


def pack(format, const uint8_t[:, ::1] codes):
    """Pack codes (rows, K) to canonical bytes (rows, row_bytes).

    Raises:
        ValueError: the format does not hold one of the codes.
    """
    cdef const bn_format_info *info = &bn_formats[_format(format)]
    cdef uint8_t[:, ::1] packed = np.empty((codes.shape[0], info.row_bytes(codes.shape[1])), np.uint8)
    cdef const char *reason = NULL
    cdef Py_ssize_t row, rows = codes.shape[0] if codes.shape[1] > 0 else 0
    with nogil:
        for row in range(rows):
            reason = info.pack(&codes[row, 0], codes.shape[1], &packed[row, 0])
            if reason != NULL:
                break
    if reason != NULL:
        raise ValueError(reason.decode())
    return np.asarray(packed)


def unpack(format, const uint8_t[:, ::1] packed, size_t k):
    """Unpack canonical bytes (rows, row_bytes) to codes uint8 (rows, k).

    Raises:
        ValueError: wrong shape, or the bytes are not canonical.
    """
    cdef const bn_format_info *info = &bn_formats[_format(format)]
    cdef uint8_t[:, ::1] codes = np.empty((packed.shape[0], k), np.uint8)
    cdef const char *reason = NULL
    cdef Py_ssize_t row, rows = packed.shape[0] if k > 0 else 0
    _require_row_bytes(packed.shape[1], info.row_bytes(k), k)
    with nogil:
        for row in range(rows):
            reason = info.unpack(&packed[row, 0], k, &codes[row, 0])
            if reason != NULL:
                break
    if reason != NULL:
        raise ValueError(reason.decode())
    return np.asarray(codes)


def _require_row_bytes(given, needed, k):
    _require(given == needed, f"weight has rows of {given} bytes, K = {k} needs {needed}")


# ---- one entry per kernel op, for tests and benchmarks -----------------------------------------------------

def panels(const uint8_t[:, ::1] weight, size_t k, size_t block_size=0, format="i2s", *, isa=None):
    """Return the panels of one plane and the sums of its codes, see ext/layout.h.

    Args:
        weight: canonical bytes (N, row_bytes).
        k: inputs.
        block_size: inputs that share a scale; 0 means all of k.
        format: of the weight.
        isa: as in `allowed_isas`.

    Returns:
        uint8 (bytes,) and int32 (super-panels, groups, 64).

    Raises:
        ValueError: wrong shape, or the bytes are not canonical.
    """
    _require(k > 0 and weight.shape[0] > 0, "N and K must be at least 1")
    cdef bn_format layout = _format(format)
    _require_row_bytes(weight.shape[1], bn_formats[layout].row_bytes(k), k)
    cdef bn_panel_source source
    cdef bn_groups groups = bn_make_groups(k, block_size)
    source.format, source.weight, source.n, source.groups = layout, &weight[0, 0], weight.shape[0], groups
    source.isas, source.is_panels = _allowed(isa), False
    source.threads.run = NULL
    cdef uint8_t[::1] out = np.empty(bn_panel_bytes(weight.shape[0], &groups, 2), np.uint8)
    cdef size_t supers = bn_super_panels(weight.shape[0])
    cdef int32_t[:, :, ::1] code_sum = np.empty((supers, groups.count, BN_SUPER), np.int32)
    cdef const char *reason
    with nogil:
        reason = bn_panel_build(&source, &out[0], &code_sum[0, 0, 0])
    if reason != NULL:
        raise ValueError(reason.decode())
    return np.asarray(out), np.asarray(code_sum)


def merged_panels(
    const uint8_t[:, :, ::1] weight, ratio, size_t k, size_t block_size=0, *, int bits, isa=None
):
    """Return the panels of planes merged to one of wider codes, and the sums of these, see ext/merge.h.

    Args:
        weight: canonical i2s bytes (P, N, row_bytes).
        ratio: P integers.
        k: inputs.
        block_size: inputs that share a scale; 0 means all of k.
        bits: of a merged code, 4 or 8, that must hold 3 * sum(ratio).
        isa: as in `allowed_isas`.

    Returns:
        uint8 (bytes,) and int32 (super-panels, groups, 64).

    Raises:
        ValueError: wrong shape or ratio, or the bytes are not canonical.
    """
    _require(k > 0 and weight.shape[1] > 0, "N and K must be at least 1")
    _require(1 <= weight.shape[0] == len(ratio) <= 4, "there must be 1 to 4 planes and a ratio for each")
    _require(bits in (4, 8) and min(ratio) > 0 and 3 * sum(ratio) < 1 << bits, "the codes do not fit")
    _require_row_bytes(weight.shape[2], bn_row_bytes(k), k)
    cdef bn_merge merge
    merge.planes, merge.bits = weight.shape[0], bits
    for plane in range(weight.shape[0]):
        merge.ratio[plane] = ratio[plane]
    cdef size_t n = weight.shape[1]
    cdef bn_groups groups = bn_make_groups(k, block_size)
    cdef uint8_t[::1] out = np.empty(bn_panel_bytes(n, &groups, bits), np.uint8)
    cdef int32_t[:, :, ::1] code_sum = np.empty((bn_super_panels(n), groups.count, BN_SUPER), np.int32)
    cdef bn_format layout = _format("i2s")
    cdef bn_threads threads
    cdef uint32_t isas = _allowed(isa)
    cdef const char *reason
    threads.run = NULL
    with nogil:
        reason = bn_merge_build(
            &merge, layout, &weight[0, 0, 0], n, &groups, isas, threads, &out[0], &code_sum[0, 0, 0]
        )
    if reason != NULL:
        raise ValueError(reason.decode())
    return np.asarray(out), np.asarray(code_sum)


def panel(const uint8_t[:, ::1] rows, uint8_t[::1] out, *, isa):
    """Run the kernel `panel i2s` of one instruction set on the rows of one super-panel.

    Args:
        rows: i2s bytes (16, 32, 48 or 64; a multiple of 4).
        out: out (as many bytes as rows,).
        isa: name of the kernel's instruction set.
    """
    _require(rows.shape[0] in (16, 32, 48, 64), "there must be 16, 32, 48 or 64 rows")
    _require(rows.shape[1] > 0 and rows.shape[1] % 4 == 0, "rows must be a positive multiple of 4 long")
    _require(out.shape[0] == rows.shape[0] * rows.shape[1], "out must have as many bytes as rows")
    cdef bn_panel_fn *fn = <bn_panel_fn *>_kernel("panel", "i2s", isa)
    cdef bn_panel_args args
    args.rows, args.panel, args.row_stride = &rows[0, 0], &out[0], rows.shape[1]
    args.panels, args.steps = rows.shape[0] // BN_PANEL, rows.shape[1] // 4
    with nogil:
        fn(&args)


def squeezed(panels, size_t n, size_t k, size_t block_size=0):
    """Return panels (bytes,) of i2s as those of t5, see ext/t5.h.

    Args:
        panels: uint8 (bytes,), what `panels` returns for these n, k and block_size; codes 0 to 2.
        n: outputs.
        k: inputs.
        block_size: inputs that share a scale; 0 means all of k.
    """
    _require(n > 0 and k > 0, "N and K must be at least 1")
    cdef bn_groups groups = bn_make_groups(k, block_size)
    out = np.array(panels, np.uint8)
    _require(out.shape == (bn_panel_bytes(n, &groups, 2),), "panels have another size")
    cdef uint8_t[::1] squeezed = out
    cdef size_t nbytes
    with nogil:
        nbytes = bn_squeeze_panels(&squeezed[0], n, &groups)
    return out[:nbytes].copy()


def shared_totals():
    """Return how many pieces of memory the layers of this module hold, and their bytes, see ext/share.h."""
    cdef size_t pieces, nbytes
    bn_shared_totals(&pieces, &nbytes)
    return pieces, nbytes


_CODE_BITS = {"i2s": 2, "w4": 4, "w8": 8}


def dot(
    const uint8_t[::1] panel,
    const int8_t[:, ::1] q,
    int32_t[:, :, ::1] acc,
    *,
    size_t panels,
    size_t group_steps,
    isa,
    format="i2s",
):
    """Run the kernel `dot` of one format and instruction set on one super-panel of one plane.

    Args:
        panel: (steps * panels * 32 * bits,) bytes; of t5 (vectors * panels * 64,), 4 vectors for 5 steps.
        q: (rows, 16 * steps).
        acc: out (rows, groups, 64).
        panels: vectors side by side, 1 to 4.
        group_steps: steps in a group; the last may have fewer.
        isa: name of the kernel's instruction set.
        format: i2s, w4 or w8, codes of 2, 4 or 8 bits, or t5, ternary ones of 1.6.
    """
    cdef size_t steps = q.shape[1] // BN_STEP
    _check_dot(panel.shape[0], q.shape[0], q.shape[1], acc.shape, panels, group_steps, format)
    cdef bytes name = format.encode()
    cdef bn_dot_fn *fn = <bn_dot_fn *>_kernel("dot", name, isa)
    cdef bn_dot_args args
    args.panel, args.q, args.acc = &panel[0], &q[0, 0], &acc[0, 0, 0]
    args.q_stride, args.rows, args.panels = q.shape[1], q.shape[0], panels
    args.steps, args.group_steps = steps, group_steps
    cdef bn_tiles_fn *use_tiles = <bn_tiles_fn *>bn_find("tiles", "config", _allowed(isa)).fn
    cdef bn_tiles_args tiles
    with nogil:
        tiles.back = 0
        use_tiles(&tiles)
        fn(&args)
        tiles.back = 1
        use_tiles(&tiles)


def dotf(
    const uint8_t[::1] panel,
    const float[:, ::1] x,
    float[:, :, ::1] acc,
    *,
    size_t panels,
    size_t group_steps,
    isa,
):
    """Run the kernel `dotf i2s` of one instruction set: `dot` with float32 rows, sums of (code - 1) * x."""
    cdef size_t steps = x.shape[1] // BN_STEP
    _check_dot(panel.shape[0], x.shape[0], x.shape[1], acc.shape, panels, group_steps, "i2s")
    cdef bn_dotf_fn *fn = <bn_dotf_fn *>_kernel("dotf", "i2s", isa)
    cdef bn_dotf_args args
    args.panel, args.x, args.acc = &panel[0], &x[0, 0], &acc[0, 0, 0]
    args.x_stride, args.rows, args.panels = x.shape[1], x.shape[0], panels
    args.steps, args.group_steps = steps, group_steps
    with nogil:
        fn(&args)


def _check_dot(panel_bytes, rows, columns, acc_shape, panels, group_steps, format):
    steps = columns // BN_STEP
    _require(rows > 0 and steps > 0 and columns % BN_STEP == 0, "rows must be a positive multiple of 16 long")
    _require(1 <= panels <= 4 and group_steps > 0, "panels must be 1 to 4 and group_steps at least 1")
    groups = -(-steps // group_steps)
    if format == "t5":
        last = steps - (groups - 1) * group_steps
        vectors = (groups - 1) * bn_t5_vectors(group_steps) + bn_t5_vectors(last)
        needed = vectors * panels * BN_VECTOR
    else:
        needed = steps * panels * bn_step_bytes(_CODE_BITS[format])
    _require(panel_bytes == needed, f"panel has {panel_bytes} bytes, {steps} steps need {needed}")
    _require(tuple(acc_shape[:3]) == (rows, groups, BN_SUPER), f"acc must be ({rows}, {groups}, 64)")


def actq(
    const float[::1] x,
    int8_t[:, ::1] q,
    int64_t[::1] sums,
    *,
    size_t block_size=0,
    int bits=8,
    float step=0.0,
    isa,
):
    """Run the kernel `actq f32` of one instruction set on one row of activations.

    Args:
        x: (K,).
        q: out (bits / 8, padded K): for 16 bits the high and the low bytes.
        sums: out (groups,).
        block_size: inputs that share a scale; 0 means all of K.
        bits: 8 or 16.
        step: the static step, 0 for dynamic.
        isa: name of the kernel's instruction set.

    Returns:
        inv_s.
    """
    _require(x.shape[0] > 0 and bits in (8, 16), "x must not be empty and bits must be 8 or 16")
    cdef bn_groups groups = bn_make_groups(x.shape[0], block_size)
    _require(
        q.shape[0] == bits // 8 and <size_t>q.shape[1] == groups.padded,
        f"q must be ({bits // 8}, {groups.padded})",
    )
    _require(<size_t>sums.shape[0] == groups.count, f"sums must be ({groups.count},)")
    cdef bn_actq_fn *fn = <bn_actq_fn *>_kernel("actq", "f32", isa)
    cdef float inv_s
    cdef bn_actq_args args
    args.x, args.q, args.sum, args.inv_s = &x[0], &q[0, 0], &sums[0], &inv_s
    args.groups, args.q_stride, args.step, args.bits = groups, q.shape[1], step, bits
    with nogil:
        fn(&args)
    return inv_s


def scale(
    const int32_t[:, :, ::1] acc,
    const int64_t[:, ::1] sums,
    const int32_t[:, ::1] code_sum,
    const float[:, ::1] scale,
    const float[:, ::1] zero_point,
    const float[::1] factor,
    float[:, ::1] y,
    *,
    size_t panels,
    isa,
    int zero=1,
    const float[:, ::1] before=None,
    const float[::1] bias=None,
    const float[::1] rescale=None,
):
    """Run the kernel `scale i32` of one instruction set: scale products of one super-panel.

    Args:
        acc: (parts * rows, groups, 64), parts 1 or 2.
        sums: (rows, groups) sums of q.
        code_sum: (groups, 64) sums of codes; used for two parts.
        scale: (groups, 64).
        zero_point: (groups, 64), or None: all are `zero`.
        factor: (rows,).
        y: out (rows, at least 16 * panels).
        panels: vectors side by side, 1 to 4.
        isa: name of the kernel's instruction set.
        zero: the zero point where there is no table of them.
        before: (rows, 64), what the products are added to, or None for zeros.
        bias: (64,) with rescale (rows,), or None: y is left without them.
    """
    cdef Py_ssize_t rows = factor.shape[0], groups = scale.shape[0]
    _require(rows > 0 and groups > 0 and 1 <= panels <= 4, "rows, groups and panels must be at least 1")
    _require(acc.shape[0] in (rows, 2 * rows), "acc must have one or two parts for each row")
    _require({acc.shape[1], sums.shape[1], code_sum.shape[0]} == {groups}, "groups differ")
    _require(sums.shape[0] == rows and y.shape[0] == rows, "rows differ")
    _require(y.shape[1] >= 16 * panels, "y must have 16 * panels columns")
    lanes = {acc.shape[2], code_sum.shape[1], scale.shape[1]}
    if before is not None:
        lanes.add(before.shape[1])
        _require(before.shape[0] == rows, "rows differ")
    if bias is not None:
        lanes.add(bias.shape[0])
        _require(rescale is not None and rescale.shape[0] == rows, "rows differ")
    if zero_point is not None:
        lanes.add(zero_point.shape[1])
        _require(zero_point.shape[0] == groups, "groups differ")
    _require(lanes == {BN_SUPER}, "the last axis must be 64 long")
    cdef bn_scale_fn *fn = <bn_scale_fn *>_kernel("scale", "i32", isa)
    cdef bn_scale_args args
    args.acc, args.sum, args.code_sum = &acc[0, 0, 0], &sums[0, 0], &code_sum[0, 0]
    args.zero = zero
    args.scale, args.factor, args.y = &scale[0, 0], &factor[0], &y[0, 0]
    args.zero_point = args.before = args.bias = args.rescale = NULL
    if zero_point is not None:
        args.zero_point = &zero_point[0, 0]
    if before is not None:
        args.before = &before[0, 0]
    if bias is not None:
        args.bias, args.rescale = &bias[0], &rescale[0]
    args.rows, args.parts, args.groups = rows, acc.shape[0] // rows, groups
    args.sum_stride, args.y_stride, args.panels = groups, y.shape[1], panels
    with nogil:
        fn(&args)


def widen(const uint16_t[::1] x, float[::1] y, *, isa):
    """Run the kernel `widen f16` of one instruction set: float16 bits x (count,) to float32 y (count,)."""
    _require(x.shape[0] == y.shape[0] and x.shape[0] > 0, "x and y must have the same length, not 0")
    cdef bn_widen_fn *fn = <bn_widen_fn *>_kernel("widen", "f16", isa)
    cdef bn_widen_args args
    args.x, args.y, args.count = &x[0], &y[0], x.shape[0]
    with nogil:
        fn(&args)


def narrow(const float[::1] x, uint16_t[::1] y, *, isa):
    """Run the kernel `narrow f16` of one instruction set: float32 x (count,) to float16 bits y (count,)."""
    _require(x.shape[0] == y.shape[0] and x.shape[0] > 0, "x and y must have the same length, not 0")
    cdef bn_narrow_fn *fn = <bn_narrow_fn *>_kernel("narrow", "f16", isa)
    cdef bn_narrow_args args
    args.x, args.y, args.count = &x[0], &y[0], x.shape[0]
    with nogil:
        fn(&args)


def hadamard(const float[:, ::1] x, const float[::1] signs, float[:, ::1] y, *, size_t block_size, isa):
    """Run the kernel `hadamard f32` of one instruction set.

    Args:
        x: (rows, K).
        signs: (K,) of 1 and -1.
        y: out (rows, K), may be x.
        block_size: a power of two that K is a multiple of.
        isa: name of the kernel's instruction set.
    """
    _require(x.shape[0] > 0 and x.shape[1] > 0, "x must not be empty")
    _require(signs.shape[0] == x.shape[1], f"signs must be ({x.shape[1]},)")
    _require((y.shape[0], y.shape[1]) == (x.shape[0], x.shape[1]), "x and y must have the same shape")
    _require(block_size & -block_size == block_size > 0, "block_size must be a power of two")
    _require(x.shape[1] % block_size == 0, f"K = {x.shape[1]} is no multiple of {block_size}")
    cdef bn_hadamard_fn *fn = <bn_hadamard_fn *>_kernel("hadamard", "f32", isa)
    cdef bn_hadamard_args args
    args.x, args.signs, args.y = &x[0, 0], &signs[0], &y[0, 0]
    args.rows, args.k, args.block = x.shape[0], x.shape[1], block_size
    with nogil:
        fn(&args)


def attention(const float[:, ::1] q, const float[:, :, ::1] keys, const float[:, ::1] values,
              const float[:, ::1] mask, float[:, ::1] scores, float[:, ::1] y, *, float scale,
              bint nan_to_zero=False, isa):
    """Run the kernel `attention f32` of one instruction set on rows of one head.

    Args:
        q: (rows, width), at most 24 rows.
        keys: (panels, width, 64), each panel 64 keys turned; past the last one anything finite.
        values: (tokens, value width rounded up to 16).
        mask: (rows or 1, 64 * panels), -inf past the last token.
        scores: out (rows, 64 * panels), room to work in.
        y: out (rows, value width).
        scale: a number.
        nan_to_zero: a row whose weights would be NaN has zeros instead.
        isa: name of the kernel's instruction set.
    """
    cdef size_t rows = q.shape[0], padded = BN_KEYS * keys.shape[0]
    _require(0 < rows <= BN_ATTENTION_ROWS, f"q must have 1 to {BN_ATTENTION_ROWS} rows")
    _require(keys.shape[0] > 0 and (keys.shape[1], keys.shape[2]) == (q.shape[1], BN_KEYS),
             f"keys must be (panels, {q.shape[1]}, {BN_KEYS})")
    _require(padded - BN_KEYS < <size_t>values.shape[0] <= padded, "values must fill the panels of keys")
    _require(mask.shape[0] in (1, rows) and <size_t>mask.shape[1] == padded,
             f"mask must be (1 or {rows}, {padded})")
    _require((scores.shape[0], scores.shape[1]) == (rows, padded), f"scores must be ({rows}, {padded})")
    _require(<size_t>y.shape[0] == rows and y.shape[1] > 0 and values.shape[1] % BN_VALUES == 0
             and 0 <= values.shape[1] - y.shape[1] < BN_VALUES,
             "y must have the rows of q and the width of v")
    cdef bn_attention_fn *fn = <bn_attention_fn *>_kernel("attention", "f32", isa)
    cdef bn_attention_args args
    args.q, args.q_stride, args.width = &q[0, 0] if q.shape[1] else NULL, q.shape[1], q.shape[1]
    args.keys = &keys[0, 0, 0] if q.shape[1] else NULL
    args.values, args.value_stride = &values[0, 0], values.shape[1]
    args.mask, args.mask_stride = &mask[0, 0], 0 if mask.shape[0] == 1 else padded
    args.scores, args.y, args.y_stride = &scores[0, 0], &y[0, 0], y.shape[1]
    args.rows, args.tokens, args.value_width, args.scale = rows, values.shape[0], y.shape[1], scale
    args.nan_to_zero = nan_to_zero
    with nogil:
        fn(&args)


def transpose(const float[:, ::1] x, float[:, ::1] y, *, isa):
    """Run the kernel `transpose f32` of one instruction set: x (rows, columns) to y (columns, rows)."""
    _require(x.size > 0 and (x.shape[0], x.shape[1]) == (y.shape[1], y.shape[0]), "y must be x transposed")
    cdef bn_transpose_fn *fn = <bn_transpose_fn *>_kernel("transpose", "f32", isa)
    cdef bn_transpose_args args
    args.x, args.y, args.x_stride, args.y_stride = &x[0, 0], &y[0, 0], x.shape[1], y.shape[1]
    args.rows, args.cols = x.shape[0], x.shape[1]
    with nogil:
        fn(&args)


def row_moments(const float[::1] w, double[:, ::1] out, *, size_t block_size=0, isa):
    """Run the kernel `moments f32` of one instruction set on one row: w (K,) to out (groups, 3)."""
    cdef bn_moments_args args
    args.groups = _row_groups(w.shape[0], block_size)
    _require((out.shape[0], out.shape[1]) == (args.groups.count, 3), "out must be (groups, 3)")
    cdef bn_moments_fn *fn = <bn_moments_fn *>_kernel("moments", "f32", isa)
    args.w, args.moments = &w[0], &out[0, 0]
    with nogil:
        fn(&args)


def row_optimum(const float[::1] w, float[::1] scale, int levels, *, size_t block_size=0, isa):
    """Run the kernel `optimum f32` of one instruction set on one row: w (K,) to scale (groups,)."""
    cdef bn_optimum_args args
    args.groups = _row_groups(w.shape[0], block_size)
    _require(scale.shape[0] == args.groups.count, "scale must be (groups,)")
    _require(levels in (3, 4), f"levels is {levels}, expected 3 or 4")
    cdef bn_optimum_fn *fn = <bn_optimum_fn *>_kernel("optimum", "f32", isa)
    cdef uint32_t[::1] keys = np.empty(bn_optimum_keys(&args.groups), np.uint32)
    args.w, args.scale, args.levels, args.keys = &w[0], &scale[0], levels, &keys[0]
    with nogil:
        fn(&args)


def row_assign(
    const float[::1] w,
    const float[:, ::1] steps,
    uint8_t[::1] packed,
    float[::1] rest,
    *,
    size_t block_size=0,
    isa,
):
    """Run the kernel `assign i2s` of one instruction set on one row.

    Args:
        w: (K,).
        steps: (groups, 4), see ext/kernel.h.
        packed: out (ceil(K / 4),), or None.
        rest: out (K,), or None; may be w.
        block_size: inputs that share a step, a multiple of 4; 0 means all of K.
        isa: name of the kernel's instruction set.
    """
    cdef bn_assign_args args
    args.groups = _row_groups(w.shape[0], block_size)
    _require((steps.shape[0], steps.shape[1]) == (args.groups.count, 4), "steps must be (groups, 4)")
    cdef bn_assign_fn *fn = <bn_assign_fn *>_kernel("assign", "i2s", isa)
    args.w, args.steps, args.packed, args.rest = &w[0], <const bn_step *>&steps[0, 0], NULL, NULL
    if packed is not None:
        _require(packed.shape[0] == bn_row_bytes(w.shape[0]), "packed must be (ceil(K / 4),)")
        args.packed = &packed[0]
    if rest is not None:
        _require(rest.shape[0] == w.shape[0], "rest must be (K,)")
        args.rest = &rest[0]
    with nogil:
        fn(&args)


def row_decode(
    const uint8_t[::1] packed,
    const float[::1] scale,
    const float[::1] zero_point,
    float[::1] out,
    *,
    size_t block_size=0,
    bint add=False,
    isa,
):
    """Run the kernel `decode i2s` of one instruction set on one row.

    Args:
        packed: (ceil(K / 4),).
        scale: (groups,).
        zero_point: (groups,).
        out: (K,), out or, with `add`, in and out.
        block_size: as in `row_assign`.
        add: add to out.
        isa: name of the kernel's instruction set.
    """
    cdef bn_decode_args args
    args.groups = _row_groups(out.shape[0], block_size)
    _require(packed.shape[0] == bn_row_bytes(out.shape[0]), "packed must be (ceil(K / 4),)")
    _require({scale.shape[0], zero_point.shape[0]} == {args.groups.count}, "scale must be (groups,)")
    cdef bn_decode_fn *fn = <bn_decode_fn *>_kernel("decode", "i2s", isa)
    args.packed, args.scale, args.zero_point = &packed[0], &scale[0], &zero_point[0]
    args.out, args.add = &out[0], add
    with nogil:
        fn(&args)


def row_compare(const float[::1] w, const float[::1] decoded, *, isa):
    """Run the kernel `compare f32` of one instruction set on one row.

    Returns:
        sum of (w - decoded)^2, sum of w^2, how many of decoded are 0.
    """
    _require(w.shape[0] == decoded.shape[0] and w.shape[0] > 0, "w and decoded must be (K,)")
    cdef bn_compare_fn *fn = <bn_compare_fn *>_kernel("compare", "f32", isa)
    cdef bn_compare_args args
    args.w, args.decoded, args.count = &w[0], &decoded[0], w.shape[0]
    with nogil:
        fn(&args)
    return args.error, args.signal, args.zeros


cdef bn_groups _row_groups(size_t k, size_t block_size) except *:
    _require(k > 0, "rows must not be empty")
    _require_fours(block_size)
    return bn_make_groups(k, block_size)


def _require_fours(block_size):
    _require(block_size % 4 == 0, f"block_size is {block_size}, expected a multiple of 4")


# ---- a whole layer -----------------------------------------------------------------------------------------

cdef class MatMul:
    """A packed linear layer y = Q(x) W^T + bias, ready to run; see `reference.matmul` for the arguments.

    Args:
        weight: uint8 (P, N, row_bytes), canonical bytes of the format.
        scale: float32 or float16 (P, N or 1, G or 1) with G = ceil(K / block_size).
        zero_point: likewise, on its own; or None for 1 everywhere.
        bias: float32 (N,), or None for zeros.
        k: inputs.
        format: of the weight.
        block_size: inputs that share a scale; 0 means all of K.
        activation_bits: 8, 16, or 32 for float activations.
        activation_scale: step of static quantization, 0 for dynamic.
        isa: strongest instruction set that may be used; None for what ONNX_BITNET_ISA says.

    Raises:
        ValueError: a shape or value does not fit, said in one line.
    """

    cdef bn_matmul *layer
    cdef readonly size_t n, k

    def __cinit__(
        self,
        weight,
        scale,
        zero_point,
        bias,
        *,
        k,
        format="i2s",
        block_size=0,
        activation_bits=8,
        activation_scale=0.0,
        isa=None,
    ):
        _require(weight.ndim == 3 and weight.dtype == np.uint8, "weight must be uint8 (P, N, row_bytes)")
        cdef bn_format layout = _format(format)
        planes, n = weight.shape[:2]
        _require(1 <= planes <= 4 and n > 0 and k > 0, "weight must have 1 to 4 planes, N and K at least 1")
        _require_row_bytes(weight.shape[2], bn_formats[layout].row_bytes(k), k)
        _require(block_size >= 0, "block_size must not be negative")
        groups = 1 if block_size == 0 else -(-k // block_size)
        for name, values in (("scale", scale), ("zero_point", zero_point)):
            if values is None and name == "zero_point":
                continue
            _require(
                values.ndim == 3
                and values.shape[0] == planes
                and values.shape[1] in (1, n)
                and values.shape[2] in (1, groups),
                f"{name} has shape {values.shape}, expected ({planes}, {n} or 1, {groups} or 1)",
            )
        _require(bias is None or bias.shape == (n,), f"bias must have shape ({n},)")

        cdef const uint8_t[:, :, ::1] w = np.ascontiguousarray(weight)
        cdef const float[:, :, ::1] s = _spread(scale, groups)
        cdef const float[:, :, ::1] z = None if zero_point is None else _spread(zero_point, groups)
        cdef const float[::1] b = None if bias is None else np.ascontiguousarray(bias, np.float32)
        cdef bn_matmul_desc desc
        cdef const char *reason
        cdef uint32_t allowed = _allowed(isa)
        desc.n, desc.k, desc.planes, desc.block_size = n, k, planes, block_size
        desc.format, desc.is_panels, desc.weight = layout, False, &w[0, 0, 0]
        desc.scale, desc.scale_rows = &s[0, 0, 0], s.shape[1]
        desc.zero_point, desc.zero_point_rows = NULL, 1
        if z is not None:
            desc.zero_point, desc.zero_point_rows = &z[0, 0, 0], z.shape[1]
        desc.bias = NULL
        if b is not None:
            desc.bias = &b[0]
        desc.activation_bits, desc.activation_scale = activation_bits, activation_scale
        desc.threads.run = NULL
        with nogil:
            reason = bn_matmul_create(&desc, allowed, &self.layer)
        if reason != NULL:
            raise ValueError(reason.decode())
        self.n, self.k = n, k

    def __dealloc__(self):
        bn_matmul_destroy(self.layer)

    def __call__(self, x, *, threads=1):
        """Return y (..., N) of the type of x, float32 or float16 (..., K).

        With more than one thread the tasks run on a thread pool, last task first.
        """
        _require(x.ndim >= 1 and x.shape[x.ndim - 1] == self.k, f"x is {x.shape}, expected (..., {self.k})")
        _require(x.dtype in (np.float32, np.float16), f"x is {x.dtype}, expected float32 or float16")
        cdef bn_float_type type = BN_FLOAT16 if x.dtype == np.float16 else BN_FLOAT32
        y_shape = (*x.shape[: x.ndim - 1], self.n)
        rows = np.ascontiguousarray(x).reshape(x.size // self.k, self.k)
        y = np.empty((rows.shape[0], self.n), x.dtype)
        if y.size == 0:
            return y.reshape(y_shape)
        cdef const uint8_t[:, ::1] x_bytes = rows.view(np.uint8)
        cdef uint8_t[:, ::1] y_bytes = y.view(np.uint8)
        cdef bn_threads workers
        cdef const char *reason
        pool = ThreadPoolExecutor(threads) if threads > 1 else None
        workers.run, workers.context, workers.count = NULL, NULL, threads
        if pool is not None:
            workers.run, workers.context = _run_on_pool, <void *>pool
        with nogil:
            reason = bn_matmul_run(
                self.layer, &x_bytes[0, 0], &y_bytes[0, 0], x_bytes.shape[0], type, workers
            )
        if pool is not None:
            pool.shutdown()
        if reason != NULL:
            raise MemoryError(reason.decode())
        return y.reshape(y_shape)


def matmul(x, weight, scale, zero_point, bias, *, threads=1, **options):
    """Return y = Q(x) W^T + bias without ONNX Runtime; the arguments are those of `MatMul`."""
    return MatMul(weight, scale, zero_point, bias, **options)(x, threads=threads)


def _spread(values, groups):
    shape = (*values.shape[:2], groups)
    return np.ascontiguousarray(np.broadcast_to(values, shape), np.float32)


cdef class _Task:
    """A C task as a Python callable that releases the GIL."""

    cdef bn_task task
    cdef void *arg

    def __call__(self, size_t index):
        with nogil:
            self.task(self.arg, index)


cdef void _run_on_pool(void *context, bn_task task, size_t count, void *arg) noexcept nogil:
    with gil:
        call = _Task()
        (<_Task>call).task, (<_Task>call).arg = task, arg
        for _ in (<object>context).map(call, reversed(range(count))):
            pass


# ---- quantization ------------------------------------------------------------------------------------------
#
# A weight is a float32, float16 or bfloat16 array (N, K) of any strides. Each function treats the outputs
# first .. last - 1 and writes the results of these only, so that threads can share the work: see quantize.py.

cdef int _weight(w, size_t first, size_t last, bn_weight *view) except -1:
    _require(w.ndim == 2 and w.size > 0, f"weight has shape {w.shape}, expected (N, K)")
    _require(first <= last <= w.shape[0], f"rows {first} to {last} are not in a weight of shape {w.shape}")
    types = {"float32": BN_WEIGHT_FLOAT32, "float16": BN_WEIGHT_FLOAT16, "bfloat16": BN_WEIGHT_BFLOAT16}
    _require(w.dtype.name in types and w.dtype.isnative, f"weight is {w.dtype}")
    view.data = <const char *><size_t>w.ctypes.data
    view.row_stride, view.col_stride = w.strides
    view.n, view.k = w.shape
    view.type = types[w.dtype.name]
    view.isas = _allowed(None)
    return 0


cdef int _grid(
    const float[:, :, :, ::1] steps, size_t block_size, const bn_weight *view, bn_grid *grid
) except -1:
    cdef bn_groups groups = bn_make_groups(view.k, block_size)
    _require_fours(block_size)
    _require(
        steps.shape[1] in (1, view.n) and steps.shape[2] == groups.count and steps.shape[3] == 4,
        f"steps must be (P, {view.n} or 1, {groups.count}, 4)",
    )
    grid.steps = <const bn_step *>&steps[0, 0, 0, 0]
    grid.planes, grid.rows, grid.block_size = steps.shape[0], steps.shape[1], block_size
    return 0


cdef int _done(int failed) except -1:
    if failed:
        raise MemoryError("no memory to read the weight")
    return 0


def weight_nonfinite(weight, size_t first, size_t last):
    """Return how many NaN and infinities there are, and the (row, column) of the first one or None."""
    cdef bn_weight w
    cdef size_t count
    cdef size_t[2] where
    cdef int failed
    _weight(weight, first, last, &w)
    with nogil:
        failed = bn_weight_nonfinite(&w, first, last, &count, where)
    _done(failed)
    return count, (where[0], where[1]) if count else None


def weight_magnitudes(weight, float[:, ::1] magnitude, size_t first, size_t last):
    """Write the magnitude of each 32 inputs to (N, ceil(K / 32)); return False at the first without."""
    cdef bn_weight w
    cdef int ternary, failed
    _weight(weight, first, last, &w)
    _require(magnitude.shape[0] == w.n, f"magnitude must be ({w.n}, ceil(K / 32))")
    _require(magnitude.shape[1] == (w.k - 1) // BN_MAGNITUDE_BLOCK + 1, "magnitude must be (N, ceil(K / 32))")
    with nogil:
        failed = bn_weight_magnitudes(&w, first, last, &magnitude[0, 0], &ternary)
    _done(failed)
    return bool(ternary)


def moments(
    weight,
    const float[:, :, :, ::1] steps,
    size_t block_size,
    double[:, :, ::1] out,
    size_t first,
    size_t last,
):
    """Write sum |r|, least and greatest r of each group to (N, G, 3): r is what `steps` leave."""
    cdef bn_weight w
    cdef bn_grid grid
    cdef int failed
    _weight(weight, first, last, &w)
    _grid(steps, block_size, &w, &grid)
    _check_out(out.shape, w.n, steps.shape[2], 3)
    with nogil:
        failed = bn_moments(&w, &grid, first, last, &out[0, 0, 0])
    _done(failed)


def products(
    weight,
    const float[:, :, :, ::1] steps,
    size_t block_size,
    double[:, :, ::1] out,
    size_t first,
    size_t last,
):
    """Write the products for the best scale of the last plane of `steps` to (N, G, 2), see quantize.h."""
    cdef bn_weight w
    cdef bn_grid grid
    cdef int failed
    _weight(weight, first, last, &w)
    _grid(steps, block_size, &w, &grid)
    _require(grid.planes > 0, "steps must have a plane")
    _check_out(out.shape, w.n, steps.shape[2], 2)
    with nogil:
        failed = bn_products(&w, &grid, first, last, &out[0, 0, 0])
    _done(failed)


def _check_out(shape, n, groups, last):
    _require(tuple(shape[:3]) == (n, groups, last), f"out must be ({n}, {groups}, {last})")


def histogram(weight, const float[:, :, :, ::1] steps, size_t first, size_t last):
    """Count what `steps` (P, N or 1, 1, 4) leave by the upper 16 bits of the float32 pattern.

    Returns:
        uint64 (65536,) counts, and uint64 (65536,) sums of the lower 16 bits.
    """
    cdef bn_weight w
    cdef bn_grid grid
    cdef int failed
    cdef uint64_t[::1] count = np.zeros(BN_BINS, np.uint64), low = np.zeros(BN_BINS, np.uint64)
    _weight(weight, first, last, &w)
    _grid(steps, 0, &w, &grid)
    with nogil:
        failed = bn_histogram(&w, &grid, first, last, &count[0], &low[0])
    _done(failed)
    return np.asarray(count), np.asarray(low)


def histogram_low(
    weight, const float[:, :, :, ::1] steps, const int32_t[::1] slot, size_t first, size_t last
):
    """Count the lower 16 bits in the bins of `histogram` that have a slot 0, 1, ... rather than -1.

    Returns:
        uint64 (slots, 65536).
    """
    cdef bn_weight w
    cdef bn_grid grid
    cdef int failed
    _require(slot.shape[0] == BN_BINS and np.max(slot) >= 0, "slot must be (65536,) and name a bin")
    cdef uint64_t[:, ::1] count = np.zeros((np.max(slot) + 1, BN_BINS), np.uint64)
    _weight(weight, first, last, &w)
    _grid(steps, 0, &w, &grid)
    with nogil:
        failed = bn_histogram_low(&w, &grid, &slot[0], first, last, &count[0, 0])
    _done(failed)
    return np.asarray(count)


_ROUNDINGS = {"absmean": BN_ROUND_ABSMEAN, "twn": BN_ROUND_TWN, "mse": BN_ROUND_MSE}
_TYPES = {"float32": BN_WEIGHT_FLOAT32, "float16": BN_WEIGHT_FLOAT16, "bfloat16": BN_WEIGHT_BFLOAT16}


cdef bn_rule _rule(rounding, int levels, scale_type) except *:
    cdef bn_rule rule
    _require(rounding in _ROUNDINGS, f"rounding is {rounding!r}, expected one of {', '.join(_ROUNDINGS)}")
    _require(levels in (3, 4), f"levels is {levels}, expected 3 or 4")
    name = np.dtype(scale_type).name
    _require(name in _TYPES, f"scale_type is {name}, expected one of {', '.join(_TYPES)}")
    rule.rounding, rule.levels, rule.scale_type = _ROUNDINGS[rounding], levels, _TYPES[name]
    return rule


cdef _step(bn_step s):
    return np.array([s.factor, s.low, s.high, s.scale], np.float32)


def step_of_moments(const double[::1] moments, size_t count, *, rounding, int levels, scale_type):
    """Return the step (4,) of `count` weights with moments (3,) by absmean, or by twn without a scale."""
    cdef bn_rule rule = _rule(rounding, levels, scale_type)
    _require(moments.shape[0] == 3 and count > 0, "moments must be (3,) of some weights")
    _require(rounding != "mse", "rounding by mse needs more than moments")
    return _step(bn_step_of_moments(&rule, &moments[0], count))


def finish_twn(const float[::1] step, const double[::1] products, *, int levels, scale_type):
    """Return the step (4,) by twn with the scale that products (2,) give."""
    cdef bn_rule rule = _rule("twn", levels, scale_type)
    _require(step.shape[0] == 4 and products.shape[0] == 2, "step must be (4,), products (2,)")
    return _step(bn_finish_twn(&rule, bn_step(step[0], step[1], step[2], step[3]), &products[0]))


def nearest_step(float scale, *, int levels, scale_type):
    """Return the step (4,) that takes the nearest level of a scale, rounded to its type."""
    cdef bn_rule rule = _rule("mse", levels, scale_type)
    return _step(bn_nearest_step(&rule, scale))


def fit(
    weight,
    float[:, :, :, ::1] steps,
    size_t block_size,
    size_t first,
    size_t last,
    *,
    rounding,
    int levels,
    scale_type,
):
    """Fit planes to outputs, and write their steps to (P, N, G, 4).

    Returns:
        whether all scales are normal numbers of their type, or 0; otherwise not all is written.
    """
    cdef bn_weight w
    cdef bn_grid grid
    cdef bn_rule rule = _rule(rounding, levels, scale_type)
    cdef int failed, held
    _weight(weight, first, last, &w)
    _grid(steps, block_size, &w, &grid)
    _require(grid.rows == w.n and grid.planes > 0, f"steps must be (P, {w.n}, G, 4)")
    with nogil:
        failed = bn_fit(
            &w, &rule, grid.planes, block_size, first, last, <bn_step *>&steps[0, 0, 0, 0], &held
        )
    _done(failed)
    return bool(held)


def quantize(
    weight,
    size_t block_size,
    uint8_t[:, :, ::1] packed,
    float[:, :, ::1] scale,
    const float[:, :, ::1] zero_point,
    size_t first,
    size_t last,
    *,
    rounding,
    int levels,
    scale_type,
):
    """Fit planes to outputs, write codes (P, N, ceil(K / 4)) and scales (P, N, G), and decode them.

    Returns:
        what `assign` returns, and whether all scales are normal numbers of their type, or 0; otherwise not
        all is written.
    """
    cdef bn_weight w
    cdef bn_packed p
    cdef bn_rule rule = _rule(rounding, levels, scale_type)
    cdef bn_difference difference
    cdef int failed, held
    _weight(weight, first, last, &w)
    _packed(packed, scale, zero_point, w.k, block_size, &p)
    _check_packed(packed.shape, packed.shape[0], w.n, w.k)
    _require(p.rows == w.n, f"scale must be (P, {w.n}, G)")
    with nogil:
        failed = bn_quantize(
            &w, &rule, first, last, &scale[0, 0, 0], &packed[0, 0, 0], &p, &difference, &held
        )
    _done(failed)
    return _tell(difference), bool(held)


def assign(
    weight,
    const float[:, :, :, ::1] steps,
    size_t block_size,
    uint8_t[:, :, ::1] packed,
    const float[:, :, ::1] scale,
    const float[:, :, ::1] zero_point,
    size_t first,
    size_t last,
):
    """Write the codes that `steps` (P, N or 1, G, 4) give to packed (P, N, ceil(K / 4)), and decode them.

    Returns:
        sum of squared errors, sum of squared weights, whether a value differs in the weight's type, zeros.
    """
    cdef bn_weight w
    cdef bn_grid grid
    cdef bn_packed p
    cdef bn_difference difference
    cdef int failed
    _weight(weight, first, last, &w)
    _grid(steps, block_size, &w, &grid)
    _packed(packed, scale, zero_point, w.k, block_size, &p)
    _check_packed(packed.shape, steps.shape[0], w.n, w.k)
    with nogil:
        failed = bn_assign(&w, &grid, first, last, &packed[0, 0, 0], &p, &difference)
    _done(failed)
    return _tell(difference)


def assign_integer(
    weight,
    const float[:, ::1] factor,
    size_t block_size,
    int bits,
    uint8_t[:, :, ::1] packed,
    const float[:, :, ::1] scale,
    const float[:, :, ::1] zero_point,
    size_t first,
    size_t last,
):
    """Do as `assign` with rint(weight * factor) clamped to `bits` bits as bits / 2 planes."""
    cdef bn_weight w
    cdef bn_packed p
    cdef bn_difference difference
    cdef int failed
    _weight(weight, first, last, &w)
    _require(bits in (4, 8), "bits must be 4 or 8")
    _require(factor.shape[0] in (1, w.n), f"factor must be ({w.n} or 1, G)")
    _require(factor.shape[1] == bn_make_groups(w.k, block_size).count, "factor has another number of groups")
    _packed(packed, scale, zero_point, w.k, block_size, &p)
    _check_packed(packed.shape, bits // 2, w.n, w.k)
    with nogil:
        failed = bn_assign_integer(
            &w, &factor[0, 0], factor.shape[0], bits, first, last, &packed[0, 0, 0], &p, &difference
        )
    _done(failed)
    return _tell(difference)


cdef _tell(bn_difference difference):
    return difference.error, difference.signal, bool(difference.different), difference.zeros


def _check_packed(shape, planes, n, k):
    expected = (planes, n, bn_row_bytes(k))
    _require(tuple(shape[:3]) == expected, f"packed has shape {tuple(shape[:3])}, expected {expected}")


cdef int _packed(
    const uint8_t[:, :, ::1] weight,
    const float[:, :, ::1] scale,
    const float[:, :, ::1] zero_point,
    size_t k,
    size_t block_size,
    bn_packed *packed,
) except -1:
    _require(k > 0 and weight.size > 0, "there must be planes, outputs and inputs")
    _require_fours(block_size)
    _check_packed(weight.shape, weight.shape[0], weight.shape[1], k)
    rows = 1 if scale.shape[1] == 1 else weight.shape[1]
    expected = (weight.shape[0], rows, bn_make_groups(k, block_size).count)
    _check_scale(scale.shape, expected)
    _check_scale(zero_point.shape, expected)
    packed.weight, packed.scale, packed.zero_point = &weight[0, 0, 0], &scale[0, 0, 0], &zero_point[0, 0, 0]
    packed.planes, packed.n, packed.rows = weight.shape[0], weight.shape[1], scale.shape[1]
    packed.k, packed.block_size, packed.isas = k, block_size, _allowed(None)
    return 0


def _check_scale(shape, expected):
    _require(tuple(shape[:3]) == expected, f"scale or zero_point is {tuple(shape[:3])}, expected {expected}")


def dequantize(
    const uint8_t[:, :, ::1] packed,
    const float[:, :, ::1] scale,
    const float[:, :, ::1] zero_point,
    size_t k,
    size_t block_size,
    float[:, ::1] out,
    size_t first,
    size_t last,
):
    """Decode outputs first .. last - 1 of packed (P, N, ceil(K / 4)) to out (last - first, K)."""
    cdef bn_packed p
    _packed(packed, scale, zero_point, k, block_size, &p)
    _require(first < last <= p.n, f"rows {first} to {last} are not in a weight of {p.n}")
    _require(out.shape[0] == last - first and out.shape[1] == k, "out must be (last - first, K)")
    with nogil:
        bn_dequantize(&p, first, last, &out[0, 0])


# ---- calibration -------------------------------------------------------------------------------------------

def observe(
    const float[:, ::1] x, double[::1] sum, double[::1] abs_sum, double bins_per_unit, int64_t[::1] histogram
):
    """Add rows of activations to sums by column and to a histogram.

    Args:
        x: finite (rows, K).
        sum: in and out (K,), sums of x.
        abs_sum: in and out (K,), sums of |x|.
        bins_per_unit: bins for a difference of 1; every |x| * bins_per_unit must be below half the bins.
        histogram: in and out (bins,), the middle at 0.

    Returns:
        mean of these rows, and the sums of the second, third and fourth powers of the deviations from it.
    """
    cdef size_t k = x.shape[1]
    cdef bn_observed o
    _require(x.shape[0] > 0 and k > 0, "x must not be empty")
    _require(sum.shape[0] == x.shape[1] and abs_sum.shape[0] == x.shape[1], "sums must be (K,)")
    _require(histogram.shape[0] % 2 == 0, "the histogram must have two equal halves")
    reach = float(np.max(np.abs(x))) * bins_per_unit
    _require(reach < histogram.shape[0] // 2, "x must be finite and within the histogram")
    with nogil:
        o = bn_observe(
            &x[0, 0],
            x.shape[0],
            k,
            &sum[0],
            &abs_sum[0],
            bins_per_unit,
            &histogram[0],
            histogram.shape[0],
        )
    return o.mean, o.second, o.third, o.fourth


# ---- grids -------------------------------------------------------------------------------------------------

cdef int _levels(const float[:, ::1] coefficient, bn_levels *levels) except -1:
    _require(2 <= coefficient.shape[0] <= BN_GRID_LEVELS, "a grid has 2 to 256 levels")
    _require(1 <= coefficient.shape[1] <= BN_GRID_PARAMS, "a grid has 1 to 4 parameters")
    levels.coefficient = &coefficient[0, 0]
    levels.count, levels.params = coefficient.shape[0], coefficient.shape[1]
    return 0


def fit_grid(
    const float[:, ::1] coefficient,
    const float[:, ::1] w,
    const float[::1] importance,
    const float[:, ::1] template,
    float[:, :, ::1] theta,
    *,
    size_t block_size,
    size_t rounds,
):
    """Fit the parameters of each group of weights of some rows to a grid, see ext/grid.h.

    Args:
        coefficient: (levels, params).
        w: (rows, K).
        importance: (K,), at least 0.
        template: (starts, params) parameters to start from, for groups of weighted mean square 1.
        theta: out (rows, groups, params).
        block_size: weights of a group.
        rounds: of alternating fits.
    """
    cdef bn_levels levels
    cdef size_t rows = w.shape[0], k = w.shape[1], starts = template.shape[0], row, g, i, p, count
    cdef size_t groups = theta.shape[1]
    cdef double square, weight
    cdef float[:, ::1] start = np.empty((starts, template.shape[1]), np.float32)
    _levels(coefficient, &levels)
    _require(rows > 0 and k > 0 and starts > 0 and block_size > 0, "w and template must not be empty")
    _require(importance.shape[0] == w.shape[1], "importance must be (K,)")
    _require(
        theta.shape[0] == w.shape[0]
        and groups == (k - 1) // block_size + 1
        and {<size_t>theta.shape[2], <size_t>template.shape[1]} == {levels.params},
        "theta must be (rows, groups, params)",
    )
    with nogil:
        for row in range(rows):
            for g in range(groups):
                count = min(block_size, k - g * block_size)
                square, weight = 0, 1e-30
                for i in range(g * block_size, g * block_size + count):
                    square += <double>importance[i] * w[row, i] * w[row, i]
                    weight += importance[i]
                for i in range(starts):
                    for p in range(levels.params):
                        start[i, p] = <float>(template[i, p] * (square / weight) ** 0.5)
                bn_fit_grid(
                    &levels,
                    &w[row, g * block_size],
                    &importance[g * block_size],
                    count,
                    &start[0, 0],
                    starts,
                    rounds,
                    &theta[row, g, 0],
                )


cdef class Tables:
    """The sorted levels of each group of some rows.

    Args:
        coefficient: (levels, params).
        theta: (rows, groups, params).
    """

    cdef bn_levels levels
    cdef object memory
    cdef bn_sorted *sorted
    cdef size_t rows, groups

    def __init__(self, const float[:, ::1] coefficient, const float[:, :, ::1] theta):
        cdef size_t i
        cdef const float *values
        _levels(coefficient, &self.levels)
        _require(
            theta.size > 0 and <size_t>theta.shape[2] == self.levels.params,
            "theta must be (rows, groups, params)",
        )
        self.rows, self.groups = theta.shape[0], theta.shape[1]
        self.memory = np.empty(self.rows * self.groups * sizeof(bn_sorted), np.uint8)
        self.sorted = <bn_sorted *><size_t>self.memory.ctypes.data
        values = &theta[0, 0, 0]
        with nogil:
            for i in range(self.rows * self.groups):
                bn_sort_levels(&self.levels, values + i * self.levels.params, &self.sorted[i])

    def feedback(
        self,
        const int32_t[::1] group,
        const float[:, ::1] feedback,
        const float[:, ::1] base,
        float[:, ::1] state,
        uint8_t[:, ::1] index,
        float[:, ::1] error,
    ):
        """Round some columns one after the other, see bn_feedback in ext/grid.h.

        Args:
            group: (columns,) the group of each.
            feedback: (columns, columns).
            base: (rows, columns).
            state: in and out (rows, columns).
            index: out (rows, columns) levels.
            error: out (rows, columns).
        """
        cdef Py_ssize_t row, columns = group.shape[0]
        shapes = {np.shape(base), np.shape(state), np.shape(index), np.shape(error)}
        _require(columns > 0 and shapes == {(self.rows, columns)}, "arrays must be (rows, columns)")
        _require((feedback.shape[0], feedback.shape[1]) == (columns, columns), "feedback must be square")
        _require(0 <= np.min(group) and np.max(group) < self.groups, "there is no such group")
        with nogil:
            for row in range(<Py_ssize_t>self.rows):
                bn_feedback(
                    &self.sorted[row * self.groups],
                    self.levels.count,
                    &group[0],
                    &feedback[0, 0],
                    columns,
                    &base[row, 0],
                    &state[row, 0],
                    &index[row, 0],
                    &error[row, 0],
                )
