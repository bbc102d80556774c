/* The part of ONNX Runtime's C interface that our ops use, declared by hand.
 *
 * OrtApi is a table of function pointers.  A new ONNX Runtime appends to it and changes nothing
 * else, so a slot number is a fact about all versions from the one that introduced it.  Every slot
 * below exists in API 17 (ONNX Runtime 1.17), which is the version that we ask for.
 *
 * A row of the table  ORT_FUNCTION(slot, name, result, arguments...)  declares the function with
 * its name in OrtApi, and  ort_name(api)(arguments...)  calls it.  Functions that return a status
 * return NULL on success; the caller releases any other status. */
#ifndef BN_ORT_H
#define BN_ORT_H

#include <stddef.h>
#include <stdint.h>

#define ORT_API_VERSION 17

#ifdef _WIN32
#define ORT_CALL __stdcall
#define ORT_EXPORT __declspec(dllexport)
#define ORT_PATH(text) L##text
typedef wchar_t ort_path_char;
#else
#define ORT_CALL
#define ORT_EXPORT __attribute__((visibility("default")))
#define ORT_PATH(text) text
typedef char ort_path_char;
#endif

typedef struct ort_api ort_api;
typedef struct ort_status ort_status;
typedef struct ort_session_options ort_session_options;
typedef struct ort_domain ort_domain;
typedef struct ort_value ort_value;
typedef struct ort_type_info ort_type_info;
typedef struct ort_tensor_info ort_tensor_info; /* element type and shape */
typedef struct ort_attribute ort_attribute;
typedef struct ort_kernel_info ort_kernel_info;
typedef struct ort_kernel_context ort_kernel_context;
typedef struct ort_shape_context ort_shape_context;
typedef struct ort_custom_op ort_custom_op;
typedef struct ort_logger ort_logger;

enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, ORT_NOT_IMPLEMENTED = 9, ORT_INVALID_GRAPH = 10 };
enum { ORT_ANY_TYPE = 0, ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_FLOAT16 = 10 };
enum { ORT_LOG_WARNING = 2 };
enum { ORT_REQUIRED = 0 };            /* characteristic of an input or output */
enum { ORT_DEFAULT_MEMORY = 0 };      /* where an input lies */
enum { ORT_ATTRIBUTE_INT = 1 };       /* type of an attribute */

/* What the library's entry point is handed. */
typedef struct {
    const ort_api *(ORT_CALL *GetApi)(uint32_t version); /* NULL when the version is too new */
    const char *(ORT_CALL *GetVersionString)(void);
} ort_api_base;

