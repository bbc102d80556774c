/* What making a layer needs of the system, which ONNX Runtime does not offer while it loads a model. */
#ifndef BN_LOAD_H
#define BN_LOAD_H

#include "parallel.h"

/* Threads that live for one call only, as many as this process may use CPUs, at most 8. */
bn_threads bn_load_threads(void);

/* Tells the system that these bytes will not be read again soon.  Pages of a mapped file leave the
 * process, stay in the system's cache and are read again where that was wrong; all other memory, and
 * pages of such a mapping that were written to, stay as they are. */
void bn_drop_file_pages(const void *data, size_t bytes);

#endif