#define ORT_FUNCTION(slot, name, result, ...)                                                      \
    typedef result(ORT_CALL ort_##name##_fn)(__VA_ARGS__);                                         \
    static inline ort_##name##_fn *ort_##name(const ort_api *api)                                  \
    {                                                                                              \
        return (ort_##name##_fn *)((void (*const *)(void))(const void *)api)[slot];                \
    }

/* Status */
ORT_FUNCTION(0, CreateStatus, ort_status *, int code, const char *message)
ORT_FUNCTION(1, GetErrorCode, int, const ort_status *)
ORT_FUNCTION(2, GetErrorMessage, const char *, const ort_status *)
ORT_FUNCTION(93, ReleaseStatus, void, ort_status *)

/* Domains of custom ops */
ORT_FUNCTION(26, CreateCustomOpDomain, ort_status *, const char *name, ort_domain **)
ORT_FUNCTION(27, CustomOpDomain_Add, ort_status *, ort_domain *, const ort_custom_op *)
ORT_FUNCTION(28, AddCustomOpDomain, ort_status *, ort_session_options *, ort_domain *)
ORT_FUNCTION(101, ReleaseCustomOpDomain, void, ort_domain *)

/* Tensors */
ORT_FUNCTION(51, GetTensorMutableData, ort_status *, ort_value *, void **)
ORT_FUNCTION(65, GetTensorTypeAndShape, ort_status *, const ort_value *, ort_tensor_info **)

/* Element type and shape */
ORT_FUNCTION(55, CastTypeInfoToTensorInfo, ort_status *, const ort_type_info *,
             const ort_tensor_info **) /* NULL when it is no tensor */
ORT_FUNCTION(57, CreateTensorTypeAndShapeInfo, ort_status *, ort_tensor_info **)
ORT_FUNCTION(58, SetTensorElementType, ort_status *, ort_tensor_info *, int type)
ORT_FUNCTION(59, SetDimensions, ort_status *, ort_tensor_info *, const int64_t *, size_t count)
ORT_FUNCTION(60, GetTensorElementType, ort_status *, const ort_tensor_info *, int *)
ORT_FUNCTION(61, GetDimensionsCount, ort_status *, const ort_tensor_info *, size_t *)
ORT_FUNCTION(62, GetDimensions, ort_status *, const ort_tensor_info *, int64_t *, size_t count)
ORT_FUNCTION(63, GetSymbolicDimensions, ort_status *, const ort_tensor_info *, const char **,
             size_t count)
ORT_FUNCTION(64, GetTensorShapeElementCount, ort_status *, const ort_tensor_info *, size_t *)
ORT_FUNCTION(98, ReleaseTypeInfo, void, ort_type_info *)
ORT_FUNCTION(99, ReleaseTensorTypeAndShapeInfo, void, ort_tensor_info *)
ORT_FUNCTION(271, SetSymbolicDimensions, ort_status *, ort_tensor_info *, const char **,
             size_t count)

/* The node, when its kernel is created */
ORT_FUNCTION(85, KernelInfoGetAttribute_float, ort_status *, const ort_kernel_info *,
             const char *name, float *)
ORT_FUNCTION(86, KernelInfoGetAttribute_int64, ort_status *, const ort_kernel_info *,
             const char *name, int64_t *)
ORT_FUNCTION(234, KernelInfo_GetInputTypeInfo, ort_status *, const ort_kernel_info *, size_t index,
             ort_type_info **)
ORT_FUNCTION(244, KernelInfo_GetNodeName, ort_status *, const ort_kernel_info *, char *,
             size_t *size) /* of the buffer in, with the final zero; of the name out */
ORT_FUNCTION(245, KernelInfo_GetLogger, ort_status *, const ort_kernel_info *, const ort_logger **)
ORT_FUNCTION(249, KernelInfoGetConstantInput_tensor, ort_status *, const ort_kernel_info *,
             size_t index, int *is_constant, const ort_value **)

/* The session's log */
ORT_FUNCTION(247, Logger_LogMessage, ort_status *, const ort_logger *, int severity,
             const char *message, const ort_path_char *file, int line, const char *function)

/* The node, when it runs */
ORT_FUNCTION(90, KernelContext_GetInput, ort_status *, const ort_kernel_context *, size_t index,
             const ort_value **)
ORT_FUNCTION(91, KernelContext_GetOutput, ort_status *, ort_kernel_context *, size_t index,
             const int64_t *dims, size_t count, ort_value **)
ORT_FUNCTION(274, KernelContext_ParallelFor, ort_status *, const ort_kernel_context *,
             void (*task)(void *arg, size_t index), size_t count,
             size_t batches /* 0: each index is a task of its own */, void *arg)

/* The node, when shapes are inferred */
ORT_FUNCTION(268, ShapeInferContext_GetInputTypeShape, ort_status *, const ort_shape_context *,
             size_t index, ort_tensor_info **) /* borrowed */
ORT_FUNCTION(269, ShapeInferContext_GetAttribute, ort_status *, const ort_shape_context *,
             const char *name, const ort_attribute **) /* borrowed */
ORT_FUNCTION(270, ShapeInferContext_SetOutputTypeShape, ort_status *, const ort_shape_context *,
             size_t index, const ort_tensor_info *)
ORT_FUNCTION(272, ReadOpAttr, ort_status *, const ort_attribute *, int type, void *data,
             size_t bytes, size_t *bytes_needed)

/* An op as ONNX Runtime sees it: OrtCustomOp up to API 17.  The version tells it where to stop.
 * Memory is owned by us and must outlive every session that knows the op. */
struct ort_custom_op {
    uint32_t version;
    void *(ORT_CALL *CreateKernel)(const ort_custom_op *, const ort_api *, const ort_kernel_info *);
    const char *(ORT_CALL *GetName)(const ort_custom_op *);
    const char *(ORT_CALL *GetExecutionProviderType)(const ort_custom_op *); /* NULL: the CPU's */
    int (ORT_CALL *GetInputType)(const ort_custom_op *, size_t index);
    size_t (ORT_CALL *GetInputTypeCount)(const ort_custom_op *);
    int (ORT_CALL *GetOutputType)(const ort_custom_op *, size_t index);
    size_t (ORT_CALL *GetOutputTypeCount)(const ort_custom_op *);
    void (ORT_CALL *KernelCompute)(void *kernel, ort_kernel_context *);
    void (ORT_CALL *KernelDestroy)(void *kernel); /* NULL is allowed */
    int (ORT_CALL *GetInputCharacteristic)(const ort_custom_op *, size_t index);
    int (ORT_CALL *GetOutputCharacteristic)(const ort_custom_op *, size_t index);
    int (ORT_CALL *GetInputMemoryType)(const ort_custom_op *, size_t index);
    int (ORT_CALL *GetVariadicInputMinArity)(const ort_custom_op *);
    int (ORT_CALL *GetVariadicInputHomogeneity)(const ort_custom_op *);
    int (ORT_CALL *GetVariadicOutputMinArity)(const ort_custom_op *);
    int (ORT_CALL *GetVariadicOutputHomogeneity)(const ort_custom_op *);
    ort_status *(ORT_CALL *CreateKernelV2)(const ort_custom_op *, const ort_api *,
                                           const ort_kernel_info *, void **kernel);
    ort_status *(ORT_CALL *KernelComputeV2)(void *kernel, ort_kernel_context *);
    ort_status *(ORT_CALL *InferOutputShapeFn)(const ort_custom_op *, ort_shape_context *);
    int (ORT_CALL *GetStartVersion)(const ort_custom_op *);
    int (ORT_CALL *GetEndVersion)(const ort_custom_op *);
};

#endif
